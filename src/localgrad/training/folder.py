"""The run folder: what one run leaves on disk, written so that a crash at any moment loses nothing.

::

    recipe.toml                what was asked for, whole
    data.json                  the data set in words and figures, and a fingerprint of it
    places.json                where lay what the recipe names by relative paths, if it does
    config.json                by which timm or transformers reads its model; preprocessor_config.json likewise
    skipped.csv                the images that were left out: part, image, reason
    metrics.jsonl              one line an epoch, and one a health check
    tensorboard/               the same for TensorBoard
    checkpoints/last.pt        everything that resuming needs; of a parallel run, what names its parts
    checkpoints/before.pt      the checkpoint before that one, until the run is complete
    checkpoints/part-*.pt      a parallel run's: the state of each rank's modules
    checkpoints/best.safetensors   model and auxiliary nets of the best epoch
    checkpoints/checksums.json     of the text files
    model.safetensors          the best epoch's weights by the model's own names, at the end
    summary.json               the figures, at the end

Files are written under another name, flushed to disk and renamed, so each is whole or absent. One process at a time
holds the folder, by a lock that the system releases when the process ends, however it ends.

Disks and people damage files later, so what is read is verified: checkpoints by the CRC-32 of each record, weights by
the SHA-256 of their tensors in their metadata, text files by ``checksums.json``. Of a damaged checkpoint the one before
is taken; every checkpoint keeps recipe, ``data.json`` and ``metrics.jsonl`` as they were, so that those can be
restored. What was done, and what can't be verified (an older version wrote it), is said as a ``RunWarning``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import re
import secrets
import struct
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from localgrad.errors import CheckpointError, RunFolderError, RunWarning, arg, reason_of
from localgrad.formats import check_format
from localgrad.step.states import LearnerPart
from localgrad.training.saved import Checkpoint, Kept, Standing

_OF_BEST = "best"
FORMAT = 2
"""Version of ``last.pt``; 2 is that of 0.1.0."""

_UNFINISHED = re.compile(r"\.[a-z0-9-]+\.(toml|json|jsonl|pt|safetensors)\.\w{8}")
_DAMAGED = (ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError)
"""What torch's reader raises at bytes that are no checkpoint, besides its own errors."""
_NO_ZIP = (zipfile.BadZipFile, NotImplementedError, struct.error, zlib.error, OverflowError, MemoryError)
"""The same of Python's reader of zip files."""

KEPT = ("recipe.toml", "data.json", "places.json", "config.json")
"""Text files that every checkpoint keeps a copy of, beside the lines of ``metrics.jsonl``."""
CHECKPOINTS = ("last.pt", "before.pt", "best.safetensors")
_SUMS = "checkpoints/checksums.json"
Agree = Callable[[Checkpoint], str | None]
"""Given a checkpoint: why it is none of this run, or ``None``."""


