"""How a Certificate gets its Secret: one certificate for one issuance, whatever breaks in between."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from certbotk8s.ca.keys import Keys
from certbotk8s.domain import api
from certbotk8s.domain.errors import PermanentError, Problem, TemporaryError
from certbotk8s.domain.issuance import Outcome, State, advance
from certbotk8s.domain.problems import judge
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.renewal import SELF_CHECKS
from certbotk8s.ports import Key
from certbotk8s.reconcile import certificate as reconcile_certificate
from certbotk8s.reconcile.claims import Claims
from certbotk8s.reconcile.secrets import next_key_name
from tests.fakes.ca import FakeCA, FakeOrder, Leaf, sign_leaf
from tests.unit.reconciling import (
    ECDSA,
    HOME,
    NAME,
    SHOP,
    SOLVERS,
    Crash,
    World,
    at,
    at_every_effect,
    crash,
    lose,
    refuse,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.reconciling import Process

DAY = 86400.0
OTHER = "other.example.test"
SEVEN = {"newOrder": 1, "authorization": 1, "answer": 1, "order": 2, "finalize": 1, "certificate": 1}


# --- worlds in which a controller is about to work --------------------------------------------------------------------


def with_issuer(**world: Any) -> World:
    """An issuer that is Ready, nothing asked for; counters at nought."""
    made = World(**world)
    made.issuer()
    made.settle()
    made.cluster.writes.clear()
    made.ca.requests.clear()
    return made


def first() -> World:
    """One name, to be validated."""
    world = with_issuer()
    world.certificate()
    return world


def two_names() -> World:
    """Two names, to be validated."""
    world = with_issuer()
    world.certificate(names=(NAME, "www.example.test"))
    return world


def preauthorized() -> World:
    """One name that the CA has validated for the account; the issuer has no solver."""
    world = with_issuer(solvers=[])
    world.ca.preauthorized = {NAME, OTHER}
    world.certificate()
    return world


def at_once() -> World:
    """As preauthorized, and finalize is answered with the issued order."""
    world = preauthorized()
    world.ca.looks_until_valid = 0
    return world


def slow() -> World:
    """The CA takes five looks to issue."""
    world = first()
    world.ca.looks_until_valid = 5
    return world


def renewal() -> World:
    """A Certificate whose renewal is due, and whose name has to be validated again."""
    world = World()
    world.ca.reuses_authorizations = False
    world.ready()
    world.clock.advance(60 * DAY + 1)
    return world


# Each with the number of certificates that the CA has signed in the end.
BEGINNINGS = {first: 1, two_names: 1, preauthorized: 1, at_once: 1, slow: 1, renewal: 2}
each_beginning = pytest.mark.parametrize(
    ("begin", "issued"), BEGINNINGS.items(), ids=[begin.__name__ for begin in BEGINNINGS]
)


def issued_once(world: World, issued: int, label: str) -> None:
    """Ready with the last of that many certificates, and nothing left behind."""
    assert len(world.ca.issued) == issued, label
    assert world.condition("Ready").status == "True", label
    assert world.tls() == world.ca.issued[-1], label
    assert world.status().serial_number == f"{world.tls().serial_number:x}", label
    assert world.status().revision == issued, label
    assert world.status().failed_attempts == 0, label
    assert len(world.ca.unfinalized()) <= 1, label
    world.nothing_left()


def condition_of(world: World) -> tuple[str, str]:
    condition = world.condition("Issuing")
    return condition.status, condition.reason


def ready_of(world: World) -> tuple[str, str]:
    condition = world.condition("Ready")
    return condition.status, condition.reason


# --- the plain ways ---------------------------------------------------------------------------------------------------


def test_one_name_costs_seven_requests_and_nine_writes() -> None:
    """A new name costs seven requests, four status writes, and a Secret, a key and a challenge, both removed again.

    Mutation: persist one more state, or fetch the order again after it was handed over.
    """
    world = first()
    world.settle()
    issued_once(world, 1, "")
    assert world.counts() == SEVEN
    key = next_key_name(world.get())
    challenge = world.cluster.writes[3][3]
    assert world.cluster.writes == [
        ("create", "Secret", SHOP, key),
        ("apply", "Certificate/status", SHOP, "web-tls"),
        ("apply", "Certificate/status", SHOP, "web-tls"),
        ("create", "Ingress", HOME, challenge),
        ("apply", "Certificate/status", SHOP, "web-tls"),
        ("create", "Secret", SHOP, "web-tls"),
        ("apply", "Certificate/status", SHOP, "web-tls"),
        ("delete", "Ingress", HOME, challenge),
        ("delete", "Secret", SHOP, key),
    ]


def test_what_a_ready_certificate_says() -> None:
    """Ready and Issuing give the validity and the renewal in the same words, and one Event tells of it.

    Mutation: take the conditions' sentences from the order instead of the Secret.
    """
    world = World().ready()
    valid = "alid until 2027-02-18 09:00 UTC"
    assert world.condition("Ready").message == f"V{valid} for {NAME}; renews 2027-01-19 09:00 UTC"
    assert f"v{valid}, renews 2027-01-19 09:00 UTC" in world.condition("Issuing").message
    assert condition_of(world) == ("False", "Issued")
    assert world.reasons().count(Reason.ISSUED) == 1
    assert world.status().issuer_ref == api.IssuerRef("ca")
    assert world.status().account_uri in world.ca.accounts
    secret = world.api.get(api.SECRET, SHOP, "web-tls")
    assert secret
    assert secret.type == "kubernetes.io/tls"
    assert secret.metadata.annotations[api.ANNOTATION_CERTIFICATE_UID] == world.get().metadata.uid
    assert secret.metadata.annotations[api.ANNOTATION_ISSUER] == "Issuer/ca"


def test_a_preauthorized_name_needs_no_solver() -> None:
    """An order that is born ready is issued by an issuer without solvers, with four requests and no challenge.

    Mutation: go to Ordered after newOrder whatever the order says.
    """
    world = preauthorized()
    world.settle()
    issued_once(world, 1, "")
    assert world.counts() == {"newOrder": 1, "finalize": 1, "order": 1, "certificate": 1}
    assert not [write for write in world.cluster.writes if write[1] == "Ingress"]


def test_finalize_is_sent_once_although_the_answer_is_not_the_end() -> None:
    """The order handed over by newOrder is looked at afresh after finalize, so that finalize is not sent again.

    Mutation: leave the order of newOrder where the collecting step finds it.
    """
    world = preauthorized()
    world.ca.fail("finalize", TemporaryError("the connection was cut"), after=True)
    world.settle()
    issued_once(world, 1, "")
    assert world.counts()["finalize"] == 1


def test_a_name_nobody_can_validate_is_told_in_a_sentence() -> None:
    """A pending authorization without a solver ends as NotPreauthorized, with the name, the CA's offers and what to do.

    Mutation: wait for the order instead.
    """
    world = with_issuer(solvers=[])
    world.certificate()
    world.settle(30)
    assert ready_of(world) == ("False", "NotPreauthorized")
    message = world.condition("Ready").message
    assert message.startswith(f"The CA has not validated {NAME} for this account and offers dns-01 and http-01; Issuer")
    assert "shop/ca solves none. Have the name validated at the CA, or add a solver to the issuer. Next" in message
    assert Reason.NOT_PREAUTHORIZED in world.reasons()
    assert world.next_keys() == []


def test_an_order_born_invalid_is_explained() -> None:
    """An order that is invalid in the answer to newOrder is a failed attempt with the CA's reason, like any other.

    Mutation: go on to Failed without asking why.
    """
    world = first()
    world.ca.ordered = lambda _order: world.ca.end_authorizations("revoked")
    world.settle(30)
    assert ready_of(world) == ("False", "ChallengeFailed")
    assert "is revoked" in world.condition("Ready").message
    assert world.status().failed_attempts == 1


@pytest.mark.parametrize("key", [ECDSA, {"algorithm": "ECDSA", "size": 384}, {"algorithm": "RSA", "encoding": "PKCS1"}])
def test_the_key_is_of_the_wanted_kind(key: dict[str, Any]) -> None:
    """Algorithm, size and encoding of the key in the Secret are those of the spec.

    Mutation: make every key with the default size.
    """
    world = World().ready(privateKey=key)
    pem = world.key()
    made = load_pem_private_key(pem, None)
    if key["algorithm"] == "RSA":
        assert isinstance(made, rsa.RSAPrivateKey)
        assert pem.startswith(b"-----BEGIN RSA PRIVATE KEY")
    else:
        assert isinstance(made, ec.EllipticCurvePrivateKey)
        assert made.curve.key_size == key.get("size", 256)


def test_rotation_always_changes_the_key_and_never_keeps_it() -> None:
    """A renewal brings a new key with rotationPolicy Always, and the one in use with Never.

    Mutation: ignore rotationPolicy.
    """
    for policy, kept in (("Always", False), ("Never", True)):
        world = World().ready(privateKey={**ECDSA, "rotationPolicy": policy})
        before = world.key()
        world.clock.advance(60 * DAY + 1)
        world.settle()
        issued_once(world, 2, policy)
        assert (world.key() == before) is kept


def test_it_is_renewed_by_itself_at_the_renewal_time() -> None:
    """Nothing is asked of the CA before renewalTime, and then once.

    Mutation: rest for an hour more.
    """
    world = World().ready()
    due = world.status().renewal_time
    assert due
    world.ca.requests.clear()
    world.live((due - world.clock.now()).total_seconds() - 1)
    assert world.counts() == {}
    world.settle(30)
    issued_once(world, 2, "")


# --- crashes, lost answers, refused writes ----------------------------------------------------------------------------


@each_beginning
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_effect_costs_no_certificate(begin: Callable[[], World], issued: int, when: str) -> None:
    """A controller that dies before or after any write or request is followed by one that issues exactly once.

    Mutation: persist Finalizing after finalize, or forget to store the key before the order.
    """
    for world, label in at_every_effect(begin, when, crash):
        issued_once(world, issued, label)


@each_beginning
def test_a_refused_status_write_costs_no_certificate(begin: Callable[[], World], issued: int) -> None:
    """A Conflict at any status write leads back to what is stored, and to one certificate.

    Mutation: go on with the step after a refused write.
    """
    for world, label in at_every_effect(begin, "before", refuse, only="status"):
        issued_once(world, issued, label)


@each_beginning
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_lost_costs_no_certificate(begin: Callable[[], World], issued: int, when: str) -> None:
    """A write or request of which the answer is lost, done or not, is found out about and not repeated blindly.

    Mutation: send finalize again after an error without looking at the order.
    """
    for world, label in at_every_effect(begin, when, lose):
        issued_once(world, issued, label)
        assert world.counts()["finalize"] <= (2 if when == "before" else 1) + issued - 1, label


@each_beginning
def test_an_answer_lost_while_the_caches_lag_costs_no_certificate(begin: Callable[[], World], issued: int) -> None:
    """The same when the watch does not show the write either for a while.

    Mutation: order on the cache's word, without the live read.
    """

    def lose_and_lag(world: World) -> None:
        world.cluster.lagging = True
        lose(world)

    for world, label in at_every_effect(begin, "after", lose_and_lag, only="/"):
        issued_once(world, issued, label)


FAULTS: dict[str, Callable[[World], None]] = {"crash": crash, "refuse": refuse, "lose": lose}


@settings(max_examples=60)
@given(
    begin=st.sampled_from(list(BEGINNINGS)),
    faults=st.lists(
        st.tuples(st.integers(0, 14), st.sampled_from(["before", "after"]), st.sampled_from(sorted(FAULTS))),
        min_size=2,
        max_size=5,
    ),
)
def test_several_faults_cost_no_certificate(begin: Callable[[], World], faults: list[tuple[int, str, str]]) -> None:
    """Crashes, refusals and lost answers in any order still end in exactly one certificate for the issuance.

    Mutation: keep the work in memory after a Conflict.
    """
    world = begin()
    for number, when, fault in faults:
        world.effects.at(number, when, lambda fault=fault: FAULTS[fault](world))  # type: ignore[misc]
        try:
            world.settle(1200)
        except Crash:
            world.start()
    world.effects.no_more()
    world.settle(1200)
    world.process.sweep()
    issued_once(world, BEGINNINGS[begin], str(faults))


@settings(max_examples=60)
@given(
    begin=st.sampled_from([first, preauthorized, renewal]),
    turns=st.lists(st.booleans(), min_size=20, max_size=60),
    lags=st.sampled_from([(False, False), (True, False), (False, True)]),
    reuses=st.booleans(),
)
def test_two_leaders_issue_once(
    begin: Callable[[], World], turns: list[bool], lags: tuple[bool, bool], reuses: bool
) -> None:
    """Two controllers that both think they lead, in any interleaving, end with one certificate and one finalized order.

    Mutation: write status without the resourceVersion.
    """
    world = begin()
    world.ca.reuses_orders = reuses
    rivals = (world.process, world.second())
    for process, lag in zip(rivals, lags, strict=True):
        process.work(Key("Issuer", SHOP, "ca"))  # opens the account
        process.cluster.lagging = lag
    running = [iter(()), iter(())]
    for turn in turns:
        running[turn] = _turn(rivals[turn], running[turn])
    for leader in rivals:
        leader.cluster.lagging = False
        leader.cluster.catch_up()
    for leader, rest in zip(rivals, running, strict=True):
        for _ in rest:
            pass
        leader.settle(300)
    rivals[0].settle(300)
    rivals[0].sweep()
    assert len(world.ca.issued) == BEGINNINGS[begin]
    assert world.tls() == world.ca.issued[-1]
    world.nothing_left()


def _turn(process: Process, running: Any) -> Any:
    """One call of the reconcile under way, or the beginning of the next."""
    try:
        next(running)
    except StopIteration:
        process.queue.due.clear()
        process.queue.add(Key("Certificate", SHOP, "web-tls"))
        return process.turns(Key("Certificate", SHOP, "web-tls"))
    return running


@pytest.mark.parametrize("when", ["before apply Secret", "after apply Secret", "before delete Secret"])
def test_a_leader_discards_no_key_with_which_another_goes_on(when: str) -> None:
    """A key that one leader takes for a left one, while another has just ordered with it, is there for its certificate.

    Mutation: delete it without looking at status in between; delete it in whatever version it is; leave the mark on it
    when it is taken.
    """
    world = preauthorized()
    world.ca.holds_issuance = True
    key, rival = Key("Certificate", SHOP, "web-tls"), world.second()
    rival.work(Key("Issuer", SHOP, "ca"))
    running = rival.turns(key)
    next(running)  # about to make a key
    next(running)  # about to order
    assert world.counts() == {}

    def go_on(at: str, verb: str, kind: str) -> None:
        if when == f"{at} {verb} {kind}":
            for _ in running:
                pass
            assert world.counts().get("finalize") == 1

    world.cluster.before = lambda verb, kind, _namespace, _name: go_on("before", verb, kind)
    world.cluster.after = lambda verb, kind, _namespace, _name: go_on("after", verb, kind)
    world.process.work(key)
    world.ca.go_on()
    rival.settle()
    world.settle()
    assert world.counts()["finalize"] == 1
    assert [order.outcome for order in world.status().recent_orders] == ["Issued"]
    world.nothing_left()


def test_an_order_of_an_account_that_another_leader_has_registered_goes_on() -> None:
    """The CA has forgotten the account; one leader registers anew and orders, and the other, which knows the former
    account alone, takes over: it opens the new one, and collects that order's certificate.

    Mutation: take an order for lost whose account is not open here, without a look at the issuer.
    """
    world = preauthorized()
    rival = world.second()
    rival.work(Key("Issuer", SHOP, "ca"))
    world.ca.forget_accounts()
    world.ca.holds_issuance = True
    world.process.settle(600)
    assert world.issuance().state == "Finalizing"
    signed = len(world.ca.issued)
    rival.work(Key("Certificate", SHOP, "web-tls"))
    assert world.issuance().state == "Finalizing"
    world.ca.go_on()
    rival.settle(600)
    world.settle(600)
    assert len(world.ca.issued) == signed
    assert [order.outcome for order in world.status().recent_orders][-1] == "Issued"
    world.nothing_left()


def test_an_account_that_never_opens_is_not_waited_for_without_end() -> None:
    """The issuer names the account as one of now, and yet it does not open here: by the order's deadline it is lost.

    Mutation: wait for such an account beyond the deadline.
    """
    world = preauthorized()
    rival = world.second()
    rival.work(Key("Issuer", SHOP, "ca"))
    world.ca.forget_accounts()
    world.ca.holds_issuance = True
    world.process.settle(600)
    url = world.issuance().order_url
    world.clock.advance(60 * DAY)
    rival.work(Key("Certificate", SHOP, "web-tls"))
    assert world.status().issuance is None
    assert [(order.order_url, order.outcome) for order in world.status().recent_orders][-1] == (url, "OrderGone")


def finalized_elsewhere(world: World, *, processing: bool) -> None:
    """Another leader has had the order finalized, with the key that is stored for it."""
    (order,) = world.ca.orders.values()
    (key,) = world.next_keys()
    for authorization in order.authorizations:
        authorization.status = "valid"
    world.ca.holds_issuance, world.ca.looks_until_valid = processing, 0
    world.ca.finalize(order.account, f"{order.url}/finalize", base64.b64decode(key.data["tls.csr"]))


def lost(world: World) -> None:
    """The CA forgets every order."""
    world.ca.orders.clear()


FURTHER: dict[str, Callable[[World], None]] = {
    "order processing": partial(finalized_elsewhere, processing=True),
    "order valid": partial(finalized_elsewhere, processing=False),
    "order gone": lost,
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("outcome", FURTHER)
@pytest.mark.parametrize("state", ["Ordered", "Presented"])
def test_an_order_that_is_further_than_was_thought(
    monkeypatch: pytest.MonkeyPatch, state: str, outcome: str, restarted: bool
) -> None:
    """Whatever became of the order while its challenge was presented or answered: its certificate is collected, or
    where the CA no longer knows it a new one is placed.

    Mutation: let no row of the table lead from there to Finalizing, or to a new order.
    """
    world, moves = first(), list[str]()

    def noted(before: State, happened: Outcome) -> State:
        moves.append(f"{before}: {happened}")
        return advance(before, happened)

    monkeypatch.setattr(reconcile_certificate, "advance", noted)
    kind = "authorization" if state == "Ordered" else "answer"
    world.ca.fail(kind, TemporaryError("no answer"))
    world.settle(1)
    assert moves[-1] == ("Requested: order pending" if state == "Ordered" else "Ordered: challenges presented")
    FURTHER[outcome](world)
    if restarted:
        world.start()
    world.settle(1)
    world.settle(60)
    world.ca.go_on()
    world.settle(60)
    assert f"{'Ordered' if restarted else state}: {outcome}" in moves
    assert len(world.ca.issued) == 1
    assert [order.outcome for order in world.status().recent_orders][-1] == "Issued"
    assert ready_of(world) == ("True", "Ready")
    world.nothing_left()


def test_a_next_key_that_cannot_be_stored_again_ends_the_attempt() -> None:
    """The key of an order is deleted before finalize, and somebody else's Secret stands where the new one belongs.

    Mutation: let no row of the table lead from Authorized to Failed.
    """
    world = preauthorized()

    def take_the_place(world: World) -> None:
        (key,) = world.next_keys()
        world.delete(api.SECRET, key.metadata.name)
        world.secret(key.metadata.name, {"theirs": b"theirs"})

    world.effects.at(2, "after", partial(take_the_place, world))
    world.settle(10)
    assert "status" in world.effects.happened
    assert condition_of(world)[1] == Reason.SECRET_NOT_OWNED
    assert "finalize" not in world.counts()
    for secret in world.api.all(api.SECRET):
        if secret.data.get("theirs"):
            world.delete(api.SECRET, secret.metadata.name)
    world.settle(600)
    issued_once(world, 1, "")


def test_an_answer_that_the_ca_has_lost_is_given_again() -> None:
    """A challenge that the CA still waits for after half a minute is answered once more; one under way is not.

    Mutation: wait for the order without a look at its challenges.
    """
    world = first()
    world.ca.holds_validation = True
    world.settle(100)
    assert world.counts()["answer"] == 1
    world.ca.holds_validation = False
    for authorization in world.ca.pending_authorizations():
        for challenge in authorization.challenges:
            challenge.status = "pending"
    world.settle()
    assert world.counts()["answer"] == 2
    issued_once(world, 1, "")


def test_a_request_that_another_leader_has_fulfilled_is_not_ordered() -> None:
    """A leader that could not place its order does not place it when another has had the certificate issued meanwhile.

    Mutation: go on with what is in memory whenever status names no issuance, as before.
    """
    world = preauthorized()
    world.ca.fail("newOrder", TemporaryError("no answer"))
    world.process.work(Key("Certificate", SHOP, "web-tls"))
    assert world.counts() == {"newOrder": 1}
    world.second().settle()
    assert len(world.ca.issued) == 1
    world.settle()
    issued_once(world, 1, "")


def test_a_leader_that_was_overtaken_takes_no_key_of_the_next_issuance() -> None:
    """One leader stops at any of its effects until another has ended the issuance and had the next one finalized.

    Mutation: look for the keys to remove after the end of their issuance was written.
    """

    def overtake(world: World) -> None:
        rival = world.second()
        rival.settle(30)
        world.annotate(renew_now="1")
        world.ca.holds_issuance = True
        rival.settle(5)

    for when in ("before", "after"):
        for world, label in at_every_effect(first, when, overtake):
            world.ca.go_on()
            world.settle(1200)
            outcomes = [order.outcome for order in world.status().recent_orders]
            assert "KeyLost" not in outcomes, label
            assert len(world.ca.issued) <= 2, label
            assert ready_of(world) == ("True", "Ready"), label


def test_a_status_that_the_api_server_refuses_is_no_bug() -> None:
    """Where the end of an attempt cannot be written down, that is tried again, and the certificate is not ordered anew.

    Mutation: treat a refused status write as a failed attempt.
    """
    world = first()

    def forbid(verb: str, kind: str, _namespace: str, _name: str) -> None:
        if kind == "Certificate/status" and world.ca.issued and world.clock.monotonic() < 60:
            raise PermanentError(Reason.INVALID_SPEC, "the API server refuses it")

    world.cluster.before = forbid
    world.settle(600)
    issued_once(world, 1, "")


# --- what changes under way -------------------------------------------------------------------------------------------


def rename(world: World) -> None:
    """The Certificate asks for another name."""
    world.certificate(names=(OTHER,))


@pytest.mark.parametrize("begin", [first, two_names, preauthorized, slow, renewal])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_spec_gets_what_it_asks_for_now(begin: Callable[[], World], when: str) -> None:
    """Other names at any effect: before finalize at most one certificate more is signed and no authorization waits.

    No failure is counted, whenever it is. Mutation: do not compare the request hash before each step.
    """
    before = len(renewal().ca.issued) if begin is renewal else 0
    seen: list[int] = []
    answered: list[bool] = []

    def change(world: World) -> None:
        seen.append(len(world.ca.issued) - before)
        answered.append("answer" in world.ca.requests)
        world.certificate(names=(OTHER,))

    for world, label in at_every_effect(begin, when, change):
        world.settle()
        assert ready_of(world) == ("True", "Ready"), label
        assert world.tls() == world.ca.issued[-1], label
        assert world.status().failed_attempts == 0, label
        assert world.ca.pending_authorizations() == [], label
        finalizing = label.endswith("finalize") or (when == "after" and world.effects.seen.count("finalize") > 1)
        assert len(world.ca.issued) - before <= seen[-1] + 1 + finalizing, label
        if begin in {first, two_names, slow} and not answered[-1]:
            assert not world.ca.validated(NAME), label
        world.nothing_left()


def test_a_change_during_newOrder_is_noticed_before_finalize() -> None:
    """While newOrder takes its time the names change: the order is given up, and only the new one is finalized.

    Mutation: go on with the Certificate as it was when the reconcile began.
    """
    world = preauthorized()
    world.effects.at(1, "after", partial(rename, world))
    world.settle()
    assert world.effects.happened.endswith("newOrder")
    assert world.counts()["finalize"] == 1
    issued_once(world, 1, "")


def test_a_change_that_slips_under_the_write_of_finalizing_stops_finalize() -> None:
    """The spec changes at the very write of Finalizing: that is not written on top of it, and finalize is not sent.

    Mutation: write Finalizing on top of another generation.
    """
    world = preauthorized()
    world.effects.at(3, "before", partial(rename, world))
    world.settle()
    assert "status" in world.effects.happened
    issued_once(world, 1, "")


def out_of_order(verb: str, ending: str, *what: str) -> None:
    """The API server takes no such request for an object whose name ends so."""
    if what[0] == verb and what[-1].endswith(ending):
        raise TemporaryError("The API server is out of order")


def test_an_order_that_another_leader_is_about_to_finalize_is_followed_to_its_end() -> None:
    """One leader has stored Finalizing and stops; the spec changes; another goes on. It collects that order's
    certificate and then orders anew: were the order given up, the first would have it finalized all the same.

    Mutation: give the order up when the CA says that it is ready; show Authorized where Finalizing is stored.
    """
    world = preauthorized()
    key, rival = Key("Certificate", SHOP, "web-tls"), world.second()
    world.process.work(Key("Issuer", SHOP, "ca"))
    running = world.process.turns(key)
    while world.status().issuance is None or world.issuance().state != "Finalizing":
        next(running)
    assert "finalize" not in world.counts()
    rename(world)
    rival.cluster.before = partial(out_of_order, "get", "-next-key")
    rival.settle(30)
    assert world.issuance().state == "Finalizing"
    assert "finalize" not in world.counts()
    rival.cluster.before = lambda *_: None
    rival.settle()
    for _ in running:
        pass
    world.settle()
    assert len(world.ca.issued) == 2
    assert world.ca.unfinalized() == []
    assert world.tls() == world.ca.issued[-1]
    assert [order.outcome for order in world.status().recent_orders] == ["Issued"]
    world.nothing_left()


def test_a_certificate_for_the_former_spec_is_discarded_where_the_old_one_serves() -> None:
    """ECDSA to RSA and back while RSA... is under way: what was ordered in between never replaces the one that fits.

    Mutation: install whatever matches the stored key and the names.
    """
    world = World().ready()
    world.ca.holds_issuance = True
    world.certificate(privateKey={**ECDSA, "size": 384})
    world.settle(60)
    assert world.issuance().state == "Finalizing"
    first_serial = world.tls().serial_number
    world.certificate()
    world.ca.go_on()
    world.settle()
    assert world.tls().serial_number == first_serial
    assert ready_of(world) == ("True", "Ready")
    assert condition_of(world)[0] == "False"
    assert world.status().failed_attempts == 0
    world.nothing_left()


def test_a_change_of_no_concern_keeps_the_order() -> None:
    """renewBefore and labels may change at any effect; the order goes on.

    Mutation: put the generation into the request hash.
    """

    def change(world: World) -> None:
        raw = world.raw(api.CERTIFICATE, "web-tls")
        raw["spec"]["renewBefore"] = "240h"
        raw["metadata"]["labels"] = {"team": "shop"}
        world.api.put(api.CERTIFICATE, raw)

    for when in ("before", "after"):
        for world, label in at_every_effect(first, when, change):
            issued_once(world, 1, label)
            assert world.counts()["newOrder"] == 1, label


def test_the_secret_name_is_read_when_the_secret_is_written() -> None:
    """A secretName that changes while the certificate is fetched is the one that is written; nothing is ordered twice.

    Mutation: use the Certificate as it was before the download.
    """
    world = first()

    def rename_secret(kind: str, _url: str) -> None:
        if kind == "certificate":
            world.certificate(secretName="other-tls")

    world.ca.after = rename_secret
    world.settle()
    assert len(world.ca.issued) == 1
    assert world.tls("other-tls") == world.ca.issued[0]
    assert world.api.get(api.SECRET, SHOP, "web-tls") is None
    assert ready_of(world) == ("True", "Ready")


@pytest.mark.parametrize("begin", [first, preauthorized, renewal])
def test_an_issuer_deleted_and_made_again_costs_no_failure(begin: Callable[[], World]) -> None:
    """At any effect the issuer is replaced by one of the same name: the certificate comes, no attempt has failed.

    Mutation: take an absent issuer for one without solvers.
    """

    def again(world: World) -> None:
        world.delete(api.ISSUER, "ca")
        world.issuer()

    for world, label in at_every_effect(begin, "after", again):
        assert ready_of(world) == ("True", "Ready"), label
        assert world.status().failed_attempts == 0, label
        assert len(world.ca.accounts) == 1, label
        assert world.ca.pending_authorizations() == [], label
        world.nothing_left()


def test_without_its_issuer_an_order_is_given_up_and_comes_back_with_it() -> None:
    """A deleted issuer ends what is not finalized, tidily and without a failure; what is finalized is collected.

    Mutation: go on with the session that is still in memory.
    """
    for world, label in at_every_effect(first, "after", lambda world: world.delete(api.ISSUER, "ca")):
        world.nothing_left()
        assert world.status().failed_attempts == 0, label
        if world.ca.issued:
            assert ready_of(world) == ("True", "Ready"), label
        else:
            assert condition_of(world) == ("False", "IssuerNotFound"), label
            assert world.ca.pending_authorizations() == [], label
            world.issuer()
            world.settle()
            issued_once(world, 1, label)


def test_an_account_that_is_not_open_is_waited_for_not_given_up() -> None:
    """After a restart with the issuer not opened yet, a finalized order waits, and is collected when it is open.

    Mutation: fail with the account when its session is missing.
    """
    world = first()
    world.ca.holds_issuance = True
    world.settle(20)
    world.ca.go_on()
    process = world.start()
    process.queue.ready.clear()
    process.queue.add(Key("Certificate", SHOP, "web-tls"))
    process.settle(5)
    assert world.issuance().state == "Finalizing"
    process.queue.add(Key("Issuer", SHOP, "ca"))
    process.settle()
    issued_once(world, 1, "")


@pytest.mark.parametrize("finalized", [False, True])
def test_an_order_whose_account_is_gone_does_not_hold_up_for_ever(finalized: bool) -> None:
    """While the controller is down the issuer moves to another CA, and the old account's key is lost: the old order
    cannot be followed, a new one is made.

    Mutation: wait until the account of the order is open.
    """
    world = first()
    world.ca.holds_issuance = world.ca.holds_validation = True
    if finalized:
        world.ca.holds_validation = False
    world.settle(20)
    other = FakeCA(world.clock, "https://other.example.test/directory")
    world.authority.cas[other.url] = other
    world.issuer(server=other.url)
    world.delete(api.SECRET, "ca-account")
    world.start()
    world.settle(300)
    assert len(other.issued) == 1
    assert world.tls() == other.issued[0]
    assert ready_of(world) == ("True", "Ready")


def test_an_order_of_an_issuer_gone_for_good_does_not_hold_up_the_next() -> None:
    """While the controller is down the issuer goes and the Certificate names another: that one is asked.

    Mutation: look at the account of the order before the spec.
    """
    world = first()
    world.ca.holds_issuance = True
    world.settle(20)
    world.delete(api.ISSUER, "ca")
    world.issuer("next")
    world.certificate(issuerRef={"name": "next"})
    world.ca.holds_issuance = False
    world.start()
    world.settle(300)
    assert ready_of(world) == ("True", "Ready")
    assert world.status().issuer_ref == api.IssuerRef("next")


def test_an_order_of_an_issuer_that_cannot_be_opened_does_not_hold_up_the_next() -> None:
    """An order not yet finalized is given up for another issuer, though after a restart its own cannot be opened.

    Mutation: wait for the account of the order before looking at the spec.
    """
    world = first()
    world.ca.holds_validation = True
    world.settle(20)
    world.issuer(server="https://down.example.test/directory")
    world.issuer("next")
    world.certificate(issuerRef={"name": "next"})
    world.ca.holds_validation = False
    world.start()
    world.settle(60)
    assert ready_of(world) == ("True", "Ready")
    assert world.status().issuer_ref == api.IssuerRef("next")


def test_what_was_finalized_before_a_restart_is_collected_though_the_issuer_is_another() -> None:
    """Finalized, then the controller is down and the issuer is made anew: the certificate is collected.

    Mutation: take a stored Finalizing for an order like any other.
    """
    world = first()
    world.ca.holds_issuance = True
    world.settle(20)
    world.delete(api.ISSUER, "ca")
    world.issuer()
    world.ca.holds_issuance = False
    world.start()
    world.settle()
    issued_once(world, 1, "")


def test_nothing_is_ordered_on_the_word_of_a_cache() -> None:
    """While the cache still shows what the Certificate asked for before, no order is placed for that.

    Mutation: leave out the live read of the Certificate.
    """
    world = with_issuer()
    world.certificate()
    world.cluster.lagging = True
    world.certificate(names=(OTHER,))
    key = Key("Certificate", SHOP, "web-tls")
    for _ in range(3):
        world.process.work(key)
    assert world.counts() == {}
    world.cluster.lagging = False
    world.settle()
    issued_once(world, 1, "")


def test_nothing_is_ordered_while_the_live_secret_serves() -> None:
    """While the cache still shows a Secret whose renewal is due, no order is placed: somebody has restored a newer one.

    Mutation: take the tls Secret from the cache instead of the live read.
    """
    world = World().ready()
    raw = world.raw(api.SECRET, "web-tls")
    world.clock.advance(60 * DAY + 1)
    world.ca.requests.clear()
    world.cluster.lagging = True
    marks = {mark: raw["metadata"][mark] for mark in ("labels", "annotations")}
    world.secret("web-tls", pair(NAME, begins=timedelta(days=59)), type=raw["type"], **marks)
    for _ in range(3):
        world.process.work(Key("Certificate", SHOP, "web-tls"))
    assert world.counts() == {}
    world.cluster.lagging = False
    world.settle()
    assert world.counts() == {}


def test_the_secret_names_the_issuer_that_signed() -> None:
    """The issuerRef changes after finalize: the Secret's annotation and status name who really issued.

    Mutation: annotate the issuer of the spec.
    """
    world = first()
    world.issuer("next")
    world.ca.holds_issuance = True
    world.settle(20)
    world.certificate(issuerRef={"name": "next"})
    world.ca.go_on()
    world.settle()
    secret = world.api.get(api.SECRET, SHOP, "web-tls")
    assert secret
    assert secret.metadata.annotations[api.ANNOTATION_ISSUER] == "Issuer/ca"
    assert world.status().issuer_ref == api.IssuerRef("ca")
    assert len(world.ca.issued) == 1


def test_a_deleted_certificate_leaves_nothing() -> None:
    """Deleted at any effect, a Certificate leaves no challenge and no next key, and is not ordered for any more.

    Mutation: go on stepping for an object that is gone, or leave the challenge to chance.
    """
    for when in ("before", "after"):
        for begin in (first, preauthorized, renewal):
            for world, label in at_every_effect(begin, when, lambda world: world.delete(api.CERTIFICATE, "web-tls")):
                world.nothing_left()
                asked = world.effects.seen.index(label.split(": ", 1)[1])
                assert "newOrder" not in world.effects.seen[asked + 1 :] or begin is renewal, label


# --- what gets lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [first, preauthorized, slow])
@pytest.mark.parametrize("restart", [False, True])
def test_a_lost_order_is_replaced(begin: Callable[[], World], restart: bool) -> None:
    """The CA forgets the order at any effect: a new one, without a failure before finalize, counted after it.

    Mutation: count every lost order as a failure.
    """

    def forget(world: World) -> None:
        world.ca.forget_orders()
        if restart:
            raise Crash

    for world, label in at_every_effect(begin, "after", forget):
        world.settle(300)
        assert ready_of(world) == ("True", "Ready"), label
        outcomes = [order.outcome for order in world.status().recent_orders]
        installed = restart and label.endswith("create Secret shop/web-tls")  # before that was recorded
        assert outcomes.count("Issued") == (0 if installed else 1), label
        assert outcomes.count("OrderGone") <= 1, label
        if len(world.ca.issued) == 1 and "OrderGone" in outcomes and not restart:
            assert world.status().failed_attempts == 0, label
        world.nothing_left()


def test_a_ca_that_forgets_every_order_is_not_asked_for_ever() -> None:
    """The second order in a row that the CA does not know is a failure, and the next attempt waits.

    Mutation: place a new order whenever one is gone.
    """
    world = first()
    world.ca.holds_validation = True
    world.ca.before = lambda kind, _url: world.ca.forget_orders() if kind == "order" else None
    world.settle(30)
    assert world.counts()["newOrder"] == 2
    assert condition_of(world) == ("False", "OrderGone")
    assert world.status().failed_attempts == 1
    world.settle(3600)
    assert world.counts()["newOrder"] <= 10


def test_an_order_past_its_expiry_is_replaced_without_a_failure() -> None:
    """After a week of downtime a pending order is not even fetched: a new one is placed, no attempt has failed.

    Mutation: fail with OrderGone when the deadline is over.
    """
    world = first()
    world.ca.holds_validation = True
    world.settle(20)
    world.clock.advance(8 * DAY)
    world.ca.holds_validation = False
    world.ca.requests.clear()
    world.start()
    world.settle()
    assert len(world.ca.issued) == 1
    assert world.status().failed_attempts == 0
    assert world.counts() == SEVEN


def test_a_clock_ahead_of_the_ca_makes_no_storm_of_orders() -> None:
    """Where every order is past its expiry when it comes, the back-off holds after the second.

    Mutation: do not record an order that is gone.
    """
    world = first()
    world.ca.holds_validation = True

    def expire(order: FakeOrder) -> None:
        order.expires = at(world, timedelta(seconds=-60))

    world.ca.ordered = expire
    world.settle(30)
    assert world.counts()["newOrder"] == 2
    assert world.status().failed_attempts == 1


def test_a_next_key_lost_before_finalize_is_made_again_for_the_same_order() -> None:
    """Up to finalize a deleted next key costs nothing; after it the attempt fails as KeyLost, and a new order is made.

    Mutation: fail with KeyLost wherever the key is missing.
    """

    def remove(world: World) -> None:
        for secret in world.next_keys():
            world.delete(api.SECRET, secret.metadata.name)

    for world, label in at_every_effect(first, "after", remove):
        finalizing = world.counts()["newOrder"] == 2
        outcomes = [order.outcome for order in world.status().recent_orders]
        assert outcomes == (["KeyLost", "Issued"] if finalizing else ["Issued"]), label
        assert ready_of(world) == ("True", "Ready"), label
        assert len(world.ca.issued) == 1 + finalizing, label
        if "newOrder" in label or "authorization" in label or "answer" in label:
            assert not finalizing, label
        world.nothing_left()


def test_a_lost_issuance_finds_its_order_again() -> None:
    """Status wiped while the key is stored: a new key and, the CA willing, the same order; one certificate.

    The key that is there may have been certified already, or be about to be deleted by another leader.

    Mutation: use the key that is there again.
    """
    world = first()
    world.ca.holds_validation = True
    world.settle(20)
    key = world.next_keys()[0]
    order = world.issuance().order_url
    world.set_status(issuance=None)
    world.ca.holds_validation = False
    world.start()
    world.process.settle(0.05)
    assert [secret.data["tls.key"] for secret in world.next_keys()] != [key.data["tls.key"]]
    assert world.issuance().order_url == order
    world.ca.go_on()
    world.settle()
    issued_once(world, 1, "")


def test_a_foreign_secret_where_the_next_key_belongs_is_told() -> None:
    """Somebody's Secret under the name of the next key is not overwritten; the Certificate says which one to delete.

    Mutation: raise Conflict for it, which nobody sees.
    """
    world = first()
    name = next_key_name(world.get())
    world.secret(name, {"mine": b"mine"})
    world.settle(30)
    assert condition_of(world) == ("False", "SecretNotOwned")
    assert f"Secret shop/{name}" in world.condition("Issuing").message
    assert world.counts() == {}
    world.delete(api.SECRET, name)
    world.settle()
    issued = world.tls()
    assert issued == world.ca.issued[0]


# --- what the CA does wrong -------------------------------------------------------------------------------------------


def test_an_order_that_another_has_finalized_is_no_failure() -> None:
    """A valid order whose certificate is for another key is left, and a new one placed at once; nobody is blamed.

    Mutation: count it as CertificateRejected.
    """
    world = first()
    alter = [other_key]
    world.ca.alter = lambda leaf: alter.pop()(leaf) if alter else leaf
    world.settle(10)
    assert ready_of(world) == ("True", "Ready")
    assert world.status().failed_attempts == 0
    assert [order.outcome for order in world.status().recent_orders] == ["CertificateRejected", "Issued"]
    assert world.counts()["newOrder"] == 2
    world.nothing_left()


def test_an_empty_chain_makes_no_loop() -> None:
    """A CA that serves nothing where the certificate should be is not asked again and again, and that is told.

    Mutation: fetch the chain whenever there is nothing in it.
    """
    world = first()
    world.ca.served = lambda _chain: b""
    world.settle(30)
    assert world.counts()["certificate"] == 1
    assert condition_of(world) == ("False", "CertificateRejected")
    assert "it cannot be read" in world.condition("Issuing").message


def other_key(leaf: Leaf) -> Leaf:
    return replace(leaf, public_key=ec.generate_private_key(ec.SECP256R1()).public_key())


def other_names(leaf: Leaf) -> Leaf:
    return replace(leaf, names=(*leaf.names, "evil.example.test"))


def fewer_names(leaf: Leaf) -> Leaf:
    return replace(leaf, names=("www.example.test",))


def expired(leaf: Leaf) -> Leaf:
    day = timedelta(days=1)
    return replace(leaf, not_before=leaf.not_before - 2 * day, not_after=leaf.not_before - day)


def not_yet(leaf: Leaf) -> Leaf:
    return replace(leaf, not_before=leaf.not_before + timedelta(hours=1))


@pytest.mark.parametrize(
    ("alter", "why"),
    [
        (other_key, "another key"),
        (other_names, "not asked for: evil.example.test"),
        (fewer_names, f"missing: {NAME}"),
        (expired, "expired at"),
        (not_yet, "not valid before"),
    ],
)
def test_a_wrong_certificate_never_replaces_the_old_one(alter: Callable[[Leaf], Leaf], why: str) -> None:
    """What fails a check is not installed: the old pair serves on, Ready stays True, and the attempt is counted.

    Mutation: leave that check out.
    """
    world = renewal()
    old, world.ca.alter = world.tls(), alter
    world.settle(30)
    assert world.tls() == old
    assert ready_of(world) == ("True", "Ready")
    assert condition_of(world) == ("False", "CertificateRejected")
    assert why in world.condition("Issuing").message
    assert world.status().failed_attempts == 1
    assert "The present certificate is valid until 2027-02-18" in world.condition("Issuing").message
    world.settle(3600)
    assert len(world.ca.issued) < 12
    assert world.broken_pairs == []


def test_a_failed_validation_backs_off_by_the_ladder_of_names() -> None:
    """The CA's words stand in condition, lastProblem and Event; attempts come after 1, 10, 100 minutes, then daily.

    Mutation: back off by the CA's ladder.
    """
    world = first()
    world.ca.validate = lambda _name, _token: Problem("unauthorized", "Invalid response from 192.0.2.7: 404", 403)
    moments = []
    for _ in range(5):
        world.settle(0.9 * 60)
        status = world.status()
        assert status.next_attempt_time
        moments.append((status.next_attempt_time - world.clock.now()).total_seconds())
        world.clock.advance((status.next_attempt_time - world.clock.now()).total_seconds())
    assert [round(seconds / 60) for seconds in moments] == [1, 10, 100, 1440, 1440]
    assert ready_of(world) == ("False", "ChallengeFailed")
    assert "Invalid response from 192.0.2.7: 404" in world.condition("Ready").message
    problem = world.status().last_problem
    assert problem
    assert (problem.type, problem.identifiers) == ("unauthorized", (NAME,))
    assert world.reasons().count(Reason.CHALLENGE_FAILED) == 5
    assert world.counts()["newOrder"] == 5
    assert world.presented() == []


def test_a_failing_renewal_keeps_ready_true() -> None:
    """Whatever a renewal fails at, the Certificate stays Ready while its certificate is valid, and says so after it.

    Mutation: compute Ready from the outcome of the last attempt.
    """
    world = renewal()
    world.ca.validate = lambda _name, _token: Problem("dns", "NXDOMAIN")
    while world.clock.monotonic() < 89 * DAY:
        world.settle(DAY)
        assert ready_of(world) == ("True", "Ready")
        assert world.condition("Issuing").reason in {"ChallengeFailed", "OrderPending"}
        world.clock.advance(DAY)
    world.clock.advance(2 * DAY)
    world.settle(2 * DAY)
    assert world.condition("Ready").status == "False"
    assert world.counts()["newOrder"] < 60


def test_an_expired_authorization_fails_with_its_name() -> None:
    """Authorizations that end while the CA validates are a failure with the name and the status.

    Mutation: look at the order alone.
    """
    world = first()
    world.ca.holds_validation = True
    world.settle(20)
    world.ca.end_authorizations("expired")
    world.settle(40)
    assert ready_of(world) == ("False", "ChallengeFailed")
    assert f"The authorization for {NAME} is expired" in world.condition("Ready").message


@pytest.mark.parametrize("kind", sorted(SEVEN))
def test_an_absent_ca_keeps_the_state(kind: str) -> None:
    """Five errors in a row of any request change no state: no new order, no failure, and the certificate comes.

    Mutation: give the order up after the third error.
    """
    world = first()
    world.ca.fail(kind, TemporaryError("No answer from the CA's server."), times=5)
    world.settle(1200)
    issued_once(world, 1, kind)
    assert world.counts()["newOrder"] == (6 if kind == "newOrder" else 1)
    assert world.counts()["finalize"] == (6 if kind == "finalize" else 1)


def test_retry_after_of_an_error_is_kept_to_and_shown() -> None:
    """A rate limit with Retry-After shows RateLimited with the time, and the CA is not asked before it is over.

    Mutation: back off by our own ladder, or let the own status write end the wait.
    """
    world = first()
    limited = judge(
        Problem("rateLimited", "too many new orders", 429), retry_after=timedelta(hours=3), doing="placing an order"
    )
    world.ca.fail("newOrder", limited)
    world.live(3 * 3600 - 5)
    assert world.counts()["newOrder"] == 1
    assert condition_of(world) == ("True", "RateLimited")
    assert ready_of(world) == ("False", "RateLimited")
    assert "2026-11-20 12:00 UTC" in world.condition("Issuing").message
    world.settle(60)
    issued_once(world, 1, "")


@pytest.mark.parametrize("kind", ["newOrder", "order", "finalize"])
def test_retry_after_outlives_the_process(kind: str) -> None:
    """A restart does not make the CA be asked before the time that it named, whatever it had refused.

    Mutation: keep the time in memory only.
    """
    world = first()
    limited = judge(Problem("rateLimited", "too many", 429), retry_after=timedelta(hours=3), doing="asking")
    world.ca.fail(kind, limited)
    world.live(600)
    for _ in range(3):
        world.start()
        world.live(3000)
    assert world.counts()[kind] == 1
    assert condition_of(world)[1] == "RateLimited"
    assert ready_of(world) == ("False", "RateLimited")
    world.start()
    world.settle(3600)
    issued_once(world, 1, "")


def test_a_changed_spec_does_not_wait_for_the_former() -> None:
    """What the CA asked to put off was the former request: the changed one is made at once, after a restart too.

    Mutation: hold whatever the spec says by now.
    """
    for restart in (False, True):
        world = first()
        limited = judge(Problem("rateLimited", "too many", 429), retry_after=timedelta(hours=3), doing="asking")
        world.ca.fail("newOrder", limited)
        world.settle(60)
        if restart:
            world.start()
            world.settle(60)
        rename(world)
        world.settle(60)
        issued_once(world, 1, str(restart))


@pytest.mark.parametrize("kind", ["newOrder", "order", "finalize"])
def test_retry_after_nought_is_no_invitation(kind: str) -> None:
    """Errors and orders with Retry-After 0 are looked at again by our own ladder, not in a loop.

    Mutation: take the CA's 0 for a pause.
    """
    world = first()
    world.ca.fail(kind, TemporaryError("busy", retry_after=timedelta(0)), times=1000)
    world.settle(600)
    assert world.counts()[kind] < 12
    world = first()
    world.ca.holds_issuance, world.ca.retry_after = True, timedelta(0)
    world.settle(600)
    assert world.counts()["order"] < 40


def test_retry_after_of_an_order_is_kept_to() -> None:
    """An order in processing is looked at when the CA says so, for hours, and shown as pending.

    Mutation: ignore Retry-After on orders.
    """
    world = first()
    world.ca.holds_issuance, world.ca.retry_after = True, timedelta(minutes=10)
    world.settle(6 * 3600)
    assert world.counts()["order"] <= 40
    assert condition_of(world) == ("True", "OrderPending")
    assert "order processing since 2026-11-20 09:00 UTC" in world.condition("Issuing").message
    world.ca.go_on()
    world.settle(1200)
    issued_once(world, 1, "")


@pytest.mark.parametrize("hold", ["holds_issuance", "holds_validation"])
@pytest.mark.parametrize("seconds", [2, 45, 3600])
def test_retry_after_of_an_order_outlives_the_process(hold: str, seconds: int) -> None:
    """A restart does not make an order be looked at before the time that the CA named with it.

    Mutation: leave `until` out in `_look_again`, or ORDER_PENDING in `asked_to_wait`; round the time down in `_in`.
    """
    world = first()
    setattr(world.ca, hold, True)
    world.ca.retry_after = timedelta(seconds=seconds)
    world.clock.advance(0.7)
    world.settle(1)
    if hold == "holds_validation":
        world.settle(0.2)
    asked, due = world.counts().get("order", 0), max(world.process.queue.due.values())
    for _ in range(3):
        world.start()
        world.settle(0.1)
        world.live((due - world.clock.monotonic()) / 2 - 0.1)
    assert world.counts().get("order", 0) == asked
    assert condition_of(world) == ("True", "OrderPending")
    world.start()
    world.settle(seconds + 1)
    assert world.counts()["order"] > asked
    world.ca.go_on()
    world.ca.retry_after = None
    world.settle(seconds + 60)
    issued_once(world, 1, "")


def test_a_short_retry_after_is_written_once() -> None:
    """A CA that wants to be asked every few seconds for hours does not make status be written as often.

    Mutation: keep every Retry-After.
    """
    world = first()
    world.ca.holds_issuance, world.ca.retry_after = True, timedelta(seconds=5)
    world.settle(10)
    world.cluster.writes.clear()
    world.settle(1800)
    assert world.counts()["order"] > 300
    assert len(world.cluster.writes) == 0


@pytest.mark.parametrize("restart", [False, True])
def test_an_order_without_an_end_is_not_waited_for_without_end(restart: bool) -> None:
    """A CA that names no `expires` and does not finish is waited for a day from finalize; then that is told, and a new
    order placed by the ladder, which is issued as soon as the CA does.

    Mutation: take only the CA's own `expires` for a deadline.
    """
    world = first()
    world.ca.tells_expiry, world.ca.holds_issuance = False, True
    world.clock.advance(3600)
    world.settle(10)
    assert f"{world.issuance().deadline}" == "2026-11-21 10:00:00+00:00"
    for _ in range(24):
        world.live(3590)
        if restart:
            world.start()
    assert (world.counts()["newOrder"], world.issuance().state) == (1, "Finalizing")
    world.live(500)
    assert world.status().failed_attempts == 1
    assert condition_of(world)[1] in {"OrderUnfinished", "OrderPending"}
    assert [order.outcome for order in world.status().recent_orders] == ["OrderUnfinished"]
    (message,) = [event.message for event in world.cluster.events if event.reason == "OrderUnfinished"]
    assert message.startswith(
        f"Issuer shop/ca has not issued for {NAME}, though its order was finalized, and waited for until "
        "2026-11-21 10:00 UTC. Next attempt 2026-11-21 10:0"
    )
    world.settle(600)
    assert world.counts()["newOrder"] == 2
    world.ca.go_on()
    world.settle(600)
    assert ready_of(world) == ("True", "Ready")
    assert world.counts()["finalize"] == 2
    world.nothing_left()


def test_an_order_without_an_end_that_stays_pending_is_replaced() -> None:
    """One that the CA neither validates nor gives up, and for which it names no `expires`, is placed anew after a day.

    Mutation: look only at the CA's own `expires` in `_fetch_order`.
    """
    world = first()
    world.ca.tells_expiry, world.ca.holds_validation, world.ca.reuses_orders = False, True, False
    for _ in range(24):
        world.live(3590)
    assert world.counts()["newOrder"] == 1
    world.live(400)
    assert world.counts()["newOrder"] == 2
    world.ca.go_on()
    world.settle(600)
    issued_once(world, 1, "")


def test_the_own_status_write_does_not_end_a_wait() -> None:
    """A key that is woken while its step waits, by its own writes or any other, does not ask the CA sooner.

    Mutation: run the step whenever the key comes.
    """
    world = first()
    world.ca.holds_issuance, world.ca.retry_after = True, timedelta(hours=1)
    world.settle(10)
    world.ca.requests.clear()
    for _ in range(10):
        world.clock.advance(60)
        raw = world.raw(api.CERTIFICATE, "web-tls")
        raw["metadata"]["labels"] = {"at": str(world.clock.monotonic())}
        world.api.put(api.CERTIFICATE, raw)
        world.settle(1)
    assert world.counts() == {}


def test_the_first_self_check_comes_after_the_first_pause() -> None:
    """What was just presented is not looked at in the same moment: nothing can have loaded it yet.

    Mutation: look at once.
    """
    world, calls = first(), []
    world.process.solver.before = lambda method: calls.append((method, world.clock.monotonic()))
    world.settle()
    presented, looked = (next(time for each, time in calls if each == method) for method in ("present", "is_ready"))
    assert looked - presented >= SELF_CHECKS[0].total_seconds()


def test_a_self_check_that_fails_delays_the_ca_by_two_minutes_at_most() -> None:
    """What is not served as seen from here is said, presented again when it is gone, and the CA is asked in the end.

    Mutation: wait for the self-check for ever.
    """
    world = first()
    world.process.solver.missing = "shop.example.test refuses the connection at 192.0.2.7 port 80"
    world.settle(110)
    assert "answer" not in world.counts()
    assert "refuses the connection at 192.0.2.7" in world.condition("Issuing").message
    for ingress in world.presented():
        world.api.delete(api.INGRESS, HOME, ingress.metadata.name)
    world.settle(6)
    assert world.presented()
    world.settle(30)
    issued_once(world, 1, "")


def test_an_account_that_the_ca_has_lost_is_registered_again() -> None:
    """accountDoesNotExist at any request: the issuer registers anew, once, and the certificate comes by itself.

    Mutation: open the account again by the URI that the Secret still has.
    """
    for world, label in at_every_effect(first, "before", lambda world: world.ca.forget_accounts()):
        world.settle(300)
        assert len(world.ca.accounts) <= 1, label
        assert ready_of(world) == ("True", "Ready"), label
        assert world.counts().get("newAccount", 0) <= 1, label
        world.nothing_left()


# --- renew-now, the shortest interval ---------------------------------------------------------------------------------


def test_each_value_of_renew_now_orders_once() -> None:
    """A new value of the annotation orders one certificate at once, over the shortest interval; the same one no more.

    Mutation: do not keep the value in status.
    """
    world = World().ready()
    for number in range(2, 5):
        world.annotate(renew_now=f"wish {number}")
        world.settle()
        issued_once(world, number, "")
        assert world.status().renew_now == f"wish {number}"
        world.start()
        world.settle()
        assert len(world.ca.issued) == number


def test_a_wish_to_renew_survives_a_failure() -> None:
    """A renewal that was asked for and failed is tried again by itself, and a new wish does not wait for that.

    Mutation: fulfil the wish when the order is placed.
    """
    world = World().ready()
    world.ca.reuses_authorizations = False
    world.ca.validate = lambda _name, _token: Problem("dns", "NXDOMAIN")
    world.annotate(renew_now="1")
    world.settle(30)
    assert world.status().renew_now == ""
    assert (world.status().failed_attempts, len(world.ca.issued)) == (1, 1)
    world.annotate(renew_now="2")
    world.settle(20)
    assert world.status().failed_attempts == 2
    world.ca.validate = lambda _name, _token: None
    world.settle(1200)
    issued_once(world, 2, "")
    assert world.status().renew_now == "2"


def test_a_wish_longer_than_status_can_keep_is_fulfilled_once() -> None:
    """A value of any length orders once, and fits into status.

    Mutation: keep the annotation as it is.
    """
    world = World().ready()
    world.annotate(renew_now="x" * 1000)
    world.settle()
    issued_once(world, 2, "")
    assert len(world.status().renew_now) <= 256
    world.start()
    world.settle()
    assert len(world.ca.issued) == 2


def test_a_secret_that_somebody_deletes_again_and_again_costs_one_order_an_hour() -> None:
    """However often the tls Secret goes, between two issuances lies an hour, also over a restart.

    Mutation: leave out the shortest interval.
    """
    world = World().ready()
    for _ in range(60):
        if world.api.get(api.SECRET, SHOP, "web-tls"):
            world.delete(api.SECRET, "web-tls")
        world.settle(240)
        world.start()
        world.clock.advance(60)
    assert len(world.ca.issued) <= 6
    assert ready_of(world)[0] == "False"
    assert "certctl renew -n shop web-tls" in world.condition("Ready").message


def test_a_secret_deleted_before_its_issue_is_recorded_does_not_stop_the_controller() -> None:
    """The tls Secret goes at the moment it was written: the issue is recorded, the interval holds, then a new order.

    Mutation: record the success from the Secret's cache.
    """
    world = first()
    world.effects.at(12, "after", lambda: world.delete(api.SECRET, "web-tls"))
    world.settle()
    assert world.effects.happened.endswith("create Secret shop/web-tls")
    assert ready_of(world) == ("False", "BackingOff")
    assert (world.status().revision, len(world.ca.issued)) == (1, 1)
    world.settle(3700)
    issued_once(world, 2, "")


@pytest.mark.parametrize("life", [timedelta(minutes=1), timedelta(hours=6), timedelta(days=6)])
def test_short_lives_are_renewed_at_half_and_no_more_often(life: timedelta) -> None:
    """Certificates of any life are renewed when half is left; an absurd renewBefore changes nothing.

    Mutation: renew as soon as renewBefore says, whatever the life.
    """
    world = with_issuer()
    world.ca.life = life
    world.certificate(renewBefore="2159h")
    world.settle(1)
    world.settle(10 * life.total_seconds())
    assert 19 <= len(world.ca.issued) <= 21


# --- several Certificates ---------------------------------------------------------------------------------------------


def test_of_two_certificates_for_one_secret_one_orders() -> None:
    """The older one owns the Secret; the other says SecretConflict, names the owner, and orders nothing.

    Mutation: let both order.
    """
    world = with_issuer()
    world.certificate()
    world.clock.advance(5)
    world.certificate("late", names=(OTHER,), secretName="web-tls")
    world.settle()
    assert world.counts() == SEVEN
    assert ready_of(world) == ("True", "Ready")
    condition = world.condition("Ready", "late")
    assert (condition.status, condition.reason) == ("False", "SecretConflict")
    assert "belongs to Certificate shop/web-tls" in condition.message
    world.settle(DAY)
    assert len(world.ca.issued) == 1


@pytest.mark.parametrize("way", ["deleted", "renamed"])
def test_the_second_goes_on_when_the_first_gives_the_secret_up(way: str) -> None:
    """When the owner is deleted or names another Secret, the other takes the Secret over and orders what it lacks.

    Mutation: wait for an event that never comes.
    """
    world = with_issuer()
    world.certificate()
    world.clock.advance(5)
    world.certificate("late", secretName="web-tls")
    world.settle()
    if way == "deleted":
        world.delete(api.CERTIFICATE, "web-tls")
    else:
        world.certificate(secretName="elsewhere")
    world.settle(400)
    condition = world.condition("Ready", "late")
    assert (condition.status, condition.reason) == ("True", "Ready")
    assert len(world.ca.issued) == (1 if way == "deleted" else 2)
    assert world.broken_pairs == []


def test_the_same_names_in_two_namespaces_wait_for_each_other() -> None:
    """Of two namespaces that a rule allows the same names one orders first; the other says so, and then orders too.

    Mutation: let both have the order that the CA returns to both.
    """
    world = World()
    world.issuer("shared", kind="ClusterIssuer", rules=[{"namespaces": [SHOP, "team"], "dnsNames": [NAME]}])
    world.settle()
    world.ca.holds_validation = True
    ref = {"name": "shared", "kind": "ClusterIssuer"}
    for namespace in (SHOP, "team"):
        world.certificate(namespace=namespace, issuerRef=ref)
    world.settle(20)
    assert world.counts()["newOrder"] == 1
    waiting = next(ns for ns in (SHOP, "team") if not world.status(namespace=ns).issuance)
    condition = world.condition("Issuing", namespace=waiting)
    assert condition.reason == "SameNames"
    assert condition.message == "Waiting for a Certificate of another namespace, which is ordering the same names"
    process = world.start()
    process.settle(20)
    assert world.counts()["newOrder"] == 1
    world.ca.go_on()
    world.settle()
    assert len(world.ca.issued) == 2
    for namespace in (SHOP, "team"):
        assert world.condition("Ready", namespace=namespace).status == "True"
    assert world.broken_pairs == []


def test_a_claim_ends_when_its_holder_asks_for_something_else() -> None:
    """Whoever claims another set, or comes to rest, gives up the first; those who wait for it are woken.

    Mutation: overwrite what the key holds.
    """
    woken: list[Key] = []
    claims = Claims(woken.append)
    one, other = Key("Certificate", SHOP, "one"), Key("Certificate", SHOP, "other")
    assert claims.take(one, "set") is None
    assert claims.take(other, "set") == one
    assert claims.take(one, "another set") is None
    assert woken == [other]
    assert claims.take(other, "set") is None


def test_a_certificate_that_is_held_up_holds_up_no_other() -> None:
    """A Certificate that cannot store its key gives the names free when it no longer wants them.

    Mutation: keep the claim until the next order ends.
    """
    world = with_issuer()
    world.ca.holds_validation = True

    def full(verb: str, kind: str, _namespace: str, name: str) -> None:
        if verb == "create" and kind == "Secret" and name.startswith("stuck"):
            raise TemporaryError("etcdserver: no space")

    world.cluster.before = full
    world.certificate("stuck")
    world.settle(5)
    world.certificate("stuck", names=("bad..name",))
    world.certificate("free")
    world.settle(1200)
    assert world.status("free").issuance
    assert api.find_condition(world.status("free").conditions, "Issuing") is not None
    assert world.condition("Issuing", "free").reason == "OrderPending"


def test_a_deleted_certificate_gives_its_authorizations_up() -> None:
    """A Certificate that is deleted before the CA was answered leaves no authorization waiting there.

    Mutation: forget the order with the Certificate.
    """
    world = first()
    world.process.solver.missing = "it is not served yet"
    world.settle(5)
    assert world.ca.pending_authorizations()
    world.delete(api.CERTIFICATE, "web-tls")
    world.settle(5)
    assert world.ca.pending_authorizations() == []
    world.nothing_left()


def test_a_changed_issuer_ends_the_back_off() -> None:
    """Where the issuer is mended after a failure, nobody has to wait or to ask.

    Mutation: leave the issuer out of account.
    """
    world = with_issuer(solvers=[])
    world.certificate()
    world.settle(200)
    assert condition_of(world) == ("False", "NotPreauthorized")
    world.solvers = SOLVERS
    world.issuer()
    world.settle(5)
    assert ready_of(world) == ("True", "Ready")


def test_the_default_size_by_name_keeps_the_order() -> None:
    """The size that a key has anyway may be written into the spec at any effect; the order goes on.

    Mutation: hash the spec's size as it stands.
    """

    def name_it(world: World) -> None:
        world.certificate(privateKey={**ECDSA, "size": 256})

    for world, label in at_every_effect(first, "after", name_it):
        issued_once(world, 1, label)
        assert world.counts()["newOrder"] == 1, label


# --- Secrets that are there already -----------------------------------------------------------------------------------


def test_a_certificate_applied_again_takes_its_secret_over() -> None:
    """Deleted and applied again, a Certificate finds its Secret by name, rewrites the UID, and orders nothing.

    Mutation: compare UIDs only.
    """
    world = World().ready()
    old = world.tls()
    world.delete(api.CERTIFICATE, "web-tls")
    world.settle()
    world.ca.requests.clear()
    world.certificate()
    world.settle()
    assert world.counts() == {}
    assert ready_of(world) == ("True", "Ready")
    assert world.tls() == old
    secret = world.api.get(api.SECRET, SHOP, "web-tls")
    assert secret
    assert secret.metadata.annotations[api.ANNOTATION_CERTIFICATE_UID] == world.get().metadata.uid
    assert Reason.ADOPTED in world.reasons()


def test_a_restore_orders_nothing_whatever_the_issuer_says() -> None:
    """Secret and Certificate from a backup, the issuer not ready: Ready at once, though renew-now was in the backup.

    Mutation: look at the issuer, or at the wish, before the Secret.
    """
    world = World().ready()
    world.annotate(renew_now="1")
    world.settle()
    certificate, secret = world.raw(api.CERTIFICATE, "web-tls"), world.raw(api.SECRET, "web-tls")
    restored = World()
    restored.issuer(server="https://down.example.test/directory")
    for raw in (certificate, secret):
        raw["metadata"] = {
            key: raw["metadata"][key]
            for key in ("name", "namespace", "labels", "annotations")
            if key in raw["metadata"]
        }
    certificate.pop("status")
    restored.api.put(api.SECRET, secret)
    restored.api.put(api.CERTIFICATE, certificate)
    restored.settle()
    assert ready_of(restored) == ("True", "Ready")
    restored.issuer()
    restored.settle()
    assert restored.ca.issued == []
    restored.annotate(renew_now="2")
    restored.settle()
    assert len(restored.ca.issued) == 1


def test_a_fight_over_a_secret_is_left_to_the_other() -> None:
    """Somebody who takes our marks off the Secret every minute wins after five times; that is said, nothing is ordered.

    Mutation: put the marks back for ever.
    """
    world = World().ready()
    bare = world.raw(api.SECRET, "web-tls")
    bare["metadata"] = {"name": "web-tls", "namespace": SHOP}
    bare["metadata"]["annotations"] = {api.ANNOTATION_CERTIFICATE: "web-tls"}
    for _ in range(8):
        world.api.put(api.SECRET, bare)
        world.live(20)
    adopted = world.reasons().count(Reason.ADOPTED)
    assert adopted == 5
    assert ready_of(world) == ("False", "SecretConflict")
    assert len(world.ca.issued) == 1
    world.live(900)
    assert ready_of(world) == ("True", "Ready")


def test_a_secret_without_its_label_is_still_its_owners() -> None:
    """Two Certificates name one Secret, which loses its label and so is in no cache: its owner marks it again, and the
    older Certificate does not take it for nobody's.

    Mutation: look at the live Secret only where the caches name no rival; tell rivals by the caches alone.
    """
    world = World()
    world.certificate("old", names=(OTHER,), secretName="old-tls")
    world.ready()
    world.certificate("old", names=(OTHER,), secretName="web-tls")
    world.settle()
    assert world.condition("Ready", "old").reason == Reason.SECRET_CONFLICT
    bare, reads = world.raw(api.SECRET, "web-tls"), Counter[str]()
    world.cluster.before = lambda verb, kind, *_: reads.update([f"{verb} {kind}"])
    bare["metadata"]["labels"] = {}
    world.api.put(api.SECRET, bare)
    world.settle(600)
    assert world.raw(api.SECRET, "web-tls")["metadata"]["labels"] == {api.LABEL_ROLE: api.ROLE_TLS}
    assert world.condition("Ready", "old").reason == Reason.SECRET_CONFLICT
    assert ready_of(world) == ("True", "Ready")
    assert len(world.ca.issued) == 2
    assert reads["get Secret"] < 20


def pair(*names: str, begins: timedelta = timedelta(0)) -> dict[str, bytes]:
    """A tls Secret's data, for these names and valid for 60 days from when a world begins, or from so long after."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = Keys().certificate_key("ECDSA", 256, "PKCS8")
    key = load_pem_private_key(pem, None)  # type: ignore[assignment]
    world = World()
    leaf = sign_leaf(Leaf(key.public_key(), names, at(world, begins), at(world, begins + timedelta(days=60))))
    return {"tls.crt": leaf.public_bytes(Encoding.PEM), "tls.key": pem}


