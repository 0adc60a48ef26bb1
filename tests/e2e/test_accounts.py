"""An account's whole life at a real CA: its binding, its key, new terms, its end. What Pebble cannot show comes from a
proxy in front of it (tests/lab/acme_proxy.py).
"""

from __future__ import annotations

import base64
import json
import secrets
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from acme.client import ClientNetwork, ClientV2
from acme.messages import Registration, RegistrationResource
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from josepy.jwa import ES256
from josepy.jwk import JWKEC, JWKRSA

from certbotk8s.ca.authority import Authority
from certbotk8s.ca.keys import Keys
from certbotk8s.clock import SystemClock
from certbotk8s.ports import Binding, Server
from tests.lab.acme_proxy import AcmeProxy, acme_proxy, held, kind_of, problem, to
from tests.lab.proxy import answered, dropped
from tests.site import CERTIFICATES, Site, assert_plain, wait_for

if TYPE_CHECKING:
    from tests.lab.acme import AcmeServer
    from tests.lab.controller import Controller
    from tests.lab.lab import Lab
    from tests.lab.proxy import Request

KEY_CHANGE = "/rollover-account-key"


@dataclass
class World:
    """The lab's CA behind a proxy of this test's own, and the namespace that orders from it."""

    lab: Lab
    site: Site
    server: AcmeServer
    proxy: AcmeProxy

    def issuer(self, **changes: Any) -> None:
        """The Issuer `ca`, ready."""
        self.site.issuer("ca", ca=self.server, **changes)

    def change(self, **acme: Any) -> None:
        """Change fields of its spec.acme; None removes one."""
        self.site.patch("issuers.certbotk8s.io", "ca", {"spec": {"acme": acme}})

    def annotate(self, **annotations: str) -> None:
        """Annotate it."""
        named = {f"certbotk8s.io/{key}": value for key, value in annotations.items()}
        self.site.patch("issuers.certbotk8s.io", "ca", {"metadata": {"annotations": named}})

    def says(self, status: str, reason: str = "", text: str = "") -> str:
        """What its Ready condition says, once it has that status, reason and text."""
        return str(self.site.issuer_condition("Issuer", "ca", status, reason, text)["message"])

    def status(self) -> dict[str, Any]:
        """Its status."""
        found = self.site.get(f"{CERTIFICATES}/namespaces/{self.site.namespace}/issuers/ca") or {}
        return dict(found.get("status", {}))

    def account(self) -> dict[str, Any]:
        """The one account in its status."""
        (found,) = self.status()["accounts"]
        return dict(found)

    def key(self) -> bytes:
        """The account key in its Secret."""
        found = self.site.secret("ca-account")
        assert found
        return base64.b64decode(found["data"]["tls.key"])

    def remembered(self) -> set[str]:
        """The accounts that stand beside it."""
        found = self.site.secret("ca-account")
        assert found
        return {each["uri"] for each in json.loads(base64.b64decode(found["data"]["accounts.json"]))["accounts"]}

    def count(self, kind: str) -> int:
        """How many requests of a kind have reached the CA."""
        return self.proxy.count(kind)


@pytest.fixture
def world(lab: Lab, site: Site, controller: Controller) -> Iterator[World]:
    with acme_proxy(lab) as (server, proxy):
        yield World(lab, site, server, proxy)
        assert_plain(site.said())
        site.delete(f"{CERTIFICATES}/namespaces/{site.namespace}/issuers/ca")


def signed(request: Request) -> tuple[dict[str, Any], str]:
    """(protected header, payload) of a request."""
    jws = msgspec.json.decode(request.body)
    return json.loads(_decoded(jws["protected"])), _decoded(jws["payload"])


def _decoded(text: str) -> str:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()


def is_binding(request: Request) -> bool:
    """Whether a request is a registration with a binding."""
    return kind_of(request) == "newAccount" and "externalAccountBinding" in signed(request)[1]


