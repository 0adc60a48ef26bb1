"""Names that belong to somebody: a tenant gets no certificate for another tenant's name through a shared issuer."""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests import builders
from tests.lab.controller import Controller
from tests.lab.lab import Lab
from tests.lab.presets import preset_ca
from tests.site import CERTIFICATES, Site, assert_plain, wait_for

Rule = dict[str, Any]
# Long enough that something asked again and again is asked again.
A_WHILE = 2.0


@pytest.fixture
def neighbour(lab: Lab) -> Iterator[Site]:
    """Another tenant's namespace."""
    name = f"other-{secrets.token_hex(4)}"
    lab.api("/api/v1/namespaces", body={"metadata": {"name": name}})
    yield Site(lab, name)
    lab.api(f"/api/v1/namespaces/{name}", method="DELETE")


@pytest.fixture
def shared(lab: Lab, controller: Controller) -> Iterator[Callable[[list[Rule] | None], str]]:
    """Makes the test's own ClusterIssuer with these rules, or gives it others; its name."""
    admin, name = Site(lab, lab.namespace), f"ca-{secrets.token_hex(3)}"

    def with_rules(rules: list[Rule] | None) -> str:
        if admin.get(f"{CERTIFICATES}/clusterissuers/{name}") is None:
            return admin.cluster_issuer(name, rules=rules)
        policy = None if rules is None else {"rules": rules}
        admin.patch("clusterissuers.certbotk8s.io", name, {"spec": {"policy": policy}})
        return name

    yield with_rules
    admin.delete(f"{CERTIFICATES}/clusterissuers/{name}")


@pytest.fixture(autouse=True)
def _plain(site: Site, neighbour: Site) -> Iterator[None]:
    """Whatever a test provokes is told in plain words, and to no tenant in the name of another."""
    yield
    assert_plain(site.said() + neighbour.said())
    assert site.namespace not in " ".join(neighbour.said())
    assert neighbour.namespace not in " ".join(site.said())


def allow(site: Site, *patterns: str) -> Rule:
    return {"namespaces": [site.namespace], "dnsNames": list(patterns)}


def refused(site: Site, name: str, reason: str, ready: str = "False") -> str:
    """The sentence of a refusal, which stands in the conditions and in an Event."""
    message: str = site.condition(name, "Issuing", "False", reason)["message"]
    assert site.event(name, reason, message)
    if ready == "False":
        assert site.condition(name, "Ready", "False", reason)["message"] == message
    return message


def test_a_name_of_another_tenant(
    lab: Lab, site: Site, neighbour: Site, suffix: str, shared: Callable[[list[Rule] | None], str]
) -> None:
    """Neither another tenant's name, nor a wildcard over it, nor either in another spelling is ordered; what is the
    tenant's own is, in any spelling.

    Mutation: leave `_not_allowed` out of REFUSALS, or compare patterns as they are written.
    """
    shop, pay = f"shop.{suffix}", f"pay.{suffix}"
    issuer = shared([allow(site, f"**.{shop}", f"bücher.{suffix}"), allow(neighbour, f"*.{pay}", f"*.Müller.{pay}.")])
    mark = lab.mark()
    others = [
        [f"www.{shop}"],
        [f"WWW.{shop.upper()}."],
        [f"*.{shop}"],
        [f"*.www.{shop}"],
        [f"bücher.{suffix}"],
        [f"BÜCHER.{suffix.upper()}"],
        [f"xn--bcher-kva.{suffix}"],
        [f"*.{suffix}"],
        [pay],
        [f"a.b.{pay}"],
        [f"www.{pay}", f"www.{shop}"],
    ]
    for number, names in enumerate(others):
        neighbour.certificate(f"web-{number}", names, issuer)
    for number, names in enumerate(others):
        message = refused(neighbour, f"web-{number}", "NotAllowed")
        name = names[-1].lower().rstrip(".").replace("bücher", "xn--bcher-kva")
        assert message.startswith(f"ClusterIssuer {issuer} does not allow {name} to namespace {neighbour.namespace}.")
        assert message.endswith(f"Allowed to this namespace: *.{pay} and *.Müller.{pay}.")
    print(f"\n{message}")
    time.sleep(A_WHILE)
    assert lab.orders(mark) == 0
    assert [len(neighbour.events(f"web-{number}")) for number in range(len(others))] == [1] * len(others)

    neighbour.certificate("own", [f"WWW.{pay.upper()}.", f"a.müller.{pay}"], issuer)
    site.certificate("own", [f"a.b.{shop}", f"xn--bcher-kva.{suffix}"], issuer)
    neighbour.ready("own")
    site.ready("own")
    assert lab.orders(mark) == 2


