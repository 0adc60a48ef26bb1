"""The controller's composition root: settings, adapters, reconcilers, threads; and how all of that stops."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from dataclasses import fields
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import click

from certbotk8s import __version__, logs
from certbotk8s.ca.authority import Authority
from certbotk8s.ca.keys import Keys
from certbotk8s.clock import SystemClock
from certbotk8s.controller.health import Health
from certbotk8s.controller.timer import Timer
from certbotk8s.controller.worker import Workers
from certbotk8s.controller.workqueue import WorkQueue
from certbotk8s.domain import api, pem
from certbotk8s.domain.addresses import Egress
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.plan import issuer_ready
from certbotk8s.domain.policy import bearing
from certbotk8s.kube.api import connect
from certbotk8s.kube.cluster import KubeCluster
from certbotk8s.kube.lease import Election
from certbotk8s.kube.networks import service_networks
from certbotk8s.ports import Key, SolverContext
from certbotk8s.reconcile.accounts import Accounts
from certbotk8s.reconcile.certificate import CertificateReconciler
from certbotk8s.reconcile.indexes import (
    BY_ISSUER,
    BY_NAMESPACE,
    BY_SECRET,
    BY_TLS,
    BY_TOKEN,
    CERTIFICATE_INDEXES,
    INGRESS_INDEXES,
    SECRET_INDEXES,
    certificate_key,
    contenders,
    secret_key,
    store_index,
)
from certbotk8s.reconcile.ingress import IngressReconciler, is_annotated
from certbotk8s.reconcile.issuer import IssuerReconciler
from certbotk8s.settings import Settings
from solvers.http01_responder import Answer, Responder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from certbotk8s.kube.api import Api
    from certbotk8s.ports import Clock, Solver

log = logging.getLogger(__name__)

SWEEP_DUE_SECONDS = 60.0
SWEEP_CHALLENGES_SECONDS = 300.0
STUCK_SECONDS = 300.0


class Controller:
    """The whole controller, wired. `clock` and `on_death` are parameters so that tests can run it in their process."""

    def __init__(self, settings: Settings, connection: Api, clock: Clock, *, on_death: Callable[[str], None]) -> None:
        self._stopping = threading.Event()
        self._queue = WorkQueue(clock)
        enqueue = self._queue.add
        self._election = (
            Election(
                connection,
                clock,
                namespace=settings.namespace,
                identity=settings.identity or f"{socket.gethostname()}-{secrets.token_hex(4)}",
                address=reachable(settings.http01_listen),
                duration=settings.lease_duration,
                on_lost=on_death,
            )
            if settings.leader_elect
            else None
        )
        fence = self._election.fence if self._election else _nothing
        self._cluster = KubeCluster(connection, clock, on_death=on_death, fence=fence)
        accounts, keys = Accounts(), Keys()
        self._certificates = self._cluster.watch(
            api.CERTIFICATE,
            indexes=CERTIFICATE_INDEXES,
            on_change=self._certificate_changed,
        )
        for kind in api.ISSUER_KINDS.values():
            self._cluster.watch(kind, on_change=self._issuer_changed(kind.kind))
        self._ingresses = self._cluster.watch(api.INGRESS, indexes=INGRESS_INDEXES, on_change=self._ingress_changed)
        self._cluster.watch(api.INGRESS_CLASS)
        self._cluster.watch(api.NAMESPACE, on_change=self._namespace_changed)
        self._cluster.watch(
            pem.SECRET_FACTS,
            label_selector=f"{api.LABEL_ROLE} in ({api.ROLE_TLS},{api.ROLE_NEXT_KEY})",
            indexes=SECRET_INDEXES,
            on_change=self._secret_changed,
        )
        self._egress, self._networks = Egress(settings.allow_addresses), partial(service_networks, connection)
        context = SolverContext(
            self._cluster, clock, settings.namespace, settings.http01_port, settings.nameservers, self._egress
        )
        reconcile_certificate = CertificateReconciler(
            cluster=self._cluster,
            clock=clock,
            key_maker=keys,
            solvers=found_solvers(context),
            accounts=accounts,
            enqueue=enqueue,
        )
        reconcile_issuer = IssuerReconciler(
            cluster=self._cluster,
            clock=clock,
            authority=Authority(clock, self._egress),
            key_maker=keys,
            accounts=accounts,
            namespace=settings.namespace,
            enqueue=enqueue,
            servers=settings.issuer_servers,
        )
        self._workers = Workers(
            self._queue,
            {
                "Certificate": reconcile_certificate,
                "Issuer": reconcile_issuer,
                "ClusterIssuer": reconcile_issuer,
                "Ingress": IngressReconciler(self._cluster),
            },
            clock,
            on_death=on_death,
            fence=fence,
            count=settings.workers,
        )
        self._timer = Timer(clock)
        self._timer.every(SWEEP_DUE_SECONDS, reconcile_certificate.sweep_due, "due Certificates")
        self._timer.every(SWEEP_CHALLENGES_SECONDS, reconcile_certificate.sweep_challenges, "orphaned challenges")
        self._sweep_challenges = reconcile_certificate.sweep_challenges
        leader = self._election.leader_address if self._election else str
        self._responder = Responder(settings.http01_listen, self._answer, leader=leader)
        self._health = Health(settings.metrics_listen, sick=self._sick, unready=self._unready)

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, as soon as this replica leads; until then answer challenges, with warm caches.

        It ends in order: not ready, no new steps, steps end, the Lease is released, watches, responder last.
        """
        self._responder.start()
        self._health.start()
        self._cluster.start()
        if self._cluster.wait_synced(stop) and self._leads(stop):
            self._egress.cluster = self._networks()
            log.info("Caches are filled; reconciling")
            self._workers.start()
            self._timer.start()
            self._sweep_challenges()
            stop.wait()
            log.info("Stopping")
            self._stopping.set()
            self._timer.stop()
            ended = self._workers.stop()
            if not ended:
                log.warning("Steps under way did not end in time; they are taken up after the next start")
            if self._election:
                self._election.stop(release=ended)
        self._stopping.set()
        self._cluster.stop()
        self._health.stop()
        self._responder.stop()

    def _leads(self, stop: threading.Event) -> bool:
        """Wait until this replica leads; False when it is told to end before."""
        if self._election is None:
            return True
        self._election.start()
        if self._election.wait(stop):
            return True
        self._election.stop(release=True)
        return False

    # --- what a change wakes ------------------------------------------------------------------------------------------

    def _certificate_changed(self, old: api.Certificate | None, new: api.Certificate | None) -> None:
        meta = (new or old).metadata  # type: ignore[union-attr]
        self._queue.add(Key("Certificate", meta.namespace, meta.name))
        if old is None or new is None:
            # Its Ingress makes a deleted one again, or no longer asks for one that it asked for while nobody looked.
            for owner in meta.owner_references:
                if owner.kind == "Ingress":
                    self._queue.add(Key("Ingress", meta.namespace, owner.name))
        if new is None:
            # One that was not theirs may have stood in the way of others.
            for ingress in self._ingresses.find(BY_TLS, f"{meta.namespace}/{meta.name}"):
                self._queue.add(Key("Ingress", meta.namespace, ingress.metadata.name))
        if old is not None and (new is None or new.spec.secret_name != old.spec.secret_name):
            self._wake_claimants(secret_key(old))  # whoever waited for its Secret may go on
        if old is not None and (new is None or bearing(new) != bearing(old)):
            for other in contenders(self._certificates, old):  # and whoever waited for its names
                self._queue.add(certificate_key(other))

    def _issuer_changed(self, kind: str) -> Callable[[api.Issuer | None, api.Issuer | None], None]:
        def changed(old: api.Issuer | None, new: api.Issuer | None) -> None:
            meta = (new or old).metadata  # type: ignore[union-attr]
            key = Key(kind, meta.namespace, meta.name)
            self._queue.add(key)
            before = issuer_ready(old) if old else None
            after = issuer_ready(new) if new else None
            if old is None or new is None or (before and before.status) != (after and after.status):
                for certificate in self._certificates.find(BY_ISSUER, store_index(key)):
                    self._queue.add(certificate_key(certificate))

        return changed

    def _namespace_changed(self, old: api.Namespace | None, new: api.Namespace | None) -> None:
        if old is None or new is None or old.metadata.labels != new.metadata.labels:
            for certificate in self._certificates.find(BY_NAMESPACE, (new or old).key):  # type: ignore[union-attr]
                self._queue.add(certificate_key(certificate))

    def _ingress_changed(self, old: api.Ingress | None, new: api.Ingress | None) -> None:
        if is_annotated(old) or is_annotated(new):
            meta = (new or old).metadata  # type: ignore[union-attr]
            self._queue.add(Key("Ingress", meta.namespace, meta.name))

    def _secret_changed(self, old: api.SecretFacts | None, new: api.SecretFacts | None) -> None:
        self._wake_claimants((new or old).key)  # type: ignore[union-attr]

    def _wake_claimants(self, secret: str) -> None:
        for certificate in self._certificates.find(BY_SECRET, secret):
            self._queue.add(certificate_key(certificate))

    # --- what others ask ----------------------------------------------------------------------------------------------

    def _answer(self, token: str) -> Answer | None:
        for certificate in self._certificates.find(BY_TOKEN, token):
            issuance = certificate.status.issuance
            for challenge in issuance.challenges if issuance else ():
                if challenge.token == token:
                    names = frozenset(each.identifier for each in issuance.challenges) if issuance else frozenset()
                    return Answer(challenge.key_authorization, names)
        return None

    def _sick(self) -> str:
        if not self._responder.is_alive():
            return "the HTTP-01 responder has ended"
        stuck = self._workers.stuck(STUCK_SECONDS)
        return f"busy for more than {STUCK_SECONDS:.0f} s: {stuck}" if stuck else ""

    def _unready(self) -> str:
        if self._stopping.is_set():
            return "stopping"
        missing = self._cluster.missing()
        return f"waiting for the API server's {missing}" if missing else ""


