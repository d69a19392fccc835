"""A model card: what a person who finds a run's model on the hub has to know of it, with figures of the run alone.

Its front matter is written by ``huggingface_hub``. The licence is that of the weights that a run began with, where
timm says it, and else unknown: nobody but the author can say more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from localgrad.app.recipe import Recipe
from localgrad.app.using_runs import FinishedRun
from localgrad.app.ways import FREEZE, FULL, LOCAL, LORA, PROBE, QLORA, typed
from localgrad.training.events import summary_rows

MANY = 20
"""Classes that are named in a card; of more, the first ones are."""
IMAGES = "image-classification"
PIPELINES = {
    "ForImageClassification": IMAGES,
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForAudioClassification": "audio-classification",
    "ForVideoClassification": "video-classification",
    "ForSemanticSegmentation": "image-segmentation",
}
"""What the hub calls the tasks of transformers' models, by the ends of their names; timm's are of images."""
_NOT_OF_THE_MODEL = ("run folder",)
"""Rows of a summary that tell nobody else anything."""


def model_card(
    *,
    library: str,
    architecture: str,
    loading: str,
    class_names: Sequence[str] = (),
    run: FinishedRun | None = None,
    source: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The text of a ``README.md``.

    Args:
        library: ``timm`` or ``transformers``.
        architecture: of the model.
        loading: Python code that loads it.
        class_names: in the order of the labels.
        run: that trained it; nothing is told of training without one.
        source: timm's config of the weights that it began with, where these are timm's.
        notes: sentences about how images are to be prepared.
    """
    from huggingface_hub import EvalResult, ModelCardData

    source = source or {}
    task = next((task for end, task in PIPELINES.items() if architecture.endswith(end)), None)
    task = IMAGES if library == "timm" or run is not None else task
    results = [] if run is None else [_result(EvalResult, run)]
    data = ModelCardData(
        library_name=library,
        license=source.get("license") or "unknown",
        tags=[*([] if task is None else [task]), library, "localgrad"],
        pipeline_tag=task,
        metrics=["accuracy"] if results else None,
        model_name=architecture if results else None,
        eval_results=results or None,
        base_model=source.get("hf_hub_id"),
    )
    lines = ["---", data.to_yaml(), "---", f"# {architecture}", "", *_told_of_run(class_names, run)]
    lines += ["## Load it", "", "```python", loading, "```", "", *(f"{note}\n" for note in notes)]
    if run is not None:
        lines += ["## Recipe", "", "```toml", _without_paths(run.recipe).to_toml().rstrip(), "```"]
    return "\n".join(lines).rstrip() + "\n"


def _without_paths(recipe: Recipe) -> Recipe:
    """A recipe that says the names of files and folders, and not where they lay on somebody's disk."""
    values = recipe.to_dict()
    data, model, execution = values["data"], values["model"], values["execution"]
    for part, key in [(data, key) for key in ("name", "root", "train_data", "val_data", "test_data")] + [
        (model, "weights"),
        (execution, "health_reference"),
    ]:
        if part.get(key) and _is_path(part[key]):
            part[key] = Path(part[key]).name
    prefix, _, rest = model["name"].rpartition(":")
    if prefix and _is_path(rest):
        model["name"] = f"{prefix}:{Path(rest).name}"
    return Recipe.from_dict(values)


def _is_path(text: str) -> bool:
    """Whether a name is that of a file here, or can't be one of the hub, which is ``OWNER/NAME``."""
    return text.startswith((".", "~", "/")) or text.count("/") > 1 or Path(text).exists()


def _result(kind: Any, run: FinishedRun) -> Any:
    name = run.info.name.rpartition("/")[2] or "data"  # a path of somebody's disk is nobody's business
    accuracy = run.summary["test_accuracy"]
    return kind(
        task_type=IMAGES,
        dataset_type=name,
        dataset_name=name,
        dataset_split="test",
        metric_type="accuracy",
        metric_value=accuracy,
    )


def _told_of_run(class_names: Sequence[str], run: FinishedRun | None) -> Iterator[str]:
    if class_names:
        more = ", …" if len(class_names) > MANY else ""
        yield f"{len(class_names)} classes: {', '.join(class_names[:MANY])}{more}."
        yield ""
    if run is None:
        return
    yield from ("## How it was trained", "", *(f"* {line}" for line in training_told(run)), "", "## Figures", "")
    yield from ("| | |", "|---|---|")
    validation = run.summary["val_accuracy"]
    yield f"| validation accuracy | {'none: no validation images' if validation is None else f'{validation:.2%}'} |"
    for name, value in summary_rows(run.summary):
        if name not in _NOT_OF_THE_MODEL:
            yield f"| {name} | {' '.join(value.split())} |"
    yield ""


def training_told(run: FinishedRun) -> Iterator[str]:
    """What of a run is to be known: method, gradients, modules, what each recomputes, software, device."""
    recipe, summary = run.recipe, run.summary
    plan = summary["plan"]
    num_modules = len(plan["boundaries"]) + 1
    yield f"Method: {typed(method_of_run(recipe, num_modules))}, by localgrad."
    yield f"Gradients: {gradients_of_run(recipe, num_modules)}"
    if num_modules > 1:
        yield f"Boundaries between local modules: before blocks {', '.join(map(str, plan['boundaries']))}."
    recomputed = plan.get("checkpoint") or []
    if any(each != "none" for each in recomputed):
        yield f"Recomputed in the backward pass: {', '.join(recomputed)}, which changes memory and time alone."
    yield f"Images: {', '.join(map(str, run.size))} (channels, height, width); {run.info.num_train:,} to train on."
    yield f"Run on: {summary['device']}, {', '.join(f'{name} {each}' for name, each in summary['versions'].items())}."


def method_of_run(recipe: Recipe, num_modules: int) -> tuple[str, ...]:
    """The words of a run's method."""
    freeze, model = recipe.method.training.freeze, recipe.method.model
    found = {
        FREEZE: freeze is not None and freeze != 1.0,
        PROBE: freeze == 1.0,
        LORA: model.lora is not None and model.quantize is None,
        QLORA: model.quantize is not None,
        LOCAL: num_modules > 1,
    }
    return tuple(word for word, holds in found.items() if holds) or (FULL,)


def gradients_of_run(recipe: Recipe, num_modules: int) -> str:
    """Whether a run's gradients were exact, as a sentence."""
    settings = recipe.method.training
    if num_modules == 1:
        return f"exact, end to end. What learned: {_learnt(method_of_run(recipe, num_modules))}."
    objective = recipe.method.local.objective
    told = f"local: {num_modules} gradient-isolated modules, each with its own loss (objective {objective})"
    if settings.schedule == "sequential":
        return f"{told}, trained one after another."
    if settings.has_global_steps:
        return f"{told}; {settings.global_share:.0%} of the steps were end-to-end, with exact gradients."
    return f"{told}."


def _learnt(method: tuple[str, ...]) -> str:
    """What of a model a method of one module trains."""
    place = " in the blocks behind frozen ones" if FREEZE in method else ""
    if PROBE in method:
        return "the head alone"
    if LORA in method or QLORA in method:
        return f"adapters{place}, and the head"
    return "the blocks behind frozen ones, and the head" if place else "the whole model"
