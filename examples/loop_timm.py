"""Local modules in the loop of timm's train.py, as a task: its optimizers, schedulers, meters, checkpoints.

Run it: python loop_timm.py 4 (so many epochs; stop it, and run it again: it goes on; needs timm 1.0.27)
"""

import sys
from pathlib import Path

from digits import ACCUMULATION, BATCH_SIZE, accuracy, datasets, vit
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import resume_task_checkpoint
from timm.utils import AverageMeter, CheckpointSaver, random_seed
from torch.utils.data import DataLoader

import localgrad
from localgrad.integrations.timm_task import LocalTask


def factory(parameters):
    """Weight decay for matrices alone, as timm has it; its own filter takes a whole model."""
    by_rank = {rank: [weight for weight in parameters if (weight.ndim > 1) == rank] for rank in (True, False)}
    groups = [{"params": by_rank[True]}, {"params": by_rank[False], "weight_decay": 0.0}]
    return create_optimizer_v2(groups, opt="adamw", lr=3e-3, weight_decay=0.05)


def main(epochs=4, modules=2, folder="loop_timm"):
    train, test = datasets()
    loader = DataLoader(train, ACCUMULATION * BATCH_SIZE, shuffle=True, drop_last=True)
    learner = localgrad.LocalLearner(vit(), modules=modules, clip_grad=1.0, accumulation=ACCUMULATION)
    learner.configure_optimizers(factory)
    task, optimizer = LocalTask(learner), learner.optimizer
    options = {"num_epochs": epochs, "warmup_epochs": 1, "warmup_lr": 1e-4, "warmup_prefix": True}
    scheduler, _ = create_scheduler_v2(optimizer, step_on_epochs=False, updates_per_epoch=len(loader), **options)
    Path(folder).mkdir(exist_ok=True)
    saver = CheckpointSaver(learner.model, optimizer, checkpoint_dir=folder, max_history=1, task=task)
    last = Path(folder) / "last.pth.tar"
    start = resume_task_checkpoint(task, last, optimizer) if last.exists() else 0
    scheduler.step_update(start * len(loader))
    losses = []
    for epoch in range(start, epochs):
        random_seed(epoch)  # so that what is drawn depends on the epoch alone, and resuming is exact
        meter = AverageMeter()
        task.get_trainable_module().train()
        for images, labels in loader:
            loss = task(images, labels)["loss"]  # trains each module
            loss.backward()  # has nothing left to do, nor has the next line
            optimizer.step()
            scheduler.step_update(learner.num_steps)
            meter.update(loss.item(), len(images))
            losses.append(loss.item())
        found = accuracy(task.get_eval_model(), test)
        saver.save_checkpoint(epoch, metric=found)
        print(f"epoch {epoch}  loss {meter.avg:.4f}  accuracy {found:.3f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
