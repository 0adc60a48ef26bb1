"""Loops that have cost others thousands of certificates, and cannot happen here: orders are counted at the CA.

Where nothing else is said the test is in this file.

| cause | test |
| --- | --- |
| two Certificates with one secretName | test_two_certificates_made_together_for_one_secret; test_issuance.py |
| an Ingress that names one secretName twice | test_an_ingress_that_names_a_secret_twice |
| another controller that owns the Secret | test_somebody_rewrites_the_secret_all_the_time; test_issuance.py |
| a certificate for another key, for other names | test_a_certificate_that_is_not_what_was_asked_for |
| a certificate that has expired, or is not valid yet | test_a_certificate_that_is_not_what_was_asked_for |
| issuerRef changed while the Secret is valid | test_another_issuer_for_a_valid_secret |
| renewBefore not shorter than the life, a notBefore in the past | test_renew_before_is_longer_than_what_is_left |
| renewal times of less than a second | test_short_lives_are_renewed_once_each; unit/test_renewal.py |
| caches behind the own writes | test_api_trouble.py, 50 and 1,000 at once; unit/test_reconcile_certificate.py |
| API errors in the midst of an issuance | test_every_write_fails_once |
| labels and annotations changed by others | test_somebody_labels_the_secret |
| the CA writes the names otherwise (order, common name) | test_the_ca_writes_the_names_otherwise |
"""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.error
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from tests.e2e.faults import FaultyCA, faulty_ca, forged
from tests.lab.acme_proxy import to
from tests.lab.kube_proxy import refused
from tests.lab.kube_proxy import to as asking
from tests.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.controller import Controller
    from tests.lab.kube_proxy import KubeProxy
    from tests.lab.lab import Lab

pytestmark = pytest.mark.usefixtures("plain")

WHILE = 2.0  # seconds; a loop makes dozens of rounds in them


@pytest.fixture(scope="module")
def controller(proxied: tuple[Controller, KubeProxy]) -> Controller:
    """The controller, in place of the one that others share."""
    return proxied[0]


@pytest.fixture
def ca(lab: Lab, controller: Controller) -> Iterator[FaultyCA]:
    """An issuer whose CA is behind a proxy."""
    with faulty_ca(lab) as faulty:
        yield faulty


def orders_while(lab: Lab, seconds: float = WHILE) -> int:
    """How many orders are placed in that time."""
    mark = lab.mark()
    time.sleep(seconds)
    return lab.orders(mark)