def test_names_that_the_ca_has_validated(
    lab: Lab, site: Site, neighbour: Site, controller: Controller, suffix: str
) -> None:
    """Where the CA has validated names for the account, and would issue them to whoever asks, the policy alone stands
    between a tenant and another's: in no spelling, and by no wildcard, is one ordered. A rule added lets it go on.

    Mutation: leave `_not_allowed` out of REFUSALS.
    """
    admin, name = Site(lab, lab.namespace), f"campus-{secrets.token_hex(3)}"
    shop, books = f"shop.{suffix}", f"xn--bcher-kva.{suffix}"
    with preset_ca(lab, "incommon-certinext", scale=0) as ca:
        ours = allow(site, shop, f"**.{shop}", f"bücher.{suffix}", f"*.{books}")
        admin.cluster_issuer(name, ca=ca.seen, rules=[ours], solvers=None, profile=None)
        account_key = admin.secret_value(f"{name}-account", "tls.key")
        ca.validate(account_key, shop, f"*.{shop}", f"www.{shop}", books, f"*.{books}")
        others = [
            [shop],
            [f"www.{shop}"],
            [f"WWW.{shop.upper()}."],
            [f"*.{shop}"],
            [f"*.{shop.upper()}"],
            [books],
            [books.upper()],
            [f"bücher.{suffix}"],
            [f"BÜCHER.{suffix.upper()}."],
            [f"*.bücher.{suffix}"],
            [f"own.{suffix}", f"www.{shop}"],
        ]
        for number, names in enumerate(others):
            neighbour.certificate(f"web-{number}", names, name)
        for number in range(len(others)):
            refused(neighbour, f"web-{number}", "NotAllowed")
        controller.restart()
        controller.wait_ready()
        time.sleep(A_WHILE)
        assert ca.proxy.count("newOrder") == 0
        assert neighbour.next_keys() == []

        site.certificate("own", [f"*.{shop}"], name)
        site.ready("own")
        assert (ca.proxy.count("newOrder"), ca.proxy.count("challenge")) == (1, 0)

        rules = [ours, allow(neighbour, f"Bücher.{suffix}")]
        admin.patch("clusterissuers.certbotk8s.io", name, {"spec": {"policy": {"rules": rules}}})
        for number in (5, 6, 7, 8):
            neighbour.ready(f"web-{number}")
        time.sleep(A_WHILE)
        assert (ca.proxy.count("newOrder"), ca.proxy.count("challenge")) == (5, 0)
        for number in (0, 1, 2, 3, 4, 9, 10):
            refused(neighbour, f"web-{number}", "NotAllowed")
            neighbour.delete(neighbour.certificate_path(f"web-{number}"))
        admin.delete(f"{CERTIFICATES}/clusterissuers/{name}")


