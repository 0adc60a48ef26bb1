"""An account's whole life: its key, its binding, its contact, new terms, another key, its end."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from josepy.jwk import JWKRSA

from certbotk8s.ca.keys import Keys
from certbotk8s.domain import api
from certbotk8s.domain.errors import Problem, TemporaryError
from certbotk8s.domain.problems import judge
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Key, Server
from tests.fakes.ca import FakeAccount, FakeCA
from tests.unit.reconciling import SHOP, World, at_every_effect, crash, lose

HMAC_KEY = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"
OTHER_HMAC_KEY = "b3RoZXItb3RoZXItb3RoZXItb3RoZXItb3RoZXItb3RoZXI"
ISSUER = Key("Issuer", SHOP, "ca")


def binding(key_id: str = "kid-1") -> dict[str, Any]:
    return {"keyID": key_id, "keySecretRef": {"name": "eab"}}


def bound() -> World:
    """An issuer with the right binding, which the controller has not seen yet."""
    world = World()
    world.ca.external_accounts = {"kid-1": HMAC_KEY, "kid-2": OTHER_HMAC_KEY}
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    world.issuer(externalAccountBinding=binding())
    return world


def issuer(world: World) -> api.Issuer:
    found = world.api.get(api.ISSUER, SHOP, "ca")
    assert found
    return found


def state(world: World) -> tuple[str, str]:
    condition = world.issuer_condition()
    return condition.status, condition.reason


def account(world: World) -> api.AccountStatus:
    (found,) = issuer(world).status.accounts
    return found


def only(world: World) -> FakeAccount:
    (found,) = world.ca.accounts.values()
    return found


def secret(world: World) -> dict[str, bytes]:
    found = world.api.get(api.SECRET, SHOP, "ca-account")
    assert found
    return {member: base64.b64decode(value) for member, value in found.data.items()}


def notes(world: World) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(secret(world)["accounts.json"])
    return found


def wish(world: World, value: str) -> None:
    """Annotate the Issuer for a new account key."""
    raw = world.raw(api.ISSUER, "ca")
    raw["metadata"]["annotations"] = {api.ANNOTATION_ROLLOVER: value}
    world.api.put(api.ISSUER, raw)


# --- bindings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        ("The account is not awaiting external account binding", "EABAlreadyBound"),
        ("This key was already used", "EABUsed"),
        ("The key has expired", "EABExpired"),
        ("Something else", "EABRefused"),
    ],
)
def test_a_refused_binding_says_what_is_wrong(detail: str, reason: str) -> None:
    """The reason on the Issuer is that of the CA's words, which stand in the message; the CA is asked once.

    Mutation: judge newAccount as if no binding had been sent.
    """
    world = bound()
    world.ca.refused_binding = Problem("malformed", detail, 400)
    world.settle(600)
    assert state(world) == ("False", reason)
    assert detail in world.issuer_condition().message
    assert world.counts()["newAccount"] == 1


def test_a_binding_that_the_ca_does_not_need() -> None:
    """Where the CA demands no binding and confirms none, none is shown, and the message says so; Ready all the same.

    Mutation: show the key id of every binding that was sent.
    """
    world = World()
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    world.issuer(externalAccountBinding=binding())
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert account(world).bound_key_id == ""
    assert "demands no external account binding" in world.issuer_condition().message
    assert Reason.EAB_NOT_NEEDED in world.reasons("ca")


@pytest.mark.parametrize("confirms", [True, False])
def test_a_binding_is_shown_where_it_is_known(confirms: bool) -> None:
    """Of an account that is found by its key, the binding is shown only if the CA repeats it.

    Mutation: show the key id that the issuer has.
    """
    world = bound()
    world.settle()
    key = secret(world)["tls.key"]
    world.delete(api.SECRET, "ca-account")
    world.delete(api.ISSUER, "ca")
    world.settle()
    world.ca.shows_bindings = confirms
    world.secret("ca-account", {"tls.key": key})
    world.issuer(externalAccountBinding=binding())
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert account(world).bound_key_id == ("kid-1" if confirms else "")
    assert world.counts()["newAccount"] == 1


def rebind(world: World, key_id: str = "kid-2", hmac_key: str = OTHER_HMAC_KEY) -> None:
    world.secret("eab", {"secret": hmac_key.encode()})
    world.issuer(externalAccountBinding=binding(key_id))


def test_another_binding_gets_another_account() -> None:
    """A changed key id, with its HMAC key, binds anew with a new key; later orders go to the new account; the key of
    the old one, which no order needs, is gone.

    Mutation: compare nothing in `_choose`.
    """
    world = bound()
    world.certificate()
    world.settle()
    before = account(world)
    rebind(world)
    world.settle()
    now = account(world)
    assert now.bound_key_id == "kid-2"
    assert now.uri != before.uri
    assert now.key_thumbprint != before.key_thumbprint
    world.annotate(renew_now="1")
    world.settle()
    assert world.status().account_uri == now.uri
    assert len(world.ca.issued) == 2
    assert [each["uri"] for each in notes(world)["accounts"]] == [now.uri]


def test_a_changed_hmac_key_alone_binds_anew() -> None:
    """A new HMAC key under the same key id is another binding; the same one in other base64 is none.

    Mutation: compare key ids only, or the texts as they are.
    """
    world = bound()
    world.settle()
    before = account(world)
    padded = base64.b64encode(base64.urlsafe_b64decode(HMAC_KEY + "=" * (-len(HMAC_KEY) % 4))) + b"\n"
    world.secret("eab", {"secret": padded})
    world.settle()
    assert account(world) == before
    world.ca.external_accounts["kid-1"] = OTHER_HMAC_KEY
    world.secret("eab", {"secret": OTHER_HMAC_KEY.encode()})
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert account(world).uri != before.uri


def test_an_order_under_way_ends_on_the_account_that_placed_it() -> None:
    """A finalized order is collected with the old account after the binding has changed, over a restart too; then the
    old key goes.

    Mutation: do not put the old key aside in `_choose`.
    """
    world = bound()
    world.ca.holds_issuance = True
    world.certificate()
    world.settle(20)
    old = world.issuance().account_uri
    rebind(world)
    world.settle(20)
    assert account(world).uri != old
    world.start()
    world.settle(20)
    assert {each["uri"] for each in notes(world)["accounts"]} == {old, account(world).uri}
    world.ca.go_on()
    world.settle(1200)
    assert world.condition("Ready").status == "True"
    assert world.status().account_uri == old
    assert len(world.ca.orders) == 1
    assert [each["uri"] for each in notes(world)["accounts"]] == [account(world).uri]


def test_an_order_under_way_is_collected_from_the_ca_before() -> None:
    """A finalized order is collected after the issuer has moved to another CA, over a restart too.

    Mutation: keep no session for accounts at another server.
    """
    world = World()
    world.ca.holds_issuance = True
    world.issuer()
    world.certificate()
    world.settle(20)
    other = FakeCA(world.clock, "https://other.example.test/directory")
    world.authority.cas[other.url] = other
    world.issuer(server=other.url)
    world.start()
    world.settle(20)
    assert account(world).uri in other.accounts
    world.ca.go_on()
    world.settle(1200)
    assert world.tls() == world.ca.issued[0]
    assert len(other.orders) == 0


def test_a_binding_that_comes_back_finds_its_account() -> None:
    """After a new binding that the CA refuses, the old binding opens the old account again; no more keys are made.

    Mutation: look for no former account in `_choose`.
    """
    world = bound()
    world.settle()
    before = account(world)
    rebind(world, "kid-9")
    world.settle()
    assert state(world) == ("False", "EABKeyIDUnknown")
    rebind(world, "kid-8")
    world.settle()
    assert len(notes(world)["accounts"]) == 1
    rebind(world, "kid-1", HMAC_KEY)
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert account(world) == before
    assert len(world.ca.accounts) == 1


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_while_a_binding_changes(moment: str) -> None:
    """Whenever the controller dies while it binds anew, one new account comes of it, and no binding is used twice.

    Mutation: register before the new key is stored.
    """

    def begin() -> World:
        world = bound()
        world.settle()
        rebind(world)
        return world

    for act in (crash, lose):
        for world, label in at_every_effect(begin, moment, act):
            assert state(world) == ("True", "AccountRegistered"), label
            assert len(world.ca.accounts) == 2, label
            assert world.ca.accounts[account(world).uri].bound_key_id == "kid-2", label


# --- the CA's side ----------------------------------------------------------------------------------------------------


def test_changed_terms_are_told_with_their_address() -> None:
    """When the CA wants new terms agreed to, the Issuer says so with the link and asks no more; when that was done the
    certificate comes by itself.

    Mutation: doubt accounts for accountDoesNotExist only.
    """
    world = World().ready()
    only(world).terms = "https://ca.example.test/terms/2"
    world.annotate(renew_now="1")
    world.settle(60)
    assert state(world) == ("False", "TermsChanged")
    assert "https://ca.example.test/terms/2" in world.issuer_condition().message
    asked = len(world.ca.requests)
    world.settle(1800)
    assert len(world.ca.requests) == asked
    assert world.condition("Ready").status == "True"
    only(world).terms = ""
    world.settle(8 * 3600)
    assert state(world) == ("True", "AccountRegistered")
    assert len(world.ca.issued) == 2


def test_a_deactivated_account_is_told_and_not_replaced() -> None:
    """An account that somebody closed at the CA stops the Issuer, which says so; none is registered in its place.

    Mutation: doubt accounts for accountDoesNotExist only.
    """
    world = World().ready()
    only(world).deactivated = True
    world.annotate(renew_now="1")
    world.settle(60)
    assert state(world) == ("False", "AccountDeactivated")
    asked = len(world.ca.requests)
    world.settle(1800)
    assert len(world.ca.requests) == asked
    assert world.counts()["newAccount"] == 1


@pytest.mark.parametrize("shows", [True, False])
def test_a_changed_address_is_told_once(shows: bool) -> None:
    """A changed email is sent to the CA once, whether or not that shows addresses, and not again after a restart.

    Mutation: compare with what the CA shows.
    """
    world = World()
    world.ca.shows_contacts = shows
    world.issuer(email="old@example.test")
    world.settle()
    world.issuer(email="new@example.test")
    world.settle()
    assert only(world).contact == account(world).contact == "new@example.test"
    world.start()
    world.settle(4000)
    world.issuer(email="new@example.test", profile="")
    world.settle()
    assert world.counts()["contact"] == 1


def test_an_address_that_cannot_be_told_now_stops_nothing() -> None:
    """While the CA does not answer, the Issuer stays ready; the changed address is told a little later.

    Mutation: let the error pass in `_tell_contact`, or do not come back.
    """
    world = World().ready()
    world.ca.fail("contact", TemporaryError("No answer from the CA's server."), times=2)
    world.issuer(email="new@example.test")
    world.settle(10)
    assert state(world) == ("True", "AccountRegistered")
    assert "No answer" in world.issuer_condition().message
    world.settle(600)
    assert only(world).contact == account(world).contact == "new@example.test"
    assert "No answer" not in world.issuer_condition().message


def test_an_address_that_the_ca_refuses_stops_nothing() -> None:
    """When the CA refuses a changed address, the Issuer stays ready and says so.

    Mutation: let the refusal pass in `_tell_contact`.
    """
    world = World().ready()
    refused = judge(Problem("invalidContact", "No such address.", 400), retry_after=None, doing="updating")
    world.ca.fail("contact", refused)
    world.issuer(email="wrong@example.test")
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert "No such address" in world.issuer_condition().message
    assert Reason.CONTACT_REFUSED in world.reasons("ca")
    assert world.counts()["contact"] == 1


# --- the key ----------------------------------------------------------------------------------------------------------


def test_a_deleted_key_is_made_again() -> None:
    """When the Secret with the account key is deleted, a new account comes of it at once.

    Mutation: watch the binding's Secret alone.
    """
    world = World().ready()
    before = account(world)
    world.delete(api.SECRET, "ca-account")
    world.settle(1)
    assert state(world) == ("True", "AccountRegistered")
    assert account(world).uri != before.uri


def test_an_edited_key_opens_its_own_account() -> None:
    """A key that somebody puts into the Secret opens its account, with nothing restarted, and is not overwritten.

    Mutation: trust what is known beside the key whatever the key is.
    """
    world = World().ready()
    before, key = account(world), Keys().account_key()
    raw = world.raw(api.SECRET, "ca-account")
    raw["data"]["tls.key"] = base64.b64encode(key).decode()
    world.api.put(api.SECRET, raw)
    world.settle(1)
    assert state(world) == ("True", "AccountRegistered")
    assert account(world).uri != before.uri
    assert secret(world)["tls.key"] == key
    assert notes(world).get("made", "") == ""


def test_an_rsa_key_is_made_where_the_ca_wants_one() -> None:
    """Where the CA takes RSA alone, a new account key is one, and the account opens by itself.

    Mutation: do not look at the problem's type in `_register`.
    """
    world = World()
    world.ca.key_algorithms = {"RS256": rsa_type()}
    world.issuer()
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert isinstance(load_pem_private_key(secret(world)["tls.key"], None), rsa.RSAPrivateKey)
    wish(world, "1")
    world.settle()
    assert isinstance(load_pem_private_key(secret(world)["tls.key"], None), rsa.RSAPrivateKey)
    assert only(world).thumbprint == account(world).key_thumbprint


def rsa_type() -> type:
    return type(load_pem_private_key(Keys().account_key("RSA"), None))


def ec_type() -> type:
    return type(load_pem_private_key(Keys().account_key(), None))


def test_a_key_that_was_given_is_never_replaced() -> None:
    """An imported key that the CA does not take stays, and the Issuer says what the CA takes.

    Mutation: take every key for our own in `_is_ours`.
    """
    world = World()
    world.ca.key_algorithms = {"RS256": rsa_type()}
    key = Keys().account_key()
    world.secret("ca-account", {"tls.key": key})
    world.issuer()
    world.settle()
    assert state(world) == ("False", "AccountKeyUnsupported")
    assert "The CA accepts: RS256" in world.issuer_condition().message
    assert "Secret shop/ca-account was not made by certbotk8s" in world.issuer_condition().message
    assert secret(world)["tls.key"] == key


def test_the_kind_of_key_can_be_chosen() -> None:
    """accountKeyAlgorithm RSA makes an RSA key, and none in place of one that is there.

    Mutation: make ECDSA keys only.
    """
    world = World()
    world.issuer(accountKeyAlgorithm="RSA")
    world.settle()
    key = secret(world)["tls.key"]
    assert isinstance(load_pem_private_key(key, None), rsa.RSAPrivateKey)
    world.issuer(accountKeyAlgorithm="ECDSA")
    world.settle()
    assert secret(world)["tls.key"] == key
    assert len(world.ca.accounts) == 1


def test_an_imported_account_is_found() -> None:
    """The account of certbot's key, a JWK, is found and used; nothing is registered and the key stays as it is.

    Mutation: read PEM only.
    """
    world = World()
    pem = Keys().account_key("RSA")
    world.authority.register(Server(world.ca.url), pem, "", None)
    key = load_pem_private_key(pem, None)
    assert isinstance(key, rsa.RSAPrivateKey)
    text = JWKRSA(key=key).json_dumps().encode()
    world.secret("private-key", {"private_key.json": text})
    world.issuer(privateKeySecretRef={"name": "private-key", "key": "private_key.json"})
    world.certificate()
    world.settle()
    assert world.condition("Ready").status == "True"
    assert account(world).uri == only(world).uri
    stored = world.api.get(api.SECRET, SHOP, "private-key")
    assert stored
    assert base64.b64decode(stored.data["private_key.json"]) == text
    world.start()
    world.ca.requests.clear()
    world.settle()
    assert world.ca.requests == []


def test_an_immutable_key_is_used_as_it_is() -> None:
    """An immutable Secret with an account key serves: nothing is written to it, and a wish for a new key is refused.

    Mutation: write to it all the same, or change the key although it cannot be stored.
    """
    world = World()
    key = Keys().account_key()
    made = world.secret("ca-account", {"tls.key": key})
    raw = world.raw(api.SECRET, "ca-account")
    world.api.put(api.SECRET, {**raw, "immutable": True})
    world.issuer()
    world.certificate()
    world.settle()
    assert world.condition("Ready").status == "True"
    wish(world, "1")
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert "its Secret is immutable" in world.issuer_condition().message
    assert "keyChange" not in world.counts()
    world.start()
    world.settle()
    assert len(world.ca.accounts) == 1
    stored = world.api.get(api.SECRET, SHOP, "ca-account")
    assert stored
    assert stored.data == made.data


def test_no_key_is_made_where_that_is_forbidden() -> None:
    """With disableAccountKeyGeneration the Issuer names the missing Secret, and goes on when that appears.

    Mutation: make a key all the same, or do not watch for it.
    """
    world = World()
    world.issuer(disableAccountKeyGeneration=True)
    world.settle(600)
    assert state(world) == ("False", "AccountKeyMissing")
    assert "Secret shop/ca-account" in world.issuer_condition().message
    assert world.api.get(api.SECRET, SHOP, "ca-account") is None
    assert world.counts() == {}
    world.secret("ca-account", {"tls.key": Keys().account_key()})
    world.settle(1)
    assert state(world) == ("True", "AccountRegistered")


def test_another_binding_never_replaces_a_key_that_was_given() -> None:
    """For another binding an imported key stays, and the Issuer says what to do; a new key then goes on by itself.

    Mutation: take every key for our own in `_is_ours`.
    """
    world = bound()
    world.delete(api.ISSUER, "ca")
    key = Keys().account_key()
    world.secret("ca-account", {"tls.key": key})
    world.issuer(externalAccountBinding=binding())
    world.settle()
    rebind(world)
    world.settle()
    assert state(world) == ("False", "AccountKeyBound")
    assert secret(world)["tls.key"] == key
    world.secret("ca-account", {"tls.key": Keys().account_key()})
    world.settle(1)
    assert state(world) == ("True", "AccountRegistered")
    assert account(world).bound_key_id == "kid-2"


# --- another key for the same account ---------------------------------------------------------------------------------


def asking() -> World:
    """An Issuer, ready, that is asked for a new account key."""
    world = World()
    world.issuer()
    world.settle()
    wish(world, "1")
    return world


def test_a_new_key_for_the_account() -> None:
    """Each new value of the annotation gives the account one new key; a restart gives it none.

    Mutation: forget the wish that was answered.
    """
    world = World().ready()
    before = account(world)
    wish(world, "1")
    world.settle()
    assert world.counts()["keyChange"] == 1
    now = account(world)
    assert now.uri == before.uri
    assert now.key_thumbprint == only(world).thumbprint != before.key_thumbprint
    assert issuer(world).status.rollover == "1"
    assert Reason.ACCOUNT_KEY_CHANGED in world.reasons("ca")
    assert not notes(world).get("nextKey")
    world.annotate(renew_now="1")
    world.settle()
    assert len(world.ca.issued) == 2
    world.start()
    world.settle(4000)
    assert world.counts()["keyChange"] == 1
    wish(world, "2")
    world.settle()
    assert world.counts()["keyChange"] == 2
    assert state(world) == ("True", "AccountRegistered")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_while_the_key_changes(moment: str) -> None:
    """Whenever the controller dies while the key changes, or an answer is lost, the account stays, with one of the two
    keys at a time, and ends with a new one.

    Mutation: store the new key after the CA has confirmed it.
    """
    for act in (crash, lose):
        for world, label in at_every_effect(asking, moment, act):
            world.settle(4000)
            assert state(world) == ("True", "AccountRegistered"), label
            assert only(world).thumbprint == account(world).key_thumbprint, label
            assert issuer(world).status.rollover == "1", label
            assert not notes(world).get("nextKey"), label
            world.certificate()
            world.settle()
            assert world.condition("Ready").status == "True", label


def test_a_ca_that_changes_no_keys() -> None:
    """A CA that refuses is asked once for each wish; the account keeps its key and the Issuer is ready.

    Mutation: let the refusal pass in `_change_key`.
    """
    world = asking()
    world.ca.changes_keys = False
    before = account(world)
    world.settle(8000)
    assert state(world) == ("True", "AccountRegistered")
    assert account(world) == before
    assert Reason.ACCOUNT_KEY_KEPT in world.reasons("ca")
    assert world.counts()["keyChange"] == 1
    world.certificate()
    world.settle()
    assert world.condition("Ready").status == "True"


def test_orders_under_way_start_again_with_the_new_key() -> None:
    """An order whose challenges were answered with the old key is given up for one with the new key: no failure.

    Mutation: leave the account's key out of what an order was placed for.
    """
    world = World()
    world.ca.holds_validation = True
    world.issuer()
    world.certificate()
    world.settle(10)
    assert world.issuance().challenges
    wish(world, "1")
    world.settle(10)
    (challenge,) = world.issuance().challenges
    assert challenge.key_authorization.endswith(only(world).thumbprint)
    world.ca.go_on()
    world.settle(300)
    assert world.condition("Ready").status == "True"
    assert world.status().failed_attempts == 0
    world.nothing_left()


def test_a_wish_that_is_taken_back() -> None:
    """A wish that is withdrawn while the CA does not answer changes no key.

    Mutation: keep the next key when the annotation goes.
    """
    world = asking()
    before = account(world)
    world.ca.fail("keyChange", TemporaryError("No answer."), times=1000)
    world.settle(60)
    wish(world, "")
    world.settle(4000)
    assert state(world) == ("True", "AccountRegistered")
    assert account(world).key_thumbprint == before.key_thumbprint
    assert not notes(world).get("nextKey")


# --- several bindings -------------------------------------------------------------------------------------------------


def several() -> World:
    """An Issuer with a binding for one name and one for several, which the controller has not seen yet."""
    world = World()
    world.ca.external_accounts = {"kid-1": HMAC_KEY, "kid-2": OTHER_HMAC_KEY}
    world.secret("eab", {"secret": HMAC_KEY.encode()})
    world.secret("eab-2", {"secret": OTHER_HMAC_KEY.encode()})
    world.issuer(bindings=BINDINGS)
    return world


BINDINGS = [
    {"name": "single", "externalAccountBinding": binding(), "shapes": ["SingleName", "ECDSA"]},
    {
        "name": "ucc",
        "externalAccountBinding": {"keyID": "kid-2", "keySecretRef": {"name": "eab-2"}},
        "shapes": ["SeveralNames"],
    },
]


def test_the_shape_of_an_order_chooses_its_account() -> None:
    """Each binding has an account and a Secret of its own; one name is ordered with the one, several with the other,
    after a restart too; a Certificate that gets a second name moves over.

    Mutation: order with the first account, whatever is asked for.
    """
    world = several()
    world.certificate("one", names=("one.example.test",))
    world.certificate("two", names=("a.example.test", "b.example.test"))
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    uris = {each.name: each.uri for each in issuer(world).status.accounts}
    assert {world.ca.accounts[uri].bound_key_id for uri in uris.values()} == {"kid-1", "kid-2"}
    assert world.status("one").account_uri == uris["single"]
    assert world.status("two").account_uri == uris["ucc"]
    assert world.api.get(api.SECRET, SHOP, "ca-account-single")
    assert world.api.get(api.SECRET, SHOP, "ca-account-ucc")
    assert world.api.get(api.SECRET, SHOP, "ca-account") is None
    world.start()
    world.ca.requests.clear()
    world.settle()
    assert world.ca.requests == []
    world.certificate("one", names=("one.example.test", "more.example.test"))
    world.settle()
    assert world.status("one").account_uri == uris["ucc"]


def to_bindings(world: World) -> None:
    world.issuer(bindings=BINDINGS)


def to_one_binding(world: World) -> None:
    world.issuer(externalAccountBinding={"keyID": "kid-2", "keySecretRef": {"name": "eab-2"}})


def to_fewer_bindings(world: World) -> None:
    world.issuer(bindings=[{**BINDINGS[1], "shapes": []}])


def to_another_secret(world: World) -> None:
    world.issuer(externalAccountBinding=binding(), privateKeySecretRef={"name": "elsewhere"})


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({"externalAccountBinding": binding()}, to_bindings),
        ({"externalAccountBinding": binding()}, to_another_secret),
        ({"bindings": BINDINGS}, to_one_binding),
        ({"bindings": BINDINGS}, to_fewer_bindings),
    ],
)
@pytest.mark.parametrize("moment", ["before", "after", "both"])
def test_an_order_under_way_ends_on_an_account_that_the_spec_has_no_more(
    before: dict[str, Any], change: Callable[[World], None], moment: str
) -> None:
    """A finalized order is collected with the account that placed it when the bindings, or the Secret of the account
    key, are others by now: also where the controller is started again before the spec changes, or after. The account
    stays in status until then.

    Mutation: do not look for former accounts, or keep them out of status.
    """
    world = several()
    world.issuer(**before)
    world.settle()
    world.ca.holds_issuance = True
    world.certificate()
    world.settle(20)
    old = world.issuance().account_uri
    if moment != "after":
        world.start()
    change(world)
    world.settle(20)
    if moment != "before":
        for _ in range(2):
            world.start()
            world.settle(400)
    assert state(world)[0] == "True"
    assert old in {each.uri for each in issuer(world).status.accounts}
    world.ca.go_on()
    world.settle(1200)
    assert world.condition("Ready").status == "True"
    assert world.status().account_uri == old
    assert len(world.ca.orders) == 1
    assert old not in {each.uri for each in issuer(world).status.accounts}


def test_a_former_account_is_what_its_secret_says() -> None:
    """What status says of a former account is where to look, no more: a Secret with another key is not used.

    Mutation: take the key of the Secret that status names.
    """
    world = several()
    world.issuer(externalAccountBinding=binding())
    world.settle()
    world.ca.holds_issuance = True
    world.certificate()
    world.settle(20)
    old = world.issuance().account_uri
    there = world.api.get(api.SECRET, SHOP, "ca-account")
    assert there
    notes_of_old = base64.b64decode(there.data["accounts.json"])
    world.secret("ca-account", {"tls.key": Keys().account_key(), "accounts.json": notes_of_old})
    world.issuer(bindings=BINDINGS)
    world.start()
    world.settle(20)
    assert world.process.accounts.session(Key("Issuer", SHOP, "ca"), old) is None


def test_an_order_of_a_former_account_whose_key_is_gone_is_lost() -> None:
    """Its account cannot open any more, and the next attempt orders with one that the issuer has now.

    Mutation: wait for every account that the issuer's status names.
    """
    world = several()
    world.issuer(externalAccountBinding=binding())
    world.settle()
    world.ca.holds_issuance = True
    world.certificate()
    world.settle(20)
    old = world.issuance().account_uri
    world.secret("ca-account", {"tls.key": Keys().account_key()})
    world.issuer(bindings=BINDINGS)
    world.ca.go_on()
    world.start()
    world.settle(600)
    first, second = world.status().recent_orders
    assert (first.account_uri, first.outcome) == (old, "OrderGone")
    assert second.account_uri != old
    assert world.condition("Ready").status == "True"


def test_a_shape_without_a_binding_is_told() -> None:
    """A Certificate that no binding is for says what is missing and orders nothing; an added binding lets it go on.

    Mutation: take the first binding where none fits.
    """
    world = several()
    world.certificate(names=("one.example.test",), privateKey={"algorithm": "RSA"})
    world.certificate("wild", names=("*.example.test",))
    world.settle()
    assert world.condition("Ready").reason == "NoBindingFits"
    assert (
        "is for one name with an RSA key; there are single (SingleName and ECDSA)" in world.condition("Ready").message
    )
    assert "is for a wildcard name; there are" in world.condition("Ready", "wild").message
    assert world.ca.orders == {}
    more = {"name": "rest", "externalAccountBinding": binding(), "shapes": ["RSA"]}
    world.issuer(bindings=[*BINDINGS, more])
    world.settle()
    assert world.condition("Ready").status == "True"
    assert len(issuer(world).status.accounts) == 3


def test_an_issuer_is_ready_when_all_its_accounts_are() -> None:
    """One binding that is refused makes the Issuer not ready and is named; the other account is open all the same.

    Mutation: stop at the first that fails.
    """
    world = several()
    wrong = {"name": "wrong", "externalAccountBinding": binding("kid-9")}
    world.issuer(bindings=[wrong, *BINDINGS])
    world.settle()
    assert state(world) == ("False", "EABKeyIDUnknown")
    assert world.issuer_condition().message.startswith("wrong: Registering an account")
    assert [each.name for each in issuer(world).status.accounts] == ["single", "ucc"]
    asked = len(world.ca.requests)
    world.settle(600)
    assert len(world.ca.requests) == asked
    world.issuer(bindings=BINDINGS)
    world.settle()
    assert state(world) == ("True", "AccountRegistered")
    assert world.counts()["newAccount"] == 3