def test_a_foreign_secret_is_left_alone() -> None:
    """A Secret that names no Certificate is refused with what to do, and nothing is ordered for it.

    Mutation: overwrite what has no owner.
    """
    world = with_issuer()
    world.secret("web-tls", {"tls.crt": b"x", "tls.key": b"y"}, type="kubernetes.io/tls")
    world.certificate()
    world.settle(900)
    assert world.counts() == {}
    assert ready_of(world) == ("False", "SecretNotOwned")
    assert api.ANNOTATION_ADOPT in world.condition("Ready").message
    world.delete(api.SECRET, "web-tls")
    world.settle(400)
    issued_once(world, 1, "")


@pytest.mark.parametrize("fits", [True, False])
def test_a_foreign_secret_is_adopted_when_that_is_asked_and_it_fits(fits: bool) -> None:
    """With the annotation a Secret that fits becomes ours as it is; one that does not is refused with the reason.

    Mutation: adopt without looking into it.
    """
    world = with_issuer()
    data = pair(NAME if fits else OTHER)
    world.secret("web-tls", data, type="kubernetes.io/tls")
    world.certificate(annotations={api.ANNOTATION_ADOPT: "true"})
    world.settle()
    assert world.counts() == {}
    assert world.key() == data["tls.key"]
    if fits:
        assert ready_of(world) == ("True", "Ready")
    else:
        assert ready_of(world) == ("False", "SecretNotOwned")
        assert "is for other names" in world.condition("Ready").message


