"""The example manifests are accepted as they stand, those in the pages on CAs and in the guides too."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lab.controller import install_crds
from tests.lab.lab import Lab

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted((DOCS / "cas").glob("*.md"))
GUIDES = sorted(DOCS.glob("*.md"))

_BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Example(NamedTuple):
    """Manifests, and where they stand."""

    where: str
    manifests: str


EXAMPLES = [
    Example(path.relative_to(DOCS).with_suffix("").as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted((DOCS / "examples").glob("*.yaml"))
] + [
    Example(f"{page.relative_to(DOCS).with_suffix('').as_posix()}-{number}", block)
    for page in PAGES + GUIDES
    for number, block in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


@pytest.fixture(scope="module")
def installed(lab: Lab) -> Lab:
    """The lab with the CRDs, and the namespaces that the examples are for."""
    install_crds(lab)
    for namespace in ("certbotk8s", "shop"):
        lab.kubectl("create", "namespace", namespace, check=False)
    return lab


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.where)
def test_example_is_accepted(installed: Lab, example: Example) -> None:
    """The API server accepts each example manifest under strict validation.

    Mutation: misspell a field of an example, or of a manifest in docs/policy.md.
    """
    said = installed.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", input=example.manifests
    )
    assert "serverside-applied" in said


def test_there_are_examples() -> None:
    """The folders are not empty, and each page on a CA shows an issuer, so that the test above tests something.

    Mutation: move the examples; mark a block as another language.
    """
    places = {example.where for example in EXAMPLES}
    assert places >= {f"examples/{name}" for name in ("letsencrypt", "eab", "ingress", "certificate", "policy")}
    assert places >= {"policy-1", "policy-2"}
    assert len(PAGES) >= 10
    assert {page.stem for page in PAGES} == {
        place.removeprefix("cas/").rpartition("-")[0] for place in places if place.startswith("cas/")
    }
