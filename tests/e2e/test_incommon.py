"""CAs that validate an institution's names beforehand and bind its accounts, played by a proxy before a Pebble.

What each of them does stands in tests/lab/presets.py.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cryptography import x509

from tests.lab.acme_proxy import acme_proxy, kind_of, to
from tests.lab.lab import Lab, start_pebble
from tests.lab.presets import OTHER_INSTITUTION, BoundCA, csr, payload, preset_ca
from tests.lab.proxy import Answer, Fault, answered, changed
from tests.site import Site, assert_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.controller import Controller
    from tests.lab.proxy import Request

FAST = 0.0
A_WHILE = 2.0


class Institution:
    """An Issuer of the test's namespace, without solvers, whose account is bound at a CA of a preset."""

    def __init__(self, site: Site, ca: BoundCA, issuer: str) -> None:
        self.site, self.ca, self.issuer = site, ca, issuer
        self._since = len(ca.proxy.exchanges)

    def validated(self, *names: str) -> None:
        """The CA's people validate names for this account; what was asked until now is not counted."""
        self.ca.validate(self.site.secret_value(f"{self.issuer}-account", "tls.key"), *names)
        self._since = len(self.ca.proxy.exchanges)

    def certificate(self, name: str, names: list[str], **spec: Any) -> None:
        """A Certificate from this issuer."""
        self.site.certificate(name, names, self.issuer, kind="Issuer", **spec)

    def asked(self) -> Counter[str]:
        """What the CA was asked since, nonces apart, by kind."""
        return Counter(kind_of(each) for each in self.ca.proxy.asked(self._since))


@pytest.fixture
def institution(lab: Lab, site: Site, controller: Controller) -> Iterator[Callable[..., Institution]]:
    """Makes a CA of a preset, and an issuer there; whatever a test provokes is told in plain words."""
    with contextlib.ExitStack() as stack:

        def make(preset: str, *, scale: float = FAST, **acme: Any) -> Institution:
            ca = stack.enter_context(preset_ca(lab, preset, scale=scale))
            name = f"campus-{secrets.token_hex(3)}"
            site.issuer(name, ca=ca.seen, **{"solvers": None, "profile": None} | acme)
            return Institution(site, ca, name)

        yield make
        assert_plain(site.said())
        assert controller.ended() is None
        for name in [each["metadata"]["name"] for each in site._items(site.certificate_path("").rstrip("/"))]:
            site.delete(site.certificate_path(name))  # while the CA is still there


def common_names(request: x509.CertificateSigningRequest) -> list[str]:
    return [str(each.value) for each in request.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]


def sans(certificate: x509.Certificate) -> list[str]:
    return sorted(
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.DNSName
        )
    )


# --- names that the CA has validated ----------------------------------------------------------------------------------


def test_four_requests_for_a_name_that_is_validated(
    lab: Lab, site: Site, institution: Callable[..., Institution], suffix: str
) -> None:
    """A validated name costs the CA four requests, needs no solver, and nothing is written but Certificate, Secrets
    and Event.

    Mutation: read the authorizations of an order that is ready in `_place_order`.
    """
    campus = institution("incommon-certinext")
    campus.validated(f"web.{suffix}")
    time.sleep(0.5)
    mark = lab.mark()
    campus.certificate("web", [f"web.{suffix}"])
    site.ready("web")
    site.nothing_left()
    site.event("web", "Issued")
    asked = campus.asked()
    writes = [write for write in lab.kube_writes(mark) if write.namespace in {site.namespace, lab.namespace}]
    kinds = Counter(f"{write.verb} {write.resource}" for write in writes)
    print(f"\none validated name: {sum(asked.values())} requests to the CA {dict(asked)}, {len(writes)} writes")
    print(f"  {dict(kinds)}")
    assert asked - Counter(order=asked["order"] - 1) == Counter(newOrder=1, finalize=1, order=1, certificate=1)
    assert {write.resource for write in writes} <= {"certificates", "secrets", "events"}