def test_a_secret_that_appears_while_the_order_is_under_way_is_not_overwritten() -> None:
    """A foreign Secret that comes before ours is written stays, and the attempt ends as SecretNotOwned.

    Mutation: apply the Secret without having judged it.
    """
    world = first()

    def appear(kind: str, _url: str) -> None:
        if kind == "certificate":
            world.secret("web-tls", {"mine": b"mine"})

    world.ca.after = appear
    world.settle(30)
    secret = world.api.get(api.SECRET, SHOP, "web-tls")
    assert secret
    assert set(secret.data) == {"mine"}
    assert condition_of(world) == ("False", "SecretNotOwned")


@pytest.mark.parametrize("begin", [renewal, preauthorized])
def test_an_immutable_secret_costs_no_order(begin: Callable[[], World]) -> None:
    """A Secret that can take no new certificate is told with what to do, before anything is ordered for it.

    It may become so at any effect: then the certificate that was under way is lost, and no other is ordered.
    Mutation: order whatever the Secret says.
    """

    def freeze(world: World) -> None:
        if world.api.get(api.SECRET, SHOP, "web-tls"):
            world.api.put(api.SECRET, world.raw(api.SECRET, "web-tls") | {"immutable": True})

    world = World().ready()
    freeze(world)
    world.clock.advance(60 * DAY + 1)
    world.ca.requests.clear()
    world.settle(4 * 3600)
    assert world.counts() == {}
    assert ready_of(world) == ("True", "Ready")
    assert condition_of(world) == ("False", "SecretImmutable")
    assert "Secret shop/web-tls is immutable" in world.condition("Issuing").message
    world.delete(api.SECRET, "web-tls")
    world.settle()
    issued_once(world, 2, "")
    for other, label in at_every_effect(begin, "after", freeze):
        orders = len(other.ca.issued)
        other.settle(7200)
        assert len(other.ca.issued) == orders <= BEGINNINGS[begin], label
        assert other.broken_pairs == [], label