# --- bindings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "detail", "reason"),
    [
        ("malformed", "The account is not awaiting external account binding", "EABAlreadyBound"),
        ("unauthorized", "the binding key with id 'kid-1' was already bound to account 'x'", "EABUsed"),
        ("unauthorized", "Unknown key. This may be due to the EAB key expiring", "EABExpired"),
        ("malformed", "External account binding is not supported", "EABNotNeeded"),
        ("unauthorized", "words that nobody has seen", "EABRefused"),
    ],
)
def test_a_refused_binding(world: World, kind: str, detail: str, reason: str) -> None:
    """What CAs say of a binding stands on the Issuer with its own reason and the CA's words; a changed Secret is tried
    at once.

    Mutation: remove a row of BINDING_REFUSALS.
    """
    with world.proxy.inject(is_binding, problem(400, kind, detail)):
        world.issuer(wait=False)
        message = world.says("False", reason)
        print(f"\n{message}")
        assert f'The CA says: "{detail}"' in message
        assert "kid-1" in message
        assert message == world.site.event("ca", reason, kind="Issuer")
    world.site.put_secret("ca-eab", {"secret": world.lab.eab["kid-1"].encode() + b"\n"})
    world.says("True")
    assert world.account()["boundKeyID"] == "kid-1"


def test_another_binding_while_an_order_is_under_way(world: World, controller: Controller, suffix: str) -> None:
    """A changed key id and HMAC key bind a new account with a new key. An order that was finalized before ends on the
    old account, over a restart too, and the next one is placed with the new; then the old key is gone.

    Mutation: do not put the old key aside in `_choose`.
    """
    world.issuer()
    first = world.account()
    with world.proxy.inject(to("order", "finalize"), held("1")):
        world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
        world.site.condition("web", "Issuing", "True", "OrderPending", "order processing since")
        world.site.put_secret("ca-eab", {"secret": world.lab.eab["kid-2"].encode()})
        world.change(externalAccountBinding={"keyID": "kid-2"})
        world.says("True", text="bound to key id kid-2")
        second = world.account()
        assert (first["boundKeyID"], second["boundKeyID"]) == ("kid-1", "kid-2")
        assert first["uri"] != second["uri"]
        assert first["keyThumbprint"] != second["keyThumbprint"]
        assert world.remembered() == {first["uri"], second["uri"]}
        controller.restart()
    assert world.site.ready("web")["accountURI"] == first["uri"]
    world.site.annotate("web", renew_now="1")
    assert world.site.ready("web", revision=2)["accountURI"] == second["uri"]
    assert world.count("newOrder") == 2
    # Looked at every five minutes, and when the issuer is looked at for another reason.
    world.change(email="other@example.test")
    wait_for(lambda: world.remembered() == {second["uri"]}, "the old key gone")


# --- the CA's side ----------------------------------------------------------------------------------------------------


def test_several_bindings_while_an_order_is_under_way(world: World, controller: Controller, suffix: str) -> None:
    """An issuer that moves from one binding to several, with an order finalized before: that ends on the account of the
    one, though the controller is started again before it is collected; the next one is placed with the new account.

    Mutation: do not look for former accounts in the issuer's reconcile.
    """
    world.issuer()
    first = world.account()
    binding = {"keyID": "kid-2", "keySecretRef": {"name": "several-eab"}}
    world.site.put_secret("several-eab", {"secret": world.lab.eab["kid-2"].encode()})
    with world.proxy.inject(to("order", "finalize"), held("1")):
        world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
        world.site.condition("web", "Issuing", "True", "OrderPending", "order processing since")
        world.change(externalAccountBinding=None, bindings=[{"name": "single", "externalAccountBinding": binding}])
        world.says("True", text="bound to key id kid-2")
        assert [each["name"] for each in world.status()["accounts"]] == ["single", "default"]
        asked = world.count("order")
        controller.restart()
        wait_for(lambda: world.count("order") > asked, "the order is looked at after the restart")
    assert world.site.ready("web")["accountURI"] == first["uri"]
    world.site.annotate("web", renew_now="1")
    second = world.site.ready("web", revision=2)["accountURI"]
    assert second != first["uri"]
    assert (world.count("newOrder"), world.count("finalize")) == (2, 2)
    # Looked at every five minutes, and when the issuer is looked at for another reason.
    world.change(email="other@example.test")
    wait_for(lambda: [each["uri"] for each in world.status()["accounts"]] == [second], "the former account gone")


