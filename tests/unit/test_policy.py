"""Who may have which name through a ClusterIssuer: patterns, rules, and names that somebody has already."""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from certbotk8s.domain import api
from certbotk8s.domain.attempt import RECENT_ORDERS, failure
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.issuance import State
from certbotk8s.domain.names import names_hash, normalise
from certbotk8s.domain.plan import refused
from certbotk8s.domain.policy import (
    Standing,
    allowed,
    check_policy,
    claim,
    is_allowed,
    overlap,
    places,
    places_against,
    policy_of,
    standing,
)
from certbotk8s.domain.reasons import Reason
from certbotk8s.reconcile.indexes import contenders
from tests.builders import DAY, HOUR, NAME, NOW, certificate, condition, issuer, observed, recent_order
from tests.unit.reconciling import SHOP, Crash, World, crash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from certbotk8s.ports import Key

CA = api.IssuerRef("letsencrypt", "ClusterIssuer")
ENDED = object()
LABELS = st.sampled_from(["a", "b", "www", "xn--bcher-kva"])
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(lambda labels: ".".join([*labels, "test"]))
PATTERNS = st.builds(lambda depth, name: depth + name, st.sampled_from(["", "*.", "**."]), NAMES) | st.just("**")


def below(zone: str) -> list[str]:
    """Names that a wildcard name covers, some of them."""
    return [f"{label}.{zone}" for label in ("a", "b", "other")]


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "covered", "others"),
    [
        (
            "app.example.edu",
            ["app.example.edu"],
            ["example.edu", "a.app.example.edu", "*.app.example.edu", "*.example.edu", "xapp.example.edu", "app"],
        ),
        (
            "*.example.edu",
            ["app.example.edu", "www.example.edu", "*.example.edu"],
            ["example.edu", "a.b.example.edu", "*.b.example.edu", "*.edu", "anexample.edu", "edu"],
        ),
        (
            "**.example.edu",
            ["app.example.edu", "a.b.c.example.edu", "*.example.edu", "*.a.b.example.edu"],
            ["example.edu", "anexample.edu", "*.edu", "a.anexample.edu", "example.edu.evil.test"],
        ),
        ("**", ["example.edu", "a.b.c", "*.example.edu", "*.edu", "intranet"], []),
        ("*.edu", ["example.edu", "*.edu"], ["edu", "www.example.edu", "*.example.edu"]),
    ],
)
def test_a_pattern_covers(pattern: str, covered: list[str], others: list[str]) -> None:
    """One name, one label below a zone, all below it, everything; the zone itself is never below itself.

    Mutation: compare the end without its dot, or let `*.z` be any depth.
    """
    assert [name for name in covered + others if is_allowed([pattern], name)] == covered


@given(PATTERNS, NAMES)
def test_a_wildcard_is_allowed_only_with_all_that_it_covers(pattern: str, zone: str) -> None:
    """Whoever is allowed a wildcard name is allowed every name that it covers, by that pattern too.

    Mutation: let an exact pattern `z` cover `*.z`.
    """
    if is_allowed([pattern], f"*.{zone}"):
        assert all(is_allowed([pattern], name) for name in below(zone))


