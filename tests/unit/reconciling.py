"""The reconcilers on an API server, a CA and a clock in memory, driven one effect at a time.

`World` is what outlives a crash: the API server's objects, the CA, the clock. `World.start` gives a `Process`: caches,
reconcilers and queue of one controller, woken as `main` wakes them. Calls that a reconcile yields are made at once.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from certbotk8s.ca.keys import Keys
from certbotk8s.domain import api, pem
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError
from certbotk8s.main import Controller
from certbotk8s.ports import Key
from certbotk8s.reconcile.accounts import Accounts
from certbotk8s.reconcile.certificate import CertificateReconciler
from certbotk8s.reconcile.indexes import CERTIFICATE_INDEXES, INGRESS_INDEXES, SECRET_INDEXES
from certbotk8s.reconcile.ingress import IngressReconciler
from certbotk8s.reconcile.issuer import IssuerReconciler
from tests.fakes.ca import FakeAuthority, FakeCA
from tests.fakes.clock import FakeClock
from tests.fakes.cluster import ApiServer, FakeCluster
from tests.fakes.solver import FakeSolver

if TYPE_CHECKING:
    from certbotk8s.domain.reasons import Reason
    from certbotk8s.ports import Steps

R = TypeVar("R", bound=api.Resource)
Json = dict[str, Any]

HOME = "certbotk8s"
SHOP = "shop"
NAME = "shop.example.test"
ECDSA: Json = {"algorithm": "ECDSA", "encoding": "PKCS8"}
SOLVERS: list[Json] = [{"http01": {"ingress": {"ingressClassName": "traefik"}}}]
# A key that comes back more often than this without time passing is in a loop.
TURNS = 400


class Crash(BaseException):
    """The process dies here."""


class Queue:
    """Keys to work on, and when others are due; what `controller.workqueue` is to the workers."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.ready: dict[Key, None] = {}
        self.due: dict[Key, float] = {}

    def add(self, key: Key) -> None:
        """Want a look at `key`."""
        self.ready[key] = None

    def add_after(self, key: Key, seconds: float) -> None:
        """Want one later; the earliest wish holds."""
        self.due[key] = min(self.due.get(key, float("inf")), self._clock.monotonic() + seconds)

    def next_due(self) -> float:
        """When the next key is due; infinite for never."""
        return min(self.due.values(), default=float("inf"))

    def waiting(self) -> list[Key]:
        """The keys that are ready to be worked on."""
        for key, due in sorted(self.due.items(), key=lambda item: item[1]):
            if due <= self._clock.monotonic():
                del self.due[key]
                self.ready[key] = None
        return list(self.ready)

    def pop(self) -> Key | None:
        """The next key, if there is one now."""
        first = next(iter(self.waiting()), None)
        if first is not None:
            del self.ready[first]
        return first