def test_new_terms(world: World, suffix: str) -> None:
    """When the CA wants new terms agreed to, the Issuer says so with the address; afterwards it goes on.

    Mutation: doubt accounts for accountDoesNotExist only.
    """
    world.issuer()
    document = {
        "type": "urn:ietf:params:acme:error:userActionRequired",
        "detail": "Terms of service have changed",
        "instance": "https://ca.example.test/agree/1",
    }
    refused = answered(403, msgspec.json.encode(document), Content_Type="application/problem+json")
    with world.proxy.inject(to("newOrder"), refused):
        world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
        message = world.says("False", "TermsChanged", "https://ca.example.test/agree/1")
        print(f"\n{message}")
        world.site.condition("web", "Ready", "False")
    world.change(email="agreed@example.test")
    world.says("True")
    world.site.ready("web")


def test_a_deactivated_account(world: World, suffix: str) -> None:
    """An account that was closed at the CA stops its Issuer, which says so; none is registered in its place.

    Mutation: doubt accounts for accountDoesNotExist only.
    """
    world.issuer()
    world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
    world.site.ready("web")
    key = load_pem_private_key(world.key(), None)
    account = RegistrationResource(body=Registration(), uri=world.account()["uri"])
    bundle: Any = world.server.ca_bundle
    net = ClientNetwork(JWKEC(key=key), account=account, alg=ES256, verify_ssl=bundle)
    client = ClientV2(ClientV2.get_directory(world.server.directory, net), net)
    client.deactivate_registration(account)
    asked = world.count("newAccount")
    world.site.annotate("web", renew_now="1")
    message = world.says("False", "AccountDeactivated")
    print(f"\n{message}")
    assert "privateKeySecretRef" in message
    assert world.count("newAccount") == asked + 1
    world.site.condition("web", "Ready", "True")


def test_an_account_that_the_ca_has_lost(world: World, suffix: str) -> None:
    """An account that the CA no longer knows is registered once more, with its key and its binding.

    Mutation: reopen the account by what stands beside the key.
    """
    world.issuer()
    lost = problem(400, "accountDoesNotExist", "unable to find existing account")
    asked = len(world.proxy.exchanges)
    with (
        world.proxy.inject(to("newOrder"), lost, times=1),
        world.proxy.inject(lambda each: kind_of(each) == "newAccount" and not is_binding(each), lost, times=1),
    ):
        world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
        world.site.condition("web", "Issuing", "False", "AccountUnknown")
        wait_for(lambda: world.proxy.count("newAccount", asked) == 1, "registered again")
    world.says("True")
    world.site.annotate("web", renew_now="1")
    world.site.ready("web")
    assert world.proxy.count("newAccount", asked) == 1


def test_a_changed_address(world: World, controller: Controller) -> None:
    """A changed email is sent to the CA once, by a request to the account, though that shows no address; not again
    after a restart or another change.

    Mutation: compare with the address that the CA shows.
    """
    world.issuer()
    world.change(email="new@example.test")
    wait_for(lambda: world.account()["contact"] == "new@example.test", "the new address")
    controller.restart()
    controller.wait_ready()
    world.change(profile="shortlived")
    wait_for(
        lambda: world.status()["observedGeneration"] == 3 and world.says("True"), "the changed profile is looked at"
    )
    assert world.count("account") == 1
    server = Server(world.server.directory, Path(world.server.ca_bundle).read_bytes())
    found = Authority(SystemClock()).find_account(server, world.key())
    assert found
    assert found.contact == "new@example.test"


# --- the key ----------------------------------------------------------------------------------------------------------


def test_a_key_that_is_deleted_or_edited(world: World, suffix: str) -> None:
    """A deleted account key is made anew, with a new account; one that somebody puts there opens its own account and
    stays; certificates come from either.

    Mutation: watch the binding's Secret alone.
    """
    world.issuer()
    first = world.account()
    world.lab.api(world.site.secret_path("ca-account"), method="DELETE")
    wait_for(lambda: world.account()["uri"] != first["uri"], "another account")
    world.says("True")
    second, key = world.account(), Keys().account_key()
    encoded = base64.b64encode(key).decode()
    world.site.patch("secret", "ca-account", {"data": {"tls.key": encoded}})
    wait_for(lambda: world.account()["uri"] != second["uri"], "the account of that key")
    world.says("True")
    assert world.key() == key
    world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
    assert world.site.ready("web")["accountURI"] == world.account()["uri"]
    assert world.key() == key


