"""The example manifests are accepted as they stand."""

from pathlib import Path

import pytest

from tests.lab.controller import install_crds
from tests.lab.lab import Lab

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_accepted(lab: Lab, path: Path) -> None:
    """The API server accepts each example manifest under strict validation.

    Mutation: misspell a field of an example.
    """
    install_crds(lab)
    for namespace in ("certbotk8s", "shop"):
        lab.kubectl("create", "namespace", namespace, check=False)
    said = lab.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", str(path))
    assert "serverside-applied" in said


def test_there_are_examples() -> None:
    """The folder is not empty, so that the test above tests something.

    Mutation: move the examples.
    """
    assert {path.stem for path in EXAMPLES} >= {"letsencrypt", "eab", "ingress", "certificate"}