class Process(Controller):
    """One controller, wired as `main` wires it, without threads; what wakes a key is main's own code."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.queue = Queue(world.clock)
        self._queue = self.queue  # type: ignore[assignment]
        enqueue = self.queue.add
        self.cluster = FakeCluster(world.api)
        self.failures: dict[Key, int] = {}
        self._certificates = self.cluster.watch(
            api.CERTIFICATE,
            indexes=CERTIFICATE_INDEXES,
            on_change=self._certificate_changed,
        )
        self.cluster.watch(
            pem.SECRET_FACTS,
            label_selector=f"{api.LABEL_ROLE} in ({api.ROLE_TLS},{api.ROLE_NEXT_KEY})",
            indexes=SECRET_INDEXES,
            on_change=self._secret_changed,
        )
        for kind in api.ISSUER_KINDS.values():
            self.cluster.watch(kind, on_change=self._issuer_changed(kind.kind))
        self._ingresses = self.cluster.watch(api.INGRESS, indexes=INGRESS_INDEXES, on_change=self._ingress_changed)
        self.cluster.watch(api.INGRESS_CLASS)
        self.cluster.watch(api.NAMESPACE, on_change=self._namespace_changed)
        self.accounts, self.solver = Accounts(), FakeSolver(self.cluster, HOME)
        keys = Keys()
        self.certificates = CertificateReconciler(
            cluster=self.cluster,
            clock=world.clock,
            key_maker=keys,
            solvers={"http01-ingress": self.solver},
            accounts=self.accounts,
            enqueue=enqueue,
        )
        self.issuers = IssuerReconciler(
            cluster=self.cluster,
            clock=world.clock,
            authority=world.authority,
            key_maker=keys,
            accounts=self.accounts,
            namespace=HOME,
            enqueue=enqueue,
        )
        self.reconcilers: dict[str, Callable[[Key], Steps]] = {
            "Certificate": self.certificates,
            "Issuer": self.issuers,
            "ClusterIssuer": self.issuers,
            "Ingress": IngressReconciler(self.cluster),
        }

    def work(self, key: Key) -> None:
        """One reconcile, as a worker drives it."""
        for _ in self.turns(key):
            pass

    def turns(self, key: Key) -> Iterator[None]:
        """One reconcile that pauses before each call that it yields, so that others may come in between."""
        steps = self.reconcilers[key.kind](key)
        try:
            call = next(steps)
            while True:
                yield
                try:
                    answer = call.function()
                except Exception as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as end:
            self.failures.pop(key, None)
            if end.value is not None:
                self.queue.add_after(key, end.value.total_seconds())
        except (TemporaryError, PermanentError) as error:
            failures = self.failures[key] = self.failures.get(key, 0) + 1
            after = error.retry_after if isinstance(error, TemporaryError) else None
            self.queue.add_after(key, after.total_seconds() if after else min(0.005 * 2.0**failures, 1000.0))

    def settle(self, horizon: float = 120.0) -> None:
        """Work until nothing is due within `horizon` seconds of now; the clock moves from due time to due time."""
        clock = self._world.clock
        end, turns = clock.monotonic() + horizon, 0
        while True:
            key = self.queue.pop()
            if key is not None:
                turns += 1
                assert turns < TURNS, f"{key} comes back again and again; the CA was asked {self._world.counts()}"
                self.work(key)
                continue
            self.cluster.catch_up()
            self._world.collect_garbage()
            if self.queue.ready:
                continue
            due = self.queue.next_due()
            if due > end:
                return
            # Rounded up as a wait is: a time is never looked at too early.
            clock.advance(due - clock.monotonic() + 1e-6)
            if clock.monotonic() > due + 0.01:
                turns = 0

    def sweep(self) -> None:
        """What the timer does, and all that comes of it."""
        self.certificates.sweep_due()
        self.certificates.sweep_challenges()
        self.settle()


class Effects:
    """Everything that the controller does to the outside: writes, and requests to the CA. At a chosen one, `act`.

    `seen` are the effects so far; `happened` is the one at which it was, "" while it was not reached.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.happened = ""
        self._number = -1
        self._when = ""
        self._act: Callable[[], None] | None = None

    def at(self, number: int, when: str, act: Callable[[], None]) -> None:
        """Call `act` "before" or "after" the effect of that number, counted from now; what it raises comes out."""
        self._number, self._when, self._act, self.happened = len(self.seen) + number, when, act, ""

    def no_more(self) -> None:
        """What was not reached is not to be."""
        self._act = None

    def before(self, what: str) -> None:
        """It is about to be done."""
        self.seen.append(what)
        self._look("before")

    def after(self) -> None:
        """It is done, and the answer is under way."""
        self._look("after")

    def _look(self, when: str) -> None:
        if self._act and when == self._when and len(self.seen) - 1 == self._number:
            act, self._act, self.happened = self._act, None, f"{when} {self._number}: {self.seen[-1]}"
            act()


