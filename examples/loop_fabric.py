"""Local modules in a loop of Lightning Fabric: schedule, accumulation, clipping, evaluation, checkpoint, resuming.

Run it: python loop_fabric.py 4 (so many epochs; stop it, and run it again: it goes on; needs lightning-fabric)
"""

import sys
from pathlib import Path

import torch
from digits import ACCUMULATION, BATCH_SIZE, accuracy, datasets, vit
from lightning_fabric import Fabric
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import localgrad


def main(epochs=4, modules=2, file="loop_fabric.ckpt"):
    fabric = Fabric(devices=1)  # the precision is the learner's matter: LocalLearner(..., precision="bf16")
    fabric.launch()
    train, test = datasets()
    loader = fabric.setup_dataloaders(DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True))
    updates = len(loader) // ACCUMULATION
    learner = localgrad.LocalLearner(vit().to(fabric.device), modules=modules, clip_grad=1.0)  # no fabric.setup
    learner.configure_optimizers(lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    optimizer = fabric.setup_optimizers(learner.optimizer)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs * updates)
    state = {"learner": learner, "scheduler": scheduler}
    if Path(file).exists():
        fabric.load(file, state)
    losses = []
    for epoch in range(learner.num_steps // updates, epochs):
        fabric.seed_everything(epoch, verbose=False)  # what is drawn depends on it alone: resuming is exact
        for parts in zip(*[iter(loader)] * ACCUMULATION, strict=False):  # batches two by two
            results = learner.step_parts(parts)  # in place of fabric.backward and fabric.clip_gradients
            optimizer.step()
            scheduler.step()
            losses.append(sum(float(result.terms[-1]["task"]) for result in results))
        found = accuracy(learner.model, test)
        fabric.save(file, state)
        fabric.print(f"epoch {epoch}  loss {sum(losses[-updates:]) / updates:.4f}  accuracy {found:.3f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
