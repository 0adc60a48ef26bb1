"""An annotated Ingress asks for certificates: what it asks for becomes Certificates, and stays so."""

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.controller import Controller
from tests.lab.lab import Lab
from tests.site import CERTIFICATES, Site, assert_plain, wait_for

ISSUER, CLUSTER_ISSUER = "certbotk8s.io/issuer", "certbotk8s.io/cluster-issuer"
LEGACY_CLASS = "kubernetes.io/ingress.class"
# Nobody makes it: Certificates that wait for it order nothing, where only the objects count.
NOBODY = "nobody"


@pytest.fixture(autouse=True)
def _plain(site: Site, controller: Controller) -> Iterator[None]:
    """Whatever a test provokes is told in plain words."""
    yield
    assert_plain(site.said())


def certificates(site: Site) -> dict[str, dict[str, Any]]:
    """The Certificates of the namespace by name."""
    found: Any = site.lab.api(f"{CERTIFICATES}/namespaces/{site.namespace}/certificates")["items"]
    return {each["metadata"]["name"]: each for each in found}


def names(site: Site) -> dict[str, list[str]]:
    """The names that each Certificate asks for."""
    return {name: each["spec"]["dnsNames"] for name, each in certificates(site).items()}


def issuer_of(certificate: dict[str, Any]) -> tuple[str, str]:
    """Kind and name of the issuer that a Certificate asks."""
    ref = certificate["spec"]["issuerRef"]
    return ref["kind"], ref["name"]


def expect(site: Site, wanted: dict[str, list[str]]) -> None:
    """Wait until just these Certificates ask for these names."""
    try:
        wait_for(lambda: names(site) == wanted, f"Certificates {wanted}")
    except AssertionError as error:
        raise AssertionError(f"{error}; there are {names(site)}") from None


def change(site: Site, name: str, *, tls: list[tuple[list[str], str]] | None = None, **annotations: str | None) -> None:
    """Change an Ingress: its tls entries, and annotations by `issuer` and `cluster_issuer` (None removes one)."""
    patch: dict[str, Any] = {}
    if tls is not None:
        patch["spec"] = {"tls": [{"hosts": hosts, "secretName": secret} for hosts, secret in tls]}
    if annotations:
        keys = {"issuer": ISSUER, "cluster_issuer": CLUSTER_ISSUER}
        patch["metadata"] = {"annotations": {keys[key]: value for key, value in annotations.items()}}
    site.patch("ingress", name, patch)


@pytest.mark.parametrize(("annotation", "kind"), [(ISSUER, "Issuer"), (CLUSTER_ISSUER, "ClusterIssuer")])
def test_one_certificate_for_each_tls_entry(site: Site, suffix: str, annotation: str, kind: str) -> None:
    """Each tls entry becomes a Certificate of the name of its Secret, for its hosts, from the annotation's issuer, and
    owned by the Ingress; an Event says so.

    Mutation: take kind Issuer for both annotations, or leave out the owner reference.
    """
    tls = [([f"a.{suffix}", f"b.{suffix}"], "first-tls"), ([f"c.{suffix}"], "second-tls")]
    ingress = site.create(site.ingress_path(), site.ingress_manifest("web", tls, {annotation: NOBODY}))
    expect(site, {secret: hosts for hosts, secret in tls})
    for name, each in certificates(site).items():
        assert each["spec"]["secretName"] == name
        assert issuer_of(each) == (kind, NOBODY)
        meta: Any = ingress["metadata"]
        assert each["metadata"]["ownerReferences"] == [
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "Ingress",
                "name": "web",
                "uid": meta["uid"],
                "controller": True,
            }
        ]
    said = site.event("web", "CertificateCreated", "first-tls", kind="Ingress")
    assert said == f"Certificate {site.namespace}/first-tls for a.{suffix} and b.{suffix} created"


def test_an_ingress_without_annotation_is_nobodys_business(site: Site, suffix: str) -> None:
    """An Ingress that asks for nothing gets nothing, not even an Event.

    Mutation: look at spec.tls alone in `is_annotated` and `wanted`.
    """
    site.ingress("plain", [([f"a.{suffix}"], "plain-tls")])
    site.ingress("web", [([f"b.{suffix}"], "web-tls")], NOBODY)
    expect(site, {"web-tls": [f"b.{suffix}"]})
    time.sleep(0.5)
    expect(site, {"web-tls": [f"b.{suffix}"]})
    assert site.events("plain", "Ingress") == []


