"""Names for what Python and PyTorch hand on untyped: whatever was in it goes on as it is."""

from __future__ import annotations

from typing import Any

Kwargs = dict[str, Any]
"""Keyword arguments of a call whose signature is others': an operator's, a block's, timm's."""
Attributes = dict[str, Any]
"""What ``vars`` or a module's table of parameters, buffers or parts has: names to whatever is there."""
