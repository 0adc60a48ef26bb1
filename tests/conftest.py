"""The lab that tests use, and what is each test's own in it."""

import os
import secrets
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.lab.build import binaries
from tests.lab.lab import Lab, running_lab

_FIXTURE = "lab"

# No test asserts a time, and an example that a busy machine puts off for 200 ms is no failure.
settings.register_profile("certbotk8s", deadline=None)
settings.load_profile("certbotk8s")

# A shell starts what it runs in the background deaf to Ctrl-C, and the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the lab's programs, where a collected test needs them, before the time limit of any test runs."""
    if "CERTBOTK8S_LAB" in os.environ or session.config.option.collectonly:
        return
    if any(_needs_lab(item) for item in session.items):
        with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            binaries()


def _needs_lab(item: pytest.Item) -> bool:
    """Whether the test uses the fixture of this file, and not one of its own with that name."""
    definitions = item._fixtureinfo.name2fixturedefs.get(_FIXTURE, ()) if isinstance(item, pytest.Function) else ()
    return bool(definitions) and definitions[-1].baseid == "tests"


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The lab of `$CERTBOTK8S_LAB` (a lab.json), else one that lives for this session."""
    path = os.environ.get("CERTBOTK8S_LAB")
    if path:
        yield Lab.load(path)
        return
    with running_lab() as running:
        yield running.lab


@pytest.fixture
def namespace(lab: Lab) -> Iterator[str]:
    """A namespace of this test's own."""
    name = f"test-{secrets.token_hex(4)}"
    lab.api("/api/v1/namespaces", body={"metadata": {"name": name}})
    yield name
    lab.api(f"/api/v1/namespaces/{name}", method="DELETE")


@pytest.fixture
def suffix() -> str:
    """A DNS suffix of this test's own: the CA keeps authorizations, and the lab's DNS server answers it."""
    return f"{secrets.token_hex(4)}.example.test"
