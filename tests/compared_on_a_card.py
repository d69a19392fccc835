"""A process on a card: small models that are named, compared as in ``allocator_table.py``; JSON on output."""

from __future__ import annotations

import json
import sys

import torch

from helpers import SIZE, make
from localgrad.backbones.base import split
from research.benchmarks.allocator_table import Configuration, compare

ROWS = {
    "vit": Configuration(model="vit-s", batch=64, modules=2, average=0.99, evaluation=128, clip_grad=1.0),
    "swin": Configuration(model="swin-t", batch=48, modules=3, precision="fp32", checkpoint="blocks", last=20),
}


def main() -> None:
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    backbones = {kind: split(make(kind), SIZE) for kind in sys.argv[1:]}
    torch.cuda.init()
    answer = {kind: compare(ROWS[kind], backbone) for kind, backbone in backbones.items()}
    sys.stdout.write(f"{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
