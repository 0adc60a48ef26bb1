"""What the controller refuses, or the CA does: a condition and an event that say why, and how it goes on."""

import secrets
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509

from tests.lab.acme import BLOCKED_NAME, start_dns
from tests.lab.controller import Controller, install_crds
from tests.lab.lab import Lab
from tests.lab.network import Ports
from tests.lab.processes import Children
from tests.site import Site, assert_plain, wait_for

DEFAULT_CLASS = "ingressclass.kubernetes.io/is-default-class"
# Long enough that something asked again and again is asked again.
A_WHILE = 3.0


@pytest.fixture(scope="module")
def controller(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """A controller with a second nameserver, which knows every name.

    Its own look succeeds so where the CA's fails, as with split DNS, and no test waits for the time limit of that look.
    """
    install_crds(lab)
    with Ports() as ports, Children(tmp_path_factory.mktemp("dns")) as children:
        second = start_dns(Path(lab.bin), ports, children)
        with Controller(lab, arguments=[f"--nameservers={second.address}", "--log-level=debug"]) as running:
            running.wait_ready()
            yield running
        said = running.log.read_text()
        assert "Traceback" not in said
        assert "a bug in the controller" not in said


@pytest.fixture(autouse=True)
def _plain(site: Site) -> Iterator[None]:
    """Whatever a test provokes is told in plain words."""
    yield
    assert_plain(site.said())


@pytest.fixture
def lost(lab: Lab, suffix: str) -> Iterator[str]:
    """A name for which the CA's DNS server answers SERVFAIL."""
    name = f"lost.{suffix}"
    lab.set_dns(name, servfail=True)
    yield name
    lab.clear_dns(name)


def seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def refused(site: Site, name: str, reason: str, *, ready: str = "False") -> str:
    """The sentence of a refusal, which stands in both conditions and in an Event."""
    message: str = site.condition(name, "Issuing", "False", reason)["message"]
    assert site.event(name, reason, message[:1000])
    if ready == "False":
        assert site.condition(name, "Ready", "False", reason)["message"] == message
    return message


def sans(site: Site, secret: str) -> list[str]:
    names = site.leaf(secret).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return sorted(str(name.value) for name in names.value)


def test_an_issuer_that_does_not_exist(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A Certificate names the issuer that it misses, orders nothing, and goes on by itself when that appears.

    Mutation: wake the Certificates of an issuer neither when it appears nor when its account is open.
    """
    mark = lab.mark()
    site.certificate("web", [f"web.{suffix}"], "late", kind="Issuer")
    message = refused(site, "web", "IssuerNotFound")
    assert message == f"Issuer {site.namespace}/late does not exist. This goes on by itself when it appears."
    site.certificate("other", [f"other.{suffix}"], f"late-{suffix.partition('.')[0]}")
    assert "ClusterIssuer late-" in refused(site, "other", "IssuerNotFound")
    assert lab.orders(mark) == 0
    site.issuer("late")
    site.ready("web")


def test_a_name_that_the_ca_rejects(lab: Lab, site: Site, controller: Controller, issuer: str) -> None:
    """The CA's words and the name it blames are told, the next attempt is a minute later, and nothing is ordered
    meanwhile: not for a changed annotation, and not after a restart.

    Mutation: drop `_backing_off` from HOLDS.
    """
    mark = lab.mark()
    site.certificate("web", [BLOCKED_NAME], issuer)
    message = refused(site, "web", "RejectedIdentifier")
    print(f"\n{message}")
    assert 'The CA says: "' in message
    assert BLOCKED_NAME in message
    assert "remove it, or use another issuer" in message
    status = site.status("web")
    assert status["failedAttempts"] == 1
    assert status["lastProblem"]["type"] == "rejectedIdentifier"
    assert status["lastProblem"]["detail"] in message
    assert seconds(status["nextAttemptTime"]) - seconds(status["lastFailureTime"]) == 60
    assert "issuance" not in status
    next_attempt = datetime.fromisoformat(status["nextAttemptTime"])
    assert message.endswith(f"Next attempt {next_attempt:%Y-%m-%d %H:%M} UTC.")
    site.nothing_left()

    site.annotate("web", note="x")
    time.sleep(A_WHILE)
    controller.restart()
    controller.wait_ready()
    time.sleep(A_WHILE)
    assert lab.orders(mark) == 1
    assert site.condition("web", "Issuing", "False", "RejectedIdentifier")["message"] == message


def renew_now(site: Site, name: str, names: list[str]) -> None:
    site.annotate(name, renew_now="1")


def change_names(site: Site, name: str, names: list[str]) -> None:
    site.patch_certificate(name, {"spec": {"dnsNames": names}})


@pytest.mark.parametrize("ask", [renew_now, change_names])
def test_a_name_whose_dns_is_broken(
    lab: Lab, site: Site, issuer: str, suffix: str, lost: str, ask: Callable[[Site, str, list[str]], None]
) -> None:
    """The CA's words about DNS are told with what to check; once it is mended, a wish to renew or a changed spec is
    enough to go on before the next attempt.

    Mutation: compare neither generation nor renew-now in `_backing_off`.
    """
    mark = lab.mark()
    site.certificate("web", [lost], issuer)
    message = refused(site, "web", "ChallengeFailed")
    print(f"\n{message}")
    assert 'The CA says: "' in message
    assert f'could not resolve URL "http://{lost}:' in message
    assert f"could not reach {lost}: check its DNS records" in message
    status = site.status("web")
    problem = status["lastProblem"]
    assert (problem["type"], problem["identifiers"]) == ("connection", [lost])
    assert problem["detail"] in message
    assert seconds(status["nextAttemptTime"]) - seconds(status["lastFailureTime"]) == 60
    site.nothing_left()
    time.sleep(1)
    assert lab.orders(mark) == 1

    lab.clear_dns(lost)
    ask(site, "web", [lost, f"www.{suffix}"])
    status = site.ready("web")
    assert lab.orders(mark) == 2
    assert not {"failedAttempts", "nextAttemptTime", "lastFailureTime", "lastProblem"} & {
        key for key, value in status.items() if value
    }


def test_one_bad_name_among_good_ones_is_named(site: Site, issuer: str, suffix: str, lost: str) -> None:
    """Of several names the one that failed is told, and only that one.

    Mutation: explain a failed order by its first authorization, whatever its status.
    """
    site.certificate("web", [f"a.{suffix}", lost, f"b.{suffix}"], issuer)
    message = refused(site, "web", "ChallengeFailed")
    assert lost in message
    assert f"a.{suffix}" not in message
    assert f"b.{suffix}" not in message
    assert site.status("web")["lastProblem"]["identifiers"] == [lost]
    site.nothing_left()


def test_a_wildcard_with_http01_alone(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A wildcard name, which no CA validates by HTTP-01, ends with what the CA offers and what the issuer solves.

    Mutation: take any challenge that is offered, whatever the solver solves.
    """
    site.certificate("web", [f"*.{suffix}"], issuer)
    message = refused(site, "web", "NotPreauthorized")
    print(f"\n{message}")
    start, _, rest = message.partition(";")
    assert start.startswith(f"The CA has not validated *.{suffix} for this account and offers dns-01")
    assert "http-01" not in start
    advice = "Have the name validated at the CA, or add a solver to the issuer."
    assert rest.startswith(f" ClusterIssuer {issuer} solves http-01. {advice}")
    site.nothing_left()


def test_an_issuer_without_solvers(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Without solvers a name that the CA has not validated before is refused in one sentence; with one it goes on.

    Mutation: pass over an authorization that no solver can serve.
    """
    site.issuer("bare", solvers=None)
    site.certificate("web", [f"web.{suffix}"], "bare", kind="Issuer")
    message = refused(site, "web", "NotPreauthorized")
    assert f"The CA has not validated web.{suffix} for this account" in message
    assert f"Issuer {site.namespace}/bare solves none. Have the name validated at the CA, or add a solver" in message
    site.patch("issuers.certbotk8s.io", "bare", {"spec": {"acme": {"solvers": [{"http01": {"ingress": {}}}]}}})
    site.annotate("web", renew_now="1")
    site.ready("web")


@pytest.fixture
def no_default_class(lab: Lab) -> Iterator[Callable[[bool], None]]:
    """The lab's IngressClass is not the default one, until the test says otherwise; it is again at the end."""

    def is_default(yes: bool) -> None:
        lab.kubectl("annotate", "ingressclass", "traefik", "--overwrite", f"{DEFAULT_CLASS}={str(yes).lower()}")

    is_default(False)
    try:
        yield is_default
    finally:
        is_default(True)


def test_no_ingress_class(site: Site, issuer: str, suffix: str, no_default_class: Callable[[bool], None]) -> None:
    """With no ingress class anywhere the three places that could name one are told; the issuer's is enough, and so is
    a default one.

    Mutation: take the first IngressClass that there is in `_class`.
    """
    time.sleep(0.2)  # the controller's cache of classes
    site.certificate("web", [f"web.{suffix}"], issuer)
    message = refused(site, "web", "NoIngressClass")
    print(f"\n{message}")
    assert f"web.{suffix}" in message
    assert f"set ingressClassName in the HTTP-01 solver of ClusterIssuer {issuer}" in message
    assert f'annotate an IngressClass with {DEFAULT_CLASS}: "true"' in message
    status = site.status("web")
    assert seconds(status["nextAttemptTime"]) - seconds(status["lastFailureTime"]) == 60
    site.nothing_left()
    site.issuer("named", solvers=[{"http01": {"ingress": {"ingressClassName": "traefik"}}}])
    site.certificate("other", [f"other.{suffix}"], "named", kind="Issuer")
    site.ready("other")

    no_default_class(True)
    time.sleep(0.2)
    site.patch_certificate("web", {"spec": {"dnsNames": [f"web.{suffix}", f"www.{suffix}"]}})
    site.ready("web")


def test_names_are_normalised(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Upper case, a trailing dot and an internationalised name are ordered as one A-label, once, and need nothing more.

    Mutation: leave the names as they stand in `wanted_names`.
    """
    mark = lab.mark()
    site.certificate("web", [f"BÜCHER.{suffix}.", f"bücher.{suffix.upper()}", f"xn--bcher-kva.{suffix}"], issuer)
    site.ready("web")
    site.nothing_left()
    assert sans(site, "web") == [f"xn--bcher-kva.{suffix}"]
    site.annotate("web", note="x")
    time.sleep(1)
    assert lab.orders(mark) == 1


def test_a_name_that_is_none(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A name that the schema lets through and IDNA does not is told, nothing is ordered, and a mended one goes on.

    Mutation: let `normalise` pass what IDNA refuses.
    """
    mark = lab.mark()
    site.certificate("web", [f"xn--a.{suffix}"], issuer)
    message = refused(site, "web", "InvalidSpec")
    print(f"\n{message}")
    assert f'"xn--a.{suffix}" is no DNS name' in message
    assert "spec.dnsNames" in message
    assert lab.orders(mark) == 0
    site.patch_certificate("web", {"spec": {"dnsNames": [f"a.{suffix}"]}})
    site.ready("web")


def test_a_renewal_that_fails(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A failing renewal takes nothing away: Ready stays True, the Secret stays as it is, and the message says until
    when that holds.

    Mutation: compute Ready from the last attempt.
    """
    host = f"web.{suffix}"
    site.certificate("web", [host], issuer)
    before = site.ready("web")
    secret = site.secret("web")
    lab.set_dns(host, servfail=True)
    try:
        site.annotate("web", renew_now="1")
        message = refused(site, "web", "ChallengeFailed", ready="True")
        print(f"\n{message}")
        until = datetime.fromisoformat(before["notAfter"])
        assert f"The present certificate is valid until {until:%Y-%m-%d %H:%M} UTC" in message
        assert site.condition("web", "Ready", "True")["lastTransitionTime"]
        status = site.status("web")
        assert (status["serialNumber"], status["revision"]) == (before["serialNumber"], 1)
        assert site.secret("web") == secret
        site.nothing_left()
    finally:
        lab.clear_dns(host)
    site.annotate("web", renew_now="2")
    after = site.ready("web", revision=2)
    assert after["serialNumber"] != before["serialNumber"]


def test_names_added_that_fail(lab: Lab, site: Site, issuer: str, suffix: str, lost: str) -> None:
    """A name added that the CA cannot validate leaves the old Secret in place; taken out again, all is well, unordered.

    Mutation: delete the Secret of a certificate for other names.
    """
    host = f"web.{suffix}"
    site.certificate("web", [host], issuer)
    site.ready("web")
    secret = site.secret("web")
    site.patch_certificate("web", {"spec": {"dnsNames": [host, lost]}})
    refused(site, "web", "ChallengeFailed")
    assert site.secret("web") == secret
    mark = lab.mark()
    site.patch_certificate("web", {"spec": {"dnsNames": [host]}})
    site.ready("web")
    site.nothing_left()
    assert lab.orders(mark) == 0


def test_an_issuer_that_goes_away(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A deleted Issuer leaves certificates as they are; a new order waits for it and says so.

    Mutation: count a missing issuer among what makes a certificate unfit.
    """
    name = f"ca-{secrets.token_hex(3)}"
    site.issuer(name)
    site.certificate("web", [f"web.{suffix}"], name, kind="Issuer")
    site.ready("web")
    site.delete(f"/apis/certbotk8s.io/v1/namespaces/{site.namespace}/issuers/{name}")
    site.annotate("web", renew_now="1")
    message = refused(site, "web", "IssuerNotFound", ready="True")
    assert f"Issuer {site.namespace}/{name} does not exist" in message
    assert site.condition("web", "Ready", "True")
    site.issuer(name)
    site.ready("web", revision=2)


def test_a_certificate_deleted_while_it_is_ordered(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Deleted in the middle of an order, a Certificate leaves neither a challenge nor a key behind.

    Mutation: return from `_gone` without a clean-up.
    """
    host = f"web.{suffix}"
    lab.set_dns(host, addresses=["127.0.0.2"])
    try:
        site.certificate("web", [host], issuer)
        wait_for(lambda: site.challenge_ingresses("web"), "the challenge stands")
        site.delete(site.certificate_path("web"))
        wait_for(lambda: not site.challenge_ingresses("web") and not site.next_keys(), "challenge and key gone")
        assert site.secret("web") is None
    finally:
        lab.clear_dns(host)