def test_wildcard_names_need_no_dns_01(site: Site, institution: Callable[..., Institution], suffix: str) -> None:
    """A wildcard name that the CA has validated is issued without any solver, beside its own domain too.

    Mutation: demand a solver for dns-01 as soon as a name begins with `*.`.
    """
    campus = institution("incommon-sectigo")
    campus.validated(f"*.team.{suffix}", f"team.{suffix}")
    campus.certificate("web", [f"*.team.{suffix}", f"team.{suffix}"], privateKey={"algorithm": "RSA"})
    site.ready("web")
    assert sans(site.leaf("web")) == [f"*.team.{suffix}", f"team.{suffix}"]
    assert campus.asked()["authorization"] == 0


VALID: dict[str, Callable[[dict[str, Any]], object]] = {
    "without token": lambda seen: seen | {"challenges": [{"type": "sectigo-email-01", "status": "valid", "url": "x"}]},
    "dns without token": lambda seen: seen | {"challenges": [{"type": "sectigo-dns-01", "url": None}]},
    "null": lambda seen: dict.fromkeys(seen) | {"status": "valid"},
    "absent": lambda _: {"status": "valid"},
    "odd": lambda seen: seen | {"challenges": [None, 1, [], {"type": None}, {"type": {}}], "wildcard": "yes"},
}


@pytest.mark.parametrize("shape", VALID)
def test_a_valid_authorization_is_enough(
    site: Site, institution: Callable[..., Institution], suffix: str, shape: str
) -> None:
    """The status of an authorization is looked at before its challenges: unknown types, no token, nulls and absent
    members do no harm.

    Mutation: choose a challenge before the status is looked at in `_present`.
    """
    campus = institution("incommon-certinext")
    campus.validated(f"web.{suffix}")
    campus.ca.proxy.inject(to("newOrder"), rewritten(lambda order: order | {"status": "pending"}), times=1)
    campus.ca.proxy.inject(to("authorization"), rewritten(VALID[shape]), first=True)
    campus.certificate("web", [f"web.{suffix}"])
    site.ready("web")
    assert campus.asked()["authorization"] == 1


UNKNOWN: dict[str, object] = {
    "status": {"status": "delegated", "identifier": {"type": "dns", "value": "x.test"}, "challenges": []},
    "nothing": {},
    "list": [],
    "text": "pending",
    "null": None,
}


@pytest.mark.parametrize("shape", UNKNOWN)
def test_an_authorization_of_an_unknown_shape(
    site: Site, institution: Callable[..., Institution], suffix: str, shape: str
) -> None:
    """What cannot be understood of an authorization is asked for again; the Certificate waits and says so, no attempt
    is lost, and it goes on by itself.

    Mutation: end the attempt in `authorization_failure` whatever the status is.
    """
    campus = institution("incommon-certinext")
    campus.validated(f"web.{suffix}")
    proxy = campus.ca.proxy
    proxy.inject(to("newOrder"), rewritten(lambda order: order | {"status": "pending"}), times=1)
    proxy.inject(to("order"), rewritten(lambda order: order | {"status": "pending"}), times=1)
    body = msgspec.json.encode(UNKNOWN[shape])
    with proxy.inject(to("authorization"), answered(200, body), first=True):
        campus.certificate("web", [f"web.{suffix}"])
        message = site.condition("web", "Issuing", "True", "CAUnavailable", "Next attempt")["message"]
        print(f"\n{message}")
    assert site.ready("web").get("failedAttempts", 0) == 0
    assert campus.asked()["newOrder"] == 1


def rewritten(change: Callable[[dict[str, Any]], object]) -> Any:
    """The client gets what `change` makes of the JSON document."""

    def respond(answer: Answer) -> Answer:
        if answer.status >= 400:
            return answer
        return answer._replace(body=msgspec.json.encode(change(msgspec.json.decode(answer.body))))

    return changed(respond)


