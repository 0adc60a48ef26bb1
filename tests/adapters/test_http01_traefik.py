"""HTTP-01 through a real Traefik: the solver's Ingress, the responder behind a Service, and the look from here."""

from __future__ import annotations

import contextlib
import http.client
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import pytest

from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import INGRESS, INGRESS_CLASS
from certbotk8s.kube.api import connect
from certbotk8s.kube.cluster import KubeCluster
from certbotk8s.ports import SolverContext
from solvers.http01_ingress import IngressSolver
from solvers.http01_responder import Answer, Responder
from tests.contract.test_solver_contract import presentation
from tests.lab.network import Ports
from tests.lab.processes import Children
from tests.lab.svcproxy import Backend
from tests.site import Site, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certbotk8s.ports import Presentation
    from tests.lab.lab import Lab

SERVICE = "certbotk8s-http01"


@dataclass
class Challenges:
    """The solver and the responder of one namespace of the lab; `answers` are what the responder knows."""

    solver: IngressSolver
    context: SolverContext
    answers: dict[str, Answer]

    def present(self, ident: str, *names: str) -> Presentation:
        """Present an order for these names, as the controller does."""
        shown = presentation(ident, *names)
        for each in shown.challenges:
            self.answers[each.token] = Answer(each.key_authorization, frozenset(names))
        self.solver.present(shown)
        return shown

    def wait_ready(self, shown: Presentation, solver: IngressSolver | None = None) -> None:
        """Look until all is served; AssertionError with what was missing last."""
        found = [""]

        def look() -> bool:
            found[0] = (solver or self.solver).is_ready(shown)
            return not found[0]

        try:
            wait_for(look, "every challenge served")
        except AssertionError as error:
            raise AssertionError(f"{error}: {found[0]}") from None

    def wait_missing(self, shown: Presentation, words: str) -> None:
        """Look until what is missing has these words."""
        wait_for(lambda: words in self.solver.is_ready(shown), words)


@pytest.fixture
def site(lab: Lab, namespace: str) -> Site:
    return Site(lab, namespace)


@pytest.fixture
def unserved(lab: Lab, namespace: str) -> Iterator[Challenges]:
    """Without a Service for the responder."""
    deaths: list[str] = []
    cluster = KubeCluster(connect(kubeconfig=lab.controller_kubeconfig), SystemClock(), on_death=deaths.append)
    cluster.watch(INGRESS, namespaces=(namespace,))
    cluster.watch(INGRESS_CLASS)
    cluster.start()
    assert cluster.wait_synced(Event())
    context = SolverContext(cluster, SystemClock(), namespace, lab.http_port, (lab.dns,))
    yield Challenges(IngressSolver(context), context, {})
    cluster.stop()
    assert deaths == []


@pytest.fixture
def challenges(lab: Lab, namespace: str, unserved: Challenges) -> Iterator[Challenges]:
    """With everything that an installation has."""
    responder = Responder("127.0.0.1:0", unserved.answers.get)
    port = responder.start()
    with lab.exposed(namespace, SERVICE, [Backend("127.0.0.1", port, port, "/healthz")]):
        yield unserved
    responder.stop()


def asked(lab: Lab, host: str, path: str) -> tuple[int, bytes]:
    """What Traefik answers on its HTTP port."""
    connection = http.client.HTTPConnection("127.0.0.1", lab.http_port, timeout=20)
    try:
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def is_application(lab: Lab, host: str, path: str) -> bool:
    return asked(lab, host, path) == (200, b"hello from web\n")


def path_of(shown: Presentation) -> str:
    return f"/.well-known/acme-challenge/{shown.challenges[0].token}"


def test_presented_served_cleaned_up(challenges: Challenges, lab: Lab, suffix: str) -> None:
    """The whole way, for several names of one order; fails when backend, port, class or path is another."""
    shown = challenges.present("0a1b", f"a.{suffix}", f"b.{suffix}", suffix)
    challenges.wait_ready(shown)
    challenges.solver.clean_up("0a1b")
    wait_for(lambda: asked(lab, f"a.{suffix}", path_of(shown))[0] == 404, "404 after clean-up")
    assert "is gone" in challenges.solver.is_ready(shown)


def test_a_deleted_ingress_is_presented_again(challenges: Challenges, lab: Lab, namespace: str, suffix: str) -> None:
    """Whoever deletes it, the next present puts it back; fails when present believes that it was there already."""
    shown = challenges.present("0a1b", suffix)
    challenges.wait_ready(shown)
    lab.kubectl("-n", namespace, "delete", "ingress", f"{SERVICE}-0a1b")
    challenges.wait_missing(shown, f"Ingress {namespace}/{SERVICE}-0a1b is gone")
    challenges.solver.present(shown)
    challenges.wait_ready(shown)


