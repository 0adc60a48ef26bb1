"""The controller dies, loses an answer or is refused a write at each of its effects; each time one certificate comes.

What a crash leaves is finished by the next start of the controller; after the other faults it goes on by itself.
"""

import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from certbotk8s.ca.authority import Authority
from certbotk8s.clock import SystemClock
from certbotk8s.ports import Server
from tests.lab.controller import Controller, install_crds
from tests.lab.crashing import FOLDER, Fault, Faults
from tests.lab.lab import Lab
from tests.site import CERTIFICATES, Site, assert_plain, wait_for

When = Literal["before", "after"]
Act = Literal["kill", "lose", "refuse"]

each_time = pytest.mark.parametrize("when", ["before", "after"])

# What the controller does to the outside for one name by HTTP-01, in this order; the order may be read more often.
ISSUANCE = (
    "create Secret next-key",
    "newOrder",
    "write Certificate status Ordered",
    "read authorization",
    "write Certificate status Ordered",
    "create Ingress challenge",
    "answer challenge",
    "read order",
    "write Certificate status Finalizing",
    "finalize",
    "read order",
    "fetch certificate",
    "create Secret tls",
    "write Certificate status",
    "delete Ingress challenge",
    "delete Secret next-key",
)
RENEWAL = tuple("apply Secret tls" if effect == "create Secret tls" else effect for effect in ISSUANCE)
# From where on a renewal needs no authorization any more.
RENEWED = RENEWAL[RENEWAL.index("write Certificate status Finalizing") :]
# A state that lasts over a second is shown.
SHOWN = {"write Certificate status Presented", "write Certificate status Submitted"}


class Point(NamedTuple):
    """An effect, and how many of the same name come before it."""

    effect: str
    number: int


def points(effects: tuple[str, ...]) -> list[Point]:
    """Each effect once."""
    seen = Counter[str]()
    found = []
    for effect in effects:
        found.append(Point(effect, seen[effect]))
        seen[effect] += 1
    return found


WRITES = ("create ", "write ", "apply ")
# The first order is remembered when its answer is written down: until then another one may have to be placed.
REMEMBERING = {Point("newOrder", 0), Point("write Certificate status Ordered", 0)}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """The faults of this module's controller."""
    return Faults(tmp_path_factory.mktemp("crashing"))


@pytest.fixture(scope="module")
def controller(lab: Lab, faults: Faults) -> Iterator[Controller]:
    """A controller that can be given faults."""
    install_crds(lab)
    with Controller(
        lab,
        command=[sys.executable, "-m", "tests.lab.crashing"],
        arguments=["--log-level=debug", "--log-format=text"],
        environment={FOLDER: str(faults.folder)},
    ) as running:
        running.wait_ready()
        yield running


@pytest.fixture(autouse=True)
def _plain(site: Site, controller: Controller, faults: Faults) -> Iterator[None]:
    """Whatever a test provokes is told in plain words, and nothing broke inside; the next test finds a controller."""
    already = controller.log.stat().st_size
    yield
    faults.set()
    if controller.ended() is not None:
        controller.start()
    assert_plain(site.said())
    assert "Traceback" not in controller.log.read_bytes()[already:].decode()


class Stage(NamedTuple):
    """Certificates of one namespace, at work on by a controller that has faults."""

    lab: Lab
    site: Site
    controller: Controller
    faults: Faults
    issuer: str
    suffix: str

    def about(self, name: str) -> tuple[str, str]:
        """By what the effects for a Certificate are known."""
        return f"{self.site.namespace}/{name}", f"{name}.{self.suffix}"

    def fault(self, name: str, act: Act, point: Point, when: When = "before", times: int = 1) -> Fault:
        """One that comes at a point, counted from now, of what is done for a Certificate."""
        return Fault(self.about(name), act, point.number, when, times, re.escape(point.effect))

    def begin(self, name: str, revision: int) -> None:
        """Have its first certificate ordered, or a renewed one."""
        if revision == 1:
            self.site.certificate(name, [f"{name}.{self.suffix}"], self.issuer)
        else:
            self.site.annotate(name, renew_now=f"revision {revision}")

    def effects(self, name: str) -> list[str]:
        """What was done for a Certificate."""
        return [effect.name for effect in self.faults.effects(*self.about(name))]

    def struck(self, name: str) -> bool:
        """Whether a fault has come."""
        return any(effect.act for effect in self.faults.effects(*self.about(name)))

    def left(self, name: str) -> list[str]:
        """What of an issuance stands at this moment."""
        issuance = self.site.status(name).get("issuance")
        parts = {
            "next key": self.site.next_keys(),
            f"order ({issuance['state'] if issuance else ''})": issuance,
            "challenge": self.site.challenge_ingresses(name),
        }
        return [part for part, there in parts.items() if there]


