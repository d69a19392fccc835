"""``localgrad export``: a trained model as files that other libraries read, each read again and held against the run.

What is written goes into a folder beside its place first. It is read there by the library that it is for, its logits
are compared with those of the model as it was trained, for batches of several sizes, and only then it gets its name. So
what lies there was found to be right, and a file that isn't is nowhere.

============== ============================================================ =======================================
``to``         what is written                                              of which models
============== ============================================================ =======================================
timm           ``config.json`` and ``model.safetensors``, as the model's    timm's, and transformers'
               own library reads them (transformers: ``save_pretrained``)
hub            the same and a model card, uploaded by ``huggingface_hub``   likewise
onnx           one file, with any number of images a batch                  any that torch.export can trace
torch-export   one file (``.pt2``), likewise                                likewise
============== ============================================================ =======================================

Shapes: B batch, C H W image.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad import rules
from localgrad.app.hub_models import is_on_hub, quietly
from localgrad.app.timm_classifiers import evaluated_images
from localgrad.app.using_runs import FinishedRun, open_run
from localgrad.backbones.adapters import is_adapted
from localgrad.backbones.example import Example
from localgrad.backbones.namespaces import Kwargs
from localgrad.backbones.quantized import dequantize_layers
from localgrad.backbones.timm_config import WEIGHTS, is_of_timm, timm_config
from localgrad.backbones.timm_models import default_input_size
from localgrad.errors import BackboneError, LocalgradError, RecipeError, RunFolderError, arg, did_you_mean, reason_of
from localgrad.integrations.model_card import model_card
from localgrad.integrations.programs import (
    TRACED_ITEMS,
    check_onnx,
    read_onnx,
    read_program,
    trace,
    write_onnx,
    write_program,
)
from localgrad.training.folder import check_writable, save_weights

TIMM, HUB, ONNX, PROGRAM = "timm", "hub", "onnx", "torch-export"
PLACES = {TIMM: "timm", HUB: "hub", ONNX: "model.onnx", PROGRAM: "model.pt2"}
"""Where each goes by default, below ``export/`` of the run folder."""
CARD = "README.md"
COMPARED = (1, 2, TRACED_ITEMS)
"""Items of the batches whose logits are compared."""
MOST_IMAGES = 16
"""Of a folder, that are compared on."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Share of the largest logit by which logits may differ for being rounded, by the dtype of weights."""