def only_rsa(request: Request) -> bool:
    """A CA that takes RSA account keys alone refuses these."""
    return kind_of(request) == "newAccount" and signed(request)[0]["alg"] != "RS256"


def refused_key() -> Any:
    document = {
        "type": "urn:ietf:params:acme:error:badSignatureAlgorithm",
        "detail": "only RS256 is taken here",
        "algorithms": ["RS256"],
    }
    return answered(400, msgspec.json.encode(document), Content_Type="application/problem+json")


def test_a_ca_that_takes_rsa_keys_alone(world: World, suffix: str) -> None:
    """Where the CA refuses the ECDSA key, an RSA key is made, and certificates come; a key that was given stays, and
    the Issuer says what the CA takes.

    Mutation: do not look at the problem's type in `_register`.
    """
    with world.proxy.inject(only_rsa, refused_key()):
        world.issuer()
        assert isinstance(load_pem_private_key(world.key(), None), rsa.RSAPrivateKey)
        world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
        world.site.ready("web")
        key = Keys().account_key()
        world.site.put_secret("ca-account", {"tls.key": key})
        message = world.says("False", "AccountKeyUnsupported", "The CA accepts: RS256")
        print(f"\n{message}")
        assert f"Secret {world.site.namespace}/ca-account was not made by certbotk8s" in message
        assert world.key() == key


@pytest.mark.parametrize("form", ["jwk", "pkcs1", "sec1", "pkcs8"])
def test_an_imported_account(world: World, form: str, suffix: str) -> None:
    """With the key of another client the Issuer, told to make none, waits for it, and uses the account of that key.

    Mutation: read PEM only, or make a key all the same.
    """
    keys = Keys()
    pem = {
        "jwk": keys.account_key("RSA"),
        "pkcs1": keys.certificate_key("RSA", 2048, "PKCS1"),
        "sec1": keys.certificate_key("ECDSA", 384, "PKCS1"),
        "pkcs8": keys.account_key(),
    }[form]
    server = Server(world.server.directory, Path(world.server.ca_bundle).read_bytes())
    binding = Binding("kid-1", world.lab.eab["kid-1"].encode())
    uri = Authority(SystemClock()).register(server, pem, "", binding).uri
    key = load_pem_private_key(pem, None)
    text = JWKRSA(key=key).json_dumps().encode() if form == "jwk" else bytes(pem)

    world.issuer(
        wait=False,
        externalAccountBinding=None,
        disableAccountKeyGeneration=True,
        privateKeySecretRef={"name": "imported", "key": "private_key.json"},
    )
    world.says("False", "AccountKeyMissing", f"Secret {world.site.namespace}/imported")
    assert world.site.secret("imported") is None
    world.site.put_secret("imported", {"private_key.json": text})
    world.says("True", text=uri)
    world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
    assert world.site.ready("web")["accountURI"] == uri


# --- another key for the same account ---------------------------------------------------------------------------------


def test_a_new_key_for_the_account(world: World, controller: Controller, suffix: str) -> None:
    """Each new value of certbotk8s.io/rollover gives the account one new key, and none after a restart; certificates
    come before and after with the same account.

    Mutation: forget the wish that was answered.
    """
    world.issuer()
    world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
    world.site.ready("web")
    before, old = world.account(), world.key()
    world.annotate(rollover="2026-11")
    wait_for(lambda: world.status().get("rollover") == "2026-11", "a new key")
    now = world.account()
    assert now["uri"] == before["uri"]
    assert now["keyThumbprint"] != before["keyThumbprint"]
    assert world.key() != old
    assert isinstance(load_pem_private_key(world.key(), None), ec.EllipticCurvePrivateKey)
    world.site.event("ca", "AccountKeyChanged", kind="Issuer")
    server = Server(world.server.directory, Path(world.server.ca_bundle).read_bytes())
    assert Authority(SystemClock()).find_account(server, old) is None
    world.site.annotate("web", renew_now="1")
    assert world.site.ready("web", revision=2)["accountURI"] == before["uri"]
    controller.restart()
    controller.wait_ready()
    world.site.annotate("web", renew_now="2")
    world.site.ready("web", revision=3)
    assert world.count(KEY_CHANGE) == 1


