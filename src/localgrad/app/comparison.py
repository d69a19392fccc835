"""The options of ``localgrad compare``, declared without what runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localgrad.app.recipe import DOWNLOAD
from localgrad.app.recipe import OPTIONS as RECIPE
from localgrad.options import DATA, EXECUTION, METHOD, RUN, documented, field_of, option


def _as_in_recipe(key: str, default: Any = None, **changes: Any) -> Any:
    """A field that is declared as one of a recipe is."""
    return field_of(default, replace(RECIPE[key], **changes))


@documented
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``localgrad compare``, as typed."""

    model: str = _as_in_recipe("model.name", "swin_tiny_patch4_window7_224")
    img_size: int | None = _as_in_recipe("model.img_size")
    num_classes: int | None = option(None, "Classes of the random labels; by default 1000.", DATA)
    batch_size: int = _as_in_recipe("training.batch_size", 64, help="Images a step.")
    data: str | None = option(None, "A data set, as for train; by default random images.", DATA)
    root: str | None = _as_in_recipe("data.root")
    download: bool = field_of(default=False, own=DOWNLOAD)
    on_corrupt: str | None = _as_in_recipe("data.on_corrupt")
    train_data: str | None = _as_in_recipe("data.train_data")
    val_data: str | None = _as_in_recipe("data.val_data")
    test_data: str | None = _as_in_recipe("data.test_data")
    image_column: str | None = _as_in_recipe("data.image_column")
    label_column: str | None = _as_in_recipe("data.label_column")
    config: str | None = _as_in_recipe("data.config")
    image_range: list[float] | None = _as_in_recipe("data.image_range")  # noqa: RUF009  # a field, as of the others
    background: str | None = _as_in_recipe("data.background")
    fit: str | None = _as_in_recipe("data.fit")
    device: str = _as_in_recipe("execution.device", "auto")
    optimizer: str = _as_in_recipe("training.optimizer", "adamw")
    precision: str = _as_in_recipe("execution.precision", "fp32", help="fp32, bf16, or both: fp32,bf16.")
    modules: tuple[str, ...] = option(
        ("2,4",), "Choices: 2,4,stages. Given repeatedly, each as for train: first 4, then 2,5,9.", METHOD, repeated=str
    )
    objective: str | None = option(
        None, "feature,image,greedy,contrastive; by default feature, and image and greedy once each.", METHOD
    )
    decoder: str = option("linear", "linear,conv,transformer.", METHOD)
    checkpoint: str = option("none,halves/8", "Recompute inside local modules: none,blocks,halves,halves/8.", EXECUTION)
    compile: bool = option(default=False, help="Compiled methods as well (none in chunks).", panel=EXECUTION)
    budget: str = option(
        "0.5", "Of compiled methods: shares of activations that torch may keep, such as 0.5,0.3.", EXECUTION,
        name="memory_budget",
    )  # fmt: skip
    plans: tuple[Path, ...] = option((), "A plan's JSON file; may be repeated.", METHOD, name="plan", repeated=Path)
    repeats: int = option(3, "Timed turns of each method.", RUN)
    warmup: int = option(1, "Steps of each method before it is measured.", RUN)
    estimate_only: bool = option(default=False, help="Estimate peaks, run nothing.", panel=RUN)
    json: Path | None = option(None, "Write everything to this file.", RUN)
    plot: Path | None = option(None, "Draw peak against step time: .png or .svg.", RUN)
    timeline: Path | None = option(None, "Draw memory over one step: .png or .svg.", RUN)
