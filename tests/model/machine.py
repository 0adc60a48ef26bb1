"""What may happen to a controller, as a table, and the rules by which hypothesis lets it happen."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from certbotk8s.domain import api
from certbotk8s.domain.errors import Conflict, Problem, TemporaryError
from certbotk8s.domain.problems import judge
from certbotk8s.reconcile.indexes import certificate_key
from certbotk8s.reconcile.secrets import next_key_name
from tests.fakes.ca import Leaf, sign_leaf
from tests.model.outside import DAY, Leader, Outside
from tests.unit.reconciling import ECDSA, NAME, SHOP, Crash

if TYPE_CHECKING:
    from collections.abc import Callable

WEB, LATE = "web-tls", "late"
NAMES = ((NAME,), ("other.example.test",), (NAME, "www.example.test"))
ENCODINGS = ("PKCS8", "PKCS1")
REQUESTS = ("newOrder", "order", "authorization", "answer", "finalize", "certificate", "deactivate")

ACTS: dict[str, Callable[[Machine], None]] = {}


def act(function: Callable[[Machine], None]) -> Callable[[Machine], None]:
    """Into the table, under the function's name with blanks."""
    ACTS[function.__name__.replace("_", " ")] = function
    return function


# --- what befalls a process -------------------------------------------------------------------------------------------


@act
def it_crashes(model: Machine) -> None:
    if model.outside.active:
        raise Crash
    model.outside.lead("A")


@act
def the_answer_is_lost(model: Machine) -> None:
    if model.outside.active:
        raise TemporaryError("the connection was cut")


@act
def the_write_is_refused(model: Machine) -> None:
    if model.outside.active and model.outside.point.startswith(("before apply", "before create")):
        raise Conflict("changed since it was read")


@act
def its_caches_lag(model: Machine) -> None:
    model.leader().process.cluster.lagging = True


@act
def its_caches_catch_up_a_little(model: Machine) -> None:
    model.leader().process.cluster.catch_up(2)


@act
def its_caches_catch_up(model: Machine) -> None:
    cluster = model.leader().process.cluster
    cluster.lagging = False
    cluster.catch_up()


@act
def its_watch_loses_an_event(model: Machine) -> None:
    leader = model.leader()
    leader.stale = True
    leader.process.cluster.skip()


@act
def it_is_woken_for_nothing(model: Machine) -> None:
    for certificate in model.outside.api.all(api.CERTIFICATE):
        model.leader().process.queue.add(certificate_key(certificate))


@act
def its_timers_are_lost(model: Machine) -> None:
    """The sweep is to find them."""
    model.leader().process.queue.due.clear()
    model.leader().process.certificates.sweep_due()
    it_is_woken_for_nothing(model)


@act
def the_other_leads_for_a_step(model: Machine) -> None:
    _other_leads(model, 1)


@act
def the_other_leads_for_some_steps(model: Machine) -> None:
    _other_leads(model, 4)


@act
def the_other_leads_for_long(model: Machine) -> None:
    _other_leads(model, 40)


def _other_leads(model: Machine, turns: int) -> None:
    outside = model.outside
    other = "B" if outside.active[-1:] != ["B"] else "A"
    if other not in outside.leaders:
        outside.lead(other)
    for _ in range(turns):
        if not outside.turn(other):
            break


@act
def the_other_is_deposed(model: Machine) -> None:
    outside = model.outside
    if len(outside.leaders) == 2 and not outside.active:
        outside.depose("B")


# --- what people change -----------------------------------------------------------------------------------------------


def _spec(model: Machine, certificate: str = WEB, **changes: Any) -> None:
    """Change a Certificate, if it is there."""
    outside = model.outside
    if outside.api.get(api.CERTIFICATE, SHOP, certificate):
        raw = outside.raw(api.CERTIFICATE, certificate)
        raw["spec"] |= changes
        outside.api.put(api.CERTIFICATE, raw)


def _next(model: Machine, values: tuple[Any, ...], member: str, default: Any = None) -> Any:
    """The value after the present one, in turn."""
    found = model.outside.api.get(api.CERTIFICATE, SHOP, WEB)
    spec = api.to_wire(found.spec) if found else {}
    present = spec.get(member, default)
    return values[(values.index(present) + 1) % len(values)] if present in values else values[0]