@given(NAMES, st.sampled_from(["", "*.", "**."]), NAMES)
def test_patterns_are_compared_as_names_are(zone: str, depth: str, name: str) -> None:
    """Case, a trailing dot and the form of an internationalised name make no difference, on either side.

    Mutation: compare patterns as they are written.
    """
    written = zone.replace("xn--bcher-kva", "BÜCHER").upper() + "."
    assert is_allowed([depth + written], name) == is_allowed([depth + zone], name)
    assert is_allowed([depth + written], normalise("A." + zone)) == is_allowed([depth + zone], "a." + zone)


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "***", "*.", "**.", "*.*.example.edu", "a.*.edu", "**edu", "a*.edu", "xn--a.edu", "192.0.2.1", "a..edu"],
)
def test_what_is_no_pattern_allows_nothing_and_is_told(pattern: str) -> None:
    """A pattern that cannot be understood allows nothing, and check_policy says which one it is.

    Mutation: let check_policy look at the first rule alone.
    """
    rules = (api.PolicyRule(("**",), ("shop",)), api.PolicyRule(("*.example.edu", pattern), ("*",)))
    with pytest.raises(PermanentError) as caught:
        check_policy(issuer(policy=api.Policy(rules)))
    assert caught.value.reason is Reason.INVALID_SPEC
    assert str(caught.value).startswith("spec.policy.rules[1].dnsNames[1]: ")
    assert f'"{pattern}' in str(caught.value)
    assert not any(is_allowed([pattern], name) for name in ("edu", "example.edu", "*.edu", "a.edu", "192.0.2.1"))


def test_a_good_policy_is_not_complained_of() -> None:
    """Neither a policy of good patterns, nor none at all.

    Mutation: refuse `**`.
    """
    rules = (api.PolicyRule(("**", "*.bücher.example", "intranet", "A.example."), ("*",)),)
    check_policy(issuer(policy=api.Policy(rules)))
    check_policy(issuer(policy=api.Policy(())))
    check_policy(issuer())


# --- rules ------------------------------------------------------------------------------------------------------------


def requirement(operator: str, *values: str) -> api.LabelSelector:
    return api.LabelSelector(match_expressions=(api.LabelSelectorRequirement("team", operator, values),))


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        (api.LabelSelector(), ["web", "pay", "none"]),
        (api.LabelSelector({"team": "web"}), ["web"]),
        (api.LabelSelector({"team": "web", "tier": "prod"}), []),
        (requirement("In", "web", "pay"), ["web", "pay"]),
        (requirement("NotIn", "web"), ["pay", "none"]),
        (requirement("Exists"), ["web", "pay"]),
        (requirement("DoesNotExist"), ["none"]),
        (api.LabelSelector({"team": "web"}, requirement("NotIn", "web").match_expressions), []),
    ],
)
def test_namespaces_are_selected_as_everywhere_in_kubernetes(selector: api.LabelSelector, selected: list[str]) -> None:
    """A selector means what a LabelSelector means; a namespace whose labels are not known is selected by none.

    Mutation: let one requirement of several do, or take unknown labels for none.
    """
    labels = {"web": {"team": "web"}, "pay": {"team": "pay"}, "none": {"tier": "dev"}}
    policy = api.Policy((api.PolicyRule(("**",), namespace_selector=selector),))
    assert [name for name, marks in labels.items() if allowed(policy, name, marks)] == selected
    assert allowed(policy, "web", None) == ()


def test_what_a_namespace_is_allowed_is_what_all_its_rules_say() -> None:
    """The rules that list a namespace, all, or select it, together; a name in its list is no pattern.

    Mutation: stop at the first rule that fits.
    """
    policy = api.Policy(
        (
            api.PolicyRule(("a.test",), ("shop", "pay")),
            api.PolicyRule(("b.test", "a.test"), ("*",)),
            api.PolicyRule(("c.test",), namespace_selector=api.LabelSelector({"team": "web"})),
            api.PolicyRule(("d.test",), ("sho*", "hop")),
        )
    )
    assert allowed(policy, "shop", {"team": "web"}) == ("a.test", "b.test", "c.test")
    assert allowed(policy, "pay", {}) == ("a.test", "b.test")
    assert allowed(policy, "other", {}) == ("b.test", "a.test")


