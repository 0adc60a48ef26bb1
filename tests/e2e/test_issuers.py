"""An issuer and its account at a CA that demands External Account Binding: what goes wrong, and how it goes on."""

import base64
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.lab.acme import AcmeRequest, AcmeServer
from tests.lab.controller import Controller
from tests.lab.lab import Lab, start_pebble
from tests.lab.network import Ports
from tests.lab.svcproxy import Backend, ServiceProxy
from tests.site import CERTIFICATES, Site, assert_plain, wait_for

NEW_ACCOUNT = AcmeRequest("POST", "/sign-me-up")
# Its base64 has both characters in which the two alphabets differ, and needs padding.
HMAC_KEY = bytes([0xFB, 0xEF, 0xBE, 0xFF, 0xFF, 0xFF, *range(26)])
# Long enough that something asked again and again is asked again.
A_WHILE = 3.0


@pytest.fixture(autouse=True)
def _plain(site: Site) -> Iterator[None]:
    """Whatever a test provokes is told in plain words."""
    yield
    assert_plain(site.said())


@pytest.fixture(scope="module")
def picky(lab: Lab) -> Iterator[AcmeServer]:
    """A CA of its own, which gave key id kid-1 with HMAC_KEY."""
    text = base64.urlsafe_b64encode(HMAC_KEY).rstrip(b"=").decode()
    with start_pebble(msgspec.structs.replace(lab, eab={"kid-1": text})) as server:
        yield server


def new_accounts(lab: Lab, mark: Any) -> int:
    """How many newAccount requests reached the CA since a mark; one that only asks for an account is one too."""
    return lab.acme_requests(mark).count(NEW_ACCOUNT)


def issuer_object(site: Site, name: str) -> dict[str, Any]:
    return site.get(f"{CERTIFICATES}/namespaces/{site.namespace}/issuers/{name}") or {}


def change(site: Site, name: str, **acme: Any) -> None:
    """Change fields of spec.acme of an Issuer; None removes one."""
    site.patch("issuers.certbotk8s.io", name, {"spec": {"acme": acme}})


