"""The cluster as certctl sees it: Certificates and what belongs to them, read with the user's own rights."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import msgspec
from kubernetes import config

from certbotk8s.certctl.errors import CertctlError, from_cluster
from certbotk8s.certctl.view import Event, issuer_status
from certbotk8s.domain.api import ANNOTATION_RENEW_NOW, CERTIFICATE, ISSUER_KINDS, Certificate, Kind, Resource
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.kube.api import NotFound, connect
from certbotk8s.kube.store import ObjectStore
from certbotk8s.kube.watch import Reflector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certbotk8s.ports import Clock

R = TypeVar("R", bound=Resource)

EVENT = Kind("", "v1", "events", "Event", Event)

_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Connection:
    """Which cluster, and which namespace of it; "" leaves the choice to the kubeconfig."""

    kubeconfig: str = ""
    context: str = ""
    namespace: str = ""


@dataclass(frozen=True)
class Change:
    """A Certificate that is new or has changed, or (`gone`) was deleted."""

    certificate: Certificate
    gone: bool = False


class Reader:
    """Every method raises CertctlError with a sentence for the user."""

    def __init__(self, connection: Connection) -> None:
        try:
            self._api = connect(kubeconfig=connection.kubeconfig, context=connection.context)
            self.namespace = connection.namespace or _default_namespace(connection)
        except TemporaryError as error:
            raise from_cluster(error) from error
        except Exception as error:  # the library's, of any type: the file is the user's, of any shape
            hint = "correct it, or name another one with --kubeconfig or $KUBECONFIG"
            raise CertctlError(f"the kubeconfig cannot be read: {error}", hint) from error

    def certificates(self, namespace: str, *, selector: str = "", name: str = "") -> list[Certificate]:
        """The Certificates of a namespace, of all with "", in the order of their names."""
        found = self._list(CERTIFICATE, namespace, label_selector=selector, field_selector=_only(name))
        return sorted(found, key=lambda each: (each.metadata.namespace, each.metadata.name))

    def certificate(self, name: str) -> Certificate:
        """The Certificate of that name in the chosen namespace."""
        found = self._get(CERTIFICATE, self.namespace, name)
        if found is None:
            raise _not_found(self.namespace, name)
        return found

    def issuer(self, certificate: Certificate) -> str:
        """What is known of the issuer of a Certificate, as a sentence part; a user may lack the right to look."""
        ref = certificate.spec.issuer_ref
        try:
            return issuer_status(self._get(ISSUER_KINDS[ref.kind], certificate.metadata.namespace, ref.name))
        except CertctlError as error:
            return f"which cannot be looked at: {error}"

    def events(self, certificate: Certificate, most: int = 10) -> tuple[Event, ...]:
        """The last Events about a Certificate, newest last; none where the user lacks the right to look."""
        selector = f"involvedObject.uid={certificate.metadata.uid}"
        try:
            found = self._list(EVENT, certificate.metadata.namespace, field_selector=selector)
        except CertctlError:
            return ()
        dated = [(each.time, each) for each in found if each.time]
        return tuple(each for _, each in sorted(dated, key=lambda pair: pair[0])[-most:])

    def ask_renewal(self, name: str, value: str) -> Certificate:
        """Set the annotation renew-now of a Certificate of the chosen namespace; the Certificate as stored."""
        patch = {"metadata": {"annotations": {ANNOTATION_RENEW_NOW: value}}}
        try:
            return CERTIFICATE.decode(self._api.merge(CERTIFICATE, self.namespace, name, patch))
        except NotFound as error:
            raise _not_found(self.namespace, name) from error
        except (TemporaryError, PermanentError) as error:
            raise from_cluster(error) from error

    def changes(
        self, namespace: str, clock: Clock, *, selector: str = "", name: str = "", deadline: float | None = None
    ) -> Iterator[Change]:
        """Every Certificate as it is, then every change, until `deadline` (by `clock.monotonic`) or for ever.

        A connection that breaks is opened again; what is wrong meanwhile goes to the log.
        """
        queue: SimpleQueue[Change | CertctlError] = SimpleQueue()

        def put(old: Certificate | None, new: Certificate | None) -> None:
            if new is not None:
                queue.put(Change(new))
            elif old is not None:
                queue.put(Change(old, gone=True))

        store: ObjectStore[Certificate] = ObjectStore(on_change=put)
        reflector = Reflector(
            self._api,
            CERTIFICATE,
            store,
            clock,
            on_death=lambda sentence: queue.put(CertctlError(sentence)),
            namespace=namespace,
            label_selector=selector,
            field_selector=_only(name),
        )
        reflector.start()
        try:
            while deadline is None or (left := deadline - clock.monotonic()) > 0:
                try:
                    change = queue.get(timeout=None if deadline is None else left)
                except Empty:
                    return
                if isinstance(change, CertctlError):
                    raise change
                yield change
        finally:
            reflector.stop()

    def _get(self, kind: Kind[R], namespace: str, name: str) -> R | None:
        try:
            body = self._api.get(kind, namespace if kind.namespaced else "", name)
            return None if body is None else kind.decode(body)
        except (TemporaryError, PermanentError) as error:
            raise from_cluster(error) from error
        except msgspec.ValidationError as error:
            raise CertctlError(f"{kind.kind} {name} cannot be read by this version of certctl: {error}") from error

    def _list(self, kind: Kind[R], namespace: str, *, label_selector: str = "", field_selector: str = "") -> list[R]:
        selectors = {"label_selector": label_selector, "field_selector": field_selector}
        try:
            return [
                kind.decode(raw) for page in self._api.pages(kind, namespace, **selectors) for raw in page.items or ()
            ]
        except (TemporaryError, PermanentError) as error:
            raise from_cluster(error) from error
        except msgspec.ValidationError as error:
            raise CertctlError(f"a {kind.kind} cannot be read by this version of certctl: {error}") from error


def log_to_stderr() -> None:
    """Let the log of a watch (a connection that broke and is opened again) speak as certctl does."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("certctl: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _only(name: str) -> str:
    return f"metadata.name={name}" if name else ""


def _not_found(namespace: str, name: str) -> CertctlError:
    hint = f"certctl status -n {namespace} lists those there, certctl status -A those of all namespaces"
    return CertctlError(f"certificate {namespace}/{name} not found", hint)


def _default_namespace(connection: Connection) -> str:
    """That of the context, as kubectl chooses it; in a Pod that of its ServiceAccount."""
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    if in_pod and not (connection.kubeconfig or connection.context or os.environ.get("KUBECONFIG")):
        return _POD_NAMESPACE.read_text(encoding="utf-8").strip() if _POD_NAMESPACE.exists() else "default"
    file = connection.kubeconfig or os.environ.get("KUBECONFIG") or None
    contexts, active = config.list_kube_config_contexts(file)  # type: ignore[no-untyped-call]
    chosen = next((each for each in contexts if each["name"] == connection.context), active)
    return str((chosen.get("context") or {}).get("namespace") or "default")
