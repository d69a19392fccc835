"""Build the wheel and the sdist, install the wheel into clean environments, and use it there: ``make test-release``.

``python tests/release.py`` takes them all, ``--only newest-plots`` one. Environments hold PyTorch with its CUDA
libraries, some 6 GB each; one at a time is made, and removed when it is done, but for ``--keep DIR``, in which they
stay and are used again.

    newest         the newest dependencies
    newest-EXTRA   with an extra that users install, and what it is for
    oldest         each dependency as old as pyproject.toml allows
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_CONTRIBUTORS = ("dev", "docs")
EXTRAS = [extra for extra in PROJECT["optional-dependencies"] if extra not in FOR_CONTRIBUTORS]
SMALL = ("--model", "vit_tiny_patch16_224", "--img-size", "32", "--batch-size", "8")
PICTURE = ("compare", "--estimate-only", *SMALL, "--modules", "2", "--objective", "feature", "--timeline", "line.png")


def oldest() -> list[str]:
    """Each dependency in the oldest release that is allowed."""
    return [re.sub(r">=", "==", re.split(r"[,;]", each)[0]) for each in PROJECT["dependencies"]]


class Environment:
    """A clean virtual environment with the wheel in it.

    Args:
        name: ``newest``, ``newest-plots``, ..., ``oldest``.
        wheel: to install.
        place: where it is made.
    """

    def __init__(self, name: str, wheel: Path, place: Path) -> None:
        self.name, self.place, self.figures = name, place, [name]
        self.python = place / "bin" / "python"
        self.work = place / "work"
        extra = name.partition("-")[2]
        is_new = not place.exists()
        if is_new:
            venv.create(place, with_pip=True)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        constraints = place / "constraints.txt"
        constraints.write_text("\n".join(oldest()) + "\n" if name == "oldest" else "", encoding="utf-8")
        quiet = ("--quiet", "--disable-pip-version-check")
        # Without bytecode, which would be most of the work: what is imported is compiled then.
        install = ("-m", "pip", "install", *quiet, "--no-compile", "--constraint", str(constraints))
        again = () if is_new else ("--force-reinstall", "--no-deps")
        if not is_new:
            self.timed("update", self.python, *install, str(wheel))
        self.timed("install", self.python, *install, *again, f"{wheel}[{extra}]" if extra else str(wheel))
        found = subprocess.run(
            [self.python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
        )
        self.versions = {each["name"].lower().replace("_", "-"): each["version"] for each in json.loads(found.stdout)}
        size = sum(path.lstat().st_size for path in place.rglob("*")) / 2**30
        names = [re.split(r"[<>=\[]", each)[0] for each in PROJECT["dependencies"]]
        told = ", ".join(
            f"{each} {self.versions[each]}"
            for each in (*names, "click", "matplotlib", "bitsandbytes")
            if each in self.versions
        )
        print(f"{name}: {size:.1f} GiB, Python {sys.version.split()[0]}: {told}", flush=True)

    def timed(self, what: str, *command: str | Path, code: int = 0) -> str:
        """Run something that must end with a code; what it said, and its seconds are kept."""
        start = time.perf_counter()
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        ended = subprocess.run(
            [*map(str, command)],
            cwd=self.work,
            env={**clean, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if ended.returncode != code:
            raise SystemExit(f"{self.name}: {what} ended with {ended.returncode}, not {code}:\n{ended.stdout}")
        self.figures.append(f"{what} {time.perf_counter() - start:.1f} s")
        return ended.stdout

    def localgrad(self, *arguments: str, code: int = 0) -> str:
        """Run the installed command."""
        return self.timed(" ".join(arguments[:2]), self.place / "bin" / "localgrad", *arguments, code=code)

    def check(self) -> None:
        """Use what everybody uses: version, help, a training, its evaluation, a plan; and what the extra is for."""
        assert PROJECT["version"] in self.localgrad("--version")
        assert "--epochs" in self.localgrad("train", "--help")
        self.localgrad("train", "--epochs", "2", "--device", "cpu", "--out", "run")
        summary = json.loads((self.work / "run" / "summary.json").read_text(encoding="utf-8"))
        self.figures.append(f"test accuracy {summary['test_accuracy']:.1%}")
        assert summary["test_accuracy"] > 0.3, "two epochs on the digits learn something"
        assert f"{summary['test_accuracy']:.2%}" in self.localgrad("evaluate", "run")
        self.localgrad("plan", *SMALL, "--num-classes", "10", "--device", "cpu", "--json", "plan.json")
        assert json.loads((self.work / "plan.json").read_text(encoding="utf-8"))["format"] == 2
        BY_EXTRA[self.name.partition("-")[2]](self)


def without_extras(environment: Environment) -> None:
    """What an extra is missing for is refused with the command that installs it."""
    assert "pip install 'localgrad[plots]'" in environment.localgrad(*PICTURE, code=2)
    options = ("--epochs", "1", "--device", "cpu", "--optimizer", "bnbadamw8bit")
    assert "pip install 'localgrad[8bit]'" in environment.localgrad("train", *options, code=2)
    assert "pip install 'localgrad[onnx]'" in environment.localgrad("export", "run", "--to", "onnx", code=2)


def with_plots(environment: Environment) -> None:
    """A picture is drawn."""
    environment.localgrad(*PICTURE)
    assert (environment.work / "line.png").read_bytes().startswith(b"\x89PNG")


def with_8bit(environment: Environment) -> None:
    """An optimizer with 8-bit state trains."""
    environment.localgrad("train", "--epochs", "1", "--device", "cpu", "--optimizer", "bnbadamw8bit", "--out", "small")


def with_hf(environment: Environment) -> None:
    """A model of transformers trains, from its folder."""
    made = (
        "import transformers as t; sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, "
        "intermediate_size=32, image_size=16, patch_size=4, num_labels=10); "
        "t.ViTForImageClassification(t.ViTConfig(**sizes)).save_pretrained('vit')"
    )
    environment.timed("make a ViT", environment.python, "-c", made)
    environment.localgrad(
        "train", "--model", "hf:vit", "--modules", "2", "--epochs", "1", "--device", "cpu", "--out", "hub"
    )
    assert (environment.work / "hub" / "config.json").exists()


def with_peft(environment: Environment) -> None:
    """Adapters are trained, and merged in the end."""
    environment.localgrad("train", *SMALL, "--epochs", "1", "--device", "cpu", "--lora", "2", "--out", "lora")
    assert (environment.work / "lora" / "model.safetensors").exists()


def with_trackers(environment: Environment) -> None:
    """A tracker itself is the user's to install, and is asked for by name."""
    said = environment.localgrad("train", "--epochs", "1", "--device", "cpu", "--sink", "wandb", code=2)
    assert "needs wandb: pip install wandb" in said