# --- names that it has not validated ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wildcard", ["", "*."])
def test_a_name_that_is_not_validated(
    site: Site, institution: Callable[..., Institution], suffix: str, wildcard: str
) -> None:
    """Pending without a solver ends at once as NotPreauthorized, with what the CA offers and what the issuer solves;
    validated meanwhile, the name goes on when that is asked for.

    Mutation: pass over an authorization that no solver can serve.
    """
    campus = institution("incommon-certinext")
    name = f"{wildcard}web.{suffix}"
    campus.certificate("web", [name])
    message = site.condition("web", "Issuing", "False", "NotPreauthorized")["message"]
    print(f"\n{message}")
    offers, _, ours = message.partition("; ")
    assert offers.startswith(f"The CA has not validated {name} for this account and offers ")
    assert "dns-01" in offers
    assert ours.startswith(f"Issuer {site.namespace}/{campus.issuer} solves none. Have the name validated at the CA")
    assert campus.asked()["challenge"] == 0
    site.nothing_left()
    campus.validated(name)
    site.annotate("web", renew_now="1")
    site.ready("web")


def test_a_pending_challenge_of_the_cas_own(site: Site, institution: Callable[..., Institution], suffix: str) -> None:
    """Pending with challenges that only this CA knows, and one without a token, is told apart by their names.

    Mutation: take a challenge without a token for usable.
    """
    campus = institution("incommon-sectigo", solvers=[{"http01": {"ingress": {}}}])
    own = [{"type": "sectigo-dns-01", "status": "pending"}, {"type": "http-01", "status": "pending", "url": "x"}]
    campus.ca.proxy.inject(to("authorization"), rewritten(lambda seen: seen | {"challenges": own}), first=True)
    campus.certificate("web", [f"web.{suffix}"], privateKey={"algorithm": "RSA"})
    message = site.condition("web", "Issuing", "False", "NotPreauthorized")["message"]
    print(f"\n{message}")
    assert "offers http-01 and sectigo-dns-01" in message
    assert "solves http-01" in message
    site.nothing_left()


def test_a_name_of_another_institution(site: Site, institution: Callable[..., Institution], suffix: str) -> None:
    """A name for which the account has no right ends with the CA's words; the account is looked up once, not the
    order placed again and again.

    Mutation: drop `_backing_off` from HOLDS.
    """
    campus = institution("incommon-sectigo")
    campus.certificate("web", [f"web.{OTHER_INSTITUTION}"], privateKey={"algorithm": "RSA"})
    message = site.condition("web", "Issuing", "False", "CARefused")["message"]
    print(f"\n{message}")
    assert 'The CA says: "The client lacks sufficient authorization"' in message
    assert "have the names validated" in message
    time.sleep(A_WHILE)
    assert campus.asked()["newOrder"] == 1
    assert site.issuer_condition("Issuer", campus.issuer, "True")


def test_several_names_on_a_binding_for_one(site: Site, institution: Callable[..., Institution], suffix: str) -> None:
    """A binding for certificates of one name refuses two in the CA's words; a binding for several takes them.

    Mutation: drop `_backing_off` from HOLDS.
    """
    names = [f"a.{suffix}", f"b.{suffix}"]
    single = institution("incommon-certinext")
    single.validated(*names)
    single.certificate("web", names)
    message = site.condition("web", "Issuing", "False", "CARefused")["message"]
    print(f"\n{message}")
    assert "EMS-1162" in message
    time.sleep(A_WHILE)
    assert single.asked()["newOrder"] == 1
    several = f"{single.issuer}-several"
    binding = {"keyID": "kid-2", "keySecretRef": {"name": f"{several}-eab"}}
    site.issuer(
        several,
        ca=single.ca.seen,
        hmac=site.lab.eab["kid-2"],
        solvers=None,
        profile=None,
        externalAccountBinding=binding,
    )
    single.ca.validate(site.secret_value(f"{several}-account", "tls.key"), *names)
    site.patch_certificate("web", {"spec": {"issuerRef": {"name": several}}})
    site.ready("web")