def test_changes_are_carried_over(site: Site, suffix: str) -> None:
    """Hosts added and removed, another issuer, an entry added and one removed: each change reaches the Certificates.

    Mutation: leave a field out of `_differs`.
    """
    a, b, c = (f"{letter}.{suffix}" for letter in "abc")
    site.ingress("web", [([a], "web-tls")], NOBODY)
    expect(site, {"web-tls": [a]})
    uid = certificates(site)["web-tls"]["metadata"]["uid"]
    change(site, "web", tls=[([a, b], "web-tls")])
    expect(site, {"web-tls": [a, b]})
    said = site.event("web", "CertificateUpdated", kind="Ingress")
    assert said == f"Certificate {site.namespace}/web-tls for {a} and {b} brought up to date"
    change(site, "web", tls=[([b], "web-tls"), ([c], "more-tls")])
    expect(site, {"web-tls": [b], "more-tls": [c]})
    change(site, "web", cluster_issuer=None, issuer="other")
    wait_for(
        lambda: {issuer_of(each) for each in certificates(site).values()} == {("Issuer", "other")},
        "both Certificates ask the other issuer",
    )
    change(site, "web", tls=[([b], "web-tls")])
    expect(site, {"web-tls": [b]})
    assert certificates(site)["web-tls"]["metadata"]["uid"] == uid


def test_what_others_set_on_a_certificate_stays(site: Site, suffix: str) -> None:
    """A field that an Ingress says nothing about is its owner's to set, and outlives a change of the hosts.

    Mutation: write the whole spec, with defaults, in `_apply`.
    """
    a, b = f"a.{suffix}", f"b.{suffix}"
    site.ingress("web", [([a], "web-tls")], NOBODY)
    expect(site, {"web-tls": [a]})
    site.patch_certificate("web-tls", {"spec": {"profile": "shortlived", "privateKey": {"algorithm": "ECDSA"}}})
    change(site, "web", tls=[([a, b], "web-tls")])
    expect(site, {"web-tls": [a, b]})
    spec = certificates(site)["web-tls"]["spec"]
    assert (spec["profile"], spec["privateKey"]["algorithm"]) == ("shortlived", "ECDSA")


def remove_entry(site: Site, keep: str) -> None:
    change(site, "web", tls=[([keep], "keep-tls")])


def remove_annotation(site: Site, keep: str) -> None:
    change(site, "web", cluster_issuer=None)


def remove_ingress(site: Site, keep: str) -> None:
    site.delete(site.ingress_path("web"))


@pytest.mark.parametrize("remove", [remove_entry, remove_annotation, remove_ingress])
def test_what_is_no_longer_asked_for(site: Site, issuer: str, suffix: str, remove: Callable[[Site, str], None]) -> None:
    """A tls entry, the annotation or the Ingress taken away takes the Certificate with it; the Secret stays.

    Mutation: own the Secret by the Certificate, or skip the deletion in `IngressReconciler`.
    """
    keep, gone = f"keep.{suffix}", f"gone.{suffix}"
    site.ingress("web", [([keep], "keep-tls"), ([gone], "gone-tls")], issuer)
    site.ready("keep-tls")
    site.ready("gone-tls")
    remove(site, keep)
    expect(site, {"keep-tls": [keep]} if remove is remove_entry else {})
    if remove is not remove_ingress:
        said = site.event("web", "CertificateDeleted", "gone-tls", kind="Ingress")
        assert said.endswith("this Ingress no longer names it. Its Secret stays")
    time.sleep(0.5)
    for secret in ("keep-tls", "gone-tls"):
        assert site.leaf(secret)
    site.nothing_left()