def test_the_rules_of_now_count(lab: Lab, site: Site, suffix: str, shared: Callable[[list[Rule] | None], str]) -> None:
    """A rule added, and the policy removed, let what waits go on by itself; without a restart, without a wish.

    Mutation: wake nobody when an issuer changes, neither in main nor in its reconcile.
    """
    issuer = shared([])
    mark = lab.mark()
    site.certificate("web", [f"web.{suffix}"], issuer)
    assert refused(site, "web", "NotAllowed").endswith("Allowed to this namespace: nothing")
    site.certificate("more", [f"more.{suffix}"], issuer)
    refused(site, "more", "NotAllowed")
    assert lab.orders(mark) == 0
    shared([{"namespaces": ["*"], "dnsNames": [f"web.{suffix}"]}])
    site.ready("web")
    assert lab.orders(mark) == 1
    assert site.condition("more", "Issuing", "False", "NotAllowed", f"Allowed to this namespace: web.{suffix}")
    shared(None)
    site.ready("more")
    assert lab.orders(mark) == 2


def test_a_label_of_the_namespace(
    lab: Lab, site: Site, suffix: str, shared: Callable[[list[Rule] | None], str]
) -> None:
    """A namespace that gets the label gets the names; one that loses it orders no more.

    Mutation: do not wake the Certificates of a namespace whose labels have changed.
    """
    selector = {"matchExpressions": [{"key": "team", "operator": "In", "values": ["web", "shop"]}]}
    issuer = shared([{"namespaceSelector": selector, "dnsNames": [f"**.{suffix}"]}])
    site.certificate("web", [f"web.{suffix}"], issuer)
    refused(site, "web", "NotAllowed")
    lab.kubectl("label", "namespace", site.namespace, "team=web")
    site.ready("web")
    lab.kubectl("label", "namespace", site.namespace, "team=pay", "--overwrite")
    site.certificate("more", [f"more.{suffix}"], issuer)
    refused(site, "more", "NotAllowed")
    lab.kubectl("label", "namespace", site.namespace, "team=shop", "--overwrite")
    site.ready("more")


def test_an_order_under_way_for_what_is_withdrawn(
    lab: Lab, site: Site, suffix: str, shared: Callable[[list[Rule] | None], str]
) -> None:
    """A rule withdrawn while the CA waits for the challenge: the order is given up, nothing is issued or left behind.

    Mutation: ask `refused` before the order alone, not in `_changed`.
    """
    host = f"web.{suffix}"
    issuer = shared([allow(site, host)])
    lab.set_dns(host, addresses=["127.0.0.2"])
    try:
        mark = lab.mark()
        site.certificate("web", [host], issuer)
        wait_for(lambda: site.challenge_ingresses("web"), "the challenge stands")
        shared([])
        refused(site, "web", "NotAllowed")
        site.nothing_left()
        assert (lab.orders(mark), lab.acme.issued(mark.acme)) == (1, 0)
        assert "failedAttempts" not in site.status("web")
    finally:
        lab.clear_dns(host)
    shared([allow(site, host)])
    site.ready("web")


def test_a_renewal_that_is_no_longer_allowed(
    lab: Lab, site: Site, suffix: str, shared: Callable[[list[Rule] | None], str]
) -> None:
    """The certificate in hand stays Ready, its renewal is refused with the reason and goes on when allowed again.

    Mutation: compute Ready from the policy.
    """
    host = f"web.{suffix}"
    issuer = shared([allow(site, host)])
    site.certificate("web", [host], issuer)
    site.ready("web")
    shared([allow(site, f"other.{suffix}")])
    mark = lab.mark()
    site.annotate("web", renew_now="1")
    assert f"does not allow {host}" in refused(site, "web", "NotAllowed", ready="True")
    assert site.condition("web", "Ready", "True", "Ready")
    assert lab.orders(mark) == 0
    shared([allow(site, host)])
    site.ready("web", revision=2)