@final
class RunFolder:
    """A run folder that this process holds.

    Args:
        path: the folder; made where it is missing.
        is_guest: another process of the same run holds the folder; this one only adds parts of checkpoints.

    Attributes:
        last: the checkpoint to resume from.
        before: the one before that.
        best: weights of the best epoch: the model's and the auxiliary nets'.
        kept: what every checkpoint keeps of other files: their text, or a list of lines.

    Raises:
        RunFolderError: it can't be written, or another process uses it.
    """

    def __init__(self, path: Path, *, is_guest: bool = False) -> None:
        self.path = path
        self.last, self.before, self.best = (path / "checkpoints" / name for name in CHECKPOINTS)
        self.kept: Kept = {}
        self._last_is_sound = False
        self._parts_of_last: tuple[str, ...] = ()
        self._lock: IO[str] | None = None
        if is_guest:
            return
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(
                f"run folder {path}: can't be written ({error.strerror}); choose another with {arg('out')}."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            in_use = isinstance(error, BlockingIOError)
            raise RunFolderError(
                f"run folder {path}: another process is using it; wait for it, or choose another with {arg('out')}."
                if in_use
                else f"run folder {path}: it can't be locked ({error.strerror}); choose another with {arg('out')}."
            ) from error
        self._lock = lock
        _remove_leftovers(path)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from."""
        return self.last.exists() or self.before.exists()

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all, and its checksum; checkpoints keep those that are in ``KEPT``."""
        path, digest = self.path / name, _digest(_encoded(text))
        sums = _read_sums(self.path) or {}
        try:  # so long as the new text isn't there, the old one is sound as well
            present = _digest(path.read_bytes())
        except OSError:
            present = ""
        accepted = list(dict.fromkeys([digest, *(each for each in sums.get(name, ()) if each == present)]))
        if sums.get(name) != accepted:
            sums = {**sums, name: accepted}
            own = json.dumps({"files": sums, "sha256": _digest(json.dumps(sums, sort_keys=True).encode())}, indent=1)
            write_atomically(self.path / _SUMS, lambda temporary: temporary.write_text(own + "\n", encoding="utf-8"))
        write_atomically(path, lambda temporary: temporary.write_bytes(_encoded(text)))
        if name in KEPT:
            self.kept[name] = text

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def save_last(self, state: Standing) -> None:
        """Write the checkpoint to resume from; the one that was it is the one before now."""
        self.commit(state, ())

    def save_best(self, weights: Mapping[str, Tensor], epoch: int, accuracy: float | None) -> None:
        """Write the best epoch's weights; metadata has its number, from 0, and its validation accuracy."""
        save_weights(self.best, weights, {_OF_BEST: json.dumps([epoch, accuracy])})

    def read_best(self) -> tuple[int, float | None] | None:
        """Of which epoch the best weights are, and its validation accuracy; ``None`` where nothing says so."""
        try:
            with safe_open(self.best, framework="pt") as file:
                epoch, accuracy = json.loads((file.metadata() or {})[_OF_BEST])
        except (SafetensorError, OSError, RuntimeError, *_DAMAGED):  # whoever reads the weights tells of damage
            return None
        return int(epoch), None if accuracy is None else float(accuracy)

    def save_part(self, name: str, state: LearnerPart) -> None:
        """Write one process's part of a checkpoint; it counts once ``commit`` names it."""
        write_atomically(self.path / "checkpoints" / name, lambda path: torch.save(dict(state), path))

    def commit(self, state: Standing, parts: Sequence[str]) -> None:
        """Make parts that lie there (by rank; none of a whole state) the checkpoint, and remove older ones."""
        named = {"parts": list(parts)} if parts else {}

        def write(path: Path) -> None:
            torch.save({"format": FORMAT, **state, "kept": self.kept, **named}, path)
            self._keep_before()

        write_atomically(self.last, write)
        self._remove_parts((*parts, *self._parts_of_last))
        self._last_is_sound, self._parts_of_last = True, tuple(parts)

    def finish(self) -> None:
        """Remove what a complete run has no more use for: the checkpoint before the last."""
        self.before.unlink(missing_ok=True)
        self._remove_parts(self._parts_of_last)

    def _keep_before(self) -> None:
        """Give the last checkpoint its second name, if it is a sound one; there is a sound one at any moment."""
        if not (self._last_is_sound and self.last.exists()):
            return
        linked = self.before.with_name(f".{self.before.name}.{secrets.token_hex(4)}")
        try:
            os.link(self.last, linked)
            linked.replace(self.before)
        except OSError:  # a file system without links
            self.last.replace(self.before)
        finally:
            linked.unlink(missing_ok=True)

    def _remove_parts(self, but: Sequence[str]) -> None:
        for path in (self.path / "checkpoints").glob("part-*.pt"):
            if path.name not in but:
                path.unlink(missing_ok=True)

    def load_last(self, agree: Agree = lambda state: None) -> Checkpoint:
        """Read the checkpoint to resume from, on the CPU; of a parallel run, with its ``parts``, a list of states.

        Where the last one is missing, damaged or none of this run, as ``agree`` says, that is the one before.

        Raises:
            CheckpointError: missing, damaged, another run's, or of another version.
        """
        errors = []
        for path in (self.last, self.before):
            try:
                state = _load_checkpoint(path)
                reason = agree(state)
                if reason is not None:
                    raise CheckpointError(
                        f"checkpoint {path}: it doesn't fit this run ({reason})",
                        "restore the run's own, or start the run again in another folder",
                    )
                names = tuple(map(str, state.get("parts", ())))
                parts = [_load_torch(path.with_name(name)) for name in names]
            except CheckpointError as error:
                errors.append(error)
                continue
            if errors:
                say(f"{errors[0].fact}; going on from the checkpoint before it, {path}.")
            self._last_is_sound, self._parts_of_last = path == self.last, names
            self.kept = kept_of(state)
            return {**state, "parts": parts} if parts else state
        if not self.last.exists() and self.before.exists():
            raise errors[1]
        raise errors[0]


def new_folder(data: str, objective: str) -> Path:
    """A folder below ``runs/`` that isn't there yet, named after data set, objective and time; makes nothing."""
    name = f"{Path(data).name or 'data'}-{objective}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs") / name, 2
    while path.exists():
        path, number = Path("runs") / f"{name}-{number}", number + 1
    return path


def holds_run(path: Path) -> bool:
    """Whether a run was started in a folder."""
    return any((path / name).exists() for name in ("recipe.toml", "checkpoints/last.pt", "checkpoints/before.pt"))


def say(text: str) -> None:
    """Tell the user what is not as it should be, and goes on all the same."""
    warnings.warn(text, RunWarning, stacklevel=3)


def _say_unverified(path: Path) -> None:
    """The same text for each file of a folder: it is printed once."""
    say(f"{path}: without checksums, as older versions wrote runs; what can't be verified is taken as it is.")


def kept_of(state: Checkpoint) -> Kept:
    """What a checkpoint keeps of other files; one of an older version keeps nothing."""
    kept = state.get("kept")
    return dict(kept) if isinstance(kept, dict) else {}