def test_two_certificates_made_together_for_one_secret(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Of two Certificates made in the same moment for one Secret, one orders, once; the other says why it does not.

    Mutation: drop `_secret_conflict` from BLOCKS.
    """
    mark = lab.mark()
    for name in ("one", "two"):
        site.certificate(name, [f"{name}.{suffix}"], issuer, secretName="shared")
    site.ready("one")
    site.condition("two", "Ready", "False", "SecretConflict")
    assert orders_while(lab) == 0
    assert lab.orders(mark) == 1


def test_an_ingress_that_names_a_secret_twice(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Two tls entries for one Secret cost one order, for the hosts of both.

    Mutation: let the later entry win, and the certificate is for its hosts alone.
    """
    mark = lab.mark()
    a, b, c = (f"{letter}.{suffix}" for letter in "abc")
    site.ingress("web", [([a, b], "web-tls"), ([b, c], "web-tls")], issuer)
    site.ready("web-tls")
    assert orders_while(lab) == 0
    assert lab.orders(mark) == 1
    names = site.leaf("web-tls").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sorted(names.get_values_for_type(x509.DNSName)) == [a, b, c]


@pytest.mark.parametrize("keeps_metadata", [True, False], ids=["data", "all"])
def test_somebody_rewrites_the_secret_all_the_time(
    lab: Lab, site: Site, issuer: str, suffix: str, *, keeps_metadata: bool
) -> None:
    """Somebody puts something else into the Secret five times a second: nothing is ordered, and it is told.

    Mutation: drop `_too_soon` from HOLDS (data), or count a Secret without our annotation as left behind (all).
    """
    site.certificate("theirs", [f"theirs.{suffix}"], issuer)
    site.ready("theirs")
    pair: Any = (site.secret("theirs") or {})["data"]
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    site.nothing_left()
    mark, stop = lab.mark(), threading.Event()

    def rewrite() -> None:
        while not stop.wait(0.2):
            with contextlib.suppress(urllib.error.HTTPError):
                metadata = (site.secret("web") or {})["metadata"] if keeps_metadata else {"name": "web"}
                metadata.pop("resourceVersion", None)
                body = {"metadata": metadata, "type": "kubernetes.io/tls", "data": pair}
                lab.api(site.secret_path("web"), method="PUT", body=body)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        site.condition("web", "Ready", "False", "BackingOff" if keeps_metadata else "SecretNotOwned")
        time.sleep(WHILE)
    finally:
        stop.set()
        thread.join()
    writes = [write for write in lab.kube_writes(mark) if (write.resource, write.name) == ("secrets", "web")]
    assert lab.orders(mark) == 0
    assert len(writes) <= 5


@pytest.mark.parametrize(
    ("flaw", "why"),
    [
        pytest.param({"for_our_key": False}, "another key", id="key"),
        pytest.param({"life": (-timedelta(days=9), -timedelta(days=1))}, "it expired", id="expired"),
    ],
)
def test_a_certificate_that_is_not_what_was_asked_for(
    site: Site, ca: FaultyCA, suffix: str, flaw: dict[str, Any], why: str
) -> None:
    """A certificate that is of no use is not installed; the CA is asked again later, and the old one serves meanwhile.

    Mutation: install without asking `pem.refusal`, or give such a failure no back-off.
    """
    names = [f"web.{suffix}"]
    site.certificate("web", names, ca.issuer)
    serial = site.ready("web")["serialNumber"]
    with ca.proxy.inject(to("certificate"), forged(site, **({"names": names} | flaw))):
        site.annotate("web", renew_now="1")
        site.condition("web", "Issuing", "False", "CertificateRejected", why)
        time.sleep(WHILE)
    assert ca.counts()["newOrder"] <= 3  # one more at once where the key is another: the order may have been another's
    assert f"{site.leaf('web').serial_number:x}" == serial
    site.condition("web", "Ready", "True")
    site.annotate("web", renew_now="2")
    assert site.ready("web", revision=2)["serialNumber"] != serial


def test_another_issuer_for_a_valid_secret(lab: Lab, site: Site, ca: FaultyCA, issuer: str, suffix: str) -> None:
    """A Certificate that changes its issuer keeps its valid certificate: nothing is ordered until that is renewed.

    Mutation: let `_renewing` call a certificate of another issuer due.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    serial = site.ready("web")["serialNumber"]
    site.nothing_left()
    mark = lab.mark()
    for number in range(6):
        name = (ca.issuer, issuer)[number % 2]
        site.patch_certificate("web", {"spec": {"issuerRef": {"name": name}}})
    site.patch_certificate("web", {"spec": {"issuerRef": {"name": ca.issuer}}})
    assert orders_while(lab) == 0
    assert site.ready("web")["serialNumber"] == serial
    site.annotate("web", renew_now="1")
    site.ready("web", revision=2)
    assert (lab.orders(mark), ca.counts()["newOrder"]) == (1, 1)


@pytest.mark.parametrize(("before", "due"), [("200m", True), ("240m", False)])
def test_renew_before_is_longer_than_what_is_left(
    lab: Lab, site: Site, ca: FaultyCA, suffix: str, before: str, *, due: bool
) -> None:
    """The CA dates a certificate of three hours back by one: a renewBefore of 200 minutes makes it due at once, which
    is told and orders nothing before the shortest interval has passed; one of its whole life is not heeded.

    Mutation: drop `_too_soon` from HOLDS (200m), or take any renewBefore as it is (240m).
    """
    names = [f"web.{suffix}"]
    with ca.proxy.inject(to("certificate"), forged(site, names, life=(-timedelta(hours=1), timedelta(hours=3)))):
        site.certificate("web", names, ca.issuer, renewBefore=before)
        site.ready("web")
        if due:
            site.condition("web", "Issuing", "False", "BackingOff")
        assert orders_while(lab) == 0
        site.condition("web", "Issuing", "False", "BackingOff" if due else "Issued")
    site.condition("web", "Ready", "True")
    assert ca.counts()["newOrder"] == 1


def test_short_lives_are_renewed_once_each(site: Site, ca: FaultyCA, suffix: str) -> None:
    """Certificates that live eight seconds are renewed when four are left, once each: three or four in twelve seconds.

    Mutation: let `_renewing` call every certificate due, and drop `_too_soon` from HOLDS.
    """
    names = [f"web.{suffix}"]
    with ca.proxy.inject(to("certificate"), forged(site, names, life=(timedelta(0), timedelta(seconds=8)))):
        site.certificate("web", names, ca.issuer)
        site.ready("web")
        time.sleep(12)
        revision, orders = site.status("web")["revision"], ca.counts()["newOrder"]
    assert 3 <= revision <= orders <= 5


def test_every_write_fails_once(lab: Lab, site: Site, way: KubeProxy, issuer: str, suffix: str) -> None:
    """Each write of an issuance fails once, some after the API server has acted: one certificate comes of it.

    Mutation: count an error of the API server as a failed attempt.
    """
    since, mark = lab.acme.mark(), lab.mark()
    for method, path, passed_on in (
        ("POST", ".*/secrets", True),
        ("POST", ".*/secrets", False),
        ("PUT", ".*/certificates/.*/status", True),
        ("PUT", ".*/certificates/.*/status", False),
        ("POST", ".*/ingresses", True),
        ("PATCH", ".*/ingresses/.*", False),
        ("DELETE", ".*/secrets/.*", True),
    ):
        way.inject(asking(method, path), refused(500, "InternalError", "oops", passed_on=passed_on), times=1)
    site.certificate("web", [f"web.{suffix}"], issuer)
    status = site.ready("web", timeout=120)
    site.nothing_left()
    print(f"\n{lab.acme.issued(since)} certificates, {lab.orders(mark)} orders")
    assert (status["revision"], status.get("failedAttempts", 0)) == (1, 0)
    assert lab.acme.issued(since) == 1
    assert lab.orders(mark) <= 3
    assert f"{site.leaf('web').serial_number:x}" == status["serialNumber"]


def test_somebody_labels_the_secret(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Labels and annotations of others stay, a changed annotation of ours orders nothing, and nobody fights over them.

    Mutation: let `ownership` compare all labels.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    site.nothing_left()
    mark = lab.mark()
    metadata = {
        "labels": {"example.test/team": "a"},
        "annotations": {"example.test/note": "b", "certbotk8s.io/issuer": "c", "certbotk8s.io/account-uri": "d"},
    }
    site.patch("secret", "web", {"metadata": metadata})
    assert orders_while(lab) == 0
    writes = [write for write in lab.kube_writes(mark) if (write.resource, write.name) == ("secrets", "web")]
    assert writes == []
    found = (site.secret("web") or {})["metadata"]
    assert found["labels"] == {"certbotk8s.io/role": "tls", "example.test/team": "a"}
    site.condition("web", "Ready", "True")


def test_the_ca_writes_the_names_otherwise(lab: Lab, site: Site, ca: FaultyCA, suffix: str) -> None:
    """Names in another order, in capitals, and a common name that nobody asked for make no other certificate.

    Mutation: compare the names as they are written.
    """
    names = [f"{letter}.{suffix}" for letter in "abc"]
    written = [name.upper() for name in reversed(names)]
    with ca.proxy.inject(to("certificate"), forged(site, written, common_name=names[1])):
        site.certificate("web", names, ca.issuer)
        site.ready("web")
    assert orders_while(lab) == 0
    assert ca.counts()["newOrder"] == 1