def test_a_restored_secret_that_appears_while_the_order_is_under_way_is_taken_over() -> None:
    """A Secret with our Certificate's name of old gets the certificate that was just issued: none is thrown away.

    Mutation: take over only what was there at the beginning.
    """
    world = first()
    labels, old = {api.LABEL_ROLE: api.ROLE_TLS}, {api.ANNOTATION_CERTIFICATE: "web-tls"}

    def restore(kind: str, _url: str) -> None:
        if kind == "certificate":
            world.secret("web-tls", pair(NAME), type="kubernetes.io/tls", labels=labels, annotations=old)

    world.ca.after = restore
    world.settle()
    issued_once(world, 1, "")


# --- status is not trusted --------------------------------------------------------------------------------------------


def issuance(world: World, **changes: Any) -> dict[str, Any]:
    """An issuance as somebody might write it into status."""
    return {
        "generation": 1,
        "attempt": 1,
        "requestHash": "0",
        "orderSet": "0",
        "state": "Ordered",
        "startedAt": "2026-11-20T09:00:00Z",
        "issuerRef": {"name": "ca"},
        "accountURI": next(iter(world.ca.accounts), ""),
        **changes,
    }


TAMPERED: list[dict[str, Any]] = [
    {"state": "Finalizing", "orderURL": "https://evil.example.test/order/1"},
    {"state": "Finalizing", "orderURL": ""},
    {"state": "Finalizing", "orderURL": "https://ca.example.test/order/999"},
    {"state": "Issued", "orderURL": "https://ca.example.test/order/999"},
    {"state": "Failed"},
    {"state": "junk", "orderURL": "junk"},
    {"state": "Requested", "keySecretName": "victim"},
    {"state": "Finalizing", "accountURI": "https://ca.example.test/account/999", "orderURL": "x"},
    {"state": "Authorized", "finalizeURL": "https://evil.example.test/finalize"},
    {"state": "Finalizing", "issuerRef": {"name": "nobody", "kind": "Nothing"}, "keySecretName": "victim"},
    {
        "state": "Presented",
        "challenges": [
            {"identifier": "x", "type": "y", "url": "z", "token": "t", "keyAuthorization": "k", "solver": ""},
            {"identifier": "x", "type": "y", "url": "z", "token": "t", "keyAuthorization": "k", "solver": "junk"},
        ],
    },
]


