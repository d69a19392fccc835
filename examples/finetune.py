"""Fine-tuning, method by method: pretrained on the digits 0 to 4, then taught 5 to 9 from 20 images of each.

python examples/finetune.py [EPOCHS]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import localgrad

METHODS = ("full", "freeze", "probe", "lora", "local", "local+lora")
VIT = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8}
VIT["options"] = {"embed_dim": 64, "depth": 4, "num_heads": 2}


def folder(name, classes, images_each):
    """Images of some digits, in one folder a class, as people have them."""
    digits = load_digits()
    for digit in classes:
        (Path(name) / str(digit)).mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(digits.images[digits.target == digit][:images_each]):
            image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((32, 32))
            image.save(Path(name) / str(digit) / f"{number}.png")
    return name


def main(epochs=30, *methods):
    """Pretrain, fine-tune by each method, and from scratch; print the table."""
    common = {"model": VIT, "training.epochs": epochs, "training.warmup_epochs": 1, "data.transform": "none"}
    common |= {"training.lr": 2e-3, "training.batch_size": 16}  # for all, as so small a model wants
    whole = {"local.modules": 1}
    runs = Path("runs/finetune-example")
    localgrad.train({**common, **whole, "data.name": folder("old-digits", range(5), 160)}, out=runs / "pretrained")
    data = {**common, "data.name": folder("new-digits", range(5, 10), 40), "data.val_fraction": 0.3}
    found = {"from scratch": localgrad.train({**data, **whole}, out=runs / "scratch")}
    data["model.weights"] = str(runs / "pretrained")
    for method in methods or METHODS:
        found[method] = localgrad.finetune(data, method=method, out=runs / method)
    for method, summary in found.items():
        peak = summary["estimated_peak_bytes"] / 2**20
        print(f"{method:13} {summary['test_accuracy']:7.1%}  {peak:5.1f} MiB  {summary['seconds']:4.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
