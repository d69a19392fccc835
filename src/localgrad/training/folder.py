"""The run folder: what one run leaves on disk, written so that a crash at any moment loses nothing.

::

    recipe.toml                what was asked for, whole
    data.json                  the data set in words and figures: classes, parts, normalisation, what was left out
    skipped.csv                the images that were left out: part, image, reason
    metrics.jsonl              one line an epoch, and one a health check
    tensorboard/               the same for TensorBoard
    checkpoints/last.pt        everything that resuming needs; of a parallel run, what names its parts
    checkpoints/part-*.pt      a parallel run's: the state of each rank's modules
    checkpoints/best.safetensors   model and auxiliary nets of the best epoch
    model.safetensors          the best epoch's plain timm weights, at the end
    summary.json               the figures, at the end

Files are written under another name, flushed to disk and renamed, so each is whole or absent. One process at a time
may use a folder: it holds a lock that the system releases when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from localgrad.errors import CheckpointError, RunFolderError, reason_of

FORMAT = 2
"""Version of ``last.pt``; a checkpoint of another version is refused."""

_UNFINISHED = re.compile(r"\.[a-z0-9-]+\.(toml|json|jsonl|pt|safetensors)\.\w{8}")
_DAMAGED = (ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError)
"""What torch's reader raises at bytes that are no checkpoint, besides its own errors."""


class RunFolder:
    """A run folder that this process holds.

    Args:
        path: the folder; made where it is missing.
        is_guest: another process of the same run holds the folder; this one only adds parts of checkpoints.

    Raises:
        RunFolderError: it can't be written, or another process uses it.
    """

    def __init__(self, path: Path, *, is_guest: bool = False) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        if is_guest:
            return
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(
                f"run folder {path}: can't be written ({error.strerror}); choose another with --out DIR."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            in_use = isinstance(error, BlockingIOError)
            raise RunFolderError(
                f"run folder {path}: another process is using it; wait for it, or choose another with --out DIR."
                if in_use
                else f"run folder {path}: it can't be locked ({error.strerror}); choose another with --out DIR."
            ) from error
        self._lock = lock
        _remove_leftovers(path)

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """Weights of the best epoch: the model's and the auxiliary nets'."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def has_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "recipe.toml").exists()

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        write_atomically(self.path / name, lambda path: path.write_text(text))

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def save_last(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint to resume from."""
        write_atomically(self.last, lambda path: torch.save({"format": FORMAT, **state}, path))

        self._remove_parts(())

    def save_part(self, name: str, state: Mapping[str, Any]) -> None:
        """Write one process's part of a checkpoint; it counts once ``commit`` names it."""
        write_atomically(self.path / "checkpoints" / name, lambda path: torch.save(dict(state), path))

    def commit(self, state: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Make parts that lie there the checkpoint to resume from, and remove those of the one before.

        Args:
            state: all but the learner's, which is in the parts.
            parts: their names, by rank.
        """
        write_atomically(self.last, lambda path: torch.save({"format": FORMAT, **state, "parts": list(parts)}, path))
        self._remove_parts(parts)

    def _remove_parts(self, but: Sequence[str]) -> None:
        for path in (self.path / "checkpoints").glob("part-*.pt"):
            if path.name not in but:
                path.unlink(missing_ok=True)

    def load_last(self) -> dict[str, Any]:
        """Read the checkpoint to resume from, on the CPU; of a parallel run, with its ``parts``, a list of states.

        Raises:
            CheckpointError: missing, truncated, or of another version.
        """
        state = self._load_last()
        parts = [self.path / "checkpoints" / str(name) for name in state.get("parts", ())]
        return {**state, "parts": [self._load(part) for part in parts]} if parts else state

    def _load(self, path: Path) -> Any:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, *_DAMAGED) as error:
            raise CheckpointError(
                f"checkpoint {path}: it is truncated or no checkpoint ({reason_of(error, limit=300)}); restore it "
                "from a copy, or start the run again in another folder."
            ) from error

    def _load_last(self) -> dict[str, Any]:
        if not self.last.exists():
            raise CheckpointError(f"checkpoint {self.last}: there is none; start the run again without --resume.")
        state = self._load(self.last)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, dict) else None
            raise CheckpointError(f"checkpoint {self.last}: its format is {found!r}, this version reads {FORMAT}.")
        checked: dict[str, Any] = state
        return checked


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, and give it its name in one step.

    Args:
        path: the file.
        write: fills the file that it is given.

    Raises:
        RunFolderError: no permission, or the disk is full; what was there before is still there.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # only torch's own writer reports a full disk so
        reason = error.strerror if isinstance(error, OSError) else reason_of(error, limit=300)
        raise RunFolderError(
            f"{path}: can't be written ({reason}); what was there before is still there. Make room, or see who may "
            "write there."
        ) from error


def check_writable(path: Path) -> None:
    """Refuse a run folder that can't be made, before anything is done for it; makes nothing.

    Raises:
        RunFolderError: below a file, or no permission.
    """
    nearest = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise RunFolderError(f"--out: {path} can't be made: {nearest} is no folder; choose another with --out DIR.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"--out: {path} can't be made: no permission in {nearest}; choose another with --out DIR.")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a process left unfinished that was killed while it wrote."""
    for path in (*folder.iterdir(), *(folder / "checkpoints").iterdir()):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all; tied ones are stored twice."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def load_saved_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors from safetensors.

    Raises:
        CheckpointError: missing or truncated.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path}: there are none; train the run first.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights {path}: truncated or no safetensors file ({reason_of(error, limit=300)})."
        ) from error