@pytest.mark.parametrize("changes", TAMPERED)
def test_a_tampered_issuance_harms_nobody(changes: dict[str, Any]) -> None:
    """Whatever stands in status.issuance: no foreign URL is asked, no other Secret used, and the certificate comes.

    Mutation: read the key from the Secret that status names.
    """
    world = with_issuer()
    victim = pair(NAME)
    world.secret("victim", victim, type="kubernetes.io/tls")
    world.certificate()
    world.set_status(issuance=issuance(world, **changes))
    world.start()
    world.settle(900)
    assert ready_of(world) == ("True", "Ready")
    assert world.key() != victim["tls.key"]
    untouched = world.api.get(api.SECRET, SHOP, "victim")
    assert untouched
    assert untouched.metadata.labels == {}
    assert len(world.ca.issued) == 1
    world.nothing_left()


def test_an_issuance_that_another_wrote_makes_no_loop() -> None:
    """An order that somebody else wrote into status is looked for, counted as lost, and gone.

    Mutation: go on with Finalizing when the CA does not know the order.
    """
    world = with_issuer()
    world.certificate()
    raw = world.raw(api.CERTIFICATE, "web-tls")
    raw["status"] = {"issuance": issuance(world, state="Finalizing", orderURL="https://ca.example.test/order/999")}
    world.api.put(api.CERTIFICATE, raw)
    world.start()
    world.settle(1200)
    assert world.counts()["order"] < 20
    assert world.raw(api.CERTIFICATE, "web-tls")["status"].get("issuance") is None
    assert ready_of(world) == ("True", "Ready")