def with_onnx(environment: Environment) -> None:
    """A run becomes ONNX, which is run."""
    assert "logits differ by" in environment.localgrad("export", "run", "--to", "onnx")


BY_EXTRA: dict[str, Callable[[Environment], None]] = {
    "": without_extras,
    "plots": with_plots,
    "8bit": with_8bit,
    "hf": with_hf,
    "peft": with_peft,
    "trackers": with_trackers,
    "onnx": with_onnx,
}


def main() -> None:
    """Build, then make each environment, use it and remove it."""
    names = ["newest", *(f"newest-{extra}" for extra in EXTRAS), "oldest"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, help="this environment; may be given again")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep environments here, and use those that are there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="localgrad-release-") as folder:
        place = Path(folder)
        venv.create(place / "build", with_pip=True)
        python = place / "build" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True)
        subprocess.run([python, "-m", "build", "--outdir", place / "dist", ROOT], check=True, stdout=subprocess.DEVNULL)
        (wheel,) = (place / "dist").glob("*.whl")
        (sdist,) = (place / "dist").glob("*.tar.gz")
        print(f"{wheel.name} {wheel.stat().st_size / 1024:.0f} KiB, {sdist.name} {sdist.stat().st_size / 1024:.0f} KiB")
        for name in asked.only or names:
            home = (asked.keep or place).absolute() / name
            environment = Environment(name, wheel, home)
            environment.check()
            print("; ".join(environment.figures), flush=True)
            if asked.keep is None:
                shutil.rmtree(home)


if __name__ == "__main__":
    main()
