"""Local modules in a loop of Accelerate: schedule, accumulation, clipping, evaluation, checkpoint, resuming.

Run it: python loop_accelerate.py 4 (so many epochs; stop it, and run it again: it goes on; needs accelerate)
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import ACCUMULATION, BATCH_SIZE, accuracy, datasets, vit
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import localgrad


def main(epochs=4, modules=2, folder="loop_accelerate"):
    accelerator = Accelerator(mixed_precision="no")  # it is the learner's: LocalLearner(..., precision="bf16")
    train, test = datasets()
    loader = accelerator.prepare(DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True))
    updates = len(loader) // ACCUMULATION
    model = vit().to(accelerator.device)  # isn't prepared: the learner calls its blocks one by one
    learner = localgrad.LocalLearner(model, modules=modules, clip_grad=1.0)
    learner.configure_optimizers(lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    optimizer = accelerator.prepare(learner.optimizer)
    scheduler = accelerator.prepare(CosineAnnealingLR(optimizer, T_max=epochs * updates))
    accelerator.register_for_checkpointing(learner)  # model, auxiliary nets, optimizers, count of steps
    if Path(folder).exists():
        accelerator.load_state(folder)
    losses = []
    for epoch in range(learner.num_steps // updates, epochs):
        set_seed(epoch)  # so that what is drawn depends on the epoch alone, and resuming is exact
        for parts in zip(*[iter(loader)] * ACCUMULATION, strict=False):  # in place of accelerator.accumulate
            results = learner.step_parts(parts)  # in place of accelerator.backward and clip_grad_norm_
            optimizer.step()
            scheduler.step()
            losses.append(sum(float(result.terms[-1]["task"]) for result in results))
        found = accuracy(model, test)
        accelerator.save_state(folder)
        accelerator.print(f"epoch {epoch}  loss {sum(losses[-updates:]) / updates:.4f}  accuracy {found:.3f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
