"""How annotated Ingresses become Certificates."""

from __future__ import annotations

from typing import Any

import pytest

from certbotk8s.domain import api
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Key
from tests.unit.reconciling import NAME, SHOP, World

TLS: list[dict[str, Any]] = [{"hosts": [NAME], "secretName": "web-tls"}]


def made(world: World) -> dict[str, api.Certificate]:
    return {each.metadata.name: each for each in world.api.all(api.CERTIFICATE)}


def annotated(*tls: dict[str, Any], **annotations: str) -> World:
    """An Ingress, annotated for Issuer ca unless the test says otherwise, and what became of it."""
    world = World()
    world.ingress(list(tls), **(annotations or {"issuer": "ca"}))
    world.settle()
    return world


def complaints(world: World) -> list[str]:
    return [event.message for event in world.cluster.events if event.reason is Reason.INGRESS_INVALID]


@pytest.mark.parametrize(("annotation", "kind"), [("issuer", "Issuer"), ("cluster_issuer", "ClusterIssuer")])
def test_an_annotated_ingress_gets_a_certificate(annotation: str, kind: str) -> None:
    """The Certificate has the Secret's name, the hosts, the issuer of the annotation, and the Ingress as its owner.

    Mutation: take every issuer for a ClusterIssuer.
    """
    world = annotated(*TLS, **{annotation: "ca"})
    certificate = made(world)["web-tls"]
    assert certificate.spec.secret_name == "web-tls"
    assert certificate.spec.dns_names == (NAME,)
    assert certificate.spec.issuer_ref == api.IssuerRef("ca", kind=kind)
    (owner,) = certificate.metadata.owner_references
    ingress = world.api.get(api.INGRESS, SHOP, "web")
    assert ingress
    assert (owner.kind, owner.name, owner.uid, owner.controller) == ("Ingress", "web", ingress.metadata.uid, True)
    assert [event.reason for event in world.cluster.events if event.about.kind == "Ingress"] == [
        Reason.CERTIFICATE_CREATED
    ]


def test_from_annotation_to_secret() -> None:
    """With an issuer there, the annotation alone leads to a Secret.

    Mutation: do not wake the Certificate that was made.
    """
    world = World()
    world.issuer()
    world.ingress(TLS, issuer="ca")
    world.settle()
    assert world.condition("Ready").status == "True"
    assert world.tls() == world.ca.issued[0]


def test_an_ingress_without_annotation_is_left_alone() -> None:
    """No annotation, no Certificate, no complaint.

    Mutation: treat an empty annotation as a name.
    """
    world = annotated(*TLS, unrelated="x")
    assert made(world) == {}
    assert complaints(world) == []


def test_a_changed_ingress_changes_its_certificate() -> None:
    """Hosts and issuer follow the Ingress; what somebody else set in the Certificate stays; nothing changed, no write.

    Mutation: replace the whole spec.
    """
    world = annotated(*TLS)
    raw = world.raw(api.CERTIFICATE, "web-tls")
    raw["spec"]["renewBefore"] = "240h"
    world.api.put(api.CERTIFICATE, raw)
    world.ingress([{"hosts": [NAME, "www.example.test"], "secretName": "web-tls"}], cluster_issuer="le")
    world.settle()
    spec = made(world)["web-tls"].spec
    assert spec.dns_names == (NAME, "www.example.test")
    assert spec.issuer_ref == api.IssuerRef("le", kind="ClusterIssuer")
    assert spec.renew_before == "240h"
    world.cluster.writes.clear()
    world.process.queue.add(Key("Ingress", SHOP, "web"))
    world.settle()
    assert [write for write in world.cluster.writes if write[1] == "Certificate"] == []


def test_what_an_ingress_no_longer_names_goes_and_its_secret_stays() -> None:
    """An entry removed takes its Certificate along; the Secret stays; with the entry back nothing is ordered.

    Mutation: keep what is not named, or delete the Secret.
    """
    world = World()
    world.issuer()
    world.ingress([*TLS, {"hosts": ["b.example.test"], "secretName": "b-tls"}], issuer="ca")
    world.settle()
    world.ingress(TLS, issuer="ca")
    world.settle()
    assert set(made(world)) == {"web-tls"}
    assert world.api.get(api.SECRET, SHOP, "b-tls")
    world.ingress([*TLS, {"hosts": ["b.example.test"], "secretName": "b-tls"}], issuer="ca")
    world.settle()
    assert len(world.ca.issued) == 2
    assert world.condition("Ready", "b-tls").status == "True"