Calls = Callable[[Example], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written, or would be.

    Attributes:
        path: the file or the folder.
        files: names of what is in the folder, or of the file alone.
        difference: the largest between logits of what was read again and the model's; ``None`` where nothing was
            written.
        largest_logit: of the model.
        batches: items of the batches that were compared.
        repo: the repository that it was uploaded to.
        notes: what is to be known, a sentence each.
    """

    path: Path
    files: tuple[str, ...]
    difference: float | None = None
    largest_logit: float = 0.0
    batches: tuple[int, ...] = ()
    repo: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Lines for people."""
        files = f" ({', '.join(self.files)})" if self.files != (self.path.name,) else ""
        if self.difference is None:
            lines = [f"would be written: {self.path}{files}"]
        else:
            sizes = ", ".join(map(str, self.batches))
            lines = [
                f"written: {self.path}{files}",
                f"read again: logits differ by {self.difference:.2g} at most, the largest is "
                f"{self.largest_logit:.3g} (batches of {sizes})",
            ]
        lines += [] if self.repo is None else [f"uploaded: {self.repo}"]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class _Subject:
    """What is exported.

    Attributes:
        model: the plain one, on the processor, in evaluation mode.
        trained: what its logits are to be.
        example: what it is called with.
        name: of its architecture.
        library: that reads it again by itself, ``timm`` or ``transformers``; ``None`` where none does.
        about: classes, size and normalisation, as JSON has them.
        files: texts that go beside the weights, by name.
        has_own_batch: whether whoever asked gave the example.
        notes: sentences.
        source: timm's config of the weights that it began with.
        run: that trained it.
    """

    model: nn.Module
    trained: nn.Module
    example: Example
    name: str
    library: str | None
    about: Mapping[str, Any]
    files: Mapping[str, str]
    has_own_batch: bool
    notes: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    run: FinishedRun | None = None

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels; none where nobody said."""
        return list(self.about.get("class_names", ()))


def export(
    source: nn.Module | Path | str,
    *,
    to: str,
    out: Path | str | None = None,
    example: Any = None,
    class_names: Sequence[str] = (),
    repo: str | None = None,
    dry_run: bool = False,
) -> Exported:
    """Write a trained model as other libraries read it; it is read again, and its logits compared.

    Args:
        source: a model of any library, which stays as it is; or the folder of a finished run.
        to: ``timm`` (a folder that timm, or transformers for its models, loads), ``onnx``, ``torch-export``, or
            ``hub`` (the folder of ``timm`` with a model card, uploaded).
        out: the file or folder, which may not be there yet; by default below ``export/`` of the run folder.
        example: what the model is called with, as for ``split``: a tensor, a tuple or a dict. Of a run it may also be
            the path of an image, or of a folder. By default, noise of the model's size, where it tells that.
        class_names: of a model, in the order of its logits; a run knows its own.
        repo: ``OWNER/NAME`` on the hub.
        dry_run: write nothing; for the hub, write the folder and upload nothing.

    Returns:
        What was written, and by how much logits differ.

    Raises:
        RunFolderError: the run isn't finished, or ``out`` can't be made.
        RecipeError: an argument that can't be; or a package is missing.
        BackboneError: the model can't be exported so, or isn't the same when it is read again.

    Example:
        >>> export("runs/flowers", to="onnx", out="flowers.onnx")  # doctest: +SKIP
    """
    if to not in PLACES:
        raise RecipeError(f"{arg('to')}: unknown {to!r}; take {', '.join(PLACES)}.{did_you_mean(to, PLACES)}")
    rules.check({"to": to, "repo": repo})
    if to == HUB and repo is None and not dry_run:
        raise RecipeError(
            f"{arg('repo')}: name where on the hub it is uploaded, {arg('repo', 'OWNER/NAME')}; or take "
            f"{arg('dry_run', value=True)}, which writes the folder alone."
        )
    if to == ONNX:
        check_onnx()
    is_run = isinstance(source, (str, Path))
    if not (is_run or isinstance(source, nn.Module)):
        raise RecipeError(
            f"{arg('source')}: got {type(source).__name__}; give a model (of a learner, its .model), or a run's folder."
        )
    if class_names and (is_run or isinstance(class_names, str)):
        raise RecipeError(
            f"{arg('class_names', class_names)}: "
            f"{'a run knows its own; leave it out' if is_run else 'give a list of names, one a class'}."
        )
    place = _place_of(source, to, out)
    if is_run:
        subject = _subject_of_run(Path(source), example)  # type: ignore[arg-type]
    else:
        subject = _subject_of_model(source, example, class_names, has_config=to in (TIMM, HUB))  # type: ignore[arg-type]
    if to in (TIMM, HUB) and subject.library is None:
        raise BackboneError(
            f"{arg('to', to)}: no library makes {subject.name} again by its name; take {arg('to', ONNX)} or "
            f"{arg('to', PROGRAM)}."
        )
    _check_called(subject)
    if dry_run and to != HUB:
        named = (*subject.files, WEIGHTS) if to == TIMM else (place.name,)
        return Exported(place, tuple(dict.fromkeys(named)), notes=subject.notes)
    with _beside(place) as written:
        found = _write_and_read(subject, to, written)
        if to == HUB:
            (written / CARD).write_text(_card_of(subject, repo or "OWNER/NAME", found.notes), encoding="utf-8")
        files = tuple(sorted(each.name for each in (written if written.is_dir() else written.parent).iterdir()))
    if to != HUB:
        return _found_at(found, place, files)
    if dry_run:
        sizes = [f"would be uploaded: {name}, {(place / name).stat().st_size:,} bytes" for name in files]
        return _found_at(found, place, files, *sizes)
    assert repo is not None, "checked above"
    return _found_at(found, place, files, repo=upload(place, repo))


def _found_at(found: Exported, place: Path, files: tuple[str, ...], *more: str, repo: str | None = None) -> Exported:
    """What was written, once it is in its place."""
    return replace(found, path=place, files=files, repo=repo, notes=(*more, *found.notes))


def _place_of(source: object, to: str, out: Path | str | None) -> Path:
    """Where it is to be written; refused where something is there, or nothing can be."""
    if out is None and not isinstance(source, (str, Path)):
        raise RecipeError(f"{arg('out')}: name the file or folder to write, as {arg('out', PLACES[to])}.")
    place = Path(str(source)) / "export" / PLACES[to] if out is None else Path(out).expanduser()
    for path in (place, Path(f"{place}.data")) if to == ONNX else (place,):  # large ONNX models have the second one
        if os.path.lexists(path):
            upload_it = f"upload it as it is by `hf upload OWNER/NAME {place}`, " if to == HUB else ""
            raise RecipeError(f"{arg('out', place)}: {path} is there already; {upload_it}remove it, or name another.")
    if out is not None or Path(str(source)).is_dir():  # else there is no run, which is told in its own words
        check_writable(place.absolute().parent)
    return place


# What is exported --------------------------------------------------------------------------------------------------


def _subject_of_run(path: Path, images: Any) -> _Subject:
    run = open_run(path)
    data, info, name = run.recipe.method.data, run.info, run.recipe.method.model.name
    evaluated = evaluated_images(data, info, run.size)
    library = "transformers" if is_on_hub(name) else "timm" if run.files else None
    shown = name.rpartition("/")[2] if library == "transformers" else name  # and not where its folder lay
    about = {"model": shown, "class_names": list(info.class_names), **evaluated.values}
    if isinstance(images, (str, Path)):
        images = run.images(Path(images), MOST_IMAGES)
    if images is None:
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (info.mean, info.std))
        images = (torch.rand(TRACED_ITEMS, *run.size, generator=torch.Generator().manual_seed(0)) - mean) / std
    began = run.recipe.method.model.pretrained and library == "timm"
    return _Subject(
        model=run.model,
        trained=run.trained,
        example=Example.of(images),
        name=shown,
        library=library,
        about=about,
        files=run.files,
        has_own_batch=False,
        notes=evaluated.notes,
        source=_config_of_source(name) if began else {},
        run=run,
    )


def _config_of_source(name: str) -> Mapping[str, Any]:
    """What timm knows of the weights that it loads by a name."""
    import timm

    found = timm.get_pretrained_cfg(name)
    return {} if found is None else dict(found.to_dict())


def _subject_of_model(model: nn.Module, batch: Any, class_names: Sequence[str], *, has_config: bool) -> _Subject:
    bare: nn.Module = getattr(model, "_orig_mod", model)  # of what torch.compile made
    try:
        trained = copy.deepcopy(bare).cpu().eval()
    except RuntimeError as error:  # of tensors that a model keeps of its last call
        raise BackboneError(
            f"model: {type(bare).__name__} can't be copied ({reason_of(error, 300)}); call it once within "
            "torch.no_grad() beforehand, if it keeps what it computed."
        ) from error
    plain: Any = _merged(trained) if is_adapted(trained) else trained
    example = Example.of(batch).to("cpu") if batch is not None else _noise_for(plain)
    names, notes, files = list(class_names), [], {}
    about: Kwargs = {"model": type(plain).__name__} | ({"class_names": names} if names else {})
    library = None
    if is_of_timm(plain):
        library, known = "timm", plain.pretrained_cfg
        files = {"config.json": timm_config(plain, class_names=names)} if has_config else {}
        about |= {"model": known["architecture"], "input_size": list(example.tensor.shape[1:])}
        about |= {key: known[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if key in known}
        notes.append("Images are to be normalised as model.pretrained_cfg says: set mean and std there, if by others.")
    elif callable(getattr(plain, "save_pretrained", None)) and hasattr(plain, "config"):
        library = "transformers"
        files = {"config.json": ""}
        if names:
            plain.config.id2label = dict(enumerate(names))
            plain.config.label2id = {name: number for number, name in enumerate(names)}
    return _Subject(
        model=plain,
        trained=trained,
        example=example,
        name=str(about["model"]),
        library=library,
        about=about,
        files=files,
        has_own_batch=batch is not None,
        notes=tuple(notes),
    )


def _merged(adapted: nn.Module) -> Any:
    """A copy of a model of peft, with what its adapters learnt in plain weights.

    Raises:
        BackboneError: peft can't merge them.
    """
    try:
        return dequantize_layers(copy.deepcopy(adapted)).merge_and_unload()  # type: ignore[operator]
    except Exception as error:  # of kinds of adapters, of layers, of values
        kind = str(getattr(getattr(adapted, "active_peft_config", None), "peft_type", "peft")).rpartition(".")[2]
        raise BackboneError(
            f"model: adapters of {kind} can't be merged into its weights ({reason_of(error, 200)}), as another library "
            "would need them; save them for peft by model.save_pretrained, or train some that can, as of LoRA."
        ) from error


def _noise_for(model: nn.Module) -> Example:
    """A batch of noise for a model of timm."""
    if not is_of_timm(model):
        raise RecipeError(
            f"{arg('example')}: give what the model is called with: a tensor, a tuple of positional arguments, or a "
            "dict of keywords."
        )
    size = default_input_size(model)
    like = next(model.parameters())
    return Example.of(torch.randn(TRACED_ITEMS, *size, generator=torch.Generator().manual_seed(0)).to(like.dtype))


def _check_called(subject: _Subject) -> None:
    """Refuse a model that gives no finite logits for its example, or others than there are names of classes."""
    example = subject.example if subject.has_own_batch else subject.example.rows(1)
    try:
        with torch.no_grad():
            logits = example.call(subject.trained)
    except LocalgradError:
        raise
    except Exception as error:  # whatever a model's code says
        raise BackboneError(
            f"{arg('example')}: {subject.name} can't be called with it ({type(error).__name__}: "
            f"{reason_of(error, 300)}); give one batch as the model takes it, in the dtype of its weights."
        ) from error
    if not (example.tensor.ndim and logits.ndim and logits.numel()):
        raise BackboneError(f"{arg('example')}: give a batch of one item or more, the first axis of every tensor.")
    if not logits.isfinite().all():
        raise BackboneError(f"model: logits of {subject.name} are no finite numbers, and can't be compared.")
    if subject.class_names and len(subject.class_names) != logits.shape[-1]:
        raise RecipeError(
            f"{arg('class_names')}: {len(subject.class_names)} names, and the model has {logits.shape[-1]} logits; "
            "name each."
        )


# Writing and reading -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A region that writes a file or a folder under its own name beside its place, and puts it there at the end."""
    parent = place.absolute().parent
    is_new = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{place.name}.") as folder:
            yield Path(folder) / place.name
            for each in Path(folder).iterdir():  # large ONNX models have a second file
                each.rename(parent / each.name)
    except OSError as error:  # no space, a file system that can't be written, a name that it doesn't take
        raise RunFolderError(f"{arg('out', place)}: it can't be written ({reason_of(error, 200)}).") from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it isn't empty: all went well
                parent.rmdir()


def _write_and_read(subject: _Subject, to: str, path: Path) -> Exported:
    """Write a file or a folder, read it again, and hold it against the model.

    Raises:
        BackboneError: its logits aren't the model's.
    """
    notes = list(subject.notes)
    sizes: tuple[int, ...] = COMPARED
    if to in (TIMM, HUB):
        read = _write_folder(subject, path)
    else:
        own = subject.example.num_items if subject.has_own_batch else 1
        traced = trace(subject.model, subject.example, num_items=own)
        if traced.num_items is not None:
            sizes = (traced.num_items,)
            notes.append(f"It takes batches of {traced.num_items} alone, as the model's code asks for: {traced.reason}")
        if to == ONNX:
            write_onnx(traced, path, subject.about)
            read = read_onnx(path, traced.names)
        else:
            write_program(traced, path, subject.about)
            read = read_program(path)
    difference, largest = _compared(subject, to, read, sizes)
    if not largest:
        notes.append("All of the model's logits are 0, so that comparing them shows nothing.")
    return Exported(path, (path.name,), difference, largest, sizes, notes=tuple(notes))


def _compared(subject: _Subject, to: str, read: Calls, sizes: Sequence[int]) -> tuple[float, float]:
    """The largest difference between logits, and the largest logit; refused beyond rounding."""
    dtype = next((each.dtype for each in subject.model.parameters() if each.is_floating_point()), torch.float32)
    differences, logits = [], []
    for count in sizes:
        given = subject.example.rows(count)
        with torch.no_grad():
            wanted = given.call(subject.trained).double()
            try:
                found = read(given).double()
            except Exception as error:
                raise BackboneError(
                    f"{arg('to', to)}: what was written can't be run on a batch of {count} ({type(error).__name__}: "
                    f"{reason_of(error, 300)}); it was removed."
                ) from error
        if found.shape != wanted.shape:
            raise BackboneError(
                f"{arg('to', to)}: read again it gives logits of {list(found.shape)}, and the model of "
                f"{list(wanted.shape)}; it was removed."
            )
        differences.append((found - wanted).abs().max())
        logits.append(wanted.abs().max())
    difference, largest = (float(torch.stack(each).max()) for each in (differences, logits))  # a NaN stays one
    if not difference <= ROUNDING.get(dtype, ROUNDING[torch.float32]) * largest:  # not a number is more, too
        raise BackboneError(
            f"{arg('to', to)}: read again, its logits differ from the model's by up to {difference:.3g}, where the "
            f"largest is {largest:.3g}: that is more than rounding, and it was removed; take another format."
        )
    return difference, largest


def _write_folder(subject: _Subject, folder: Path) -> Calls:
    """Write a folder as a model's own library has it; gives what calls the model that it reads there."""
    model: Any = subject.model
    if subject.library == "transformers":
        with quietly():
            model.save_pretrained(folder)
        for name in subject.files.keys() - {"config.json"}:
            (folder / name).write_text(subject.files[name], encoding="utf-8")
    else:
        folder.mkdir()
        for name, text in subject.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        save_weights(folder / WEIGHTS, model.state_dict())
    try:
        again = _read_folder_again(subject, folder)
    except Exception as error:  # whatever a library says of its own files
        raise BackboneError(
            f"model: {subject.library} can't read {subject.name} again ({type(error).__name__}: "
            f"{reason_of(error, 300)}); take {arg('to', ONNX)} or {arg('to', PROGRAM)}."
        ) from error
    return lambda example: example.call(again)


def _read_folder_again(subject: _Subject, folder: Path) -> nn.Module:
    if subject.library == "transformers":
        with quietly():
            found: nn.Module = type(subject.model).from_pretrained(folder)  # type: ignore[attr-defined]
    else:
        import timm

        found = timm.create_model(f"local-dir:{folder}", pretrained=True)
    like = next(subject.model.parameters())
    return found.to(like.dtype).eval()


# The hub -------------------------------------------------------------------------------------------------------------


def _card_of(subject: _Subject, repo: str, notes: Sequence[str]) -> str:
    """A model card of what is exported, with code that loads it from its repository."""
    if subject.library == "transformers":
        loading = (
            f"from transformers import AutoImageProcessor, {type(subject.model).__name__}\n\n"
            f'model = {type(subject.model).__name__}.from_pretrained("{repo}")'
        )
        if "preprocessor_config.json" in subject.files:
            loading += f'\nprocessor = AutoImageProcessor.from_pretrained("{repo}")'
        else:
            loading = loading.replace("AutoImageProcessor, ", "")
    else:
        loading = (
            "import timm\n\n"
            f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        )
    return model_card(
        library=str(subject.library),
        architecture=subject.name,
        loading=loading,
        class_names=subject.class_names,
        run=subject.run,
        source=subject.source,
        notes=notes,
    )


def upload(folder: Path, repo: str) -> str:
    """Upload a folder to the hub, into a repository that is made where there is none; gives its address.

    Raises:
        RecipeError: the hub can't be reached, or says no; the folder stays.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        made = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model that localgrad trained")
    except Exception as error:  # of the network, of the hub, of a token
        raise RecipeError(
            f"{arg('repo', repo)}: it can't be uploaded ({type(error).__name__}: {reason_of(error, 200)}); the folder "
            f"stays: {folder}. Log in by `hf auth login`, or upload it by `hf upload {repo} {folder}`."
        ) from error
    return str(made)