def test_a_name_that_another_namespace_holds(
    lab: Lab,
    site: Site,
    neighbour: Site,
    suffix: str,
    controller: Controller,
    shared: Callable[[list[Rule] | None], str],
) -> None:
    """Without any rule a name is its holder's, in any spelling, and so is what its wildcard covers; only the log says
    whose. A rule that lists both namespaces, or its release, lets the other go on by itself.

    Mutation: leave `_name_claimed` out of REFUSALS, or wake nobody when a Certificate goes.
    """
    host = f"www.{suffix}"
    issuer = shared(None)
    site.certificate("web", [host], issuer)
    site.ready("web")
    mark = lab.mark()
    neighbour.certificate("same", [f"WWW.{suffix.upper()}."], issuer)
    neighbour.certificate("over", [f"*.{suffix}"], issuer)
    message = refused(neighbour, "same", "NameClaimed")
    print(f"\n{message}")
    assert message.startswith(f"{host} is held by another namespace through ClusterIssuer {issuer}. Nothing is ordered")
    assert refused(neighbour, "over", "NameClaimed").startswith(f"*.{suffix} covers a name that is held")
    assert lab.orders(mark) == 0
    told = f"{neighbour.namespace}/same asks for {host}, but {site.namespace}/web holds {host}"
    wait_for(lambda: told in controller.log.read_text(), "the log says whose it is")

    site.annotate("web", renew_now="1")
    site.ready("web", revision=2)  # a holder's renewal is nobody's to refuse
    assert lab.orders(mark) == 1

    shared([{"namespaces": ["*"], "dnsNames": ["**"]}])
    time.sleep(A_WHILE)
    assert lab.orders(mark) == 1
    shared([{"namespaces": [site.namespace, neighbour.namespace], "dnsNames": [host]}])
    neighbour.ready("same")
    shared(None)

    third = f"third.{suffix}"
    site.certificate("third", [third], issuer)
    site.ready("third")
    neighbour.certificate("third", [third], issuer)
    refused(neighbour, "third", "NameClaimed")
    site.delete(site.certificate_path("third"))
    neighbour.ready("third")


def test_two_that_ask_at_the_same_moment(
    lab: Lab, site: Site, neighbour: Site, suffix: str, shared: Callable[[list[Rule] | None], str]
) -> None:
    """One gets the name, the other is told, and it stays like that.

    Mutation: leave `_name_claimed` out of REFUSALS.
    """
    host, issuer = f"web.{suffix}", shared(None)
    sites = {each.namespace: each for each in (site, neighbour)}
    mark = lab.mark()
    manifests = [each.certificate_manifest("web", [host], issuer) for each in sites.values()]
    both = {"apiVersion": "v1", "kind": "List", "items": manifests}
    lab.kubectl("apply", "-f", "-", input=json.dumps(both))

    def over() -> list[str]:
        states = [_conditions(each, "web") for each in sites.values()]
        return (
            [state["Ready"] for state in states] if all(set(state) == {"Ready", "Issuing"} for state in states) else []
        )

    wait_for(lambda: sorted(over()) == ["NameClaimed", "Ready"], "one has it, the other is told")
    ready = over()
    time.sleep(A_WHILE)
    assert over() == ready
    assert lab.acme.issued(mark.acme) == 1


def _conditions(site: Site, name: str) -> dict[str, str]:
    """The reasons of the conditions by their type."""
    return {each["type"]: each["reason"] for each in site.status(name).get("conditions", [])}


def test_a_planted_secret_holds_no_name(
    lab: Lab, site: Site, neighbour: Site, suffix: str, shared: Callable[[list[Rule] | None], str]
) -> None:
    """A tenant that has a Secret of its own making adopted has a Ready Certificate, but no claim: nobody has issued it.

    Mutation: take Ready for holding a name in `standing`.
    """
    host, issuer = f"web.{suffix}", shared(None)
    key = builders.private_key("planted")
    made = builders.chain([host], key, start=datetime.now(UTC) - timedelta(hours=1))
    neighbour.put_secret("web", {"tls.crt": made, "tls.key": builders.key_pem(key)}, kind="kubernetes.io/tls")
    manifest = neighbour.certificate_manifest("web", [host], issuer)
    manifest["metadata"]["annotations"] = {"certbotk8s.io/adopt": "true"}
    neighbour.create(f"{CERTIFICATES}/namespaces/{neighbour.namespace}/certificates", manifest)
    neighbour.condition("web", "Ready", "True")
    site.certificate("web", [host], issuer)
    site.ready("web")
