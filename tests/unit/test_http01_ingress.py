"""What the solver `http01-ingress` writes, and what it refuses to write."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import (
    INGRESS,
    INGRESS_CLASS,
    Http01Spec,
    IngressSolverSpec,
    OwnerReference,
    SolverSpec,
)
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import SolverContext
from solvers.http01_ingress import IngressSolver
from tests.contract.test_solver_contract import presentation
from tests.fakes.cluster import ApiServer, FakeCluster

if TYPE_CHECKING:
    from certbotk8s.ports import Presentation

HOME = "certbotk8s"
NGINX = SolverSpec(http01=Http01Spec(ingress=IngressSolverSpec(ingress_class_name="nginx")))


@pytest.fixture
def cluster() -> FakeCluster:
    return in_memory()


def in_memory() -> FakeCluster:
    cluster = FakeCluster(ApiServer())
    cluster.watch(INGRESS)
    cluster.watch(INGRESS_CLASS)
    return cluster


def solver(cluster: FakeCluster) -> IngressSolver:
    return IngressSolver(SolverContext(cluster, SystemClock(), HOME, 80, ("127.0.0.1:1",)))


def stored(cluster: FakeCluster) -> dict[str, Any]:
    """The one Ingress that was written last, as JSON."""
    return cluster.server.log[-1].obj


def ingress(
    name: str, namespace: str = "shop", *, spec: dict[str, Any] | None = None, **metadata: Any
) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, **metadata}, "spec": spec or {}}


def ingress_class(name: str, *, default: bool = False, created: str = "") -> dict[str, Any]:
    annotations = {"ingressclass.kubernetes.io/is-default-class": "true"} if default else {}
    return {"metadata": {"name": name, "annotations": annotations}}


def asked_by(shown: Presentation, uid: str, name: str = "web") -> Presentation:
    """The same presentation, of a Certificate that was made for an Ingress."""
    owner = OwnerReference(api_version="networking.k8s.io/v1", kind="Ingress", name=name, uid=uid)
    metadata = msgspec.structs.replace(shown.certificate.metadata, owner_references=(owner,))
    return replace(shown, certificate=msgspec.structs.replace(shown.certificate, metadata=metadata))


def test_one_ingress_per_order_with_one_exact_rule_per_name(cluster: FakeCluster) -> None:
    """Every name gets a rule of its own to the responder's Service; fails when only the first challenge is shown."""
    solver(cluster).present(presentation("0a1b", "a.example.test", "b.example.test", spec=NGINX))
    written = stored(cluster)
    assert written["metadata"]["name"] == "certbotk8s-http01-0a1b"
    assert written["metadata"]["namespace"] == HOME
    assert "tls" not in written["spec"]
    assert written["spec"]["ingressClassName"] == "nginx"
    backend = {"service": {"name": "certbotk8s-http01", "port": {"number": 80}}}
    assert written["spec"]["rules"] == [
        {
            "host": host,
            "http": {
                "paths": [
                    {
                        "path": f"/.well-known/acme-challenge/{token}",
                        "pathType": "Exact",
                        "backend": backend,
                    }
                ]
            },
        }
        for host, token in (("a.example.test", "0a1b-0".ljust(43, "t")), ("b.example.test", "0a1b-1".ljust(43, "t")))
    ]


def test_it_says_whose_it_is_and_keeps_neighbours_away(cluster: FakeCluster) -> None:
    """Labels and annotations name the Certificate and switch off what would spoil the challenge; fails without one."""
    solver(cluster).present(presentation("0a1b", "a.example.test", spec=NGINX))
    metadata = stored(cluster)["metadata"]
    assert metadata["labels"] == {"certbotk8s.io/role": "challenge"}
    assert metadata["annotations"] == {
        "certbotk8s.io/certificate": "shop/web-tls",
        "certbotk8s.io/certificate-uid": "uid-1",
        "external-dns.kubernetes.io/controller": "none",
        "external-dns.alpha.kubernetes.io/controller": "none",
        "traefik.ingress.kubernetes.io/router.priority": "2000000000",
        "nginx.ingress.kubernetes.io/whitelist-source-range": "0.0.0.0/0,::/0",
        "zalando.org/skipper-ingress-redirect": "false",
        "haproxy.org/ssl-redirect": "false",
    }