@pytest.mark.parametrize(
    ("tls", "annotations", "says"),
    [
        (
            [{"hosts": ["a"], "secretName": "web-tls"}],
            {ISSUER: NOBODY, CLUSTER_ISSUER: NOBODY},
            f"It has both annotations {ISSUER} and {CLUSTER_ISSUER}: keep one of them.",
        ),
        ([{"hosts": ["a"]}], {ISSUER: NOBODY}, "spec.tls[0] has no secretName: name the Secret for the certificate."),
        (
            [{"hosts": ["a"], "secretName": "ok-tls"}, {"secretName": "web-tls"}],
            {ISSUER: NOBODY},
            "spec.tls[1] has no hosts: list the names for Secret web-tls.",
        ),
        ([], {ISSUER: NOBODY}, "It asks for a certificate but has no spec.tls: add an entry with hosts and a secretN"),
    ],
    ids=["both annotations", "no secretName", "no hosts", "no tls"],
)
def test_an_ingress_that_cannot_be_served(
    site: Site, suffix: str, tls: list[dict[str, Any]], annotations: dict[str, str], says: str
) -> None:
    """What is wrong with an Ingress is told by an Event about it; entries without fault are served.

    Mutation: drop that line of `wanted`.
    """
    entries = [entry | ({"hosts": [f"a.{suffix}"]} if "hosts" in entry else {}) for entry in tls]
    manifest = site.ingress_manifest("web", [([f"a.{suffix}"], "x")], annotations)
    manifest["spec"]["tls"] = entries
    site.create(site.ingress_path(), manifest)
    site.event("web", "IngressInvalid", says, kind="Ingress")
    good = [entry["secretName"] for entry in entries if entry.get("hosts") and entry.get("secretName")]
    expect(site, {} if len(annotations) == 2 else {name: [f"a.{suffix}"] for name in good})


def test_a_mistake_takes_nothing_away(site: Site, suffix: str) -> None:
    """A second annotation on a working Ingress is told, and its Certificates stay as they are until it is clear again.

    Mutation: treat an Ingress with both annotations as one that asks for nothing.
    """
    host = f"a.{suffix}"
    site.ingress("web", [([host], "web-tls")], NOBODY)
    expect(site, {"web-tls": [host]})
    uid = certificates(site)["web-tls"]["metadata"]["uid"]
    change(site, "web", issuer=NOBODY)
    site.event("web", "IngressInvalid", "both annotations", kind="Ingress")
    change(site, "web", issuer=None)
    time.sleep(0.5)
    assert certificates(site)["web-tls"]["metadata"]["uid"] == uid


def test_two_entries_for_one_secret(site: Site, suffix: str) -> None:
    """Two tls entries that name one Secret become one Certificate for the hosts of both, each once.

    Mutation: let the later entry win.
    """
    a, b, c = (f"{letter}.{suffix}" for letter in "abc")
    site.ingress("web", [([a, b], "web-tls"), ([b, c], "web-tls")], NOBODY)
    expect(site, {"web-tls": [a, b, c]})


def test_a_certificate_of_somebody_else(site: Site, suffix: str) -> None:
    """A Certificate of that name that the Ingress does not own is neither changed nor deleted; an Event says so.

    Mutation: look for Certificates by name and not by owner.
    """
    host = f"a.{suffix}"
    site.certificate("web-tls", [f"mine.{suffix}"], NOBODY)
    site.ingress("web", [([host], "web-tls"), ([host], "new-tls")], NOBODY)
    said = site.event("web", "IngressInvalid", kind="Ingress")
    assert said == (
        f"Certificate {site.namespace}/web-tls exists and is not owned by this Ingress: it is left as it is."
    )
    expect(site, {"web-tls": [f"mine.{suffix}"], "new-tls": [host]})
    change(site, "web", tls=[([host], "new-tls")])
    change(site, "web", cluster_issuer=None)
    expect(site, {"web-tls": [f"mine.{suffix}"]})


@pytest.fixture
def second_class(lab: Lab) -> Iterator[str]:
    """A second IngressClass of the same ingress controller, which it was not told to serve."""
    path, name = "/apis/networking.k8s.io/v1/ingressclasses", f"second-{secrets.token_hex(3)}"
    lab.api(path, body={"metadata": {"name": name}, "spec": {"controller": "traefik.io/ingress-controller"}})
    yield name
    lab.api(f"{path}/{name}", method="DELETE")


def challenge_of(site: Site, certificate: str) -> dict[str, Any]:
    """The challenge Ingress of a Certificate, once it stands."""
    return wait_for(lambda: site.challenge_ingresses(certificate), "the challenge stands")[0]


