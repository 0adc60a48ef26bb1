"""The figures as a page: a Markdown table beside goals and other programs, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.bench.issuance import Measurement, median
from tests.bench.servers import host


class _Other(NamedTuple):
    """What a figure is held against. cert-manager's: the real controller of 1.21.1 on a host of the same kind, set up
    as kindly as can be: no pod to start, no ingress controller to wait for, a CA that validates at once."""

    goal: str = ""
    cert_manager: str = ""


_BOTH = {
    "one alone, seconds from apply to Ready": _Other("0.5 + load time of the ingress controller", "10; waits off: 1.9"),
    "requests to the CA": _Other("7", "11 to 13"),
    "writes to Kubernetes": _Other("<= 10", "57, 4 of them conflicts"),
    "certificates issued by the CA": _Other("as many as wanted", "200 to 204 for 200"),
    "etcd left, KiB": _Other("<= 12", "39"),
}
_OTHERS = {
    "ECDSA": _BOTH
    | {
        "certificates per second": _Other(">= 20", "0.56; waits off: 4.7 to 6.2"),
        "CPU of the controller, ms": _Other("<= 35", "63"),
    },
    "RSA": _BOTH
    | {
        "certificates per second": _Other(">= 12", "0.55; waits off: 4.2 to 5.3"),
        "CPU of the controller, ms": _Other("<= 75", "128"),
    },
}
_RATE = "certificates per second"
_INTRODUCTION = """\
# {count} Certificates at once by HTTP-01, {time:%Y-%m-%d %H:%M} UTC

{cores} cores ({cpu}), shared by the controller, the API server, etcd, the CA, Traefik and the benchmark itself.
{rounds}

Figures are per certificate unless they name something else. Those of two hosts, or of two runs on a busy one, say
nothing to each other; the bare client was measured in the same run. How it is measured: [README.md](README.md).
"""


class Results(msgspec.Struct):
    """What a run of the benchmark has brought."""

    time: datetime
    host: dict[str, object]
    count: int
    measurements: list[Measurement]
    floors: dict[str, dict[str, float]]
    """The bare client's figures by key algorithm."""


def results(count: int, measurements: list[Measurement], floors: dict[str, dict[str, float]]) -> Results:
    """Everything measured, with the present time and this host."""
    return Results(datetime.now(UTC).replace(microsecond=0), host(), count, measurements, floors)


def write(found: Results, folder: Path) -> Path:
    """Write the pair of files, named by time and size; the Markdown one's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found.time:%Y-%m-%d-%H%M}-n{found.count}.md"
    path.write_text(markdown(found), encoding="utf-8")
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    return path


def markdown(found: Results) -> str:
    """The page."""
    keys = list(dict.fromkeys(each.key for each in found.measurements))
    trees = list(dict.fromkeys(each.tree for each in found.measurements))
    rounds = len(found.measurements) // len(keys) // len(trees)
    said = f"Medians of {rounds} rounds, in which all columns took turns." if rounds > 1 else "One round."
    parts = [
        _INTRODUCTION.format(
            count=found.count, time=found.time, cores=found.host["cores"], cpu=found.host["cpu"], rounds=said
        )
    ]
    for key in keys:
        columns = [median([each for each in found.measurements if (each.key, each.tree) == (key, t)]) for t in trees]
        parts += _tables(key, columns, found.floors.get(key, {}))
    return "\n".join(parts)


def _tables(key: str, columns: Sequence[Measurement], floor: dict[str, float]) -> list[str]:
    names = [column.tree for column in columns] if len(columns) > 1 else ["certbotk8s"]
    rows = []
    for figure in columns[0].figures:
        other = _OTHERS[key].get(figure, _Other())
        mine = [_number(column.figures[figure]) for column in columns]
        rows.append([figure, *mine, other.goal, other.cert_manager, _number(floor.get(figure))])
        if figure == _RATE and floor:
            shares = [f"{100 * column.figures[_RATE] / floor[_RATE]:.0f} %" for column in columns]
            rows.append(["of the bare client's rate", *shares, "", "", ""])
    cpu = [[name, *[_number(column.cpu[name]) for column in columns]] for name in columns[0].cpu]
    cpu.append(["all", *[_number(round(sum(column.cpu.values()), 1)) for column in columns]])
    stages = [
        [name, *[f"{column.stages[name][0]:.2f}, {column.stages[name][1]:.2f}" for column in columns]]
        for name in columns[0].stages
    ]
    return [
        f"## {key}\n",
        _table(["", *names, "goal", "cert-manager 1.21.1", "bare client"], rows),
        "CPU by program, ms per certificate:\n",
        _table(["", *names], cpu),
        "Seconds from one durable step to the next, median and 95th percentile:\n",
        _table(["", *names], stages),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _number(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}".rstrip("0").rstrip(".")