def test_one_write_to_present_and_one_to_clean_up(cluster: FakeCluster) -> None:
    """Writes are what issuance costs the API server; fails when present asks first by a write, or applies always."""
    solver(cluster).present(presentation("0a1b", "a.example.test", spec=NGINX))
    solver(cluster).clean_up("0a1b")
    assert [verb for verb, *_ in cluster.writes] == ["create", "delete"]
    assert cluster.server.all(INGRESS) == []


class TestIngressClass:
    """Which ingress controller serves the challenge."""

    def test_the_issuer_decides_first(self, cluster: FakeCluster) -> None:
        """Its ingressClassName beats the asking Ingress and the default; fails when the order is another."""
        cluster.server.put(INGRESS_CLASS, ingress_class("by-default", default=True))
        web = cluster.server.put(INGRESS, ingress("web", spec={"ingressClassName": "asking"}))
        solver(cluster).present(asked_by(presentation("0a1b", "a.example.test", spec=NGINX), web.metadata.uid))
        assert stored(cluster)["spec"]["ingressClassName"] == "nginx"

    def test_then_the_ingress_that_asked(self, cluster: FakeCluster) -> None:
        """Its class beats the default one; fails when owners are not looked at."""
        cluster.server.put(INGRESS_CLASS, ingress_class("by-default", default=True))
        web = cluster.server.put(INGRESS, ingress("web", spec={"ingressClassName": "asking"}))
        solver(cluster).present(asked_by(presentation("0a1b", "a.example.test"), web.metadata.uid))
        assert stored(cluster)["spec"]["ingressClassName"] == "asking"

    def test_its_legacy_annotation_is_carried_over_as_one(self, cluster: FakeCluster) -> None:
        """Controllers told by annotation need the annotation; fails when it is turned into ingressClassName."""
        web = cluster.server.put(INGRESS, ingress("web", annotations={"kubernetes.io/ingress.class": "gce"}))
        solver(cluster).present(asked_by(presentation("0a1b", "a.example.test"), web.metadata.uid))
        assert stored(cluster)["metadata"]["annotations"]["kubernetes.io/ingress.class"] == "gce"
        assert "ingressClassName" not in stored(cluster)["spec"]

    def test_another_ingress_of_that_name_did_not_ask(self, cluster: FakeCluster) -> None:
        """The owner's uid counts; fails when the name alone is compared."""
        cluster.server.put(INGRESS_CLASS, ingress_class("by-default", default=True))
        cluster.server.put(INGRESS, ingress("web", spec={"ingressClassName": "asking"}))
        solver(cluster).present(asked_by(presentation("0a1b", "a.example.test"), "another-uid"))
        assert stored(cluster)["spec"]["ingressClassName"] == "by-default"

    def test_a_legacy_class_that_is_no_name_goes_nowhere(self, cluster: FakeCluster) -> None:
        """A tenant's annotation ends in configuration files; fails when it is copied as it is."""
        bad = 'x;\n}} more_set_headers "a'
        web = cluster.server.put(INGRESS, ingress("web", annotations={"kubernetes.io/ingress.class": bad}))
        with pytest.raises(PermanentError):
            solver(cluster).present(asked_by(presentation("0a1b", "a.example.test"), web.metadata.uid))
        assert cluster.writes == []

    def test_of_several_defaults_the_youngest(self, cluster: FakeCluster) -> None:
        """As the API server's own admission does; fails when the first in the list is taken."""
        for name, second in (("a", 1), ("c", 3), ("b", 3), ("d", 2)):
            made = ingress_class(name, default=True)
            made["metadata"]["creationTimestamp"] = f"2026-01-01T00:00:0{second}Z"
            cluster.server.put(INGRESS_CLASS, made)
        solver(cluster).present(presentation("0a1b", "a.example.test"))
        assert stored(cluster)["spec"]["ingressClassName"] == "b"

    def test_none_at_all_is_said_with_what_to_set(self, cluster: FakeCluster) -> None:
        """The reason is NoIngressClass and the sentence names the field; fails when a class-less Ingress is written."""
        cluster.server.put(INGRESS_CLASS, ingress_class("not-default"))
        web = cluster.server.put(INGRESS, ingress("web"))
        with pytest.raises(PermanentError) as caught:
            solver(cluster).present(asked_by(presentation("0a1b", "a.example.test"), web.metadata.uid))
        assert caught.value.reason is Reason.NO_INGRESS_CLASS
        assert str(caught.value) == (
            "No ingress class for the challenge of a.example.test: set ingressClassName in the HTTP-01 solver of "
            "Issuer ca or in Ingress shop/web, or annotate an IngressClass with "
            'ingressclass.kubernetes.io/is-default-class: "true".'
        )
        assert cluster.writes == []


