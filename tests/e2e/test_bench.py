"""The benchmark measures what it says, on a run too small to say how fast anything is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.bench import issuance
from tests.bench.__main__ import ready_issuer
from tests.bench.floor import floor
from tests.bench.issuance import measure
from tests.bench.page import Results, results, write
from tests.lab.controller import ROOT
from tests.lab.lab import Lab


@pytest.mark.soak
def test_a_small_run_is_measured_and_kept(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two certificates: the servers' counts are right, every moment has its place, and the page is kept twice.

    Mutations: the requests before the mark count too; the next key counts as the tls Secret.
    """
    monkeypatch.setattr(issuance, "ALONE", 1)
    found = measure(lab, ready_issuer(lab), 2, "ECDSA", ROOT)
    bare = floor(lab, 2, "ECDSA")
    assert found.figures["requests to the CA"] == 7
    assert (found.figures["orders placed"], found.figures["certificates issued by the CA"]) == (2, 2)
    assert found.figures["writes to Kubernetes"] == 10
    assert bare["certificates issued by the CA"] == 2
    assert all(bare.values())
    assert found.cpu["controller"] > 0
    waits = [median for median, _ in found.stages.values()]
    assert all(wait >= 0 for wait in waits)
    assert found.figures["from apply to Ready, longest"] >= max(waits)
    page = write(results(2, [found], {"ECDSA": bare}), tmp_path)
    assert "| requests to the CA | 7 | 7 | 11 to 13 |" in page.read_text()
    kept = msgspec.json.decode(page.with_suffix(".json").read_bytes(), type=Results)
    assert kept.measurements == [found]