def test_one_issuer_for_both_products(site: Site, institution: Callable[..., Institution], suffix: str) -> None:
    """An issuer with a binding for each product takes one name and several: each order goes by the account for it.

    Mutation: take the first binding whatever its shapes are.
    """
    bindings = []
    for name, shape, kid in (("single", "SingleName", "kid-1"), ("several", "SeveralNames", "kid-2")):
        site.put_secret(f"hmac-{kid}", {"secret": site.lab.eab[kid].encode()})
        binding = {"keyID": kid, "keySecretRef": {"name": f"hmac-{kid}"}}
        bindings.append({"name": name, "shapes": [shape], "externalAccountBinding": binding})
    campus = institution("incommon-certinext", externalAccountBinding=None, bindings=bindings)
    orders = {"single": [f"web.{suffix}"], "several": [f"a.{suffix}", f"b.{suffix}"]}
    for product, names in orders.items():
        campus.ca.validate(site.secret_value(f"{campus.issuer}-account-{product}", "tls.key"), *names)
        campus.certificate(product, names)
    accounts = {site.ready(product)["accountURI"] for product in orders}
    assert len(accounts) == 2
    assert campus.asked()["newOrder"] == 2


# --- what they want in a CSR ------------------------------------------------------------------------------------------


def test_a_key_of_the_wrong_kind(site: Site, institution: Callable[..., Institution], suffix: str) -> None:
    """An endpoint for RSA keys refuses another kind: the CA's words and the setting to change are told, nothing is
    sent again, and the changed key is issued for.

    Mutation: take badCSR for temporary in domain.problems.
    """
    campus = institution("incommon-sectigo")
    campus.validated(f"web.{suffix}")
    campus.certificate("web", [f"web.{suffix}"])
    message = site.condition("web", "Issuing", "False", "CSRRefused")["message"]
    print(f"\n{message}")
    assert "The public key algorithm of the CSR is not allowed" in message
    assert "spec.privateKey" in message
    time.sleep(A_WHILE)
    assert (campus.asked()["newOrder"], campus.asked()["finalize"]) == (1, 1)
    site.patch_certificate("web", {"spec": {"privateKey": {"algorithm": "RSA"}}})
    site.ready("web")
    assert campus.asked()["finalize"] == 2


def test_the_common_name_where_it_is_wanted(site: Site, institution: Callable[..., Institution], suffix: str) -> None:
    """A CA that binds accounts gets the first name that fits as common name, without a setting; with Never, CERTInext
    refuses the empty subject in its own words, once.

    Mutation: take Auto for Never in `common_name`.
    """
    long, short = f"{'a' * 40}.{'b' * 40}.{suffix}", f"web.{suffix}"
    campus = institution("incommon-certinext", commonName="Never")
    campus.validated(short)
    campus.certificate("web", [short])
    message = site.condition("web", "Issuing", "False", "CSRRefused")["message"]
    print(f"\n{message}")
    assert 'The CA says: "EMS-1056: Domain Name present in CSR does not match"' in message
    assert "spec.acme.commonName of the issuer" in message
    time.sleep(A_WHILE)
    assert campus.asked()["finalize"] == 1
    site.patch("issuers.certbotk8s.io", campus.issuer, {"spec": {"acme": {"commonName": None}}})
    site.ready("web")
    campus = institution("incommon-sectigo")
    campus.validated(long, short)
    subjects: list[list[str]] = []
    campus.ca.proxy.inject(lambda each: is_csr_of(each, subjects), Fault(), first=True)
    campus.certificate("long", [long, short], privateKey={"algorithm": "RSA"})
    site.ready("long")
    assert subjects == [[short]]


def is_csr_of(request: Request, subjects: list[list[str]]) -> bool:
    """Notes the common names of a finalize; no other fault is made of it."""
    if kind_of(request) == "finalize":
        subjects.append(common_names(csr(request)))
    return False