def test_the_legacy_class_of_the_asking_ingress(lab: Lab, site: Site, issuer: str, suffix: str) -> None:
    """An Ingress with the annotation of old times gets its challenge by that annotation, and its certificate.

    Mutation: write the legacy class into spec.ingressClassName of the challenge.
    """
    host = f"web.{suffix}"
    lab.set_dns(host, addresses=["127.0.0.2"])
    try:
        manifest = site.ingress_manifest(
            "web", [([host], "web-tls")], {CLUSTER_ISSUER: issuer, LEGACY_CLASS: "traefik"}
        )
        del manifest["spec"]["ingressClassName"]
        site.create(site.ingress_path(), manifest)
        challenge = challenge_of(site, "web-tls")
        assert challenge["metadata"]["annotations"][LEGACY_CLASS] == "traefik"
        assert "ingressClassName" not in challenge["spec"]
        waiting = site.condition("web-tls", "Issuing", "True", "OrderPending", "refuses the connection at 127.0.0.2")
        assert host in waiting["message"]
    finally:
        lab.clear_dns(host)
    site.ready("web-tls")
    site.nothing_left()


def test_the_class_of_the_asking_ingress(lab: Lab, site: Site, issuer: str, suffix: str, second_class: str) -> None:
    """The challenge is of the class of the Ingress that asked, though another is the default; unless the issuer names
    one.

    Mutation: swap the first two steps of `_class`, or take the default class at once.
    """
    one, two = f"one.{suffix}", f"two.{suffix}"
    site.issuer("named", solvers=[{"http01": {"ingress": {"ingressClassName": "traefik"}}}])
    for host in (one, two):
        lab.set_dns(host, addresses=["127.0.0.2"])
    try:
        site.ingress("one", [([one], "one-tls")], issuer, ingressClassName=second_class)
        manifest = site.ingress_manifest("two", [([two], "two-tls")], {ISSUER: "named"}, ingressClassName=second_class)
        site.create(site.ingress_path(), manifest)
        assert challenge_of(site, "one-tls")["spec"]["ingressClassName"] == second_class
        assert challenge_of(site, "two-tls")["spec"]["ingressClassName"] == "traefik"
        site.delete(site.ingress_path("one"))
        wait_for(lambda: not site.challenge_ingresses("one-tls"), "the challenge goes with the Ingress")
    finally:
        for host in (one, two):
            lab.clear_dns(host)
    site.ready("two-tls")
    site.nothing_left()


def test_what_changes_while_nobody_looks(site: Site, controller: Controller, suffix: str) -> None:
    """What changed while the controller was away is carried over when it is back: hosts, and an annotation removed.

    Mutation: wake an Ingress only when it is annotated.
    """
    a, b = f"a.{suffix}", f"b.{suffix}"
    site.ingress("web", [([a], "web-tls")], NOBODY)
    site.ingress("old", [([a], "old-tls")], NOBODY)
    expect(site, {"web-tls": [a], "old-tls": [a]})
    controller.kill()
    change(site, "web", tls=[([b], "web-tls")])
    change(site, "old", cluster_issuer=None)
    controller.start()
    controller.wait_ready()
    expect(site, {"web-tls": [b]})


def test_a_certificate_deleted_by_hand(site: Site, suffix: str) -> None:
    """A Certificate that an Ingress asks for is there again when somebody has deleted it.

    Mutation: do not wake the owner of a deleted Certificate.
    """
    host = f"a.{suffix}"
    site.ingress("web", [([host], "web-tls")], NOBODY)
    expect(site, {"web-tls": [host]})
    uid = certificates(site)["web-tls"]["metadata"]["uid"]
    site.lab.api(site.certificate_path("web-tls"), method="DELETE")
    wait_for(lambda: (certificates(site).get("web-tls") or {}).get("metadata", {}).get("uid", uid) != uid, "a new one")
    expect(site, {"web-tls": [host]})


def test_a_foreign_certificate_that_goes(site: Site, suffix: str) -> None:
    """When the Certificate of somebody else that stood in the way is deleted, the Ingress gets its own by itself.

    Mutation: do not look for the Ingresses that name a deleted Certificate in `_certificate_changed`.
    """
    host = f"a.{suffix}"
    site.certificate("web-tls", [f"mine.{suffix}"], NOBODY)
    site.ingress("web", [([host], "web-tls")], NOBODY)
    site.event("web", "IngressInvalid", kind="Ingress")
    site.lab.api(site.certificate_path("web-tls"), method="DELETE")
    expect(site, {"web-tls": [host]})