def test_rules_of_an_application_do_not_win(challenges: Challenges, lab: Lab, site: Site, suffix: str) -> None:
    """Neither `/` nor the challenge path with a priority takes the request; fails without router.priority."""
    with site.application("web"):
        site.ingress("web", [([suffix], "web-tls")])
        greedy = site.ingress_manifest(
            "greedy", [([suffix], "web-tls")], {"traefik.ingress.kubernetes.io/router.priority": "1000"}
        )
        greedy["spec"]["rules"][0]["http"]["paths"][0]["path"] = "/.well-known/acme-challenge"
        site.create(site.ingress_path(), greedy)
        for path in ("/", "/.well-known/acme-challenge/x"):
            wait_for(partial(is_application, lab, suffix, path), f"{path} served by the application")
        shown = challenges.present("0a1b", suffix)
        challenges.wait_ready(shown)
        assert is_application(lab, suffix, "/")


def test_an_application_without_challenge_is_told_apart(
    challenges: Challenges, lab: Lab, site: Site, suffix: str
) -> None:
    """Its 200 for every path is no answer, and its words are not repeated; fails when the status is enough."""
    with site.application("web"):
        site.ingress("web", [([suffix], "web-tls")])
        wait_for(lambda: asked(lab, suffix, "/")[0] == 200, "the application")
        shown = challenges.present("0a1b", suffix)
        challenges.wait_ready(shown)
        moved = replace(shown, challenges=presentation("other", suffix).challenges)
        assert challenges.solver.is_ready(moved) == f"{suffix} answers something else at 127.0.0.1"


def test_an_application_that_redirects_to_its_apex(
    challenges: Challenges, site: Site, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """apex and www in one order, www redirecting: both are served, and no Host is odd; fails without rules for both."""
    www = f"www.{suffix}"
    with site.application("web", redirect_from=www, redirect_to=suffix), caplog.at_level(logging.INFO):
        site.ingress("web", [([suffix, www], "web-tls")])
        challenges.wait_ready(challenges.present("0a1b", suffix, www))
    assert [each.getMessage() for each in caplog.records if "Host" in each.getMessage()] == []


def test_a_responder_out_of_reach_is_said_to_be(unserved: Challenges, lab: Lab, namespace: str, suffix: str) -> None:
    """A Service without ready endpoints is not the tenant's fault; fails when 502 has no words of its own."""
    with lab.exposed(namespace, SERVICE, []):
        shown = unserved.present("0a1b", suffix)
        unserved.wait_missing(
            shown, f"{suffix} answers 502 at 127.0.0.1: the ingress controller does not reach Service {SERVICE}"
        )


def test_https_for_everything(challenges: Challenges, lab: Lab, suffix: str, tmp_path: Path) -> None:
    """Traefik's redirection beats every rule; the way leads over its default certificate; fails if that is verified."""
    with contextlib.ExitStack() as stack:
        ports = stack.enter_context(Ports())
        plain, secure = ports.take(), ports.take()
        stack.enter_context(redirecting_traefik(lab, tmp_path, plain, secure))
        context = replace(challenges.context, http01_port=plain)
        shown = challenges.present("0a1b", suffix)
        challenges.wait_ready(shown, IngressSolver(context))
        connection = http.client.HTTPConnection("127.0.0.1", plain, timeout=20)
        stack.callback(connection.close)
        connection.request("GET", path_of(shown), headers={"Host": suffix})
        assert connection.getresponse().status in {301, 308}


@contextlib.contextmanager
def redirecting_traefik(lab: Lab, logs: Path, plain: int, secure: int) -> Iterator[None]:
    """A second Traefik for the same Ingresses, which redirects all HTTP to HTTPS."""
    with Children(logs) as children:
        traefik = children.start(
            "traefik",
            [
                Path(lab.bin) / "traefik",
                f"--entrypoints.web.address=127.0.0.1:{plain}",
                "--entrypoints.web.http.redirections.entrypoint.to=websecure",
                f"--entrypoints.websecure.address=127.0.0.1:{secure}",
                "--entrypoints.websecure.http.tls=true",
                "--global.checknewversion=false",
                "--global.sendanonymoususage=false",
                "--providers.providersthrottleduration=100ms",
                "--providers.kubernetesingress=true",
                "--providers.kubernetesingress.ingressclass=traefik",
                f"--providers.kubernetesingress.endpoint={lab.api_server}",
                f"--providers.kubernetesingress.token={Path(lab.kubeconfig).with_name('traefik.token')}",
                f"--providers.kubernetesingress.certauthfilepath={lab.api_ca_bundle}",
            ],
        )
        for port in (plain, secure):
            traefik.wait_listening("127.0.0.1", port)
        yield
