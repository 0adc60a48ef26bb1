"""A Certificate becomes a Secret, through a real API server, Pebble and Traefik; counted from the servers' side."""

import base64
import json
import secrets
import time
from collections import Counter

import pytest
from cryptography import x509

from tests.lab.controller import Controller
from tests.lab.lab import Lab, start_pebble
from tests.site import CERTIFICATES, Site, wait_for


def counted(site: Site, mark: object) -> Counter[str]:
    """The controller's writes since a mark, by `verb resource/subresource`."""
    writes = site.lab.kube_writes(mark)  # type: ignore[arg-type]
    return Counter(f"{w.verb} {w.resource}{'/' + w.subresource if w.subresource else ''}" for w in writes)


def test_one_name_costs_seven_requests_and_ten_writes(
    lab: Lab, site: Site, issuer: str, suffix: str, record_property: object
) -> None:
    """One name by HTTP-01 costs the CA 7 requests and the API server at most 10 writes, and leaves nothing behind.

    Mutation: persist the state Presented in `_present`, and there are 11 writes.
    """
    site.certificate("warm", [f"warm.{suffix}"], issuer)
    site.ready("warm")
    site.nothing_left()
    time.sleep(0.5)
    mark, start = lab.mark(), time.monotonic()
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    seconds = time.monotonic() - start
    site.nothing_left()
    site.event("web", "Issued")
    requests = [request for request in lab.acme_requests(mark) if not request.is_new_nonce]
    polls = [request for request in requests if "/my-order/" in request.path or "/order/" in request.path]
    # Namespaces of former tests are still being taken down.
    writes = [write for write in lab.kube_writes(mark) if write.namespace in {site.namespace, lab.namespace}]
    print(f"\none name: Ready after {seconds:.2f} s, {len(requests)} requests to the CA, {len(writes)} writes")
    print(f"  {[request.path for request in requests]}\n  {dict(counted(site, mark))}")
    extra_polls = max(0, len(polls) - 2)
    assert len(requests) - extra_polls == 7
    assert len(writes) <= 10
    assert lab.orders(mark) == 1