def _load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint without its parts."""
    if not path.exists():
        raise CheckpointError(f"checkpoint {path}: there is none", f"start the run again without {arg('resume')}")
    state = _load_torch(path)
    found = state.get("format") if isinstance(state, dict) else None
    check_format(f"checkpoint {path}", found, FORMAT, CheckpointError, oldest=2)
    return cast(Checkpoint, state)


def _load_torch(path: Path) -> Any:
    try:
        _verify_records(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, *_NO_ZIP, *_DAMAGED) as error:
        raise CheckpointError(
            f"checkpoint {path}: it is truncated or no checkpoint ({reason_of(error, limit=300)})",
            "restore it from a copy, or start the run again in another folder",
        ) from error


def _verify_records(path: Path) -> None:
    """Compare every record with its CRC-32, which torch writes and doesn't read."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its record {damaged} is wrong")


# ------------------------------------------------------------------------------------------------- text files


def read_text(folder: Path, name: str) -> str:
    """A text file of a run, verified; where it is damaged or missing, as a checkpoint keeps it.

    Raises:
        FileNotFoundError: it isn't there, or no text, and no checkpoint keeps it.
        RunFolderError: it is damaged, and no checkpoint keeps it.
    """
    path, accepted = folder / name, (_read_sums(folder) or {}).get(name)
    encoded, text = b"", None
    try:
        encoded = path.read_bytes()
        if accepted is not None and _digest(encoded) in accepted:
            return encoded.decode("utf-8", "surrogateescape")
        text = encoded.decode()
    except (OSError, UnicodeDecodeError):
        pass
    kept = _kept_text(folder, name)
    if kept is not None:
        if kept != text:
            what = "missing" if not path.exists() else "damaged or changed since it was written"
            say(f"{path}: {what}; taken as the checkpoint keeps it.")
        return kept
    if text is None and accepted is None:
        raise FileNotFoundError(f"{path}: not there, or no text")
    if text is None or accepted is not None:
        raise RunFolderError(
            f"{path}: damaged or changed since it was written, and no checkpoint keeps it; restore it from a copy, or "
            "start the run again in another folder."
        )
    _say_unverified(folder)
    return text


def is_sound(folder: Path, name: str) -> bool | None:
    """Whether a text file is as it was written; ``None`` where no checksum is known."""
    accepted = (_read_sums(folder) or {}).get(name)
    if accepted is None:
        return None
    try:
        return _digest((folder / name).read_bytes()) in accepted
    except OSError:
        return False


def _kept_text(folder: Path, name: str) -> str | None:
    """What the newest sound checkpoint keeps of a text file."""
    for path in (folder / "checkpoints" / "last.pt", folder / "checkpoints" / "before.pt"):
        try:
            kept = kept_of(_load_checkpoint(path)).get(name)
        except CheckpointError:
            continue
        if isinstance(kept, str):
            return kept
    return None


def _read_sums(folder: Path) -> dict[str, list[str]] | None:
    """The checksums of text files by name, the newest first; ``None`` where they are missing or damaged themselves."""
    try:
        values = json.loads((folder / _SUMS).read_bytes())
        files: dict[str, list[str]] = values["files"]
        return files if values["sha256"] == _digest(json.dumps(files, sort_keys=True).encode()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names of files may be any bytes


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, and give it its name in one step.

    Raises:
        RunFolderError: no permission, or the disk is full; what was there before is still there.
    """
    with written_atomically(path) as temporary:
        write(temporary)


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A region that fills a temporary file, which has the name at its end; see `write_atomically`."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
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


def check_writable(path: Path, name: str = "out") -> None:
    """Refuse a folder, that an argument names, that can't be made, before anything is done for it; makes nothing.

    Raises:
        RunFolderError: below a file, or no permission.
    """
    nearest = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise RunFolderError(f"{arg(name, path)}: it can't be made: {nearest} is no folder; choose another.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"{arg(name, path)}: it can't be made: no permission in {nearest}; choose another.")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a process left unfinished that was killed while it wrote."""
    for path in (*folder.iterdir(), *(folder / "checkpoints").iterdir()):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def save_weights(path: Path, weights: Mapping[str, Tensor], told: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write tensors as safetensors, whole or not at all; tied ones are stored twice.

    Metadata has their SHA-256, and what else is told.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    metadata = {"format": "pt", "sha256": _digest_of_tensors(tensors), **told}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=metadata)
        _sort_metadata(temporary)

    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, which is random else: equal weights are equal files."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same values in another order"
        file.seek(8)
        file.write(text.ljust(length))


def load_saved_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors from safetensors, verified.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path}: there are none", "train the run first") from error
    except (SafetensorError, OSError, RuntimeError, *_DAMAGED) as error:
        raise CheckpointError(
            f"weights {path}: truncated or no safetensors file ({reason_of(error, limit=300)})",
            "restore them from a copy, or train the run again",
        ) from error
    if expected is None:
        _say_unverified(path.parent.parent if path.parent.name == "checkpoints" else path)
    elif expected != _digest_of_tensors(weights):
        raise CheckpointError(
            f"weights {path}: damaged (their checksum is wrong)", "restore them from a copy, or train the run again"
        )
    return weights


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> Any:
    """A tensor's values as a buffer of bytes, on the host."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