class World:
    """All that is outside of a controller, and the controller that runs there now."""

    def __init__(self, *, solvers: list[Json] | None = None) -> None:
        self.clock = FakeClock()
        self.api = ApiServer(self.clock.now)
        self.ca = FakeCA(self.clock)
        self.authority = FakeAuthority.of(self.ca)
        self.solvers = SOLVERS if solvers is None else solvers
        self.broken_pairs: list[str] = []
        self.effects = Effects()
        self.ca.before = lambda kind, _url: self.effects.before(kind)
        self.ca.after = lambda _kind, _url: self.effects.after()
        self.process = self.start()

    # --- the controller -----------------------------------------------------------------------------------------------

    def start(self) -> Process:
        """A controller from nothing but what is stored; whichever ran before is dead."""
        self.api.watchers.clear()
        self.process = self.second()
        return self.process

    def second(self) -> Process:
        """One more controller that thinks itself the leader."""
        process = Process(self)
        process.cluster.before = self._before
        process.cluster.after = self._after
        return process

    def _before(self, verb: str, kind: str, namespace: str, name: str) -> None:
        if verb != "get":
            self.effects.before(f"{verb} {kind} {namespace}/{name}")

    def _after(self, verb: str, kind: str, namespace: str, name: str) -> None:
        if kind == "Secret" and verb in {"create", "apply"}:
            self._check_pair(namespace, name)
        if verb != "get":
            self.effects.after()

    @property
    def cluster(self) -> FakeCluster:
        """The controller's connection to the API server."""
        return self.process.cluster

    def settle(self, horizon: float = 120.0) -> None:
        """Let the controller work."""
        self.process.settle(horizon)

    def live(self, seconds: float) -> None:
        """Let the controller work, and that much time pass."""
        end = self.clock.monotonic() + seconds
        self.process.settle(seconds)
        self.clock.advance(max(0.0, end - self.clock.monotonic()))

    def ready(self, *, names: tuple[str, ...] = (NAME,), **spec: Any) -> World:
        """With an Issuer `ca` and a Ready Certificate shop/web-tls."""
        self.issuer()
        self.certificate(names=names, **spec)
        self.settle()
        assert self.condition("Ready").status == "True", self.condition("Ready")
        return self

    # --- objects ------------------------------------------------------------------------------------------------------

    def issuer(
        self,
        name: str = "ca",
        *,
        kind: str = "Issuer",
        namespace: str = SHOP,
        rules: list[Json] | None = None,
        **acme: Any,
    ) -> api.Issuer:
        """Make or replace an Issuer; `acme` are members of spec.acme, `rules` those of a ClusterIssuer's policy."""
        metadata: Json = {"name": name} if kind == "ClusterIssuer" else {"name": name, "namespace": namespace}
        spec = {
            "server": self.ca.url,
            "privateKeySecretRef": {"name": f"{name}-account"},
            "solvers": self.solvers,
            **acme,
        }
        policy = {} if rules is None else {"policy": {"rules": rules}}
        return self._put(api.ISSUER_KINDS[kind], metadata, {"acme": spec, **policy})

    def certificate(
        self,
        name: str = "web-tls",
        *,
        names: tuple[str, ...] = (NAME,),
        namespace: str = SHOP,
        annotations: dict[str, str] | None = None,
        **spec: Any,
    ) -> api.Certificate:
        """Make or replace a Certificate; its status stays."""
        metadata: Json = {"name": name, "namespace": namespace, "annotations": annotations or {}}
        wanted = {
            "secretName": name,
            "issuerRef": {"name": "ca"},
            "dnsNames": list(names),
            "privateKey": ECDSA,
            **spec,
        }
        return self._put(api.CERTIFICATE, metadata, wanted)

    def ingress(self, tls: list[Json], *, name: str = "web", **annotations: str) -> api.Ingress:
        """Make or replace an Ingress; annotations without their prefix and with _ for -."""
        marks = {f"{api.GROUP}/{key.replace('_', '-')}": value for key, value in annotations.items()}
        metadata = {"name": name, "namespace": SHOP, "annotations": marks}
        return self._put(api.INGRESS, metadata, {"tls": tls, "rules": []})

    def secret(
        self,
        name: str,
        data: dict[str, bytes],
        *,
        namespace: str = SHOP,
        type: str = "Opaque",
        **metadata: Any,
    ) -> api.Secret:
        """Make or replace a Secret, as somebody else does."""
        encoded = {member: base64.b64encode(value).decode() for member, value in data.items()}
        manifest = {"metadata": {"name": name, "namespace": namespace, **metadata}, "type": type, "data": encoded}
        return self.api.put(api.SECRET, manifest)

    def _put(self, kind: api.Kind[R], metadata: Json, spec: Json) -> R:
        there = self.api.get(kind, metadata.get("namespace", ""), metadata["name"])
        if there is not None:
            raw = self.raw(kind, metadata["name"], metadata.get("namespace", ""))
            return self.api.put(kind, {**raw, "metadata": {**raw["metadata"], **metadata}, "spec": spec})
        return self.api.put(kind, {"metadata": metadata, "spec": spec})

    def raw(self, kind: api.Kind[Any], name: str, namespace: str = SHOP) -> Json:
        """An object as JSON values, to be changed and put back."""
        found = self.api.get(kind, namespace, name)
        assert found is not None, f"{kind.kind} {namespace}/{name} is not there"
        plain: Json = msgspec.json.decode(msgspec.json.encode(found))
        return plain

    def set_status(self, name: str = "web-tls", **changes: Any) -> None:
        """Somebody writes into a Certificate's status in our field manager's name; issuance=None removes it."""
        raw = self.raw(api.CERTIFICATE, name)
        status = {**raw.get("status", {}), **changes}
        raw["status"] = {key: value for key, value in status.items() if value is not None}
        raw["metadata"] = {"name": name, "namespace": SHOP}
        self.api.apply(api.CERTIFICATE, raw, subresource="status")

    def annotate(self, name: str = "web-tls", **annotations: str) -> None:
        """Annotate a Certificate; annotations without their prefix and with _ for -."""
        raw = self.raw(api.CERTIFICATE, name)
        marks = {f"{api.GROUP}/{key.replace('_', '-')}": value for key, value in annotations.items()}
        raw["metadata"]["annotations"] = {**raw["metadata"].get("annotations", {}), **marks}
        self.api.put(api.CERTIFICATE, raw)

    def delete(self, kind: api.Kind[Any], name: str, namespace: str = SHOP) -> None:
        """Somebody deletes an object; the garbage collector comes at the next settle."""
        self.api.delete(kind, namespace, name)

    def collect_garbage(self) -> None:
        """What kube-controller-manager does: an object whose owners are all gone goes."""
        kinds: tuple[api.Kind[Any], ...] = (api.CERTIFICATE, api.SECRET, api.INGRESS)
        alive = {each.metadata.uid for kind in kinds for each in self.api.all(kind)}
        for kind in kinds:
            for each in self.api.all(kind):
                owners = each.metadata.owner_references
                if owners and not any(owner.uid in alive for owner in owners):
                    self.api.delete(kind, each.metadata.namespace, each.metadata.name)

    # --- what came of it ----------------------------------------------------------------------------------------------

    def get(self, name: str = "web-tls", namespace: str = SHOP) -> api.Certificate:
        """A Certificate as it is stored."""
        found = self.api.get(api.CERTIFICATE, namespace, name)
        assert found is not None
        return found

    def status(self, name: str = "web-tls", namespace: str = SHOP) -> api.CertificateStatus:
        """Its status."""
        return self.get(name, namespace).status

    def issuance(self, name: str = "web-tls") -> api.Issuance:
        """Its issuance under way."""
        issuance = self.status(name).issuance
        assert issuance is not None
        return issuance

    def condition(self, kind: str, name: str = "web-tls", namespace: str = SHOP) -> api.Condition:
        """A condition of a Certificate."""
        found = api.find_condition(self.status(name, namespace).conditions, kind)
        assert found is not None, f"there is no condition {kind}"
        return found

    def issuer_condition(self, name: str = "ca") -> api.Condition:
        """The Ready condition of an Issuer."""
        issuer = self.api.get(api.ISSUER, SHOP, name)
        assert issuer is not None
        found = api.find_condition(issuer.status.conditions, "Ready")
        assert found is not None
        return found

    def tls(self, name: str = "web-tls", namespace: str = SHOP) -> x509.Certificate:
        """The certificate in a tls Secret."""
        secret = self.api.get(api.SECRET, namespace, name)
        assert secret is not None, f"there is no Secret {namespace}/{name}"
        return x509.load_pem_x509_certificates(base64.b64decode(secret.data["tls.crt"]))[0]

    def key(self, name: str = "web-tls") -> bytes:
        """The private key in a tls Secret."""
        secret = self.api.get(api.SECRET, SHOP, name)
        assert secret is not None
        return base64.b64decode(secret.data["tls.key"])

    def next_keys(self) -> list[api.Secret]:
        """The next-key Secrets that are there."""
        return [each for each in self.api.all(api.SECRET) if each.metadata.labels.get(api.LABEL_ROLE) == "next-key"]

    def presented(self) -> list[api.Ingress]:
        """The challenges that are presented."""
        return [each for each in self.api.all(api.INGRESS) if each.metadata.labels.get(api.LABEL_ROLE) == "challenge"]

    def counts(self) -> dict[str, int]:
        """The CA's requests by kind."""
        return dict(self.ca.counts())

    def reasons(self, name: str = "web-tls") -> list[Reason]:
        """The reasons of the Events about an object, in order."""
        return [event.reason for event in self.cluster.events if event.about.name == name]

    def nothing_left(self) -> None:
        """No issuance under way, no next key, no challenge, and no Secret was ever seen with a key of another."""
        assert self.broken_pairs == []
        assert [each.key for each in self.next_keys()] == []
        assert [each.key for each in self.presented()] == []
        assert [each.key for each in self.api.all(api.CERTIFICATE) if each.status.issuance] == []

    def _check_pair(self, namespace: str, name: str) -> None:
        """A tls Secret is a matching pair whenever a controller has written it; one taken over is as it was."""
        versions = [
            change.obj
            for change in self.api.log
            if change.collection == "/secrets"
            and (change.obj["metadata"].get("namespace"), change.obj["metadata"]["name"]) == (namespace, name)
        ]
        data = versions[-1].get("data", {})
        ours = versions[-1]["metadata"].get("labels", {}).get(api.LABEL_ROLE) == api.ROLE_TLS
        if not ours or (versions[1:] and versions[-2].get("data", {}) == data):
            return
        try:
            leaf = x509.load_pem_x509_certificates(base64.b64decode(data["tls.crt"]))[0]
            key = load_pem_private_key(base64.b64decode(data["tls.key"]), None)
            matches = leaf.public_key() == key.public_key()
        except (KeyError, ValueError):
            matches = False
        if not matches:
            self.broken_pairs.append(f"{namespace}/{name}")


def at(world: World, moment: timedelta) -> datetime:
    """That long from now, as status gives times."""
    return (world.clock.now() + moment).replace(microsecond=0)


def at_every_effect(
    begin: Callable[[], World], when: str, act: Callable[[World], None], *, only: str = ""
) -> Iterator[tuple[World, str]]:
    """Settled worlds, one for each effect of the controller, at which `act` was; a crash is followed by a new start.

    `begin` gives a world in which the controller is about to work. `only` chooses effects by a part of their name.
    """
    for number in itertools.count():
        world = begin()
        world.effects.at(number, when, partial(_act, world, act, only))
        try:
            world.settle()
        except Crash:
            world.start()
            world.settle()
        if not world.effects.happened:
            assert number, "the controller did nothing"
            return
        world.process.sweep()
        yield world, world.effects.happened


def _act(world: World, act: Callable[[World], None], only: str) -> None:
    if only in world.effects.seen[-1]:
        act(world)


def crash(_world: World) -> None:
    """The process dies."""
    raise Crash


def refuse(_world: World) -> None:
    """The API server refuses a write, since the object changed."""
    raise Conflict("changed since it was read")


def lose(_world: World) -> None:
    """No answer comes."""
    raise TemporaryError("the connection was cut")