def test_an_order_of_another_in_status_is_not_touched() -> None:
    """A Certificate whose status names another's order neither takes its certificate nor gives up its authorizations.

    Mutation: act on an order of which the identifiers are not ours.
    """
    world = with_issuer()
    world.ca.holds_validation = True
    world.certificate("victim")
    world.settle(10)
    order = world.issuance("victim")
    world.certificate("thief", names=(OTHER,))
    world.set_status("thief", issuance=issuance(world, orderURL=order.order_url, state="Finalizing"))
    world.start()
    world.settle(20)
    world.ca.go_on()
    world.settle(900)
    assert world.condition("Ready", "victim").status == "True"
    assert world.condition("Ready", "thief").status == "True"
    assert world.status("victim").failed_attempts == 0
    assert world.broken_pairs == []


def test_a_ca_that_claims_the_account_of_another_gets_none_of_its_orders() -> None:
    """A second issuer whose server gives out the first's account URI neither gets its orders nor holds up its names.

    Mutation: find sessions by account URI alone.
    """
    world = first()
    world.ca.holds_validation = True
    world.settle(10)
    evil = FakeCA(world.clock, "https://evil.example.test/directory")
    world.authority.cas[evil.url] = evil
    uri = next(iter(world.ca.accounts))
    evil.next_account = uri
    evil.holds_validation = True
    world.issuer("evil", server=evil.url, namespace="team")
    world.certificate(namespace="team", names=(OTHER,), issuerRef={"name": "evil"})
    world.settle(10)
    world.certificate("second", names=(OTHER,))
    world.ca.go_on()
    world.settle()
    assert ready_of(world) == ("True", "Ready")
    assert world.condition("Ready", "second").status == "True"
    assert len(world.ca.issued) == 2