@act
def the_names_change(model: Machine) -> None:
    names = _next(model, tuple(list(each) for each in NAMES), "dnsNames")
    model.outside.excuse(WEB)
    _spec(model, dnsNames=names)


@act
def the_kind_of_key_changes(model: Machine) -> None:
    key = _next(model, ({**ECDSA}, {**ECDSA, "encoding": "PKCS1"}), "privateKey")
    model.outside.excuse(WEB)
    _spec(model, privateKey=key)


@act
def the_profile_changes(model: Machine) -> None:
    _spec(model, profile=_next(model, ("", "short"), "profile", ""))


@act
def the_secret_name_changes(model: Machine) -> None:
    model.outside.excuse(WEB)
    _spec(model, secretName=_next(model, (WEB, "elsewhere"), "secretName"))


@act
def the_issuer_changes(model: Machine) -> None:
    other = _next(model, ({"name": "ca"}, {"name": "next"}), "issuerRef")
    if model.outside.api.get(api.ISSUER, SHOP, other["name"]) is None:
        model.outside.issuer(other["name"])
    _spec(model, issuerRef=other)


@act
def the_issuer_is_made_again(model: Machine) -> None:
    model.outside.delete(api.ISSUER, "ca")
    model.outside.issuer()


@act
def somebody_wishes_a_renewal(model: Machine) -> None:
    if model.outside.api.get(api.CERTIFICATE, SHOP, WEB):
        model.wishes += 1
        model.outside.excuse(WEB)
        model.outside.annotate(renew_now=str(model.wishes))


@act
def the_certificate_is_labelled(model: Machine) -> None:
    raw = _raw(model, api.CERTIFICATE, WEB)
    if raw:
        labels = raw["metadata"].setdefault("labels", {})
        labels["times"] = str(int(labels.get("times", "0")) + 1)
        model.outside.api.put(api.CERTIFICATE, raw)


@act
def the_certificate_is_deleted(model: Machine) -> None:
    outside = model.outside
    found = outside.api.get(api.CERTIFICATE, SHOP, WEB)
    if found:
        # Of what is under way, the end may be lost: finalize may be on its way.
        outside.excuse_lost(WEB)
        if found.status.issuance:
            outside.excuse(WEB)
        outside.delete(api.CERTIFICATE, WEB)


@act
def the_certificate_is_made_again(model: Machine) -> None:
    the_certificate_is_deleted(model)
    model.certificate(WEB)


@act
def another_wants_the_same_names(model: Machine) -> None:
    model.certificate(LATE)


@act
def another_wants_the_same_secret(model: Machine) -> None:
    model.outside.excuse_lost(WEB)
    model.certificate(LATE, names=NAMES[1], secretName=WEB)


@act
def the_other_certificate_is_deleted(model: Machine) -> None:
    if model.outside.api.get(api.CERTIFICATE, SHOP, LATE):
        # What it has taken, or had signed for the Secret that both name, the other one may order.
        model.outside.excuse(WEB)
        model.outside.delete(api.CERTIFICATE, LATE)


# --- what people do to Secrets and to status --------------------------------------------------------------------------


def _raw(model: Machine, kind: api.Kind[Any], name: str) -> dict[str, Any]:
    return model.outside.raw(kind, name) if model.outside.api.get(kind, SHOP, name) else {}


def _secret(model: Machine) -> dict[str, Any]:
    """The tls Secret of the Certificate, if it is there and may be changed."""
    certificate = model.outside.api.get(api.CERTIFICATE, SHOP, WEB)
    raw = _raw(model, api.SECRET, certificate.spec.secret_name) if certificate else {}
    return {} if raw.get("immutable") else raw


def _excuse_all(model: Machine) -> None:
    for name in tuple(model.outside.wanted):
        model.outside.excuse(name)


@act
def the_tls_secret_is_deleted(model: Machine) -> None:
    certificate = model.outside.api.get(api.CERTIFICATE, SHOP, WEB)
    if certificate and model.outside.api.get(api.SECRET, SHOP, certificate.spec.secret_name):
        _excuse_all(model)
        model.outside.delete(api.SECRET, certificate.spec.secret_name)