class TestDenied:
    """What the API server or an admission webhook says no to."""

    WORDS = (
        'admission webhook "validate.nginx.ingress.kubernetes.io" denied the request: ingress contains invalid paths: '
        "path /.well-known/acme-challenge/x cannot be used with pathType Exact"
    )

    @pytest.mark.parametrize("error", [PermanentError(Reason.INVALID_SPEC, WORDS), TemporaryError(WORDS)])
    def test_a_denied_path_type_is_replaced(self, cluster: FakeCluster, error: Exception) -> None:
        """Old ingress-nginx refuses Exact with a dot in the path; fails without the second attempt."""
        refusals = [error]

        def deny_once(*_: str) -> None:
            if refusals:
                raise refusals.pop()

        cluster.before = deny_once
        solver(cluster).present(presentation("0a1b", "a.example.test", "b.example.test", spec=NGINX))
        types = [rule["http"]["paths"][0]["pathType"] for rule in stored(cluster)["spec"]["rules"]]
        assert types == ["ImplementationSpecific", "ImplementationSpecific"]

    @pytest.mark.parametrize("error", [PermanentError(Reason.INVALID_SPEC, "quota exceeded"), Conflict("changed")])
    def test_any_other_refusal_is_passed_on(self, cluster: FakeCluster, error: Exception) -> None:
        """Once is enough to be told no; fails when every refusal is tried again with another path type."""

        def deny(*_: str) -> None:
            raise error

        cluster.before = deny
        with pytest.raises(type(error)):
            solver(cluster).present(presentation("0a1b", "a.example.test", spec=NGINX))
        assert len(cluster.writes) == 1


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


class TestInjection:
    """Names and tokens become part of other programs' configuration files."""

    @given(st.text(max_size=200).filter(lambda token: not set(token) <= set(TOKEN_CHARACTERS) or not token))
    def test_a_token_outside_base64url_is_not_served(self, token: str) -> None:
        """Whatever the CA sends, nothing but base64url enters a path; fails with a looser pattern."""
        cluster = in_memory()
        shown = presentation("0a1b", "a.example.test", spec=NGINX)
        challenge = msgspec.structs.replace(shown.challenges[0], token=token)
        with pytest.raises(PermanentError, match="base64url"):
            solver(cluster).present(replace(shown, challenges=(challenge,)))
        assert cluster.writes == []

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "*.example.test",
            "192.0.2.1",
            "2001:db8::1",
            "a..example.test",
            "-a.example.test",
            "a.example.test.",
            "a_b.example.test",
            "A.example.test",
            "a.example.test\n",
            "a.example.test;}",
            "a/b.example.test",
            f"{'a' * 64}.example.test",
            ".".join(["a" * 50] * 6),
            "münchen.example.test",
        ],
    )
    def test_a_name_that_is_no_dns_name_is_not_served(self, cluster: FakeCluster, name: str) -> None:
        """Only lower-case A-label names become hosts; fails when `match` stands for `fullmatch`, or `$` for the end."""
        with pytest.raises(PermanentError, match="no DNS name"):
            solver(cluster).present(presentation("0a1b", name, spec=NGINX))
        assert cluster.writes == []

    @given(st.lists(LABEL, min_size=0, max_size=5), st.sampled_from(["test", "xn--p1ai", "t3st", "a"]))
    def test_every_dns_name_is_served(self, labels: list[str], last: str) -> None:
        """The pattern refuses no name that a CA accepts; fails when labels may not begin with a digit."""
        cluster = in_memory()
        name = ".".join([*labels, last])
        solver(cluster).present(presentation("0a1b", name, spec=NGINX))
        assert stored(cluster)["spec"]["rules"][0]["host"] == name


TOKEN_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def test_leftovers_are_ours_alone(cluster: FakeCluster) -> None:
    """Nothing without our label, in another namespace or of another name is swept; fails when one check is missing."""
    ours = {"certbotk8s.io/role": "challenge"}
    cluster.server.put(INGRESS, ingress("certbotk8s-http01-left", HOME, labels=ours))
    cluster.server.put(INGRESS, ingress("certbotk8s-http01-unlabelled", HOME))
    cluster.server.put(INGRESS, ingress("certbotk8s-http01-elsewhere", "shop", labels=ours))
    cluster.server.put(INGRESS, ingress("something", HOME, labels=ours))
    assert list(solver(cluster).leftovers()) == ["left"]