def test_an_annotation_taken_away_takes_the_certificate_along() -> None:
    """Without its annotation the Ingress wants no Certificate.

    Mutation: look at annotated Ingresses alone.
    """
    world = annotated(*TLS)
    world.ingress(TLS)
    world.settle()
    assert made(world) == {}


def test_a_certificate_of_somebody_else_is_not_touched() -> None:
    """A Certificate of that name that the Ingress does not own stays as it is, and the Ingress is told.

    Mutation: apply over it.
    """
    world = World()
    world.certificate(names=("mine.example.test",))
    world.ingress(TLS, issuer="ca")
    world.settle()
    assert made(world)["web-tls"].spec.dns_names == ("mine.example.test",)
    assert made(world)["web-tls"].metadata.owner_references == ()
    assert complaints(world) == [
        "Certificate shop/web-tls exists and is not owned by this Ingress: it is left as it is."
    ]
    world.delete(api.CERTIFICATE, "web-tls")
    world.process.queue.add(Key("Ingress", SHOP, "web"))
    world.settle()
    assert made(world)["web-tls"].spec.dns_names == (NAME,)


def test_both_annotations_are_told_and_destroy_nothing() -> None:
    """An Ingress with both annotations is told to keep one; the Certificate that it has goes on.

    Mutation: want nothing where it is not clear what is wanted.
    """
    world = annotated(*TLS)
    world.ingress(TLS, issuer="ca", cluster_issuer="le")
    world.settle()
    assert made(world)["web-tls"].spec.issuer_ref == api.IssuerRef("ca")
    (complaint,) = set(complaints(world))
    assert "certbotk8s.io/issuer and certbotk8s.io/cluster-issuer: keep one of them" in complaint


@pytest.mark.parametrize(
    ("tls", "words"),
    [
        ([{"hosts": [NAME]}], "spec.tls[0] has no secretName"),
        ([*TLS, {"secretName": "x-tls"}], "spec.tls[1] has no hosts: list the names for Secret x-tls"),
        ([], "no spec.tls"),
    ],
)
def test_an_entry_that_lacks_something_is_told(tls: list[dict[str, Any]], words: str) -> None:
    """What an entry lacks is said with its number; the other entries get their Certificates.

    Mutation: pass over it in silence.
    """
    world = annotated(*tls)
    assert words in complaints(world)[0]
    assert set(made(world)) == {"web-tls"} & {entry.get("secretName", "") for entry in tls}


def test_entries_for_one_secret_make_one_certificate() -> None:
    """Two entries that name one Secret make one Certificate for all their hosts, each once.

    Mutation: let the last entry win.
    """
    world = annotated(*TLS, {"hosts": ["b.example.test", NAME], "secretName": "web-tls"})
    assert made(world)["web-tls"].spec.dns_names == (NAME, "b.example.test")


def test_a_certificate_that_somebody_deletes_is_made_again() -> None:
    """A Certificate of an Ingress that is deleted by hand comes back, takes its Secret over, and orders nothing.

    Mutation: do not wake the Ingress.
    """
    world = World()
    world.issuer()
    world.ingress(TLS, issuer="ca")
    world.settle()
    world.delete(api.CERTIFICATE, "web-tls")
    world.settle()
    assert world.condition("Ready").status == "True"
    assert len(world.ca.issued) == 1


def test_a_deleted_ingress_is_left_to_the_garbage_collector() -> None:
    """Nothing is written for an Ingress that is gone; its Certificates go with it, their Secrets stay.

    Mutation: make its Certificates once more.
    """
    world = World()
    world.issuer()
    world.ingress(TLS, issuer="ca")
    world.settle()
    world.delete(api.INGRESS, "web")
    world.settle()
    assert made(world) == {}
    assert world.api.get(api.SECRET, SHOP, "web-tls")


def test_a_certificate_that_the_api_server_refuses_is_told_and_stops_no_other() -> None:
    """A host that no Certificate can have is told with the API server's words; the other entries go on.

    Mutation: let the refusal end the reconcile.
    """
    world = World()

    def refuse(verb: str, kind: str, _namespace: str, name: str) -> None:
        if (verb, kind, name) == ("create", "Certificate", "bad-tls"):
            raise PermanentError(Reason.INVALID_SPEC, "spec.dnsNames[0]: must be a DNS name")

    world.cluster.before = refuse
    world.ingress([{"hosts": ["bad..name"], "secretName": "bad-tls"}, *TLS], issuer="ca")
    world.settle()
    assert set(made(world)) == {"web-tls"}
    assert "Certificate shop/bad-tls was refused: spec.dnsNames[0]: must be a DNS name." in complaints(world)
