"""What the data path costs: batches made and augmented, as a share of a training step on the same device.

    python -m research.benchmarks.data_path                  # the processor, or the GPU where there is one
    python -m research.benchmarks.data_path --img-size 224 --batch-size 32
    python -m research.benchmarks.data_path --profile cpu    # the small Swin of that profile

The same steps are timed on batches from the data path (random images in memory, cropped, flipped, resized, normalised;
by option RandAugment as in the preset `paper`, mixup, cutmix and erasing) and on one batch that lies there already, in
turns; medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import timm
import torch

from localgrad import FeatureReconstruction, LocalLearner
from localgrad.objectives.carried import LocalBatch
from localgrad.training.data import Batches, DataInfo
from localgrad.training.image_sets import InMemoryImages
from localgrad.training.optim import OptimizerFactory
from localgrad.training.settings import Augment
from research.reproduce.profiles import CPU


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="with --profile, the profile's own")
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rand-augment", action="store_true")
    parser.add_argument("--mix", action="store_true", help="mixup, cutmix and random erasing, too")
    parser.add_argument("--profile", choices=["cpu"])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"img_size": options.img_size, "patch_size": options.patch_size} if options.img_size != 224 else {}
    more = {"window_size": 4} if sizes and "swin" in options.model else {}
    if options.profile is not None:
        small = CPU.models["swin"]
        options.model, options.img_size = small["model.name"], small["model.img_size"]
        sizes = {"img_size": options.img_size, "patch_size": small["model.patch_size"]}
        more = small["model.options"]
        options.batch_size = CPU.settings["training.batch_size"]
    model = timm.create_model(options.model, num_classes=100, **sizes, **more).to(device)
    learner = LocalLearner(
        model,
        modules=options.modules,
        objective=FeatureReconstruction(),
        input_size=(3, options.img_size, options.img_size),
        precision=options.precision,
        checkpoint="none" if options.profile is None else CPU.settings["execution.checkpoint"],
    )
    learner.configure_optimizers(OptimizerFactory(model, name="adamw", lr=1e-3, weight_decay=0.05))
    batches = made_of(options, device)
    stored = next(iter(batches.epoch(0)))

    def synthetic() -> float:
        return timed(lambda: learner.step(stored.images, stored.labels), device)

    feed = itertools.chain.from_iterable(batches.epoch(number) for number in itertools.count())

    def fed() -> float:
        def step() -> None:
            batch = next(feed)
            learner.step_on(LocalBatch(batch.images, batch.labels))

        return timed(step, device)

    for _ in range(2):
        synthetic()
        fed()
    pairs = [(synthetic(), fed()) for _ in range(options.steps)]
    alone, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(one / other for one, other in pairs)
    of = "" if options.profile is None else f" of profile {options.profile}"
    print(
        f"{options.model}{of}, {options.img_size} px, batch {options.batch_size}, {options.precision}, {device}: "
        f"{options.batch_size / alone:.0f} images/s on a batch that is there, {options.batch_size / whole:.0f} with "
        f"the data path; {100 * statistics.median(ratios):.1f} % of the speed ({100 * ratios[0]:.0f} to "
        f"{100 * ratios[-1]:.0f} over {options.steps} pairs)"
    )


def made_of(options: argparse.Namespace, device: torch.device) -> Batches:
    count, side = 16 * options.batch_size, 32 if options.img_size <= 96 else 224
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (count,), generator=generator)
    info = DataInfo(
        name="random",
        class_names=tuple(map(str, range(100))),
        num_channels=3,
        found_size=(side, side),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        num_skipped=0,
        num_train=count,
        num_val=0,
        num_test=0,
        notes=(),
    )
    mixing = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25} if options.mix else {}
    augment = Augment(crop_padding=4, flip=True, rand_augment=(2, 9) if options.rand_augment else None, **mixing)
    return Batches(
        images=InMemoryImages(pixels, labels),
        batch_size=options.batch_size,
        image_size=(options.img_size, options.img_size),
        info=info,
        device=device,
        augment=augment,
        seed=0,
        drop_last=True,
    )


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