def test_the_binding_secret_comes_late(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Without its EAB Secret an Issuer says which Secret and which member it wants, and goes on when that is there;
    so does a Certificate that waits for it.

    Mutation: do not watch the binding's Secret, and it stays not ready for an hour.
    """
    mark = lab.mark()
    site.issuer("ca", hmac="", wait=False)
    site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
    found = site.issuer_condition("Issuer", "ca", "False", "EABSecretMissing")
    assert f"Secret {site.namespace}/ca-eab" in found["message"]
    assert "spec.acme.externalAccountBinding.keySecretRef" in found["message"]
    assert found["message"] == site.event("ca", "EABSecretMissing", kind="Issuer")
    waiting = site.condition("web", "Ready", "False", "IssuerNotReady")["message"]
    assert f"Waiting for Issuer {site.namespace}/ca" in waiting

    site.put_secret("ca-eab", {"hmac": lab.eab["kid-1"].encode()})
    found = site.issuer_condition("Issuer", "ca", "False", "EABSecretMissing", "has no member secret")
    assert "kid-1; it has hmac" in found["message"]
    # Each time the CA is asked whether this key has an account already, which would need no binding.
    assert new_accounts(lab, mark) <= 2

    start = time.monotonic()
    site.put_secret("ca-eab", {"secret": lab.eab["kid-1"].encode()})
    site.issuer_condition("Issuer", "ca", "True")
    print(f"\nready {time.monotonic() - start:.2f} s after the Secret was put right")
    site.ready("web")
    assert site.event("ca", "AccountRegistered", "key id kid-1", kind="Issuer")


def test_a_wrong_hmac_key(lab: Lab, site: Site, controller: Controller) -> None:
    """A wrong HMAC key is told in the CA's words and not tried again while nothing changes; a corrected Secret makes
    the Issuer ready with no restart.

    Mutation: answer a PermanentError with the pause of STEP_LADDER, and the CA is asked again.
    """
    pid, mark = controller.pid, lab.mark()
    wrong = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    site.issuer("ca", hmac=wrong, wait=False)
    found = site.issuer_condition("Issuer", "ca", "False", "EABMACWrong")
    print(f"\n{found['message']}")
    assert 'The CA says: "' in found["message"]
    assert "error in cryptographic primitive" in found["message"]
    assert "kid-1" in found["message"]
    assert "keySecretRef" in found["message"]
    assert found["message"] == site.event("ca", "EABMACWrong", kind="Issuer")
    problem = issuer_object(site, "ca")["status"]["lastProblem"]
    assert problem["type"] == "unauthorized"
    assert problem["detail"] in found["message"]

    time.sleep(A_WHILE)
    # One that only asks whether this key has an account, and one with the binding.
    assert new_accounts(lab, mark) == 2
    start = time.monotonic()
    site.put_secret("ca-eab", {"secret": lab.eab["kid-1"].encode()})
    site.issuer_condition("Issuer", "ca", "True")
    print(f"corrected Secret: ready after {time.monotonic() - start:.2f} s")
    assert controller.pid == pid
    assert "lastProblem" not in issuer_object(site, "ca")["status"]
    account = issuer_object(site, "ca")["status"]["accounts"][0]
    assert account["boundKeyID"] == "kid-1"
    assert account["contact"] == "ops@example.test"


def test_an_unknown_key_id(lab: Lab, site: Site, issuer: str) -> None:
    """A key id that the CA does not know is named beside the CA's words; corrected in the spec, it goes on.

    Mutation: compare an attempt with the Secret alone in `IssuerReconciler.__call__`, not with the generation.
    """
    name = "ca"
    site.issuer(name, wait=False, externalAccountBinding={"keyID": "kid-9", "keySecretRef": {"name": "ca-eab"}})
    found = site.issuer_condition("Issuer", name, "False", "EABKeyIDUnknown")
    print(f"\n{found['message']}")
    assert "kid-9" in found["message"]
    assert 'The CA says: "' in found["message"]
    change(site, name, externalAccountBinding={"keyID": "kid-1"})
    site.issuer_condition("Issuer", name, "True", text="bound to key id kid-1")


HMAC_FORMS: dict[str, Callable[[bytes], bytes]] = {
    "url-safe, unpadded": lambda key: base64.urlsafe_b64encode(key).rstrip(b"="),
    "url-safe, padded": base64.urlsafe_b64encode,
    "standard, unpadded": lambda key: base64.b64encode(key).rstrip(b"="),
    "standard, padded": base64.b64encode,
    "trailing newline": lambda key: base64.b64encode(key) + b"\n",
}


@pytest.mark.parametrize("form", HMAC_FORMS)
def test_every_form_of_an_hmac_key(site: Site, issuer: str, picky: AcmeServer, form: str) -> None:
    """An HMAC key registers in whichever base64 the CA's portal gave, each time with an account key of its own.

    Mutation: leave out one character of the translation, the rstrip or the strip in `_hmac_key`.
    """
    text = HMAC_FORMS[form](HMAC_KEY)
    assert (b"+" in text and b"/" in text) or (b"-" in text and b"_" in text)
    before = picky.mark()
    site.issuer("ca", hmac=text.decode(), ca=picky)
    assert picky.requests(before).count(NEW_ACCOUNT) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("correct horse battery staple", "characters that are not base64"),
        ("c2hvcnQta2V5", "a key of 9 bytes"),
        ("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY5X", "a part of it may be missing"),
    ],
    ids=["words", "short", "cut"],
)
def test_an_hmac_key_that_cannot_be_read(
    lab: Lab, site: Site, controller: Controller, issuer: str, text: str, says: str
) -> None:
    """What is wrong with it is said, the CA is not asked to register, and its text stands nowhere.

    Mutation: put the text into the message of `_unbindable`.
    """
    said, mark = controller.log.stat().st_size, lab.mark()
    site.issuer("ca", hmac=text, wait=False)
    found = site.issuer_condition("Issuer", "ca", "False", "EABKeyInvalid", says)
    assert "kid-1" in found["message"]
    site.event("ca", "EABKeyInvalid", says, kind="Issuer")
    # The CA is only asked whether this key has an account.
    assert new_accounts(lab, mark) <= 1
    events = lab.api(f"/api/v1/namespaces/{site.namespace}/events")
    log = controller.log.read_bytes()[said:].decode()
    for place in (json.dumps(issuer_object(site, "ca")), json.dumps(events), log):
        assert text not in place
        assert base64.b64encode(text.encode()).decode() not in place
    site.put_secret("ca-eab", {"secret": lab.eab["kid-1"].encode()})
    site.issuer_condition("Issuer", "ca", "True")


def test_a_ca_that_demands_a_binding(site: Site, issuer: str) -> None:
    """Where a CA demands a binding and none is configured, the Issuer says so; one that is added makes it ready.

    Mutation: drop the look at `external_account_required` in `_find_or_make`, and only the CA's own words are left.
    """
    site.issuer("ca", wait=False, externalAccountBinding=None)
    found = site.issuer_condition("Issuer", "ca", "False", "EABRequired")
    assert "demands an external account binding" in found["message"]
    assert "spec.acme.externalAccountBinding" in found["message"]
    site.event("ca", "EABRequired", kind="Issuer")
    change(site, "ca", externalAccountBinding={"keyID": "kid-1", "keySecretRef": {"name": "ca-eab"}})
    site.issuer_condition("Issuer", "ca", "True")


def test_secrets_of_an_issuer_are_in_its_own_namespace(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """An Issuer uses the Secrets of its own namespace and no others, and issues there.

    Mutation: let `_home` always be the controller's namespace.
    """
    name = f"ca-{secrets.token_hex(3)}"
    elsewhere = lab.namespace
    site.put_secret(f"{name}-eab", {"secret": lab.eab["kid-1"].encode()}, namespace=elsewhere)
    try:
        site.issuer(name, hmac="", wait=False)
        site.issuer_condition("Issuer", name, "False", "EABSecretMissing", f"{site.namespace}/{name}-eab")
        site.put_secret(f"{name}-eab", {"secret": lab.eab["kid-1"].encode()})
        site.issuer_condition("Issuer", name, "True")
        assert site.secret(f"{name}-account", elsewhere) is None
    finally:
        site.delete(site.secret_path(f"{name}-eab", elsewhere))
    account = site.secret(f"{name}-account")
    assert account
    assert "BEGIN PRIVATE KEY" in base64.b64decode(account["data"]["tls.key"]).decode()
    site.certificate("web", [f"web.{suffix}"], name, kind="Issuer")
    site.ready("web")


def test_an_account_outlives_its_issuer(lab: Lab, site: Site, issuer: str) -> None:
    """An Issuer deleted and created again has the account of the key that is still there, and needs no binding for it;
    where only the key is left, the CA is asked for its account and not to register.

    Mutation: find nothing in `Notes.find` for the first half, drop `find_account` from `_find_or_make` for the second.
    """
    path = f"{CERTIFICATES}/namespaces/{site.namespace}/issuers/ca"
    site.issuer("ca")
    first = issuer_object(site, "ca")["status"]["accounts"][0]
    site.delete(path)
    site.delete(site.secret_path("ca-eab"))
    mark = lab.mark()
    site.issuer("ca", hmac="")
    second = issuer_object(site, "ca")["status"]["accounts"][0]
    assert (second["uri"], second["keyThumbprint"]) == (first["uri"], first["keyThumbprint"])
    assert new_accounts(lab, mark) == 0

    site.delete(path)
    kept = site.secret("ca-account")
    assert kept
    site.delete(site.secret_path("ca-account"))
    site.put_secret("ca-account", {"tls.key": base64.b64decode(kept["data"]["tls.key"])})
    mark = lab.mark()
    site.issuer("ca")
    third = issuer_object(site, "ca")["status"]["accounts"][0]
    assert third["uri"] == first["uri"]
    # A registration would be a second one.
    assert new_accounts(lab, mark) == 1


def test_a_restart_asks_the_ca_nothing(lab: Lab, site: Site, controller: Controller, issuer: str, suffix: str) -> None:
    """For an Issuer that is ready a restarted controller asks the CA nothing, and its account is open.

    Mutation: do not write what is known beside the key in `Opening._register`.
    """
    with start_pebble(lab) as ca:
        site.issuer("ca", ca=ca)
        mark = ca.mark()
        controller.restart()
        controller.wait_ready()
        time.sleep(A_WHILE)
        assert ca.requests(mark) == []
        site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
        site.ready("web")
        assert ca.requests(mark).count(NEW_ACCOUNT) == 0
        assert ca.orders(mark) == 1


def test_a_wrong_ca_bundle(lab: Lab, site: Site, issuer: str) -> None:
    """TLS roots that are not the CA's, and a bundle that holds none: the message names caBundle; corrected, it goes on.

    Mutation: leave `_BUNDLE` out of the sentence for an untrusted certificate.
    """
    right = site.acme_spec("ca")["caBundle"]
    others = base64.b64encode(Path(lab.api_ca_bundle).read_bytes()).decode()
    site.issuer("ca", wait=False, caBundle=others)
    found = site.issuer_condition("Issuer", "ca", "False", "CAUnavailable", "spec.acme.caBundle")
    print(f"\n{found['message']}")
    assert "TLS certificate was refused" in found["message"]
    site.event("ca", "CAUnavailable", "spec.acme.caBundle", kind="Issuer")
    junk = base64.b64encode(b"-----BEGIN CERTIFICATE-----\njunk\n-----END CERTIFICATE-----\n").decode()
    change(site, "ca", caBundle=junk)
    found = site.issuer_condition("Issuer", "ca", "False", "CABundleInvalid")
    assert "spec.acme.caBundle" in found["message"]
    change(site, "ca", caBundle=right)
    site.issuer_condition("Issuer", "ca", "True")


def test_a_server_that_is_no_acme_directory(lab: Lab, site: Site, issuer: str) -> None:
    """A URL without an ACME directory is named with what is there instead; corrected, it goes on.

    Mutation: treat 404 at the directory like any other 404, and it is tried for ever as if the CA were away.
    """
    site.issuer("ca", wait=False, server=f"{lab.acme.directory}ectory")
    found = site.issuer_condition("Issuer", "ca", "False", "DirectoryInvalid", "404")
    print(f"\n{found['message']}")
    assert f"{lab.acme.directory}ectory" in found["message"]
    assert "spec.acme.server" in found["message"]
    site.event("ca", "DirectoryInvalid", kind="Issuer")
    # JSON from a server that speaks to everybody, and speaks no ACME.
    bundle = base64.b64encode(Path(lab.api_ca_bundle).read_bytes()).decode()
    change(site, "ca", server=f"{lab.api_server}/version", caBundle=bundle)
    found = site.issuer_condition("Issuer", "ca", "False", "DirectoryInvalid", "does not name newNonce, newAccount")
    assert f"{lab.api_server}/version is no ACME directory" in found["message"]
    spec = site.acme_spec("ca")
    change(site, "ca", server=spec["server"], caBundle=spec["caBundle"])
    site.issuer_condition("Issuer", "ca", "True")


def test_an_unknown_profile(site: Site, controller: Controller, issuer: str) -> None:
    """A profile that the CA does not offer is refused with those that it offers, after a restart too; another one
    makes the Issuer ready.

    Mutation: drop `_check_profile`, or check the profile only where there is no condition yet.
    """
    says = "no profile tlsserver. Its profiles: default and shortlived."
    site.issuer("ca", wait=False, profile="tlsserver")
    site.issuer_condition("Issuer", "ca", "False", "UnknownProfile", says)
    site.event("ca", "UnknownProfile", says, kind="Issuer")
    controller.restart()
    controller.wait_ready()
    site.certificate("web", ["web.example.test"], "ca", kind="Issuer")
    site.condition("web", "Ready", "False", "IssuerNotReady", says)
    time.sleep(1)
    site.issuer_condition("Issuer", "ca", "False", "UnknownProfile", says)
    site.delete(site.certificate_path("web"))
    change(site, "ca", profile="shortlived")
    site.issuer_condition("Issuer", "ca", "True")


def test_a_ca_that_is_away(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A CA that cannot be reached is waited for: the Issuer says so, and becomes ready by itself when it is back.

    Mutation: treat a TemporaryError in `IssuerReconciler.__call__` as a refusal.
    """
    port = int(lab.acme.directory.rpartition(":")[2].removesuffix("/dir"))
    ping = int(lab.traefik_api.rpartition(":")[2].removesuffix("/api"))
    with Ports() as ports:
        door = ports.take()
        site.issuer("ca", wait=False, server=f"https://127.0.0.1:{door}/dir")
        found = site.issuer_condition("Issuer", "ca", "False", "CAUnavailable")
        assert f"127.0.0.1:{door}" in found["message"]
        assert "Connection refused" in found["message"]
        assert "by itself" in found["message"]
        site.event("ca", "CAUnavailable", kind="Issuer")
        with ServiceProxy("127.0.0.1", door, lambda: [Backend("127.0.0.1", port, ping, "/ping")]):
            start = time.monotonic()
            site.issuer_condition("Issuer", "ca", "True")
            print(f"\nready {time.monotonic() - start:.1f} s after the CA came back")
            site.certificate("web", [f"web.{suffix}"], "ca", kind="Issuer")
            site.ready("web")
            wait_for(lambda: not site.challenges(), "challenges gone")