@pytest.fixture
def stage(lab: Lab, site: Site, controller: Controller, faults: Faults, issuer: str, suffix: str) -> Stage:
    """The test's own namespace, and the controller with faults."""
    return Stage(lab, site, controller, faults, issuer, suffix)


class Crash(NamedTuple):
    """A point at which the controller died, and what came of it."""

    point: Point
    when: When
    stood: list[str]
    orders: int
    certificates: int
    left: list[str]
    missed: bool


def crash(stage: Stage, point: Point, when: When, name: str, revision: int = 1) -> Crash | None:
    """Kill the controller at a point of an issuance, and start it again; None when that point did not come.

    AssertionError unless the CA has issued one certificate then, which is used, and nothing is left. One more order is
    right where the first was placed and not remembered, and where the CA looked for the challenge meanwhile.
    """
    site, controller, told = stage.site, stage.controller, f"{point.effect} ({point.number}), killed {when}"
    if revision > 1:
        issue(stage, [name])
    earlier = len(stage.effects(name))
    ca, since = stage.lab.acme, stage.lab.acme.mark()
    stage.faults.set(stage.fault(name, "kill", point, when))
    stage.begin(name, revision)
    wait_for(
        lambda: stage.struck(name) or (site.ended(name, revision=revision) and not stage.left(name)), told, pause=0.05
    )
    if not stage.struck(name):
        return None
    wait_for(lambda: controller.ended() is not None, f"{told}: its end")
    stage.faults.set()
    status, stood, made = site.status(name), stage.left(name), stage.effects(name)[earlier:]
    if revision > 1:
        assert site.condition(name, "Ready", "True"), told
        assert site.leaf(name), told
    remembered = "issuance" in status or status.get("revision") == revision
    placed = "newOrder" in (made if when == "after" else made[:-1])
    controller.start()
    missed = site.recovered(name, told, revision=revision)
    found = Crash(point, when, stood, ca.orders(since), ca.issued(since), stage.left(name), missed)
    assert found.certificates == 1, told
    assert found.orders <= (2 if placed and not remembered else 1) + missed, told
    assert not found.left, told
    assert not missed or "answer challenge" in made, told
    return found


def show(crashes: list[Crash]) -> None:
    """Print the table."""
    print(f"\n{'effect':36} {'killed':7} {'what stood then':40} {'orders':>6} {'certificates':>12} {'left':>4}")
    for each in crashes:
        print(
            f"{each.point.effect:36} {each.when:7} {', '.join(each.stood) or 'nothing':40} {each.orders:6} "
            f"{each.certificates:12} {len(each.left):4}{'  the CA had looked meanwhile' if each.missed else ''}"
        )
    abandoned = sum(each.orders - each.certificates for each in crashes)
    print(f"{len(crashes)} kills: {abandoned} orders abandoned, {sum(e.missed for e in crashes)} validations missed")


def issue(stage: Stage, names: list[str]) -> None:
    """Have their first certificates issued."""
    for name in names:
        stage.begin(name, 1)
    for name in names:
        stage.site.ready(name)
    stage.site.nothing_left()


def test_the_effects_of_an_issuance(stage: Stage) -> None:
    """An issuance and a renewal have the effects at which the tests below make their faults, and no others; the API
    server and the CA have seen as many writes and requests.

    Mutation: persist Finalizing after finalize; or persist Requested; or delete Secrets past the record.
    """
    lab, mark = stage.lab, stage.lab.mark()
    issue(stage, ["web"])
    first = renewal = stage.effects("web")
    for revision in range(2, 6):
        earlier = len(stage.effects("web"))
        stage.begin("web", revision)
        stage.site.ready("web", revision=revision)
        stage.site.nothing_left()
        renewal = stage.effects("web")[earlier:]
        if "read authorization" in renewal:
            break  # one time in a hundred the lab's CA takes the authorization of the order before
    for made, expected in ((first, ISSUANCE), (renewal, RENEWAL)):
        assert set(made) - SHOWN == set(expected)
        later = iter(made)
        assert all(effect in later for effect in expected), made
    made = stage.effects("web")
    places = {stage.site.namespace, lab.namespace}
    writes = [
        write
        for write in lab.kube_writes(mark)
        if write.namespace in places and write.resource not in {"events", "leases"}
    ]
    assert len(writes) == sum(effect.startswith((*WRITES, "delete ")) for effect in made)
    requests = [request for request in lab.acme_requests(mark) if not request.is_new_nonce]
    assert len(requests) == sum(not effect.startswith((*WRITES, "delete ")) for effect in made)