@settings(max_examples=50)
@given(
    status=st.fixed_dictionaries(
        {},
        optional={
            "failedAttempts": st.integers(-5, 10**12),
            "revision": st.integers(-5, 10**12),
            "renewNow": st.text(max_size=10),
            "nextAttemptTime": st.sampled_from(["1970-01-01T00:00:00Z", "2026-11-20T09:10:00Z"]),
            "notBefore": st.sampled_from(["1970-01-01T00:00:00Z", "9999-01-01T00:00:00Z"]),
            "notAfter": st.sampled_from(["1970-01-01T00:00:00Z", "9999-01-01T00:00:00Z"]),
            "recentOrders": st.lists(
                st.fixed_dictionaries(
                    {
                        "time": st.sampled_from(["1970-01-01T00:00:00Z", "2026-11-20T08:59:00Z"]),
                        "setHash": st.text(max_size=5),
                        "generation": st.integers(0, 3),
                        "outcome": st.sampled_from(["Issued", "OrderGone", "junk", ""]),
                    }
                ),
                max_size=30,
            ),
            "conditions": st.lists(
                st.fixed_dictionaries(
                    {
                        "type": st.sampled_from(["Ready", "Issuing", "junk"]),
                        "status": st.sampled_from(["True", "False", "Unknown"]),
                        "reason": st.sampled_from(["Ready", "junk", "Issued", ""]),
                        "message": st.text(max_size=5),
                        "lastTransitionTime": st.just("2026-11-20T08:00:00Z"),
                    }
                ),
                max_size=3,
            ),
        },
    )
)
def test_any_status_ends_in_one_certificate(status: dict[str, Any]) -> None:
    """Whatever else stands in status, the controller does not stumble, and one certificate comes within the hour.

    Mutation: take a reason or a time from status without a check.
    """
    world = with_issuer()
    world.certificate()
    world.set_status(**status)
    world.start()
    world.settle(3700)
    assert ready_of(world) == ("True", "Ready")
    assert len(world.ca.issued) == 1


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_an_invalid_spec_is_told_and_mended_at_once() -> None:
    """A name that is none is told with what to do, costs no request, and is forgotten when it is mended.

    Mutation: order what is left of the names.
    """
    world = with_issuer()
    world.certificate(names=("bad..name",))
    world.settle()
    assert ready_of(world) == ("False", "InvalidSpec")
    assert world.counts() == {}
    world.certificate()
    world.settle()
    issued_once(world, 1, "")


