"""The outside of two controllers, under a model's eye: what they do is judged at each effect, whatever befalls them.

`Outside` is a `World` with up to two leaders, each of which works on several keys at once and pauses at every call that
it yields. Around every request to the API server or the CA (a *point*) something may befall it: a crash, a lost answer,
a turn of the other leader, somebody else's write. `wanted` counts for each Certificate how many certificates may yet be
signed for it: one when it is made, one more for each event that legitimately costs one. None of them is a crash, a lost
or refused write, a stale cache, a second leader, or anything at all that happens to an order before its finalize.
"""

from __future__ import annotations

import base64
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from certbotk8s.domain import api, pem
from certbotk8s.domain.renewal import renewal_time
from tests.unit.reconciling import SHOP, Crash, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from certbotk8s.ports import Key
    from tests.fakes.ca import Leaf
    from tests.unit.reconciling import Json, Process

DAY = 86400.0
# Turns without time passing after which a leader is in a loop.
LOOP = 600
# Turns for each second that passes: what is waited for is looked at ever more seldom, and so are three Certificates.
BUSY = 1.0
# Within this everything has come to rest: the longest pause between two attempts is a day, and one may follow another.
CALM = 3 * DAY
# Orders for one Certificate from the moment at which nothing fails any more: what was under way, one more where that
# was lost, one for a wish that came in between.
ORDERS = 4


@dataclass
class Leader:
    """A process that thinks itself the leader, and its reconciles under way."""

    process: Process
    running: dict[Key, Iterator[None]] = field(default_factory=dict)
    # Its watch has lost an event.
    stale: bool = False

    @property
    def sees(self) -> bool:
        """Whether its caches show what is."""
        return not (self.stale or self.process.cluster.lagging)


@dataclass
class Armed:
    """What befalls whoever is at work, that many points from now: of all, or of those that begin like `point`."""

    point: str
    left: int
    name: str
    act: Callable[[], None]


@dataclass(frozen=True)
class Stored:
    """A next key pair that was stored, and the Certificate for which it was."""

    name: str
    uid: str