@pytest.mark.timeout(900)
@each_time
def test_killed_at_every_effect_of_an_issuance(stage: Stage, when: When) -> None:
    """A controller that dies before or after any write or request is followed by one that issues exactly once.

    Mutation: start anew instead of fetching the order in `_resume`; or sweep no challenges at the start.
    """
    crashes = []
    for number, point in enumerate(points(ISSUANCE)):
        crashed = crash(stage, point, when, f"web{number}")
        assert crashed, f"{point} did not come"
        crashes.append(crashed)
    show(crashes)


@pytest.mark.timeout(1800)
@each_time
@pytest.mark.parametrize(
    "effects",
    [
        pytest.param(("apply Secret tls",), id="written"),
        pytest.param(RENEWAL, id="all", marks=pytest.mark.soak),
    ],
)
def test_killed_at_the_effects_of_a_renewal(stage: Stage, effects: tuple[str, ...], when: When) -> None:
    """The same where there is a certificate already, which stays in its place, and Ready, until the new one is written.

    Mutation: say that it is not Ready while an issuance is under way.
    """
    crashes = []
    for number, point in enumerate(points(effects)):
        # See above: a point of the authorization may not come.
        crashed = crash(stage, point, when, f"web{number}", 2) or crash(stage, point, when, f"again{number}", 2)
        assert crashed, f"{point} did not come"
        crashes.append(crashed)
    show(crashes)


def issue_in_spite(
    stage: Stage, act: Act, given: list[Point], *, when: When = "before", times: int = 1, revision: int = 1
) -> dict[Point, list[str]]:
    """Have certificates ordered at once, one for each point, at which there is a fault; the effects of each.

    AssertionError unless every fault came, no attempt failed, and the CA issued one certificate for each, now in use.
    """
    site, ca, names = stage.site, stage.lab.acme, {f"web{number}": point for number, point in enumerate(given)}
    if revision > 1:
        issue(stage, list(names))
    earlier = {name: len(stage.effects(name)) for name in names}
    since = ca.mark()
    stage.faults.set(*(stage.fault(name, act, point, when, times) for name, point in names.items()))
    for name in names:
        stage.begin(name, revision)
    for name, point in names.items():
        status = site.ready(name, revision=revision)
        assert status["revision"] == revision, point
        assert f"{site.leaf(name).serial_number:x}" == status["serialNumber"], point
        assert {order["outcome"] for order in status["recentOrders"]} == {"Issued"}, point
        wait_for(lambda name=name: stage.struck(name), f"the fault at {point}")  # type: ignore[misc]
    assert ca.issued(since) == len(given)
    print(f"\n{act} {when} {len(given)} effects, {times} times: {ca.orders(since) - len(given)} orders abandoned")
    return {point: stage.effects(name)[earlier[name] :] for name, point in names.items()}


def goes_on(made: list[str], point: Point, times: int, effects: tuple[str, ...]) -> bool:
    """Whether the step that an undisturbed issuance takes after a write was taken after one that failed `times`."""
    last = [place for place, effect in enumerate(made) if effect == point.effect][point.number + times - 1]
    following = points(effects).index(point) + 1
    return following < len(effects) and made[last + 1 : last + 2] == [effects[following]]


@each_time
@pytest.mark.parametrize(("effects", "revision"), [(ISSUANCE, 1), (RENEWAL, 2)], ids=["first", "renewal"])
def test_every_answer_lost(stage: Stage, effects: tuple[str, ...], revision: int, when: When) -> None:
    """A write or request of which no answer comes, whether it was done or not, costs no certificate.

    A clean-up that failed is made by the sweep, which also comes at the start.

    Mutation: send finalize again after an error without looking at the order.
    """
    lost = points(effects) if revision == 1 else [Point("apply Secret tls", 0)]
    for point, made in issue_in_spite(stage, "lose", lost, when=when, revision=revision).items():
        assert made.count("newOrder") <= (2 if point in REMEMBERING else 1), point
        assert made.count("finalize") <= (2 if point.effect == "finalize" and when == "before" else 1), point
        assert not point.effect.startswith(WRITES) or not goes_on(made, point, 1, effects), point
    stage.controller.stop()
    stage.controller.start()
    stage.site.nothing_left()


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize(("effects", "revision"), [(ISSUANCE, 1), (RENEWED, 2)], ids=["first", "renewal"])
def test_every_write_refused(stage: Stage, effects: tuple[str, ...], revision: int, times: int) -> None:
    """A write refused since the object changed, and refused again where it is repeated at once, costs no certificate.

    Mutation: go on with the step after a refused write.
    """
    writes = [point for point in points(effects) if point.effect.startswith(WRITES[1:])]
    for point, made in issue_in_spite(stage, "refuse", writes, times=times, revision=revision).items():
        assert made.count("newOrder") <= (2 if point in REMEMBERING and times > 1 else 1), point
        assert made.count("finalize") == 1, point
        assert not goes_on(made, point, times, effects), point
    stage.site.nothing_left()