@pytest.mark.parametrize("passed_on", [True, False], ids=["done", "not done"])
def test_an_answer_that_is_lost_while_the_key_changes(
    world: World, controller: Controller, suffix: str, passed_on: bool
) -> None:
    """When the answer to keyChange is lost, and the controller restarted, the CA is asked which of the two keys it has;
    the account ends with the new key, and certificates come.

    Mutation: store the new key only when the CA has confirmed it.
    """
    world.issuer()
    before = world.account()
    with world.proxy.inject(lambda each: each.path == KEY_CHANGE, dropped(passed_on=passed_on)) as lost:
        world.annotate(rollover=secrets.token_hex(4))
        wait_for(lambda: lost.hits, "the lost answer")
        controller.kill()
    controller.start()
    wait_for(lambda: world.status().get("rollover"), "a new key")
    world.says("True")
    now = world.account()
    assert now["uri"] == before["uri"]
    assert now["keyThumbprint"] != before["keyThumbprint"]
    assert world.count(KEY_CHANGE) == 1
    world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
    world.site.ready("web")


def test_a_ca_that_refuses_the_new_key(world: World, suffix: str) -> None:
    """A CA that answers 409 keeps the account's key: the Issuer stays ready and says so, and asks once.

    Mutation: let the refusal pass in `_change_key`.
    """
    world.issuer()
    before = world.account()
    with world.proxy.inject(lambda each: each.path == KEY_CHANGE, problem(409, "malformed", "key in use")) as refused:
        world.annotate(rollover="1")
        print("\n" + world.site.event("ca", "AccountKeyKept", "key in use", kind="Issuer"))
        world.says("True", text="The account keeps its key")
        assert world.account() == before
        world.site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
        world.site.ready("web")
        assert refused.hits == 1


# --- several bindings -------------------------------------------------------------------------------------------------


def test_the_shape_of_an_order_chooses_its_binding(world: World, controller: Controller, suffix: str) -> None:
    """One name is ordered with the account of one binding, two with that of another, after a restart too; what no
    binding is for is told on the Certificate, and comes when a binding is added.

    Mutation: order with the first account, whatever is asked for.
    """
    site = world.site
    site.put_secret("ucc-eab", {"secret": world.lab.eab["kid-2"].encode()})
    single = {"keyID": "kid-1", "keySecretRef": {"name": "ca-eab"}}
    ucc = {"keyID": "kid-2", "keySecretRef": {"name": "ucc-eab"}}
    bindings = [
        {"name": "single", "externalAccountBinding": single, "shapes": ["SingleName"]},
        {"name": "ucc", "externalAccountBinding": ucc, "shapes": ["SeveralNames", "ECDSA"]},
    ]
    with pytest.raises(urllib.error.HTTPError) as refused:
        world.issuer(bindings=bindings, wait=False)
    assert "give either externalAccountBinding or bindings, not both" in str(refused.value)
    with pytest.raises(urllib.error.HTTPError) as refused:
        world.issuer(bindings=[bindings[0], bindings[0]], externalAccountBinding=None, wait=False)
    assert "each binding needs a name of its own" in str(refused.value)
    world.issuer(bindings=bindings, externalAccountBinding=None)
    accounts = {each["name"]: each for each in world.status()["accounts"]}
    assert {name: each["boundKeyID"] for name, each in accounts.items()} == {"single": "kid-1", "ucc": "kid-2"}
    for name in accounts:
        assert site.secret(f"ca-account-{name}")
    controller.restart()
    site.certificate("one", [f"one.{suffix}"], "ca", kind="Issuer")
    site.certificate("two", [f"a.{suffix}", f"b.{suffix}"], "ca", kind="Issuer")
    assert site.ready("one")["accountURI"] == accounts["single"]["uri"]
    assert site.ready("two")["accountURI"] == accounts["ucc"]["uri"]
    asked = world.count("newOrder")
    names = [f"c.{suffix}", f"d.{suffix}"]
    site.certificate("three", names, "ca", kind="Issuer", privateKey={"algorithm": "RSA"})
    message = site.condition("three", "Ready", "False", "NoBindingFits", "several names with an RSA key")["message"]
    print(f"\n{message}")
    assert world.count("newOrder") == asked
    world.change(bindings=[*bindings, {"name": "rsa", "externalAccountBinding": ucc, "shapes": ["RSA"]}])
    site.ready("three")
    assert world.says("True").count("bound to key id kid-2") == 2
