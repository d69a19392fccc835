"""Local modules in a plain loop: groups, schedule, accumulation, clipping, evaluation, checkpoint, resuming.

Run it: python loop_plain.py 4 (so many epochs; stop it, and run it again: it goes on)
"""

import sys
from pathlib import Path

import torch
from digits import ACCUMULATION, BATCH_SIZE, accuracy, datasets, vit
from timm.optim import param_groups_layer_decay
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import localgrad


def grouped_as_in_timm(model, rate=3e-3):
    """A factory: called with the parameters of each local module, it makes an optimizer of just those."""
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.9)
    settings = {id(w): (rate * group["lr_scale"], group["weight_decay"]) for group in groups for w in group["params"]}

    def factory(parameters):
        own = {}
        for weight in parameters:  # those of auxiliary nets are in none of the model's groups
            own.setdefault(settings.get(id(weight), (rate, 0.05)), []).append(weight)
        return torch.optim.AdamW({"params": own[key], "lr": key[0], "weight_decay": key[1]} for key in own)

    return factory


def main(epochs=4, modules=2, file="loop_plain.pt"):
    train, test = datasets()
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True)
    updates = len(loader) // ACCUMULATION
    learner = localgrad.LocalLearner(vit(), modules=modules, clip_grad=1.0)
    learner.configure_optimizers(grouped_as_in_timm(learner.model))
    scheduler = CosineAnnealingLR(learner.optimizer, T_max=epochs * updates)
    if Path(file).exists():
        saved = torch.load(file, weights_only=True)
        learner.load_state_dict(saved["learner"])
        scheduler.load_state_dict(saved["scheduler"])
    losses = []
    for epoch in range(learner.num_steps // updates, epochs):
        torch.manual_seed(epoch)  # so that what is drawn depends on the epoch alone, and resuming is exact
        for parts in zip(*[iter(loader)] * ACCUMULATION, strict=False):  # batches two by two
            results = learner.step_parts(parts)  # each module: all parts, then clipping and its update
            learner.optimizer.step()  # updates nothing more; schedulers count on the call
            scheduler.step()
            losses.append(sum(float(result.terms[-1]["task"]) for result in results))
        torch.save({"learner": learner.state_dict(), "scheduler": scheduler.state_dict()}, f"{file}.part")
        Path(f"{file}.part").replace(file)
        loss, found = sum(losses[-updates:]) / updates, accuracy(learner.model, test)
        print(f"epoch {epoch}  loss {loss:.4f}  accuracy {found:.3f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