def test_what_was_waited_for_is_no_longer_said_when_it_is_over() -> None:
    """A spec that changes and changes back leaves Issuing False, not "ordering".

    Mutation: leave Issuing alone when nothing is to be done.
    """
    world = World().ready()
    world.ca.holds_validation = True
    world.certificate(names=(OTHER,))
    world.settle(10)
    assert condition_of(world) == ("True", "OrderPending")
    world.certificate()
    world.settle(10)
    assert ready_of(world) == ("True", "Ready")
    assert condition_of(world) == ("False", "Ready")
    assert len(world.ca.issued) == 1
    world.nothing_left()


def test_a_backoff_says_why_whatever_was_said_meanwhile() -> None:
    """After a failure and an issuer that was not ready for a while, the condition speaks of the failure again.

    Mutation: repeat the condition's last sentence.
    """
    world = first()
    world.ca.validate = lambda _name, _token: Problem("dns", "NXDOMAIN")
    world.settle(80)
    assert world.status().failed_attempts == 2
    key = world.raw(api.SECRET, "ca-account")["data"]["tls.key"]
    for content, reason in (("anVuaw==", "IssuerNotReady"), (key, "BackingOff")):
        secret = world.raw(api.SECRET, "ca-account")
        secret["data"]["tls.key"] = content
        world.api.put(api.SECRET, secret)
        world.settle(5)
        assert condition_of(world) == ("False", reason)
    assert (
        "The last attempt failed (ChallengeFailed). Next attempt 2026-11-20 09:1" in world.condition("Issuing").message
    )


def test_the_first_of_two_solvers_of_a_kind_is_used() -> None:
    """Of two entries for the same solver the first one is presented with, and only that.

    Mutation: present with each entry in turn.
    """
    second = {"http01": {"ingress": {"ingressClassName": "nginx"}}}
    world = with_issuer(solvers=[*SOLVERS, second])
    world.certificate()
    world.settle()
    classes = [
        shown.spec.http01.ingress.ingress_class_name
        for shown in world.process.solver.presented
        if shown.spec.http01 and shown.spec.http01.ingress
    ]
    assert classes == ["traefik"]


def test_the_sweep_spares_what_is_presented_meanwhile() -> None:
    """A challenge that is presented while the sweep looks around is not removed.

    Mutation: find out what is wanted before what stands.
    """
    world = first()
    world.ca.holds_validation = True
    process = world.process
    process.solver.before = lambda method: process.settle(20) if method == "leftovers" else None
    process.certificates.sweep_challenges()
    assert len(world.presented()) == 1


def test_the_sweep_removes_what_a_crash_left() -> None:
    """A challenge of an order that is over goes with the next sweep; a solver that fails does not stop it.

    Mutation: sweep nothing.
    """
    world = first()

    def fail(method: str) -> None:
        if method == "clean_up":
            raise TemporaryError("the API server cannot be reached")

    world.process.solver.before = fail
    world.settle()
    assert len(world.presented()) == 1
    world.process.certificates.sweep_challenges()
    assert len(world.presented()) == 1
    world.process.solver.before = lambda _method: None
    world.process.sweep()
    issued_once(world, 1, "")


def test_the_sweep_of_due_certificates_wakes_those_alone() -> None:
    """A renewal that no timer woke is found by the sweep; a Certificate that is not due is left in peace.

    Mutation: enqueue every Certificate.
    """
    world = World().ready()
    world.certificate("young", names=(OTHER,))
    world.settle()
    world.process.queue.due.clear()
    world.clock.advance(60 * DAY + 1)
    world.set_status("young", renewalTime="2099-01-01T00:00:00Z")
    world.process.queue.ready.clear()
    world.process.certificates.sweep_due()
    assert list(world.process.queue.ready) == [Key("Certificate", SHOP, "web-tls")]
