"""The house rules that a machine can check: imports, clocks, reasons, settings, entry points, the text itself."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from certbotk8s.domain.reasons import Reason
from certbotk8s.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CODE = [path for part in ("certbotk8s", "solvers") for path in sorted((ROOT / part).rglob("*.py"))]


def run(*command: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """A program of this environment, in the project's folder."""
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_imports_go_downwards_only() -> None:
    """The layers hold, and the domain does no I/O.

    Mutation: import `logging` in domain/plan.py, or `certbotk8s.kube.api` in reconcile/ingress.py.
    """
    done = run(TOOLS / "lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(PYPROJECT['tool']['importlinter']['contracts'])} kept, 0 broken." in done.stdout


CLOCKS = """\
import datetime as dt
import time
from datetime import datetime
from time import sleep  # refused
FOUND = [
    time.time(),  # refused
    time.monotonic(),  # refused
    datetime.now(),  # refused
    dt.datetime.now(dt.UTC),  # refused
    datetime.utcnow(),  # refused
    datetime.today(),  # refused
]
time.sleep(1)  # refused
"""
REFUSED = {number for number, line in enumerate(CLOCKS.splitlines(), 1) if line.endswith("# refused")}


def banned(place: str) -> set[int]:
    """The lines of CLOCKS that ruff refuses as banned, were they in a file of that name."""
    done = run(TOOLS / "ruff", "check", "--output-format=json", "--stdin-filename", place, "-", text=CLOCKS)
    return {found["location"]["row"] for found in json.loads(done.stdout) if found["code"] == "TID251"}


@pytest.mark.parametrize("place", ["certbotk8s/domain/x.py", "certbotk8s/controller/x.py", "solvers/x.py"])
def test_reading_a_clock_is_refused(place: str) -> None:
    """Each way to read the time, or to wait, is refused by the linter wherever it stands.

    Mutation: remove a row of ruff's banned-api, or exempt a folder.
    """
    assert banned(place) == REFUSED


def test_one_file_reads_the_clocks() -> None:
    """Only clock.py may read a clock, and only it imports `time`, whose other functions read one too.

    Mutation: call time.time_ns() anywhere.
    """
    assert banned("certbotk8s/clock.py") == set()
    assert [path.relative_to(ROOT).as_posix() for path in CODE if "time" in imported(path)] == ["certbotk8s/clock.py"]


def test_every_reason_is_given_somewhere() -> None:
    """No reason is declared that the controller or a solver never gives; certctl only reads them.

    Mutation: declare a reason that nothing uses.
    """
    given = {
        node.attr
        for path in CODE
        if path.name != "reasons.py" and path.parent.name != "certctl"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }
    assert {reason.name for reason in Reason} - given == set()


def test_every_setting_explains_itself() -> None:
    """`python -m certbotk8s --help` names every setting with its help text.

    Mutation: leave a setting's text empty, or a flag undeclared.
    """
    done = run(sys.executable, "-m", "certbotk8s", "--help")
    assert done.returncode == 0, done.stderr
    shown = re.sub(r"\s+", " ", done.stdout)
    for setting in fields(Settings):
        text = setting.metadata["help"]
        assert len(text) > 10, setting.name
        assert f"--{setting.name.replace('_', '-')} " in shown
        # A word with a hyphen may stand on two lines.
        assert text.replace("- ", "-") in shown.replace("- ", "-")


def declared() -> list[tuple[str, str, str]]:
    """(group, name, value) of each entry point in pyproject.toml."""
    project: dict[str, Any] = PYPROJECT["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    return [(group, name, value) for group, entries in groups.items() for name, value in entries.items()]


def test_entry_points_load() -> None:
    """What is installed are the entry points of pyproject.toml, and each leads to something that can be called.

    Mutation: move a solver's class without its entry point.
    """
    installed = distribution("certbotk8s").entry_points
    assert sorted((entry.group, entry.name, entry.value) for entry in installed) == sorted(declared())
    for entry in installed:
        assert callable(entry.load()), entry


def texts() -> Iterator[Path]:
    """The files of the project, those that tools write apart."""
    for top in ROOT.iterdir():
        if top.name == ".ci" or (not top.name.startswith(".") and top.name != "uv.lock"):
            files = [top] if top.is_file() else top.rglob("*")
            yield from (path for path in files if path.is_file() and "__pycache__" not in path.parts)


def test_the_text_names_no_place_of_a_machine() -> None:
    """No file leads to a folder that exists on one machine only.

    Mutation: write the home folder of root into a comment.
    """
    homes = "|".join(("root", "work", "home", "Users"))
    absolute = re.compile(rf"(?<![\w.~-])/(?:{homes})/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if absolute.search(line)
    ]
    assert found == []


def test_types_are_prepared_before_threads_start() -> None:
    """No Struct is decoded without a decoder that was made with its module: msgspec prepares a type at its first use,
    and two threads that do so at once crash the interpreter.

    Mutation: decode pages of a list by `msgspec.json.decode(body, type=Page)`.
    """
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for package in ("certbotk8s", "solvers")
        for path in (ROOT / package).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and any(keyword.arg == "type" for keyword in call.keywords)
        if "msgspec" in ast.unparse(call.func) or ast.unparse(call.func).endswith(".decode")
    ]
    assert found == []
