"""Builds the simulated card's libraries once for each version of torch and of their sources, into a cache."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("nvml.cpp", "runtime.cpp", "values.cpp")
RUNTIME = "libsimulated_card.so"
CUDA = "13"
"""Whose calls the runtime stands in for: torch must be built for that major version."""


class Unavailable(Exception):  # noqa: N818 - it is a reason, not a mistake
    """Why there can be no simulated card here, in one line."""


def default_cache() -> Path:
    """Where builds are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localgrad" / "simulated-card"


def build(cache: Path | None = None) -> Path:
    """The runtime to preload, built where it isn't yet: half a minute of one core.

    Args:
        cache: folder of the builds, ``default_cache()`` by default. Processes may share it.

    Raises:
        Unavailable: no compiler, no headers of CUDA's toolkit, or a torch that isn't built for CUDA 13.
    """
    torch, compiler, toolkit = _torch_folder(), _compiler(), _toolkit_headers()
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / _key(torch, compiler)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of with the file
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                made = Path(temporary) / "made"
                made.mkdir()
                _compile(made, torch, compiler, toolkit)
                made.rename(folder)
    return folder / RUNTIME


def _torch_folder() -> Path:
    """Where torch lies; it isn't imported, which takes seconds."""
    if sys.platform != "linux":
        raise Unavailable(f"libraries are preloaded on Linux only, and this is {sys.platform}")
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise Unavailable("torch isn't installed")
    folder = Path(found.origin).parent
    settings: dict[str, str | None] = {}
    exec((folder / "version.py").read_text(), settings)  # it is torch's own
    cuda = settings.get("cuda")
    if not cuda:
        raise Unavailable("this torch is built without CUDA")
    if cuda.split(".")[0] != CUDA:
        raise Unavailable(f"this torch is built for CUDA {cuda}; the simulated card stands in for CUDA {CUDA}")
    return folder


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise Unavailable("there is no C++ compiler")
    return found


def _toolkit_headers() -> Path:
    """The headers that come with a CUDA toolkit, or with its pip packages where these are whole."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob(f"cuda-{CUDA}*"))]
    folders = [home / "include" for home in homes]
    for base in map(Path, sys.path):
        folders.append(base / "nvidia" / f"cu{CUDA}" / "include")
    for folder in folders:
        version = folder / "cuda_runtime_api.h"
        if not version.exists() or not (folder / "crt" / "host_defines.h").exists():
            continue
        if f"#define CUDART_VERSION {CUDA}" in version.read_text(errors="replace").replace("  ", " "):
            return folder
    raise Unavailable(f"there are no headers of a CUDA {CUDA} toolkit (CUDA_HOME names one)")


def _key(torch: Path, compiler: str) -> str:
    read = hashlib.sha256()
    for part in (importlib.metadata.version("torch"), str(torch), compiler):
        read.update(part.encode() + b"\0")
    for name in (*SOURCES, Path(__file__).name):
        read.update((HERE / name).read_bytes() + b"\0")
    return read.hexdigest()[:16]


def _compile(folder: Path, torch: Path, compiler: str, toolkit: Path) -> None:
    shared = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-w"]
    nvml = folder / "libnvidia-ml.so.1"
    beside = ["-Wl,--no-as-needed", str(nvml), "-Wl,-rpath,$ORIGIN", "-ldl", "-lpthread"]
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-I{toolkit}"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    commands = [
        [str(HERE / "nvml.cpp"), "-o", str(nvml), f"-Wl,-soname,{nvml.name}"],
        [f"-I{toolkit}", str(HERE / "runtime.cpp"), "-o", str(folder / RUNTIME), "-Wl,-soname,libcuda.so.1", *beside],
        [*includes, str(HERE / "values.cpp"), "-o", str(folder / "libsimulated_values.so"), *libraries],
    ]
    for command in commands:
        done = subprocess.run([*shared, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise Unavailable(f"the compiler doesn't take the sources: {lines[0]}")