def test_no_common_name_where_nobody_wants_one(lab: Lab, site: Site, controller: Controller, suffix: str) -> None:
    """A CA that binds no accounts, as Let's Encrypt, is sent an empty subject, and the name with First.

    Mutation: take Auto for First in `common_name`.
    """
    seen: dict[str, list[str]] = {}

    def note(request: Request) -> Fault:
        found = csr(request)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        seen[names.get_values_for_type(x509.DNSName)[0]] = common_names(found)
        return Fault()

    with start_pebble(lab, eab_required=False) as behind, acme_proxy(lab, behind) as (ca, proxy):
        proxy.inject(to("finalize"), note)
        for name, setting in (("auto", None), ("first", "First")):
            site.issuer(name, ca=ca, externalAccountBinding=None, commonName=setting)
            site.certificate(name, [f"{name}.{suffix}"], name, kind="Issuer")
            site.ready(name)
    assert seen == {f"auto.{suffix}": [], f"first.{suffix}": [f"first.{suffix}"]}


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["incommon-sectigo", "harica", "zerossl"])
def test_an_account_is_bound_once(
    lab: Lab, site: Site, institution: Callable[..., Institution], controller: Controller, suffix: str, preset: str
) -> None:
    """The binding is sent once: neither another issuer with the same account key nor a restart sends it again.

    Mutation: neither remember an account in `_choose` nor look for it in `_find_or_make`.
    """
    campus = institution(preset)
    bound: list[str] = []
    campus.ca.proxy.inject(lambda each: is_bound(each, bound), Fault(), first=True)
    second = f"{campus.issuer}-second"
    account = {"name": f"{campus.issuer}-account"}
    site.issuer(second, ca=campus.ca.seen, solvers=None, profile=None, privateKeySecretRef=account)
    controller.restart()
    controller.wait_ready()
    campus.validated(f"web.{suffix}")
    site.certificate("web", [f"web.{suffix}"], second, kind="Issuer", privateKey={"algorithm": "RSA"})
    site.ready("web")
    assert bound == []
    assert campus.ca.behind.registered() == 1


def is_bound(request: Request, found: list[str]) -> bool:
    """Notes a request that carries a binding; no other fault is made of it."""
    if kind_of(request) == "newAccount" and "externalAccountBinding" in payload(request):
        found.append(request.target)
    return False


# --- how they issue ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "scale"),
    [
        ("incommon-certinext", 0.05),
        ("incommon-sectigo", 0.03),
        ("zerossl", 0.05),
        ("harica", 0.1),
        pytest.param("incommon-certinext", 1.0, marks=pytest.mark.soak),
        pytest.param("incommon-sectigo", 1.0, marks=pytest.mark.soak),
    ],
)
def test_each_ca_at_its_own_pace(
    site: Site, institution: Callable[..., Institution], suffix: str, preset: str, scale: float
) -> None:
    """One order and one certificate, however long the CA takes, and whatever its documents lack; renewed just so.

    Mutation: end the attempt in `_collect` when a valid order names no certificate.
    """
    campus = institution(preset, scale=scale)
    names = [f"{each}.{suffix}" for each in "abc"] if preset == "zerossl" else [f"a.{suffix}"]
    campus.validated(*names)
    start = time.monotonic()
    campus.certificate("web", names, privateKey={"algorithm": "RSA"})
    site.ready("web", timeout=200)
    limited = int(preset == "zerossl")
    asked = campus.asked()
    print(f"\n{preset} x {scale}: {time.monotonic() - start:.1f} s, {dict(asked)}")
    assert (asked["newOrder"] - limited, asked["finalize"], campus.ca.behind.issued()) == (1, 1, 1)
    assert site.status("web").get("failedAttempts", 0) == 0
    if scale == 1:
        return
    campus.validated(*names)
    site.annotate("web", renew_now="1")
    site.ready("web", revision=2)
    assert (campus.asked()["newOrder"], campus.asked()["finalize"], campus.ca.behind.issued()) == (1, 1, 2)