def _nothing() -> None:
    """The fence of a controller that is alone."""


def reachable(listen: str) -> str:
    """`host:port` at which other replicas reach what listens at `listen`; "" when this host does not know its address.

    Of an address that stands for all, that of the host's name, which in a Pod is the Pod's.
    """
    host, _, port = listen.rpartition(":")
    if host.strip("[]") not in {"", "0.0.0.0", "::"}:  # noqa: S104 - compared, not bound to
        return listen
    try:
        address = str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return ""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def found_solvers(context: SolverContext) -> Mapping[str, Solver]:
    """The solvers that are installed, by the name of their entry point."""
    return {entry.name: entry.load()(context) for entry in entry_points(group="certbotk8s.solvers")}


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """The flags of the controller, one for each setting."""
    for setting in reversed(fields(Settings)):
        several = setting.default == ()
        names = (f"CERTBOTK8S_{setting.name.upper()}", *setting.metadata["environment"])
        kind: Any = type(setting.default)
        command = click.option(
            "--" + setting.name.replace("_", "-"),
            setting.name,
            envvar=list(names),
            default=setting.default,
            type=str if several else CHOICES.get(setting.name, kind),
            multiple=several,
            show_default=not several,
            help=setting.metadata["help"],
        )(command)
    return command


CHOICES = {
    "log_format": click.Choice(["json", "text"]),
    "log_level": click.Choice(["debug", "info", "warning", "error"]),
    "workers": click.IntRange(1, 256),
    "lease_duration": click.IntRange(2, 3600),
    "http01_port": click.IntRange(1, 65535),
}


@click.command()
@click.version_option(__version__)
@_options
def main(**values: Any) -> None:
    """Run the certbotk8s controller against the cluster of the kubeconfig, or the one it runs in."""
    settings = Settings(**values)
    logs.configure(settings.log_format, settings.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def die(why: str) -> None:
        # A controller that goes on with a part of its threads does harm in silence; whoever started it starts it again.
        log.critical("%s; ending", why)
        logging.shutdown()
        os._exit(1)

    try:
        Controller(settings, connect(), SystemClock(), on_death=die).run(stop)
    except (TemporaryError, PermanentError, OSError, ValueError) as error:
        log.critical("The controller cannot start: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