def test_a_refusal_says_what_is_refused_by_whom_and_what_is_allowed() -> None:
    """The names that are refused, the issuer, the namespace, and what that may have; of other namespaces nothing.

    Mutation: list the names that are allowed too, or the patterns of every rule.
    """
    policy = api.Policy((api.PolicyRule(("*.shop.test",), ("shop",)), api.PolicyRule(("*.pay.test",), ("pay",))))
    of = certificate(names=["a.shop.test", "pay.test", "*.shop.test"], issuer_kind="ClusterIssuer")
    found = refused(observed(of, issuer=issuer(policy=policy)))
    assert found
    assert found.reason is Reason.NOT_ALLOWED
    assert found.message == (
        "ClusterIssuer letsencrypt does not allow pay.test to namespace shop. Nothing is ordered: ask for other names, "
        "or have an administrator add a rule to its spec.policy. Allowed to this namespace: *.shop.test"
    )
    assert refused(observed(of, issuer=issuer(policy=api.Policy(())))).message.endswith("this namespace: nothing")  # type: ignore[union-attr]


def test_without_a_policy_every_name_is_allowed() -> None:
    """An Issuer has no policy, and a ClusterIssuer may have none.

    Mutation: take no policy for one without rules.
    """
    assert policy_of(issuer()) is None
    assert policy_of(None) is None
    assert refused(observed()) is None
    assert refused(observed(certificate(issuer_kind="ClusterIssuer"))) is None


# --- who has a name already -------------------------------------------------------------------------------------------


@given(NAMES, st.data())
def test_names_that_share_a_host_are_found(zone: str, data: st.DataObject) -> None:
    """Two names overlap when some host is served by both; then, and only then, the index finds one by the other.

    Mutation: leave the names below a wildcard out of the index, or the wildcard over a name out of the search.
    """
    related = [zone, f"*.{zone}", *below(zone), f"*.a.{zone}", f"b.a.{zone}", f"a{zone}"]
    one, other = data.draw(st.sampled_from(related)), data.draw(st.sampled_from(related))

    def hosts(name: str) -> set[str]:
        return set(below(name[2:])) if name.startswith("*.") else {name}

    assert overlap(one, other) == overlap(other, one) == bool(hosts(one) & hosts(other))
    found = set(places(asking(one))) & set(places_against(asking(other)))
    assert bool(found) == overlap(one, other)


def asking(*names: str, **more: Any) -> api.Certificate:
    return certificate(names=names or (NAME,), issuer_kind="ClusterIssuer", **more)


def holding(*names: str, issued: tuple[str, ...] = (), **more: Any) -> api.Certificate:
    """A Certificate that was issued for these names, or for others, before its spec was changed."""
    wanted = names or (NAME,)
    status = {
        "issuer_ref": CA,
        "observed_generation": 1,
        "not_after": NOW + DAY,
        "recent_orders": (recent_order(set_hash=names_hash(issued or wanted)), recent_order("ChallengeFailed")),
        "conditions": (condition("Issuing", "False", Reason.ISSUED),),
    }
    return asking(*wanted, **{"status": {**status, **more.pop("status", {})}, **more})


def ordering(state: State = State.ORDERED, ref: api.IssuerRef = CA) -> dict[str, Any]:
    """A status with an order under way."""
    issuance = api.Issuance(1, 1, "hash", "set", state, NOW, ref)
    return {"observed_generation": 1, "issuance": issuance}


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (holding(), Standing.HOLDS),
        (holding(status=ordering(State.FINALIZING)), Standing.HOLDS),
        (holding(status={"not_after": NOW}), Standing.NONE),
        (holding(status={"issuer_ref": api.IssuerRef("other", "ClusterIssuer")}), Standing.NONE),
        (holding(status={"issuer_ref": api.IssuerRef("letsencrypt")}), Standing.NONE),
        (holding(NAME, "pay.test", issued=(NAME,)), Standing.NONE),
        (holding(status={"recent_orders": ()}), Standing.NONE),  # adopted: never issued through this issuer
        (holding(deletion_timestamp=NOW), Standing.NONE),
        (holding(issuer_name="next"), Standing.HOLDS),  # moved to another issuer, and not yet renewed
        (asking(status=ordering()), Standing.ASKS),
        (asking(status=ordering(State.FINALIZING)), Standing.FINALIZES),
        (asking(status=ordering(ref=api.IssuerRef("other", "ClusterIssuer"))), Standing.NONE),
        (asking(), Standing.ASKS),  # not looked at yet
        (asking(generation=2, status={"observed_generation": 1}), Standing.ASKS),
        (asking(issuer_name="other"), Standing.NONE),
        (asking(status={"observed_generation": 1}), Standing.NONE),  # adopted
        (
            asking(
                status={"observed_generation": 1, "conditions": (condition("Issuing", "True", Reason.ORDER_PENDING),)}
            ),
            Standing.ASKS,
        ),
        (
            asking(
                status={"observed_generation": 1, "conditions": (condition("Issuing", "False", Reason.NOT_ALLOWED),)}
            ),
            Standing.NONE,
        ),
    ],
)
def test_how_a_certificate_stands_to_its_names(of: api.Certificate, expected: Standing) -> None:
    """It holds what it was issued for, as long as that is valid; what was refused or given up is nobody's.

    Mutation: take Ready, which an adopted Secret makes True as well, or forget the hash of the names.
    """
    assert standing(of, CA, NOW) is expected


