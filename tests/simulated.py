"""What the fixture ``simulated`` gives: processes that see CUDA cards, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from research import simulated_card
from research.simulated_card import Ran


class SimulatedCard:
    """Starts processes on simulated cards; builds these first, once for all processes of the tests.

    Args:
        folder: where they run, unless they are told otherwise; their caches lie there, too.
        builds: the cache of builds.

    Raises:
        Unavailable: there is no compiler, no toolkit, or no CUDA build of torch.
    """

    def __init__(self, folder: Path, builds: Path) -> None:
        simulated_card.build(builds)
        self._given: dict[str, Any] = {"folder": folder, "cache": builds}
        self._more = {"XDG_CACHE_HOME": str(folder / "cache")}

    def _with(self, given: dict[str, Any]) -> dict[str, Any]:
        return self._given | given | {"more": self._more | given.get("more", {})}

    def run(self, code: str | Path, *arguments: str, **given: Any) -> str:
        """What the code printed; it must end well. The rest as ``simulated_card.run`` takes it."""
        ran = simulated_card.run(code, *arguments, **self._with(given))
        assert ran.code == 0, ran.out + ran.err
        return ran.out

    def environment(self, **card: Any) -> dict[str, str]:
        """Of a process that is started by other means; as ``simulated_card.environment`` takes it."""
        return simulated_card.environment(cache=self._given["cache"], **card) | self._more

    def localgrad(self, *arguments: str, **given: Any) -> Ran:
        """``localgrad ...``; the rest as ``simulated_card.command_line`` takes it."""
        return simulated_card.command_line(*arguments, **self._with(given))