def test_the_secret_holds_a_verified_pair(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """The Secret is of type kubernetes.io/tls, names its Certificate, and its chain leads to the CA's root.

    Mutation: write only the leaf into tls.crt, and Traefik's chain is not verified.
    """
    host = f"web.{suffix}"
    with site.application():
        site.ingress("web", [([host], "web-tls")], issuer)
        site.ready("web-tls")
        root = lab.acme.root_pem()
        wait_for(lambda: host in site.served(host).names, "Traefik serves the certificate")
        assert site.request(host, root) == "hello from web\n"
    secret = site.secret("web-tls")
    assert secret
    assert secret["type"] == "kubernetes.io/tls"
    assert secret["metadata"]["annotations"]["certbotk8s.io/certificate"] == "web-tls"
    assert secret["metadata"]["labels"] == {"certbotk8s.io/role": "tls"}
    assert set(secret["data"]) == {"tls.crt", "tls.key"}


def test_five_percent_of_nonces_rejected(lab: Lab, site: Site, controller: Controller, suffix: str) -> None:
    """A CA that rejects one nonce in twenty is no trouble: ten Certificates, ten orders, no failure.

    Mutation: send a request refused with badNonce no second time, and some order fails.
    """
    with start_pebble(lab, nonce_reject=5) as ca:
        name = site.cluster_issuer(f"nonces-{secrets.token_hex(3)}", ca=ca)
        try:
            for number in range(10):
                site.certificate(f"n{number}", [f"n{number}.{suffix}"], name)
            for number in range(10):
                assert site.ready(f"n{number}").get("failedAttempts", 0) == 0
            # Requests that were refused for their nonce are in the CA's log too: what counts is what it issued.
            assert ca.issued() == 10
        finally:
            site.delete(f"{CERTIFICATES}/clusterissuers/{name}")


def test_apex_and_www_with_a_redirect(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """apex and www in one Certificate are issued although the application redirects www to the apex.

    Mutation: let the responder answer only tokens whose own name is the Host, or refuse redirects in the self-check.
    """
    apex, www = f"shop.{suffix}", f"www.shop.{suffix}"
    with site.application(redirect_from=www, redirect_to=apex):
        site.ingress("shop", [([apex, www], "shop-tls")], issuer)
        site.ready("shop-tls")
        wait_for(lambda: set(site.served(www).names) == {apex, www}, "Traefik serves both names")
    site.nothing_left()


def test_applied_again_orders_nothing(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A Certificate and its Ingress, deleted and applied again, take the Secret over without an order.

    Mutation: judge a Secret by the UID in its annotation alone, and a second order is placed.
    """
    host = f"web.{suffix}"
    site.ingress("web", [([host], "web-tls")], issuer)
    site.ready("web-tls")
    serial = site.leaf("web-tls").serial_number
    site.delete(site.ingress_path("web"))
    wait_for(lambda: site.get(site.certificate_path("web-tls")) is None, "the Certificate goes with its Ingress")
    mark = lab.mark()
    site.ingress("web", [([host], "web-tls")], issuer)
    site.condition("web-tls", "Ready", "True")
    site.event("web-tls", "Adopted")
    assert lab.orders(mark) == 0
    assert site.leaf("web-tls").serial_number == serial
    uid = (site.get(site.certificate_path("web-tls")) or {})["metadata"]["uid"]
    secret = site.secret("web-tls")
    assert secret
    assert secret["metadata"]["annotations"]["certbotk8s.io/certificate-uid"] == uid


def test_a_secret_of_another_tool(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A Secret of somebody else is never overwritten; with `adopt` and a certificate that fits it becomes ours,
    unordered.

    Mutation: skip `claim` for Secrets without our annotation, and the foreign Secret is replaced.
    """
    host = f"web.{suffix}"
    site.certificate("first", [host], issuer)
    site.ready("first")
    made = site.secret("first")
    assert made
    foreign = {key: base64.b64decode(value) for key, value in made["data"].items()}
    site.put_secret("theirs", foreign, kind="kubernetes.io/tls")
    mark = lab.mark()
    site.certificate("second", [host], issuer, secretName="theirs")
    found = site.condition("second", "Ready", "False", "SecretNotOwned")
    assert f"{site.namespace}/theirs" in found["message"]
    assert "certbotk8s.io/adopt=true" in found["message"]
    site.event("second", "SecretNotOwned")
    assert "labels" not in (site.secret("theirs") or {})["metadata"]
    site.annotate("second", adopt="true")
    site.condition("second", "Ready", "True")
    assert lab.orders(mark) == 0
    assert (site.secret("theirs") or {})["metadata"]["annotations"]["certbotk8s.io/certificate"] == "second"


def test_a_foreign_secret_that_does_not_fit_is_not_adopted(site: Site, issuer: str, suffix: str) -> None:
    """Adoption asked for a Secret that does not serve the spec is refused with what is wrong with it.

    Mutation: adopt without asking `misfit`.
    """
    site.put_secret("junk", {"tls.crt": b"junk", "tls.key": b"junk"}, kind="kubernetes.io/tls")
    manifest = site.certificate_manifest("web", [f"web.{suffix}"], issuer, secretName="junk")
    manifest["metadata"]["annotations"] = {"certbotk8s.io/adopt": "true"}
    site.create(f"{CERTIFICATES}/namespaces/{site.namespace}/certificates", manifest)
    found = site.condition("web", "Ready", "False", "SecretNotOwned")
    assert "tls.crt: no PEM certificate that can be read" in found["message"]
    assert (site.secret("junk") or {})["data"]["tls.crt"] == "anVuaw=="


def test_renew_now_orders_once_for_each_value(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Each new value of the renew-now annotation orders once; the same value again orders nothing.

    Mutation: do not write status.renewNow, and orders are placed until the shortest interval stops them.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    first = site.ready("web")["serialNumber"]
    mark = lab.mark()
    site.annotate("web", renew_now="monday")
    second = site.ready("web", revision=2)["serialNumber"]
    assert second != first
    site.annotate("web", renew_now="monday", x="y")
    site.annotate("web", renew_now="tuesday")
    third = site.ready("web", revision=3)["serialNumber"]
    assert third not in {first, second}
    site.nothing_left()
    assert lab.orders(mark) == 2


def test_changed_names_are_ordered(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A name added to the spec is ordered at once, although the last certificate is young.

    Mutation: compare the shortest interval without the generation in `_too_soon`.
    """
    site.certificate("web", [f"a.{suffix}"], issuer)
    site.ready("web")
    site.patch_certificate("web", {"spec": {"dnsNames": [f"a.{suffix}", f"b.{suffix}"]}})
    site.ready("web", revision=2)
    names = site.leaf("web").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert sorted(str(name.value) for name in names.value) == [f"a.{suffix}", f"b.{suffix}"]


def test_a_deleted_secret_is_ordered_at_most_once_an_interval(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Deleting the Secret of a fresh certificate again and again costs no order before the interval has passed.

    Mutation: drop `_too_soon` from HOLDS, and each deletion costs an order.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    mark = lab.mark()
    for _ in range(3):
        site.delete(site.secret_path("web"))
    found = site.condition("web", "Ready", "False", "BackingOff")
    assert f"certctl renew -n {site.namespace} web" in found["message"]
    assert lab.orders(mark) == 0
    site.annotate("web", renew_now="now")
    site.ready("web", revision=2)
    assert lab.orders(mark) == 1


def test_two_certificates_one_secret(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Of two Certificates that name one Secret the owner is served; the other says so, orders nothing, and follows
    later.

    Mutation: drop `_secret_conflict` from HOLDS.
    """
    site.certificate("one", [f"one.{suffix}"], issuer, secretName="shared")
    site.ready("one")
    mark = lab.mark()
    site.certificate("two", [f"two.{suffix}"], issuer, secretName="shared")
    found = site.condition("two", "Ready", "False", "SecretConflict")
    assert f"{site.namespace}/one" in found["message"]
    assert lab.orders(mark) == 0
    site.delete(site.certificate_path("one"))
    site.ready("two")
    assert lab.orders(mark) == 1


def test_same_names_are_ordered_one_after_the_other(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """Two Certificates for the same names are both issued, and never have an order in flight at once.

    Mutation: let `Claims.take` always answer None.
    """
    names = [f"x.{suffix}", f"y.{suffix}"]
    site.certificate("one", names, issuer)
    site.certificate("two", names, issuer)
    one, two = site.ready("one"), site.ready("two")
    assert one["serialNumber"] != two["serialNumber"]
    site.nothing_left()


@pytest.mark.parametrize(("algorithm", "size", "encoding"), [("RSA", 2048, "PKCS1"), ("ECDSA", 384, "PKCS8")])
def test_key_kinds(site: Site, issuer: str, suffix: str, algorithm: str, size: int, encoding: str) -> None:
    """The key is of the kind, size and encoding asked for, and is kept where rotationPolicy says Never.

    Mutation: ignore `encoding` in the key maker, or `rotation_policy` in `_kept_key`.
    """
    key = {"algorithm": algorithm, "size": size, "encoding": encoding, "rotationPolicy": "Never"}
    site.certificate("web", [f"web.{suffix}"], issuer, privateKey=key)
    site.ready("web")
    before = site.secret("web")
    site.annotate("web", renew_now="1")
    site.ready("web", revision=2)
    after = site.secret("web")
    assert before
    assert after
    assert before["data"]["tls.key"] == after["data"]["tls.key"]
    assert before["data"]["tls.crt"] != after["data"]["tls.crt"]
    text = base64.b64decode(after["data"]["tls.key"]).decode()
    assert ("BEGIN PRIVATE KEY" in text) == (encoding == "PKCS8")
    assert site.leaf("web").public_key().key_size == size  # type: ignore[union-attr]


def test_a_fight_over_a_secret_ends(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """A Secret of which somebody else removes our label again and again is left alone after five times, unordered.

    Mutation: drop `_fight` from `claim`, and the controller writes for ever.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    mark = lab.mark()
    for _ in range(7):
        lab.kubectl("-n", site.namespace, "label", "secret", "web", "certbotk8s.io/role-")
        time.sleep(0.5)
    found = site.condition("web", "Ready", "False", "SecretConflict")
    assert f"Secret {site.namespace}/web 5 times" in found["message"]
    writes = [w for w in lab.kube_writes(mark) if (w.resource, w.name) == ("secrets", "web")]
    assert len(writes) == 5
    assert lab.orders(mark) == 0


def test_a_status_written_by_others_is_replaced(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """An issuance that somebody else wrote into status is looked up, found to be none, and gone; nothing waits for it.

    Mutation: write status by server-side apply, which leaves what another manager has written.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    status = site.status("web")
    junk = {
        "generation": 1,
        "attempt": 1,
        "requestHash": "x",
        "orderSet": "x",
        "state": "Finalizing",
        "startedAt": "2026-01-01T00:00:00Z",
        "issuerRef": {"name": issuer, "kind": "ClusterIssuer"},
        "accountURI": status["accountURI"],
        "orderURL": f"{lab.acme.directory.removesuffix('/dir')}/my-order/none",
        "renewNow": "junk",
    }
    patch = json.dumps({"status": {"issuance": junk, "failedAttempts": 7}})
    lab.kubectl("-n", site.namespace, "patch", "cbcert", "web", "--subresource=status", "--type=merge", "-p", patch)
    wait_for(lambda: "issuance" not in site.status("web"), "the issuance is gone")
    site.condition("web", "Ready", "True")
    assert site.status("web").get("nextAttemptTime")
