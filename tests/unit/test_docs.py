"""The reference lists what there is, all of it and nothing else."""

import re
from dataclasses import fields
from pathlib import Path

from certbotk8s.domain import api
from certbotk8s.domain.reasons import Reason
from certbotk8s.settings import Settings

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()

# Defaults that are found out, not fixed.
BY_ITSELF = {
    "nameservers": "the system's",
    "allow_addresses": "none",
    "issuer_servers": "any",
    "identity": "the host's name and a random part",
}


def section(title: str) -> str:
    """The text below a heading of the second level."""
    return REFERENCE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_reason_is_explained() -> None:
    """Each reason that a condition or an Event can carry has its row, and no row is of a reason that is gone.

    Mutation: add a Reason without a row.
    """
    listed = re.findall(r"^\| (\w+) \|", section("Reasons"), re.MULTILINE)
    assert sorted(set(listed) - {"reason"}) == sorted(Reason)


def test_every_annotation_is_explained() -> None:
    """Each annotation and label of ours is in the table.

    Mutation: add an ANNOTATION_ constant without a row.
    """
    known = {value for name, value in vars(api).items() if name.startswith(("ANNOTATION_", "LABEL_"))}
    assert set(re.findall(r"`(certbotk8s\.io/[\w-]+)`", section("Annotations and labels"))) == known


def test_every_setting_is_explained() -> None:
    """Each setting has its row with the flag, the environment variables and the default.

    Mutation: change a default in settings.py alone.
    """
    rows = section("Settings of the controller")
    for setting in fields(Settings):
        flag = setting.name.replace("_", "-")
        row = next(line for line in rows.splitlines() if line.startswith(f"| `--{flag}`"))
        assert f"`CERTBOTK8S_{setting.name.upper()}`" in row
        assert BY_ITSELF.get(setting.name, f"`{setting.default}`") in row