@each_time
def test_killed_while_an_account_is_made(stage: Stage, when: When) -> None:
    """A controller that dies at any effect of a registration is followed by one that opens that account, and no second.

    Mutation: register with a key that is not the stored one.
    """
    lab, admin, controller = stage.lab, Site(stage.lab, stage.lab.namespace), stage.controller

    def register(point: Point | None) -> list[str]:
        """Make an issuer, and kill the controller at a point, if one is given; what was done for it."""
        name = f"ca-{secrets.token_hex(3)}"
        about = (name, f"{lab.namespace}/{name}-account", lab.acme.directory)
        since, earlier = lab.acme.mark(), len(stage.faults.effects(*about))
        if point:
            stage.faults.set(Fault(about, "kill", point.number, when, only=re.escape(point.effect)))
        admin.cluster_issuer(name, wait=False)
        try:
            if point:
                wait_for(lambda: controller.ended() is not None, f"{point}: its end")
                stage.faults.set()
                controller.start()
            admin.issuer_condition("ClusterIssuer", name, "True")
        finally:
            admin.delete(f"{CERTIFICATES}/clusterissuers/{name}")
        assert lab.acme.registered(since) == 1, point
        return [effect.name for effect in stage.faults.effects(*about)[earlier:]]

    effects = tuple(register(None))
    assert {"create Secret", "newAccount", "write ClusterIssuer status"} <= set(effects)
    for point in points(effects):
        register(point)
    print(f"\nkilled {when} each of {len(effects)} effects, one account each: {', '.join(effects)}")


@each_time
def test_killed_while_an_account_changes(stage: Stage, when: When) -> None:
    """A controller that dies at any effect of telling the CA another address and another key is followed by one that
    ends both: the account is the same, the CA has the key that is stored and no other, and certificates come.

    Mutation: store the new key only when the CA has confirmed it.
    """
    lab, admin, controller = stage.lab, Site(stage.lab, stage.lab.namespace), stage.controller
    server, authority = Server(lab.acme.directory, Path(lab.acme.ca_bundle).read_bytes()), Authority(SystemClock())

    def change(point: Point | None) -> list[str]:
        """Have an account changed, and kill the controller at a point, if one is given; what was done for it."""
        name = admin.cluster_issuer(f"ca-{secrets.token_hex(3)}")
        path = f"{CERTIFICATES}/clusterissuers/{name}"
        about = (name, f"{lab.namespace}/{name}-account", lab.acme.directory)
        old, earlier = admin.secret_value(f"{name}-account", "tls.key"), len(stage.faults.effects(*about))
        uri = _account(admin, path)["uri"]

        def changed() -> bool:
            status = (admin.get(path) or {})["status"]
            return bool(status.get("rollover") == "1" and status["accounts"][0]["contact"] == "new@example.test")

        if point:
            stage.faults.set(Fault(about, "kill", point.number, when, only=re.escape(point.effect)))
        wanted = {
            "metadata": {"annotations": {"certbotk8s.io/rollover": "1"}},
            "spec": {"acme": {"email": "new@example.test"}},
        }
        admin.patch("clusterissuers.certbotk8s.io", name, wanted)
        try:
            if point:
                wait_for(lambda: controller.ended() is not None, f"{point}: its end")
                stage.faults.set()
                controller.start()
            wait_for(changed, f"{point}: the account changed")
            admin.issuer_condition("ClusterIssuer", name, "True")
            made = [effect.name for effect in stage.faults.effects(*about)[earlier:]]
            found = authority.find_account(server, admin.secret_value(f"{name}-account", "tls.key"))
            assert found, point
            assert (found.uri, found.contact) == (uri, "new@example.test"), point
            assert _account(admin, path)["uri"] == uri, point
            assert authority.find_account(server, old) is None, point
            stage.site.certificate(name, [f"{name}.{stage.suffix}"], name)
            assert stage.site.ready(name)["accountURI"] == uri, point
        finally:
            admin.delete(path)
        return made

    effects = tuple(change(None))
    assert {"update account", "keyChange", "apply Secret"} <= set(effects)
    for point in points(effects):
        change(point)
    print(f"\nkilled {when} each of {len(effects)} effects, the account usable: {', '.join(effects)}")


def _account(admin: Site, path: str) -> dict[str, Any]:
    """The one account in the status of an issuer."""
    found: Any = (admin.get(path) or {})["status"]["accounts"]
    return dict(found[0])