def test_a_name_stays_held_however_often_its_renewal_fails() -> None:
    """The record of the last success outlasts any number of failures.

    Mutation: keep the newest orders alone in `recent`.
    """
    of = holding()
    for _ in range(2 * RECENT_ORDERS):
        _, changes = failure(observed(of), None, PermanentError(Reason.CHALLENGE_FAILED, "No answer."))
        of = structs.replace(of, status=structs.replace(of.status, recent_orders=changes["recent_orders"]))
    assert len(of.status.recent_orders) == RECENT_ORDERS
    assert standing(of, CA, NOW) is Standing.HOLDS


BOTH = api.PolicyRule((NAME,), (SHOP, "pay", "third"))


@pytest.mark.parametrize(
    ("mine", "theirs", "rules", "stands"),
    [
        (asking(), holding(namespace="pay"), None, True),
        (asking(), holding(namespace="pay", age=HOUR), None, True),
        (asking("*.example.test"), holding(namespace="pay"), None, True),
        (asking(), holding("*.example.test", namespace="pay"), None, True),
        (asking("*.example.test"), holding("*.example.test", namespace="pay"), None, True),
        (asking("other.example.test", NAME), holding("third.test", NAME, namespace="pay"), None, True),
        (asking(), holding("other.example.test", namespace="pay"), None, False),
        (asking("*.example.test"), holding("a.b.example.test", namespace="pay"), None, False),
        # a rule that lists both ends the question, one that allows it to each or to all does not
        (asking(), holding(namespace="pay"), [BOTH], False),
        (asking(), holding(namespace="pay"), [api.PolicyRule(("**",), ("*",))], True),
        (asking(), holding(namespace="pay"), [api.PolicyRule((NAME,), (SHOP, "*"))], True),
        (asking(), holding(namespace="pay"), [api.PolicyRule((NAME,), (n,)) for n in (SHOP, "pay")], True),
        (asking(), holding(namespace="pay"), [api.PolicyRule(("other.test",), (SHOP, "pay"))], True),
        (asking("*.example.test"), holding(namespace="pay"), [BOTH], True),
        (
            asking("*.example.test"),
            holding(namespace="pay"),
            [structs.replace(BOTH, dns_names=("*.example.test",))],
            False,
        ),
        (
            asking(),
            holding(namespace="pay"),
            [api.PolicyRule((NAME,), namespace_selector=api.LabelSelector())],
            True,
        ),
        # who holds a name keeps it
        (holding(), asking(namespace="pay", age=9 * DAY), None, False),
        (holding(age=HOUR), holding(namespace="pay", age=9 * DAY), None, False),
        # of two that ask the older goes on
        (asking(age=DAY), asking(namespace="pay", age=HOUR), None, False),
        (asking(age=HOUR), asking(namespace="pay", age=DAY), None, True),
        (asking(), asking("a", namespace="pay"), None, False),
        (asking(age=DAY), asking(namespace="pay", age=DAY), None, True),  # pay/... comes before shop/...
        (asking(age=DAY), asking(namespace="shops", age=DAY), None, False),
        # what is being finalized cannot be called back
        (asking(age=DAY), asking(namespace="pay", age=HOUR, status=ordering(State.FINALIZING)), None, True),
        (asking(age=DAY), asking(namespace="pay", age=HOUR, status=ordering(State.SUBMITTED)), None, False),
    ],
)
def test_what_stands_against_a_name(
    mine: api.Certificate, theirs: api.Certificate, rules: list[api.PolicyRule] | None, *, stands: bool
) -> None:
    """A name of another namespace, unless a rule lists both namespaces for it.

    Mutation: leave out the age, the rule, or the question whether it holds the name itself.
    """
    policy = None if rules is None else api.Policy(tuple(rules))
    found = claim(mine, mine.spec.dns_names, [theirs], policy, NOW)
    assert (found is not None) == stands


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(State)), min_size=2, max_size=5))
def test_of_several_that_ask_at_once_one_goes_on(asked: list[tuple[int, State]]) -> None:
    """However many namespaces ask for one name at the same moment: before any was sent to be issued, exactly one goes
    on, and it is the oldest; once one was, no other does.

    Mutation: compare the times alone, which are full seconds, or let the oldest overtake what is being finalized.
    """
    others = [
        asking(namespace=f"team-{number}", age=age * HOUR, uid=f"uid-{number}", status=ordering(state))
        for number, (age, state) in enumerate(asked)
    ]
    going_on = [
        each for each in others if claim(each, [NAME], [one for one in others if one is not each], None, NOW) is None
    ]
    finalizing = [each for each in others if standing(each, CA, NOW) is Standing.FINALIZES]
    if finalizing:
        assert set(map(id, going_on)) <= set(map(id, finalizing))
        assert len(going_on) <= 1
    else:
        assert [each.key for each in going_on] == [max(others, key=lambda one: (_age(one), _last(one))).key]