class Outside(World):
    """See above. `reached` counts what happened: over many examples it tells whether the model reaches everything."""

    def __init__(self, reached: Counter[str]) -> None:
        self.reached = reached
        self.journal: list[tuple[float, str, str]] = []
        self.leaders: dict[str, Leader] = {}
        self.active: list[str] = []
        self.armed: list[Armed] = []
        self.point = ""
        self.failed = False
        self.wanted: Counter[str] = Counter()
        self.stored: dict[str, Stored] = {}
        self.in_hand: dict[str, str] = {}
        self.certified: dict[str, list[str]] = {}
        self.ended: set[str] = set()
        self.disturbances = 0
        self.touched = False  # since the outermost turn began
        self.alone = True
        self.wrong: Callable[[Leaf], Leaf] | None = None
        super().__init__()
        self.leaders["A"] = Leader(self.process)
        self.ca.before = lambda kind, _url: self._point("before", kind)
        self.ca.after = self._after_request
        self.ca.alter = self._sign

    # --- leaders ------------------------------------------------------------------------------------------------------

    def lead(self, name: str) -> None:
        """A process thinks itself the leader from now on; one of that name has died."""
        if name in self.leaders:
            self.depose(name)
        self.leaders[name] = Leader(self.second())
        self.alone &= len(self.leaders) == 1

    def depose(self, name: str) -> None:
        """A process is no more."""
        self.leaders.pop(name).process.cluster.close()

    def turn(self, name: str, choice: int = 0) -> bool:
        """One step of a leader up to the next call that it yields; False when it has nothing to do."""
        leader = self.leaders.get(name)
        if leader is None or name in self.active:
            return False
        queue = leader.process.queue
        keys = [*leader.running, *(key for key in queue.waiting() if key not in leader.running)]
        if not keys:
            return False
        key = keys[choice % len(keys)]
        if not self.active:
            self.touched = False
        with self._at_work(name):
            try:
                if key not in leader.running:
                    del queue.ready[key]
                    leader.running[key] = leader.process.turns(key)
                next(leader.running[key])
            except StopIteration:
                del leader.running[key]
            except Crash:
                self.note("crash", name)
                self.lead(name)
        return True

    @contextmanager
    def _at_work(self, name: str) -> Iterator[None]:
        self.active.append(name)
        try:
            yield
        finally:
            self.active.pop()

    def live_for(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """Let all leaders work, and time pass from one due key to the next, or until something is so."""
        begin, turns, total = self.clock.monotonic(), 0, 0
        end = begin + seconds
        while True:
            moved = False
            for name in list(self.leaders):
                while self.turn(name):
                    moved, turns, total = True, turns + 1, total + 1
                    self.claim(turns < LOOP, f"{name} comes back again and again")
                    lived = self.clock.monotonic() - begin
                    self.claim(total < 2 * LOOP + BUSY * lived, f"{name} is busy: {total} turns in {lived:.0f} s")
                    if turns == LOOP // 2 and len(self.leaders) == 2:
                        # Two that contradict each other go on for as long as both think that they lead.
                        self.note("its Lease is lost", name)
                        self.depose(name)
                        break
            if moved:
                continue
            for leader in self.leaders.values():
                self._catch_up(leader)
            self.collect_garbage()
            if any(leader.process.queue.ready for leader in self.leaders.values()):
                continue
            due = min(leader.process.queue.next_due() for leader in self.leaders.values())
            if due > end or until():
                break
            passed = due - self.clock.monotonic()
            self.clock.advance(passed + 1e-6)
            if passed > 0.01:
                turns = 0
        if not until():
            self.clock.advance(max(0.0, end - self.clock.monotonic()))

    def _catch_up(self, leader: Leader) -> None:
        """What a watch has lost is found when it breaks: then everything is listed anew."""
        if leader.stale:
            leader.process.cluster.relist()
            leader.stale = False
        leader.process.cluster.catch_up()

    # --- points -------------------------------------------------------------------------------------------------------

    def note(self, what: str, who: str = "") -> None:
        """Something happened."""
        self.reached[what] += 1
        self.journal.append((self.clock.monotonic(), who, what))

    def arm(self, points: int, name: str, act: Callable[[], None], *, point: str = "") -> None:
        """Let something befall whoever is at work, that many points from now."""
        self.armed.append(Armed(point, points, name, act))

    def do(self, name: str, act: Callable[[], None]) -> None:
        """Let something happen now."""
        self.note(name, self.active[-1] if self.active else "")
        self.disturbances += 1
        self.touched = True
        act()

    def _before(self, verb: str, kind: str, namespace: str, name: str) -> None:
        self._point("before", f"{verb} {kind} {namespace}/{name}")

    def _after(self, verb: str, kind: str, namespace: str, name: str) -> None:
        if verb == "get":
            self._take_in_hand(namespace, name)
        else:
            if kind == "Secret":
                self._judge_secret(verb, namespace, name)
            elif kind == "Certificate/status":
                self._judge_status(name, namespace)
        self._point("after", f"{verb} {kind} {namespace}/{name}")

    def _take_in_hand(self, namespace: str, name: str) -> None:
        """Whoever reads a next key is about to finalize with it."""
        secret = self.api.get(pem.SECRET_FACTS, namespace, name) if name.endswith("-next-key") else None
        stored = self.stored.get(secret.public_key_hash) if secret else None
        if secret and stored:
            self.in_hand[stored.name] = secret.public_key_hash

    def _after_request(self, kind: str, _url: str) -> None:
        self._point("after", kind)

    def _point(self, when: str, what: str) -> None:
        who = self.active[-1] if self.active else ""
        self.point = f"{when} {what}"
        self.journal.append((self.clock.monotonic(), who, self.point))
        for armed in self.armed:
            armed.left -= self.point.startswith(armed.point)
        while due := next((armed for armed in self.armed if armed.left < 0), None):
            self.armed.remove(due)
            self.do(due.name, due.act)

    # --- what is judged -----------------------------------------------------------------------------------------------

    def claim(self, so: bool, what: str) -> None:
        """An invariant; the story is told where it does not hold."""
        if not so:
            self.failed = True
            story = "\n".join(f"{time:12.1f} {who or '-'} {text}" for time, who, text in self.journal[-150:])
            raise AssertionError(f"{what}\n{story}")

    def _sign(self, leaf: Leaf) -> Leaf:
        """A certificate is signed: for a key that was stored before, once, and because it was wanted."""
        key = pem.public_key_hash(leaf.public_key)
        stored = self.stored.get(key)
        self.claim(stored is not None, "a certificate is signed for a key that no Secret held")
        assert stored
        name, before = stored.name, self.certified.get(key, [])
        self._renewal_is_due(name)
        self.wanted[name] -= 1
        self.note(f"signed for {name}", self.active[-1])
        self.claim(self.wanted[name] >= 0, f"one more certificate is signed for {name} than was wanted")
        if before:
            self.claim(False, f"a second certificate is signed for one key of {name}")
        self.certified.setdefault(key, []).append(name)
        if self.wrong:
            leaf, self.wrong = self.wrong(leaf), None
            self.wanted[name] += 1
        return leaf

    def _renewal_is_due(self, name: str) -> None:
        """A certificate whose renewal is due, or that has expired, may be replaced once."""
        certificate = self.api.get(api.CERTIFICATE, SHOP, name)
        secret = certificate and self.api.get(pem.SECRET_FACTS, SHOP, certificate.spec.secret_name)
        facts = secret.certificate if secret else None
        if certificate is None or facts is None or facts.serial_number in self.ended:
            return
        if renewal_time(certificate.spec, facts) <= self.clock.now():
            self.ended.add(facts.serial_number)
            self.wanted[name] += 1

    def outstanding(self, name: str) -> list[str]:
        """The key for which a certificate was, or is about to be, signed that is not in the Certificate's Secret."""
        certificate = self.api.get(api.CERTIFICATE, SHOP, name)
        facts = certificate and self.api.get(pem.SECRET_FACTS, SHOP, certificate.spec.secret_name)
        installed = facts.public_key_hash if facts else ""
        keys = [key for key, names in self.certified.items() if name in names][-1:]
        return [key for key in {*keys, self.in_hand.get(name, "")} if key not in {installed, ""}]

    def excuse(self, name: str) -> None:
        """One more certificate may be signed for it."""
        self.wanted[name] += 1

    def excuse_lost(self, *names: str) -> None:
        """What was signed and not yet installed may be lost, so that it may be ordered again."""
        for name in names or tuple(self.wanted):
            self.wanted[name] += bool(self.outstanding(name))

    def _judge_secret(self, verb: str, namespace: str, name: str) -> None:
        """A write of ours to a Secret: nobody else's is touched, and what serves is replaced only by what does."""
        change = self.api.log[-1]
        if not self._is_secret(change.obj, namespace, name):
            return  # nothing has changed
        labels = change.obj["metadata"].get("labels", {})
        if name.endswith("-next-key"):
            if verb == "create":
                secret = self.api.get(pem.SECRET_FACTS, namespace, name)
                assert secret
                marks = secret.metadata.annotations
                owner = Stored(marks[api.ANNOTATION_CERTIFICATE], marks[api.ANNOTATION_CERTIFICATE_UID])
                self.stored[secret.public_key_hash] = owner
            return
        if verb == "delete" or labels.get(api.LABEL_ROLE) != api.ROLE_TLS:
            self.claim("account" in name, f"Secret {name} is none to {verb}")
            return
        before = [each.obj for each in self.api.log[:-1] if self._is_secret(each.obj, namespace, name)]
        live = before[-1] if before and not self._gone(namespace, name, change.version) else None
        made_for = change.obj["metadata"]["annotations"][api.ANNOTATION_CERTIFICATE]
        if live:
            self._check_owner(live, name, made_for)
            if live.get("data", {}) == change.obj.get("data", {}):
                return  # taken over as it is
        certificate = self.api.get(api.CERTIFICATE, namespace, made_for)
        self.claim(_pair(_data(change.obj)) is not None, f"Secret {name} is written with a key that is not its own")
        if certificate and live and not self.touched and self.fits(certificate, live):
            self.claim(self.fits(certificate, change.obj), f"what served in Secret {name} is replaced by what does not")
        self.note("installed", self.active[-1])

    def _is_secret(self, obj: Json, namespace: str, name: str) -> bool:
        meta = obj["metadata"]
        return obj["kind"] == "Secret" and (meta.get("namespace"), meta["name"]) == (namespace, name)

    def _gone(self, namespace: str, name: str, version: int) -> bool:
        """Whether the last thing that happened to a Secret before that version was its deletion."""
        for change in reversed(self.api.log[: version - 1]):
            if self._is_secret(change.obj, namespace, name):
                return change.gone
        return True

    def _check_owner(self, live: Json, name: str, made_for: str) -> None:
        owner = live["metadata"].get("annotations", {}).get(api.ANNOTATION_CERTIFICATE)
        if self.leaders[self.active[-1]].sees and not self.touched and owner not in {None, made_for}:
            other = self.api.get(api.CERTIFICATE, SHOP, owner)
            self.claim(other is None or other.spec.secret_name != name, f"Secret {name} of {owner} is written")
        self.claim(bool(owner), f"Secret {name} of somebody else is written")

    def _judge_status(self, name: str, namespace: str) -> None:
        """Ready tells the truth about some version of the Secret, and stays True while the certificate serves.

        And one leader that alone writes statuses has one order at a time under way for the same names.
        """
        certificate = self.get(name, namespace)
        if certificate.status.issuance and self.alone:
            same = certificate.status.issuance.order_set
            under_way = [each.metadata.name for each in self._ordering(same)]
            self.claim(len(under_way) == 1, f"{under_way} are ordering the same names")
        obj = self.raw(api.CERTIFICATE, name, namespace)
        ready = next((each for each in obj["status"]["conditions"] if each["type"] == "Ready"), None)
        if ready is None or ready.get("observedGeneration") != obj["metadata"]["generation"]:
            return
        secrets = [
            change.obj
            for change in reversed(self.api.log)
            if self._is_secret(change.obj, namespace, certificate.spec.secret_name)
        ]
        if ready["status"] == "True":
            so = any(self.fits(certificate, secret) for secret in secrets)
            self.claim(so, f"{name} is Ready with a Secret that never held a certificate for it")
            return
        leader = self.leaders[self.active[-1]]
        if self.touched or not leader.sees or not secrets:
            return
        live = self.api.get(api.SECRET, namespace, certificate.spec.secret_name)
        marks = secrets[0]["metadata"].get("annotations", {})
        labels = secrets[0]["metadata"].get("labels", {})
        ours = marks.get(api.ANNOTATION_CERTIFICATE_UID) == certificate.metadata.uid
        named = marks.get(api.ANNOTATION_CERTIFICATE) == name and labels.get(api.LABEL_ROLE) == api.ROLE_TLS
        if live and ours and named:
            self.claim(not self.fits(certificate, secrets[0]), f"{name} is not Ready although its certificate serves")

    def fits(self, certificate: api.Certificate, secret: Json) -> bool:
        """Whether a Secret holds a valid pair for the names and the kind of key that a Certificate asks for."""
        pair = _pair(_data(secret))
        if pair is None:
            return False
        names, not_after, key = pair
        spec = certificate.spec
        encoding = "PKCS8" if b"BEGIN PRIVATE KEY" in key else "PKCS1"
        wanted = (frozenset(spec.dns_names), spec.private_key.encoding)
        return (names, encoding) == wanted and not_after > self.clock.now()

    def _ordering(self, same: str) -> list[api.Certificate]:
        """The Certificates that remember an order for the same names at the same account."""
        found = self.api.all(api.CERTIFICATE)
        return [each for each in found if each.status.issuance and each.status.issuance.order_set == same]

    # --- when nothing fails any more ----------------------------------------------------------------------------------

    def rests(self, name: str) -> bool:
        """Whether a Certificate is where it should be when nothing fails."""
        certificate = self.get(name)
        ready = api.find_condition(certificate.status.conditions, "Ready")
        if certificate.status.issuance or ready is None:
            return False
        owner = self._owner(certificate)
        if owner != name:
            return ready.reason == "SecretConflict" and ready.status == "False"
        wish = certificate.metadata.annotations.get(api.ANNOTATION_RENEW_NOW, "")
        current = ready.status == "True" and ready.observed_generation == certificate.metadata.generation
        due = certificate.status.renewal_time
        return current and wish == certificate.status.renew_now and due is not None and due > self.clock.now()

    def _owner(self, certificate: api.Certificate) -> str:
        """Which of the Certificates that name one Secret is to have it."""
        name = certificate.spec.secret_name
        rivals = [each for each in self.api.all(api.CERTIFICATE) if each.spec.secret_name == name]
        if len(rivals) == 1:
            return rivals[0].metadata.name
        secret = self.api.get(api.SECRET, SHOP, certificate.spec.secret_name)
        owner = secret.metadata.annotations.get(api.ANNOTATION_CERTIFICATE, "") if secret else ""
        return owner if owner in {each.metadata.name for each in rivals} else certificate.metadata.name

    def come_to_rest(self) -> None:
        """Nothing fails, caches catch up, time passes: then everything is Ready, and nothing is left or goes on."""
        for leader in self.leaders.values():
            leader.process.cluster.lagging = False
            self._catch_up(leader)
        names = [each.metadata.name for each in self.api.all(api.CERTIFICATE)]
        before = self.counts().get("newOrder", 0)
        # What is due by a timer is found by the sweep, too.
        for leader in self.leaders.values():
            leader.process.certificates.sweep_due()
        self.live_for(CALM, until=lambda: all(self.rests(each.metadata.name) for each in self.api.all(api.CERTIFICATE)))
        for name in names:
            said = self.status(name).conditions
            self.claim(self.rests(name), f"{name} has not come to rest: {said}, {self.status(name).issuance}")
        self.live_for(30)
        for name, leader in self.leaders.items():
            with self._at_work(name):
                leader.process.certificates.sweep_challenges()
        self.live_for(1)
        orders = self.counts().get("newOrder", 0) - before
        # One more for what was under way for a Certificate that is gone.
        most = ORDERS * (len(names) + 1) * len(self.leaders)
        self.claim(orders <= most, f"{orders} orders although nothing fails")
        # The key of an attempt that began before another Certificate took the Secret is kept for when that ends.
        held = {name for name in names if self._owner(self.get(name)) != name}
        keys = [each for each in self.next_keys() if each.metadata.annotations[api.ANNOTATION_CERTIFICATE] not in held]
        for kind, left in (("next key", keys), ("challenge", self.presented())):
            self.claim(not left, f"a {kind} is left behind: {[each.key for each in left]}")
        for name in names:
            certificate = self.get(name)
            secret = self.raw(api.SECRET, certificate.spec.secret_name) if self._owner(certificate) == name else None
            if secret:
                ready = self.condition("Ready", name).status == "True"
                self.claim(ready == self.fits(certificate, secret), f"Ready of {name} does not tell the truth")
                self.wanted[name] = 0
            else:
                self.wanted[name] = max(self.wanted[name], 1)
        abandoned = len(self.ca.unfinalized())
        self.claim(abandoned <= self.disturbances, f"{abandoned} orders abandoned by {self.disturbances} disturbances")
        requests = len(self.ca.requests)
        self.live_for(2000)
        self.claim(len(self.ca.requests) == requests, "the CA is asked although everything rests")


def _data(secret: Json) -> tuple[str, str]:
    data = secret.get("data", {})
    return data.get("tls.crt", ""), data.get("tls.key", "")


@lru_cache(maxsize=4096)
def _pair(data: tuple[str, str]) -> tuple[frozenset[str], datetime, bytes] | None:
    """(names, end of validity, key) of a matching pair; None for anything else."""
    try:
        leaf = x509.load_pem_x509_certificates(base64.b64decode(data[0]))[0]
        key = base64.b64decode(data[1])
        if leaf.public_key() != load_pem_private_key(key, None).public_key():
            return None
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, IndexError):
        return None
    return frozenset(names.get_values_for_type(x509.DNSName)), leaf.not_valid_after_utc, key
