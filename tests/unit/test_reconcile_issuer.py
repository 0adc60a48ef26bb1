"""How an Issuer comes to an open account: once, and asked of the CA no more than that takes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from certbotk8s.domain import api
from certbotk8s.domain.errors import Conflict, Problem, TemporaryError
from certbotk8s.domain.problems import judge
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Key
from tests.fakes.ca import FakeCA
from tests.unit.reconciling import HOME, SHOP, World, at_every_effect, crash, lose

HMAC_KEY = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"
BINDING: dict[str, Any] = {"keyID": "kid-1", "keySecretRef": {"name": "eab"}}


def demanding() -> World:
    """A CA that demands an external account binding."""
    world = World()
    world.ca.external_accounts = {"kid-1": HMAC_KEY}
    return world


def bound() -> World:
    """An issuer with the right binding, which the controller has not seen yet."""
    world = demanding()
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    world.issuer(externalAccountBinding=BINDING)
    return world


def state(world: World) -> tuple[str, str]:
    condition = world.issuer_condition()
    return condition.status, condition.reason


def account(world: World) -> api.AccountStatus:
    issuer = world.api.get(api.ISSUER, SHOP, "ca")
    assert issuer
    (found,) = issuer.status.accounts
    return found


def test_an_account_is_registered_with_its_binding() -> None:
    """Directory, look-up, registration: three requests; status says URI, thumbprint, key id and contact.

    Mutation: register without asking for the account of the key first.
    """
    world = bound()
    world.issuer(externalAccountBinding=BINDING, email="team@example.test")
    world.settle()
    assert world.ca.requests == ["directory", "findAccount", "newAccount"]
    assert state(world) == ("True", "AccountRegistered")
    uri, made = next(iter(world.ca.accounts.items()))
    contact = "team@example.test"
    assert account(world) == api.AccountStatus("default", uri, made.thumbprint, "kid-1", contact, "ca-account")
    assert (made.bound_key_id, made.contact) == ("kid-1", "team@example.test")
    assert "bound to key id kid-1" in world.issuer_condition().message
    assert HMAC_KEY not in repr(world.cluster.events)


def test_a_restart_asks_the_ca_nothing() -> None:
    """The URI beside the key opens the account again, without a request and without a write.

    Mutation: look the account up at each start.
    """
    world = bound()
    world.settle()
    world.ca.requests.clear()
    world.start()
    world.settle()
    assert world.ca.requests == []
    assert world.cluster.writes == []
    assert world.process.accounts.of(Key("Issuer", SHOP, "ca"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_effect_makes_one_account(when: str) -> None:
    """A controller that dies at any effect is followed by one that ends with the one account, bound once.

    Mutation: make a new account key at each start.
    """
    for act in (crash, lose):
        for world, label in at_every_effect(bound, when, act):
            assert state(world) == ("True", "AccountRegistered"), label
            assert len(world.ca.accounts) == 1, label
            assert account(world).uri in world.ca.accounts, label


def test_an_account_is_found_again_by_its_key_without_the_binding() -> None:
    """A new Issuer with the account key of old finds its account, though the binding's Secret is gone by now; the key
    stays in its Secret where somebody takes everything else out of that.

    Mutation: ask for the binding before looking the account up, or leave the key out of what is applied.
    """
    world = bound()
    world.settle()
    raw = world.raw(api.SECRET, "ca-account")
    raw["data"] = {"tls.key": raw["data"]["tls.key"]}
    world.api.put(api.SECRET, raw)
    world.settle()
    assert world.raw(api.SECRET, "ca-account")["data"]["tls.key"] == raw["data"]["tls.key"]
    world.api.put(api.SECRET, raw)
    world.delete(api.SECRET, "eab")
    world.delete(api.ISSUER, "ca")
    world.settle()
    world.issuer(externalAccountBinding=BINDING)
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert len(world.ca.accounts) == 1
    assert world.counts()["newAccount"] == 1


def test_a_missing_binding_secret_is_told_and_its_appearance_is_enough() -> None:
    """EABSecretMissing names the Secret and the member; when it appears, the account is registered without a restart.

    Mutation: do not watch the Secret.
    """
    world = demanding()
    world.issuer(externalAccountBinding=BINDING)
    world.settle()
    assert state(world) == ("False", "EABSecretMissing")
    assert "Secret shop/eab" in world.issuer_condition().message
    asked = len(world.ca.requests)
    world.settle(600)
    assert len(world.ca.requests) == asked
    world.secret("eab", {"other": b"x"})
    world.settle(1)
    assert "has no member secret with the HMAC key of key id kid-1; it has other" in world.issuer_condition().message
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    world.settle(1)
    assert state(world) == ("True", "AccountRegistered")


@pytest.mark.parametrize(
    ("text", "reason"), [(b"d3Jvbmctd3Jvbmctd3Jvbmctd3Jvbmctd3JvbmctMTI", "EABMACWrong"), (b"!", "EABKeyInvalid")]
)
def test_a_wrong_binding_is_told_and_not_tried_again_until_it_changes(text: bytes, reason: str) -> None:
    """A refused or unreadable HMAC key is not sent again while nothing changes; the right one is tried at once.

    Mutation: try again with each reconcile.
    """
    world = demanding()
    world.secret("eab", {"secret": text})
    world.issuer(externalAccountBinding=BINDING)
    world.settle(1800)
    assert state(world) == ("False", reason)
    assert world.counts()["newAccount"] == 1
    for _ in range(5):
        world.process.queue.add(Key("Issuer", SHOP, "ca"))
        world.settle(60)
    assert world.counts()["newAccount"] == 1
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    world.settle(1)
    assert state(world) == ("True", "AccountRegistered")


def test_a_demanded_binding_that_is_not_there_is_told() -> None:
    """A CA that demands a binding gets no registration without one, and the issuer says which field to fill.

    Mutation: send newAccount all the same.
    """
    world = demanding()
    world.issuer()
    world.settle()
    assert state(world) == ("False", "EABRequired")
    assert "spec.acme.externalAccountBinding" in world.issuer_condition().message
    assert "newAccount" not in world.counts()


def test_a_certificate_waits_for_its_issuer_and_says_so() -> None:
    """While the issuer is not ready the Certificate repeats why; when it is, the certificate comes by itself.

    Mutation: order with an account that is not open.
    """
    world = demanding()
    world.issuer(externalAccountBinding=BINDING)
    world.certificate()
    world.settle()
    assert world.condition("Ready").reason == "IssuerNotReady"
    assert "Secret shop/eab" in world.condition("Ready").message
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    world.settle(10)
    assert world.condition("Ready").status == "True"


def test_a_changed_server_is_registered_at() -> None:
    """When spec.acme.server changes, the same key is registered there, and new orders go there.

    Mutation: trust the URI beside the key whatever server it is of.
    """
    world = World().ready()
    other = FakeCA(world.clock, "https://other.example.test/directory")
    world.authority.cas[other.url] = other
    world.issuer(server=other.url)
    world.settle()
    assert account(world).uri in other.accounts
    world.certificate("more", names=("more.example.test",))
    world.settle()
    assert (len(world.ca.issued), len(other.issued)) == (1, 1)
    world.start()
    world.settle()
    assert other.requests.count("newAccount") == 1


def test_an_unknown_profile_lists_those_offered_and_stays_refused() -> None:
    """A profile that the CA lacks is told with those it has, also at the next try and after a restart.

    Mutation: check the profile at the first try only.
    """
    world = World()
    world.ca.profiles = {"classic": "90 days", "shortlived": "6 days"}
    world.issuer(profile="tlsserver")
    world.settle()
    assert state(world) == ("False", "UnknownProfile")
    assert "Its profiles: classic and shortlived" in world.issuer_condition().message
    world.settle(3 * 3600)
    assert state(world) == ("False", "UnknownProfile")
    world.start()
    world.settle()
    assert state(world) == ("False", "UnknownProfile")
    assert len(world.ca.accounts) == 1
    world.issuer(profile="shortlived")
    world.certificate()
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert [order.profile for order in world.ca.orders.values()] == ["shortlived"]


def test_an_account_that_the_ca_does_not_know_is_registered_again_with_its_binding() -> None:
    """After the CA has lost its accounts a certificate's failure leads to one new registration, with the binding.

    Mutation: reopen the account by the URI in the Secret.
    """
    world = bound()
    world.certificate()
    world.settle()
    world.ca.forget_accounts()
    world.ca.requests.clear()
    world.annotate(renew_now="1")
    world.settle(300)
    assert world.counts()["newAccount"] == 1
    assert len(world.ca.issued) == 2
    assert account(world).uri in world.ca.accounts
    assert world.issuer_condition().status == "True"


def test_an_account_in_doubt_that_the_ca_knows_is_kept() -> None:
    """When the CA only stumbled, the look-up finds the account again and nothing is registered.

    Mutation: register whenever a request was refused for its account.
    """
    world = World().ready()
    unknown = judge(Problem("accountDoesNotExist", "No such account.", 400), retry_after=None, doing="placing an order")
    world.ca.fail("newOrder", unknown)
    world.ca.requests.clear()
    world.annotate(renew_now="1")
    world.settle(300)
    assert "newAccount" not in world.counts()
    assert world.counts()["findAccount"] == 1
    assert len(world.ca.issued) == 2


@pytest.mark.parametrize("retry_after", [None, timedelta(0), timedelta(minutes=30)])
def test_an_absent_ca_is_asked_again_ever_later(retry_after: timedelta | None) -> None:
    """Errors are waited out by the CA's Retry-After, else by a ladder to ten minutes, and told with the reason.

    Mutation: take a Retry-After of 0 for a pause.
    """
    world = World()
    world.ca.fail("directory", TemporaryError("No answer from the CA's server.", retry_after=retry_after), times=1000)
    world.issuer()
    world.settle(3600)
    assert state(world) == ("False", "CAUnavailable")
    assert "No answer from the CA's server" in world.issuer_condition().message
    assert world.counts()["directory"] <= (3 if retry_after else 12)


def test_a_failure_that_could_not_be_written_is_written_later() -> None:
    """When the status write of a failure is refused, the next look writes it, and does not ask the CA again.

    Mutation: remember the failed try only.
    """
    world = demanding()
    world.issuer()
    refused = [Conflict("changed since it was read")]

    def refuse_once(_verb: str, kind: str, _namespace: str, _name: str) -> None:
        if kind == "Issuer/status" and refused:
            raise refused.pop()

    world.cluster.before = refuse_once
    world.settle(60)
    assert not refused
    assert state(world) == ("False", "EABRequired")
    assert world.counts()["findAccount"] == 1


def test_an_account_key_that_is_none_is_told() -> None:
    """A Secret without the account key is not overwritten: the issuer names it and the member.

    Mutation: put a new key into it.
    """
    world = World()
    world.secret("ca-account", {"other": b"x"})
    world.issuer()
    world.settle()
    assert state(world) == ("False", "AccountKeyMissing")
    assert "Secret shop/ca-account" in world.issuer_condition().message
    assert world.counts() == {}


def test_a_cluster_issuer_keeps_its_secrets_in_the_namespace_of_the_controller() -> None:
    """A ClusterIssuer's account key and binding are Secrets of the controller's namespace, and serve every namespace.

    Mutation: look for them in the Certificate's namespace.
    """
    world = demanding()
    world.secret("eab", {"secret": HMAC_KEY.encode()}, namespace=HOME)
    world.issuer("shared", kind="ClusterIssuer", externalAccountBinding=BINDING)
    world.certificate(issuerRef={"name": "shared", "kind": "ClusterIssuer"})
    world.settle()
    assert world.condition("Ready").status == "True"
    assert world.api.get(api.SECRET, HOME, "shared-account")
    assert world.api.get(api.SECRET, SHOP, "shared-account") is None


def test_a_deleted_issuer_is_closed_and_its_secret_no_longer_watched() -> None:
    """After its deletion an issuer takes no orders, and a change of its binding's Secret wakes nobody.

    Mutation: leave the watch.
    """
    world = bound()
    world.settle()
    world.delete(api.ISSUER, "ca")
    world.settle()
    assert world.process.accounts.of(Key("Issuer", SHOP, "ca")) is None
    world.secret("eab", {"secret": b"new"})
    assert not [key for key in world.process.queue.ready if key.kind == "Issuer"]


def test_what_is_told_is_told_once() -> None:
    """One Event for a registration and one for a refusal, however often the issuer is looked at.

    Mutation: report with every reconcile.
    """
    world = demanding()
    world.issuer(externalAccountBinding=BINDING)
    world.settle(600)
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    for _ in range(3):
        world.process.queue.add(Key("Issuer", SHOP, "ca"))
        world.settle(60)
    assert world.reasons("ca") == [Reason.EAB_SECRET_MISSING, Reason.ACCOUNT_REGISTERED]