def _age(of: api.Certificate) -> timedelta:
    assert of.metadata.creation_timestamp
    return NOW - of.metadata.creation_timestamp


def _last(of: api.Certificate) -> int:
    return -int(of.metadata.namespace.removeprefix("team-"))


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (asking(), holding(namespace="pay"), f"{NAME} is held by another namespace"),
        (asking(), holding("*.example.test", namespace="pay"), f"{NAME} is covered by a wildcard name that is held by"),
        (asking("*.example.test"), holding(namespace="pay"), "*.example.test covers a name that is held by another"),
        (asking(), asking(namespace="pay", age=9 * DAY), f"{NAME} is being ordered by another namespace"),
    ],
)
def test_a_tenant_is_not_told_who_the_other_is(mine: api.Certificate, theirs: api.Certificate, words: str) -> None:
    """The sentence names what was asked for and the issuer; whose it is stands in the aside for the log alone, and so
    does a name that only the other has.

    Mutation: name the holder, or the name that it holds, in the message.
    """
    found = refused(observed(mine, contenders=(theirs,)))
    assert found
    assert found.reason is Reason.NAME_CLAIMED
    assert words in found.message
    assert "through ClusterIssuer letsencrypt" in found.message
    assert "pay" not in found.message
    assert set(theirs.spec.dns_names) <= set(mine.spec.dns_names) or theirs.spec.dns_names[0] not in found.message
    assert "pay/web-tls" in found.aside
    assert "shop/web-tls" in found.aside


# --- at work ----------------------------------------------------------------------------------------------------------