@act
def the_tls_secret_is_emptied(model: Machine) -> None:
    if raw := _secret(model):
        _excuse_all(model)
        model.outside.api.put(api.SECRET, raw | {"data": {"tls.crt": "", "tls.key": ""}})


@act
def the_tls_secret_gets_another_pair(model: Machine) -> None:
    if raw := _secret(model):
        _excuse_all(model)
        key = ec.generate_private_key(ec.SECP256R1())
        now = model.outside.clock.now().replace(microsecond=0)
        leaf = sign_leaf(Leaf(key.public_key(), ("evil.example.test",), now, now + timedelta(days=90)))
        pair = {
            "tls.crt": leaf.public_bytes(Encoding.PEM),
            "tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        }
        marks = {part: raw["metadata"].get(part, {}) for part in ("labels", "annotations")}
        model.outside.secret(raw["metadata"]["name"], pair, type=raw["type"], **marks)


@act
def the_tls_secret_gets_the_key_of_another(model: Machine) -> None:
    if raw := _secret(model):
        _excuse_all(model)
        key = ec.generate_private_key(ec.SECP256R1())
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        raw["data"]["tls.key"] = base64.b64encode(text).decode()
        model.outside.api.put(api.SECRET, raw)


@act
def the_tls_secret_loses_its_label(model: Machine) -> None:
    if raw := _secret(model):
        raw["metadata"]["labels"] = {}
        model.outside.api.put(api.SECRET, raw)


@act
def the_tls_secret_becomes_foreign(model: Machine) -> None:
    if raw := _secret(model):
        model.outside.excuse_lost()
        raw["metadata"]["annotations"] = {}
        model.outside.api.put(api.SECRET, raw)


@act
def the_tls_secret_becomes_immutable(model: Machine) -> None:
    if raw := _secret(model):
        model.outside.excuse_lost()
        model.outside.api.put(api.SECRET, raw | {"immutable": True})


@act
def the_next_key_is_deleted(model: Machine) -> None:
    model.outside.excuse_lost()
    for secret in model.outside.next_keys():
        model.outside.delete(api.SECRET, secret.metadata.name)


@act
def the_next_key_is_emptied(model: Machine) -> None:
    model.outside.excuse_lost()
    for secret in model.outside.next_keys():
        raw = model.outside.raw(api.SECRET, secret.metadata.name)
        model.outside.api.put(api.SECRET, raw | {"data": {}})


@act
def somebody_puts_a_secret_where_the_next_key_belongs(model: Machine) -> None:
    outside = model.outside
    found = outside.api.get(api.CERTIFICATE, SHOP, WEB)
    if found and outside.api.get(api.SECRET, SHOP, next_key_name(found)) is None:
        outside.secret(next_key_name(found), {"theirs": b"theirs"})


def _forget_status(model: Machine, status: dict[str, Any]) -> None:
    """What was fulfilled, and what was finalized, is no longer known."""
    raw = _raw(model, api.CERTIFICATE, WEB)
    if raw:
        model.outside.excuse_lost(WEB)
        if raw["metadata"].get("annotations", {}).get(api.ANNOTATION_RENEW_NOW):
            model.outside.excuse(WEB)
        raw["status"] = status
        model.outside.api.put(api.CERTIFICATE, raw)


@act
def the_status_is_wiped(model: Machine) -> None:
    _forget_status(model, {})


@act
def the_issuance_is_wiped(model: Machine) -> None:
    status = _raw(model, api.CERTIFICATE, WEB).get("status", {})
    _forget_status(model, {member: value for member, value in status.items() if member != "issuance"})


@act
def an_old_status_is_restored(model: Machine) -> None:
    certificate = model.outside.api.get(api.CERTIFICATE, SHOP, WEB)
    uid = certificate.metadata.uid if certificate else ""
    old = [
        change.obj["status"]
        for change in model.outside.api.log
        if change.obj["metadata"]["uid"] == uid and change.obj.get("status", {}).get("issuance")
    ]
    if old:
        model.outside.alone = False  # the order that it names may be under way beside another Certificate's
        _forget_status(model, old[len(model.outside.journal) % len(old)])


# --- what the CA does -------------------------------------------------------------------------------------------------


@act
def the_ca_forgets_its_orders(model: Machine) -> None:
    model.outside.excuse_lost()
    model.outside.ca.forget_orders()


@act
def the_ca_forgets_its_accounts(model: Machine) -> None:
    model.outside.excuse_lost()
    model.outside.ca.forget_accounts()


@act
def authorizations_expire(model: Machine) -> None:
    model.outside.ca.end_authorizations("expired")


@act
def authorizations_are_deactivated(model: Machine) -> None:
    model.outside.ca.end_authorizations("deactivated")


@act
def authorizations_are_revoked(model: Machine) -> None:
    model.outside.ca.end_authorizations("revoked")


@act
def authorizations_are_pending_again(model: Machine) -> None:
    """Those of orders that were ready."""
    model.outside.ca.validate_again()


@act
def orders_become_invalid(model: Machine) -> None:
    model.outside.excuse_lost()
    for order in model.outside.ca.orders.values():
        if order.processing or order.csr is None:
            order.error = Problem("serverInternal", "The order was given up.")


@act
def validation_is_held_back(model: Machine) -> None:
    model.outside.ca.holds_validation = True


@act
def issuance_is_held_back(model: Machine) -> None:
    model.outside.ca.holds_issuance = True


@act
def the_ca_goes_on(model: Machine) -> None:
    model.outside.ca.go_on()


@act
def the_next_certificate_is_for_another_key(model: Machine) -> None:
    model.outside.wrong = lambda leaf: replace(leaf, public_key=ec.generate_private_key(ec.SECP256R1()).public_key())


@act
def the_next_certificate_is_for_other_names(model: Machine) -> None:
    model.outside.wrong = lambda leaf: replace(leaf, names=("evil.example.test",))


@act
def validation_fails(model: Machine) -> None:
    model.outside.ca.validate = lambda _name, _token: Problem("dns", "NXDOMAIN")


@act
def validation_succeeds(model: Machine) -> None:
    model.outside.ca.validate = lambda _name, _token: None


@act
def the_ca_is_away(model: Machine) -> None:
    for kind in REQUESTS:
        model.outside.ca.fail(kind, TemporaryError("No answer from the CA's server."), times=2)


@act
def the_ca_limits_the_rate(model: Machine) -> None:
    hour = timedelta(hours=1)
    for kind in REQUESTS:
        limited = judge(Problem("rateLimited", "too many", 429), retry_after=hour, doing="asking")
        model.outside.ca.fail(kind, limited)


@act
def the_ca_asks_to_wait(model: Machine) -> None:
    model.outside.ca.retry_after = timedelta(minutes=10)


@act
def the_ca_gives_a_new_order_each_time(model: Machine) -> None:
    model.outside.ca.reuses_orders = False


@act
def the_ca_gives_finalized_orders_again(model: Machine) -> None:
    model.outside.ca.reuses_finalized = True


@act
def the_ca_validates_each_time(model: Machine) -> None:
    model.outside.ca.reuses_authorizations = False


@act
def the_ca_issues_at_once(model: Machine) -> None:
    model.outside.ca.looks_until_valid = 0


@act
def the_ca_issues_slowly(model: Machine) -> None:
    model.outside.ca.looks_until_valid = 4


@act
def the_names_are_known_to_the_ca(model: Machine) -> None:
    model.outside.ca.preauthorized = {name for names in NAMES for name in names}


@act
def challenges_are_not_served(model: Machine) -> None:
    for leader in model.outside.leaders.values():
        leader.process.solver.missing = "nothing answers"


# --- time -------------------------------------------------------------------------------------------------------------


@act
def the_clock_is_set_back(model: Machine) -> None:
    _excuse_all(model)
    model.outside.clock.step(-2 * 3600)


@act
def the_clock_is_set_back_by_days(model: Machine) -> None:
    _excuse_all(model)
    model.outside.clock.step(-3 * DAY)


@act
def the_clock_is_set_forward(model: Machine) -> None:
    model.outside.clock.step(2 * 3600)


@act
def the_machine_sleeps_for_a_minute(model: Machine) -> None:
    model.outside.clock.advance(61)


@act
def the_machine_sleeps_for_two_months(model: Machine) -> None:
    model.outside.excuse_lost()  # no order lives so long
    model.outside.clock.advance(61 * DAY)


FAULTS = ("it crashes", "the answer is lost", "the write is refused")
OTHERS = tuple(name for name in ACTS if name.startswith("the other leads"))
WRITES = (
    *("create Secret", "apply Secret", "delete Secret", "apply Certificate/status"),
    *("create Ingress", "delete Ingress", "apply Issuer/status"),
)
POINTS = [f"{when} {what}" for when in ("before", "after") for what in (*REQUESTS, *WRITES, "get Secret", "get Cert")]
names_of_acts = st.one_of(st.sampled_from(FAULTS), st.sampled_from(OTHERS), st.sampled_from(sorted(ACTS)))


class Machine(RuleBasedStateMachine):
    """Any of the acts at any point, in any order; and rest in between and in the end."""

    reached: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.wishes = self.rested = 0
        self.outside = Outside(self.reached)
        self.outside.ca.profiles = {"short": ""}
        self.outside.issuer()
        self.outside.live_for(1)

    def leader(self) -> Leader:
        """Whoever is at work, or else the first of those that lead."""
        outside = self.outside
        return outside.leaders[outside.active[-1] if outside.active else next(iter(outside.leaders))]

    def certificate(self, name: str, names: tuple[str, ...] = NAMES[0], **spec: Any) -> None:
        """Somebody applies a Certificate; a new one wants a certificate."""
        outside = self.outside
        if outside.api.get(api.CERTIFICATE, SHOP, name) is None:
            outside.excuse(name)
            outside.certificate(name, names=names, **spec)

    @initialize(names=st.sampled_from(NAMES[:2]), begun=st.booleans())
    def begin(self, names: tuple[str, ...], begun: bool) -> None:
        self.certificate(WEB, names)
        if begun:
            self.outside.live_for(60)

    @rule(points=st.integers(0, 40), name=names_of_acts)
    def at_a_point(self, points: int, name: str) -> None:
        self.outside.arm(points, name, lambda: ACTS[name](self))

    @rule(points=st.integers(0, 2), point=st.sampled_from(POINTS), name=names_of_acts)
    def soon(self, points: int, point: str, name: str) -> None:
        self.outside.arm(points, name, lambda: ACTS[name](self), point=point)

    @rule(name=st.sampled_from(sorted(ACTS)))
    def now(self, name: str) -> None:
        self.outside.do(name, lambda: ACTS[name](self))

    @rule(at_once=st.booleans())
    def anew(self, at_once: bool) -> None:
        """The name is to be validated anew for another certificate: most faults need an issuance under way."""
        self.now("authorizations expire")
        if at_once:
            self.outside.live_for(3.0)
        self.now("somebody wishes a renewal")

    @rule(leader=st.sampled_from("AB"), choice=st.integers(0, 2), turns=st.integers(1, 8))
    def work(self, leader: str, choice: int, turns: int) -> None:
        for _ in range(turns):
            if not self.outside.turn(leader, choice):
                break

    @rule(seconds=st.sampled_from([0.3, 3.0, 40.0, 700.0, 7200.0]))
    def live(self, seconds: float) -> None:
        self.outside.live_for(seconds)

    @precondition(lambda self: self.outside.disturbances >= self.rested + 3)
    @rule()
    def rest(self) -> None:
        """Nothing fails any more; what people broke so that it cannot go on, they mend."""
        self.rested = self.outside.disturbances
        outside, ca = self.outside, self.outside.ca
        outside.note("rest")
        outside.armed.clear()
        outside.wrong = None
        ca.go_on()
        ca.validate, ca.retry_after = lambda _name, _token: None, None
        ca.reuses_orders = ca.reuses_authorizations = True
        ca.reuses_finalized = False
        ca.looks_until_valid = 1
        ca.be_well()
        for leader in outside.leaders.values():
            leader.process.solver.missing = ""
        for secret in outside.api.all(api.SECRET):
            foreign = api.ANNOTATION_CERTIFICATE not in secret.metadata.annotations and "account" not in secret.key
            if secret.immutable or foreign:
                _excuse_all(self)
                outside.delete(api.SECRET, secret.metadata.name)
        outside.come_to_rest()

    def teardown(self) -> None:
        """Whatever has happened, all ends well."""
        if not self.outside.failed:
            self.rest()