SHARED: dict[str, Any] = {"issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}
OURS = {"namespaces": [SHOP], "dnsNames": ["*.example.test"]}
TEAM = {"namespaceSelector": {"matchLabels": {"team": "web"}}, "dnsNames": ["*.example.test"]}


def shared(rules: list[dict[str, Any]] | None) -> World:
    """A world with a ClusterIssuer that has this policy."""
    world = World()
    world.issuer(kind="ClusterIssuer", rules=rules)
    world.settle()
    return world


def label(world: World, **labels: str) -> None:
    """Label the namespace."""
    world.api.put(api.NAMESPACE, {"metadata": {"name": SHOP, "labels": labels}})


def allow(world: World) -> None:
    world.issuer(kind="ClusterIssuer", rules=[OURS])


def forbid(world: World) -> None:
    world.issuer(kind="ClusterIssuer", rules=[])


def test_what_no_rule_allows_is_not_ordered_and_told_once() -> None:
    """Nothing is asked of the CA, the conditions and one Event say why; looked at again, nothing is said again.

    Mutation: leave `_not_allowed` out of REFUSALS.
    """
    world = shared([])
    world.certificate(**SHARED)
    world.settle(3600)
    assert "newOrder" not in world.counts()
    assert world.condition("Ready").reason == world.condition("Issuing").reason == Reason.NOT_ALLOWED
    assert world.condition("Issuing").status == "False"
    assert world.reasons() == [Reason.NOT_ALLOWED]
    world.nothing_left()


@pytest.mark.parametrize(
    "change",
    [
        allow,
        lambda world: world.issuer(kind="ClusterIssuer", rules=None),
        lambda world: world.certificate(**SHARED, names=("shop.pay.test",)),
    ],
)
def test_what_is_allowed_now_goes_on_by_itself(change: Callable[[World], None]) -> None:
    """A rule added, the policy removed, or another name asked for is enough.

    Mutation: do not wake the Certificates of an issuer whose spec has changed.
    """
    world = shared([{"namespaces": ["*"], "dnsNames": ["shop.pay.test"]}])
    world.certificate(**SHARED)
    world.settle(0)
    assert world.condition("Ready").reason == Reason.NOT_ALLOWED
    change(world)
    world.settle(10)
    assert world.condition("Ready").status == "True"


def test_a_label_of_the_namespace_counts_at_once() -> None:
    """A namespace that is labelled gets what the selector allows, and one that loses the label gets no more.

    Mutation: do not wake the Certificates of a namespace whose labels have changed.
    """
    world = shared([TEAM])
    world.certificate(**SHARED)
    world.settle(0)
    assert world.condition("Ready").reason == Reason.NOT_ALLOWED
    label(world, team="web")
    world.settle(10)
    assert world.condition("Ready").status == "True"
    label(world, team="pay")
    world.certificate("more", **SHARED)
    world.settle(10)
    assert world.condition("Ready", "more").reason == Reason.NOT_ALLOWED
    label(world)
    label(world, team="web")
    world.settle(10)
    assert world.condition("Ready", "more").status == "True"


# Which effect of an issuance writes the state from which nobody turns back.
FINALIZING = 8


@pytest.mark.parametrize("withdraw", [forbid, lambda world: label(world, team="pay")])
@pytest.mark.parametrize("at", range(12))
def test_an_order_for_what_is_no_longer_allowed_is_given_up_before_finalize(
    withdraw: Callable[[World], None], at: int
) -> None:
    """Whenever a name is withdrawn while it is ordered: once Finalizing is written the certificate is installed;
    before that nothing is issued and the Certificate says why. Nothing is counted as a failure.

    Mutation: ask `refused` before the order alone, not in `_changed`; or not again after the write of Finalizing.
    """
    world = shared([TEAM])
    label(world, team="web")
    world.settle()
    world.effects.at(at, "before", lambda: withdraw(world))
    world.certificate(**SHARED)
    world.settle()
    world.process.sweep()
    assert world.effects.happened
    world.nothing_left()
    assert not world.status().failed_attempts
    if at > FINALIZING:
        assert world.condition("Ready").status == "True"
        assert len(world.ca.issued) == 1
    else:
        assert not world.ca.issued
        assert world.condition("Ready").reason == Reason.NOT_ALLOWED


def test_what_is_no_longer_allowed_is_not_finalized_after_a_restart() -> None:
    """A controller that was killed before it sent finalize does not send it when the name has been withdrawn since.

    Mutation: let no change count once Finalizing is stored.
    """
    world = shared([OURS])
    world.settle()
    world.effects.at(FINALIZING + 1, "before", partial(crash, world))
    world.certificate(**SHARED)
    with pytest.raises(Crash):
        world.settle()
    assert world.effects.happened.endswith("finalize")
    forbid(world)
    world.start().settle()
    assert world.ca.issued == []
    assert world.condition("Ready").reason == Reason.NOT_ALLOWED
    world.nothing_left()


def test_a_renewal_that_is_no_longer_allowed_leaves_the_certificate_in_hand() -> None:
    """Ready stays as it is, the renewal is refused with the reason, and goes on when it is allowed again.

    Mutation: compute Ready from the policy.
    """
    world = shared([OURS])
    world.certificate(**SHARED)
    world.settle()
    world.issuer(kind="ClusterIssuer", rules=[])
    world.settle()
    assert world.condition("Ready").status == "True"
    world.annotate(renew_now="1")
    world.settle()
    assert world.condition("Ready").status == "True"
    assert world.condition("Issuing").reason == Reason.NOT_ALLOWED
    assert len(world.ca.issued) == 1
    allow(world)
    world.settle()
    assert len(world.ca.issued) == 2
    assert world.condition("Issuing").reason == Reason.ISSUED


def test_a_name_that_is_held_is_refused_until_it_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Another namespace gets neither the name nor a wildcard over it, and is told so without a name of the holder; the
    log has both. It goes on by itself when the holder is deleted, or no longer wants the name.

    Mutation: do not wake those that wait for the names of a Certificate that goes or changes.
    """
    world = shared(None)
    world.certificate(**SHARED)
    world.settle()
    for name, wanted in {"same": "SHOP.example.test.", "over": "*.example.test"}.items():
        world.certificate(name, names=(wanted,), namespace="pay", **SHARED)
    with caplog.at_level(logging.WARNING):
        world.settle(0)
    assert len(world.ca.issued) == 1
    for name in ("same", "over"):
        assert world.condition("Ready", name, "pay").reason == Reason.NAME_CLAIMED
        assert "shop/" not in world.condition("Ready", name, "pay").message
    assert "pay/over asks for *.example.test, but shop/web-tls holds shop.example.test" in caplog.text
    assert all("shop/" not in event.message for event in world.cluster.events if event.about.namespace == "pay")
    world.certificate(names=("other.test",), **SHARED)
    world.settle(10)
    assert world.condition("Ready", "same", "pay").status == "True"
    assert world.condition("Ready").status == "True"
    world.delete(api.CERTIFICATE, "same", "pay")
    world.certificate(names=("other.test", "shop.example.test"), **SHARED)
    world.settle(10)
    world.nothing_left()


def test_who_holds_a_name_renews_it_whoever_came_later() -> None:
    """A later Certificate of another namespace, even an older one, does not stand against the renewal.

    Mutation: leave the question out whether it holds the name itself.
    """
    world = shared(None)
    world.certificate("early", names=("other.test",), namespace="pay", **SHARED)
    world.live(5)
    world.certificate(**SHARED)
    world.settle()
    world.annotate(renew_now="1")
    world.certificate("early", names=("other.test", NAME), namespace="pay", **SHARED)
    world.settle(10)
    assert world.status().revision == 2
    assert world.reasons() == [Reason.ISSUED, Reason.ISSUED]
    assert world.condition("Issuing", "early", "pay").reason == Reason.NAME_CLAIMED
    assert len(world.ca.issued) == 3


def test_two_that_ask_at_the_same_moment_get_it_once() -> None:
    """The older goes on, the other waits, whichever is looked at first and however far it has come; neither flaps.

    Mutation: leave `_name_claimed` out of REFUSALS.
    """
    for early, late in (("early", "late"), ("late", "early")):
        world = shared(None)
        world.certificate(early, **SHARED)
        world.certificate(late, namespace="pay", **SHARED)
        world.settle(60)
        ready = [world.condition("Ready", name, space).status for name, space in ((early, SHOP), (late, "pay"))]
        assert sorted(ready) == ["False", "True"]
        assert len(world.ca.issued) == 1
        # Of the same second: the first by namespace and name.
        assert world.condition("Ready", late, "pay").status == "True"
        assert world.condition("Ready", early).reason == Reason.NAME_CLAIMED
        world.nothing_left()
        before = list(world.cluster.events)
        world.settle(1800)
        assert world.cluster.events == before


@settings(max_examples=40)
@given(st.integers(0, 18), st.integers(0, 12), st.lists(st.sampled_from([0, 0, 1]), min_size=20, max_size=40))
def test_two_that_are_ordered_side_by_side_are_issued_once(comes: int, looks: int, turns: list[int]) -> None:
    """However the steps of two namespaces interleave, and whenever the second comes (made in the same second, it counts
    as the older), one of them gets the name and the other is told.

    Mutation: ask `refused` before the order alone, or let the oldest overtake what is being finalized.
    """
    world = shared(None)
    world.ca.looks_until_valid = looks
    process = world.process
    world.certificate("one", **SHARED)
    running: dict[Key, Iterator[None]] = {}
    for number, turn in enumerate(turns):
        if number == comes:
            world.certificate("two", names=(NAME, "pay.test"), namespace="pay", **SHARED)  # no two orders of one set
        for key in process.queue.waiting():
            if key not in running:
                del process.queue.ready[key]
                running[key] = process.turns(key)
        if running:
            key = sorted(running)[turn % len(running)]
            if next(running[key], ENDED) is ENDED:
                del running[key]
        world.clock.advance(0.04)
    for left in running.values():
        for _ in left:
            pass
    world.settle(300)
    assert len(world.ca.issued) == 1
    ready = {space: world.condition("Ready", name, space) for name, space in (("one", SHOP), ("two", "pay"))}
    assert sorted(each.status for each in ready.values()) == ["False", "True"]
    assert Reason.NAME_CLAIMED in {each.reason for each in ready.values()}
    world.nothing_left()


def test_contenders_are_those_of_other_namespaces() -> None:
    """Certificates of one namespace share names as they like.

    Mutation: look at all namespaces.
    """
    world = shared(None)
    world.certificate(**SHARED)
    world.certificate("second", **SHARED)
    world.settle()
    assert len(world.ca.issued) == 2
    store = world.cluster.store(api.CERTIFICATE)
    assert contenders(store, world.get()) == []


def test_a_policy_that_cannot_be_understood_is_told_by_the_issuer() -> None:
    """The issuer is not Ready and says which pattern it is; nothing is ordered through it until that is mended.

    Mutation: leave check_policy out of the issuer's reconcile.
    """
    world = shared([OURS, {"namespaces": ["pay"], "dnsNames": ["xn--a.test"]}])
    world.certificate(**SHARED)
    world.settle(0)
    ready = api.find_condition(world.api.all(api.CLUSTER_ISSUER)[0].status.conditions, "Ready")
    assert ready
    assert (ready.status, ready.reason) == ("False", Reason.INVALID_SPEC)
    assert 'spec.policy.rules[1].dnsNames[0]: "xn--a.test" is no DNS name' in ready.message
    assert world.condition("Ready").reason == Reason.ISSUER_NOT_READY
    assert "newOrder" not in world.counts()
    allow(world)
    world.settle(10)
    assert world.condition("Ready").status == "True"
