"""What the people of a site do with certbotk8s in the lab: administrators make issuers, tenants apply and look.

Used by the demo, the journey, e2e tests and the benchmark. Everything goes through the API server, DNS and Traefik, as
it does for them; waits have a limit ten times the goal, since machines differ.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import re
import socket
import ssl
import threading
import time
import urllib.error
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509

from tests.lab.acme import AcmeServer
from tests.lab.lab import Lab
from tests.lab.svcproxy import Backend

T = TypeVar("T")

PATIENCE = 60.0
CERTIFICATES = "/apis/certbotk8s.io/v1"

_JARGON = re.compile(
    r"Traceback|<nil>|<class |object at 0x|\bNone\b|\b[A-Z][A-Za-z]*(Error|Exception)\b|failed to sync"
    r"|context deadline exceeded|check the logs|\b(NoneType|msgspec|urllib3)\b"
)


def wait_for(look: Callable[[], T | None], what: str, *, timeout: float = PATIENCE, pause: float = 0.02) -> T:
    """The first answer of `look` that is true; AssertionError with `what` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        if found := look():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not after {timeout:.0f} s")
        time.sleep(pause)


def assert_plain(sentences: Iterable[str]) -> None:
    """AssertionError when a sentence for people holds what only programmers know: a trace, a type name, a nil."""
    for sentence in sentences:
        found = _JARGON.search(sentence)
        assert found is None, f"{found[0]!r} stands in: {sentence}"


@dataclass(frozen=True)
class Served:
    """What a TLS connection was served."""

    serial: str
    not_after: float
    names: tuple[str, ...]
    verified: bool


class Site:
    """One namespace of the lab, as an administrator and its tenants use it."""

    def __init__(self, lab: Lab, namespace: str) -> None:
        self.lab = lab
        self.namespace = namespace

    # --- objects ------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> dict[str, Any] | None:
        """An object by its path; None when there is none."""
        try:
            return self.lab.api(path)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def create(self, collection: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """POST with strict field validation."""
        return self.lab.api(f"{collection}?fieldValidation=Strict", body=manifest)

    def patch(self, resource: str, name: str, patch: dict[str, Any]) -> None:
        """Merge a change into an object of this namespace, as `kubectl patch --type merge` does; None removes."""
        self.lab.kubectl("-n", self.namespace, "patch", resource, name, "--type=merge", "-p", json.dumps(patch))

    def delete(self, path: str) -> None:
        """DELETE, and wait until it is gone; nothing there is fine."""
        with contextlib.suppress(urllib.error.HTTPError):
            self.lab.api(path, method="DELETE")
        wait_for(lambda: self.get(path) is None, f"{path} gone")

    def secret_path(self, name: str, namespace: str = "") -> str:
        """The path of a Secret."""
        return f"/api/v1/namespaces/{namespace or self.namespace}/secrets/{name}"

    def secret(self, name: str, namespace: str = "") -> dict[str, Any] | None:
        """A Secret."""
        return self.get(self.secret_path(name, namespace))

    def secret_value(self, name: str, key: str) -> bytes:
        """A member of a Secret's data; AssertionError when there is no such Secret."""
        secret = self.secret(name)
        assert secret, f"Secret {name} is missing"
        return base64.b64decode(secret["data"][key])

    def put_secret(self, name: str, data: dict[str, bytes], *, namespace: str = "", kind: str = "Opaque") -> None:
        """Create a Secret, or replace its data."""
        space = namespace or self.namespace
        body = {
            "metadata": {"name": name},
            "type": kind,
            "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
        }
        if self.secret(name, space) is None:
            self.lab.api(f"/api/v1/namespaces/{space}/secrets", body=body)
        else:
            self.lab.api(self.secret_path(name, space), method="PUT", body=body)

    # --- issuers ------------------------------------------------------------------------------------------------------

    def acme_spec(self, name: str, *, ca: AcmeServer | None = None, **changes: Any) -> dict[str, Any]:
        """`spec.acme` of an issuer for the lab's CA (or another), bound to kid-1, with the HTTP-01 solver.

        A change of None leaves that field out.
        """
        server = ca or self.lab.acme
        spec = {
            "server": server.directory,
            "caBundle": base64.b64encode(Path(server.ca_bundle).read_bytes()).decode(),
            "email": "ops@example.test",
            "profile": "default",
            "privateKeySecretRef": {"name": f"{name}-account"},
            "externalAccountBinding": {"keyID": "kid-1", "keySecretRef": {"name": f"{name}-eab"}},
            "solvers": [{"http01": {"ingress": {}}}],
        } | changes
        return {key: value for key, value in spec.items() if value is not None}

    def cluster_issuer(
        self,
        name: str,
        *,
        ca: AcmeServer | None = None,
        hmac: str | None = None,
        wait: bool = True,
        rules: list[dict[str, Any]] | None = None,
        **changes: Any,
    ) -> str:
        """A ClusterIssuer with its EAB Secret in the controller's namespace; ready when this returns.

        `rules` are those of its policy; None: it has no policy.
        """
        self.put_secret(
            f"{name}-eab", {"secret": (hmac or self.lab.eab["kid-1"]).encode()}, namespace=self.lab.namespace
        )
        manifest = {
            "apiVersion": "certbotk8s.io/v1",
            "kind": "ClusterIssuer",
            "metadata": {"name": name},
            "spec": {"acme": self.acme_spec(name, ca=ca, **changes)}
            | ({} if rules is None else {"policy": {"rules": rules}}),
        }
        self.create(f"{CERTIFICATES}/clusterissuers", manifest)
        if wait:
            self.issuer_condition("ClusterIssuer", name, "True")
        return name

    def issuer(
        self, name: str, *, ca: AcmeServer | None = None, hmac: str | None = None, wait: bool = True, **changes: Any
    ) -> str:
        """An Issuer with its EAB Secret in this namespace; with `hmac` "" without that Secret."""
        if hmac != "":
            self.put_secret(f"{name}-eab", {"secret": (hmac or self.lab.eab["kid-1"]).encode()})
        manifest = {
            "apiVersion": "certbotk8s.io/v1",
            "kind": "Issuer",
            "metadata": {"name": name},
            "spec": {"acme": self.acme_spec(name, ca=ca, **changes)},
        }
        self.create(f"{CERTIFICATES}/namespaces/{self.namespace}/issuers", manifest)
        if wait:
            self.issuer_condition("Issuer", name, "True")
        return name

    def issuer_condition(self, kind: str, name: str, status: str, reason: str = "", text: str = "") -> dict[str, Any]:
        """The Ready condition of an issuer, once it has that status (and that reason, and that text in it)."""
        scope = "" if kind == "ClusterIssuer" else f"namespaces/{self.namespace}/"
        path = f"{CERTIFICATES}/{scope}{kind.lower()}s/{name}"
        return self._condition(path, "Ready", status, reason, text)

    # --- certificates -------------------------------------------------------------------------------------------------

    def certificate_path(self, name: str) -> str:
        """The path of a Certificate."""
        return f"{CERTIFICATES}/namespaces/{self.namespace}/certificates/{name}"

    def certificate_manifest(
        self, name: str, names: list[str], issuer: str, *, kind: str = "ClusterIssuer", **spec: Any
    ) -> dict[str, Any]:
        """A Certificate with an ECDSA key and the Secret of its own name."""
        return {
            "apiVersion": "certbotk8s.io/v1",
            "kind": "Certificate",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "secretName": name,
                "dnsNames": names,
                "issuerRef": {"name": issuer, "kind": kind},
                "privateKey": {"algorithm": "ECDSA"},
            }
            | spec,
        }

    def certificate(self, name: str, names: list[str], issuer: str, **spec: Any) -> None:
        """Create a Certificate."""
        manifest = self.certificate_manifest(name, names, issuer, **spec)
        self.create(f"{CERTIFICATES}/namespaces/{self.namespace}/certificates", manifest)

    def patch_certificate(self, name: str, patch: dict[str, Any]) -> None:
        """Merge a change into a Certificate."""
        self.patch("certificates.certbotk8s.io", name, patch)

    def annotate(self, name: str, **annotations: str) -> None:
        """Annotate a Certificate; `renew_now` stands for certbotk8s.io/renew-now."""
        named = {f"certbotk8s.io/{key.replace('_', '-')}": value for key, value in annotations.items()}
        self.patch_certificate(name, {"metadata": {"annotations": named}})

    def status(self, name: str) -> dict[str, Any]:
        """The status of a Certificate; {} before there is one."""
        found = self.get(self.certificate_path(name)) or {}
        return dict(found.get("status", {}))

    def ready(self, name: str, *, revision: int = 1, timeout: float = PATIENCE) -> dict[str, Any]:
        """The status of a Certificate once it is Ready with at least that revision and nothing is under way."""

        def look() -> dict[str, Any] | None:
            status = self.status(name)
            conditions = {each["type"]: each["status"] for each in status.get("conditions", [])}
            done = conditions.get("Ready") == "True" and status.get("revision", 0) >= revision
            return status if done and "issuance" not in status else None

        try:
            return wait_for(look, f"Certificate {self.namespace}/{name} Ready", timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {self.says(name)}") from None

    def ended(self, name: str, *, revision: int = 1) -> dict[str, Any] | None:
        """The status of a Certificate, if nothing is under way after an attempt: that revision, or one that failed."""
        status = self.status(name)
        over = status.get("revision", 0) >= revision or status.get("nextAttemptTime")
        return status if over and "issuance" not in status else None

    def recovered(self, name: str, told: str, *, revision: int = 1) -> bool:
        """Whether the CA had looked at a challenge while no controller ran, after one has finished the Certificate.

        Then that attempt is lost, and told as such; the next one is asked for here. AssertionError, with `told`, unless
        it ends with that revision, what status says is in the Secret, and nothing is left.
        """
        ended = wait_for(lambda: self.ended(name, revision=revision), f"{told}: an end of {name}", pause=0.05)
        missed = bool(ended.get("nextAttemptTime"))
        if missed:
            assert self.condition(name, "Issuing", "False", "ChallengeFailed"), told
            self.annotate(name, renew_now=f"after {ended['lastFailureTime']}")
        status = self.ready(name, revision=revision)
        self.nothing_left()
        assert status["revision"] == revision, told
        assert f"{self.leaf(name).serial_number:x}" == status["serialNumber"], told
        return missed

    def condition(
        self, name: str, kind: str, status: str, reason: str = "", text: str = "", *, timeout: float = PATIENCE
    ) -> dict[str, Any]:
        """A condition of a Certificate, once it has that status (and that reason, and that text in it)."""
        return self._condition(self.certificate_path(name), kind, status, reason, text, timeout=timeout)

    def _condition(
        self, path: str, kind: str, status: str, reason: str, text: str, *, timeout: float = PATIENCE
    ) -> dict[str, Any]:
        seen: list[Any] = []

        def look() -> dict[str, Any] | None:
            conditions = ((self.get(path) or {}).get("status") or {}).get("conditions", [])
            seen[:] = conditions
            for each in conditions:
                fits = each["type"] == kind and each["status"] == status and text in each["message"]
                if fits and reason in ("", each["reason"]):
                    return dict(each)
            return None

        try:
            return wait_for(look, f"{path} {kind}={status} {reason} {text!r}", timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; it has {seen}") from None

    def says(self, name: str) -> list[str]:
        """What the conditions of a Certificate say, for the message of a test that fails."""
        conditions = self.status(name).get("conditions", [])
        return [f"{each['type']}={each['status']} {each['reason']}: {each['message']}" for each in conditions]

    def events(self, name: str, kind: str = "Certificate") -> list[tuple[str, str, str]]:
        """(type, reason, message) of the Events about an object of this namespace."""
        found = self.lab.api(f"/api/v1/namespaces/{self.namespace}/events")
        items: Any = found["items"]
        about = [
            each for each in items if each["involvedObject"]["name"] == name and each["involvedObject"]["kind"] == kind
        ]
        return [(each["type"], each["reason"], each["message"]) for each in about]

    def event(self, name: str, reason: str, text: str = "", kind: str = "Certificate") -> str:
        """The message of an Event, once there is one with that reason and that text in it."""

        def look() -> str | None:
            return next((m for _, r, m in self.events(name, kind) if r == reason and text in m), None)

        return wait_for(look, f"Event {reason} {text!r} about {kind} {name}; there are {self.events(name, kind)}")

    def said(self) -> list[str]:
        """Every sentence that stands in this namespace: of conditions, of Events, and the CA's last problems."""
        sentences = [each["message"] for each in self._items(f"/api/v1/namespaces/{self.namespace}/events")]
        for plural in ("certificates", "issuers"):
            for item in self._items(f"{CERTIFICATES}/namespaces/{self.namespace}/{plural}"):
                status = item.get("status", {})
                sentences += [each["message"] for each in status.get("conditions", [])]
                sentences += filter(None, [status.get("lastProblem", {}).get("detail")])
        return sentences

    def _items(self, collection: str) -> list[dict[str, Any]]:
        found: Any = self.lab.api(collection)["items"]
        return list(found)

    def leaf(self, name: str) -> x509.Certificate:
        """The certificate in a Secret."""
        return x509.load_pem_x509_certificate(self.secret_value(name, "tls.crt"))

    # --- applications -------------------------------------------------------------------------------------------------

    def ingress_manifest(
        self,
        name: str,
        tls: list[tuple[list[str], str]],
        annotations: dict[str, str],
        *,
        service: str = "web",
        **spec: Any,
    ) -> dict[str, Any]:
        """An Ingress that sends all its hosts to a Service; `tls` is a list of (hosts, Secret)."""
        hosts = list(dict.fromkeys(host for entry, _ in tls for host in entry))
        backend = {"service": {"name": service, "port": {"number": 80}}}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": {"name": name, "namespace": self.namespace, "annotations": annotations},
            "spec": {
                "ingressClassName": "traefik",
                "tls": [{"hosts": entry, "secretName": secret} for entry, secret in tls],
                "rules": [
                    {"host": host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
                    for host in hosts
                ],
            }
            | spec,
        }

    def ingress_path(self, name: str = "") -> str:
        """The path of an Ingress of this namespace, or of their collection."""
        return f"/apis/networking.k8s.io/v1/namespaces/{self.namespace}/ingresses" + (f"/{name}" if name else "")

    def ingress(self, name: str, tls: list[tuple[list[str], str]], issuer: str = "", **more: Any) -> None:
        """Create an Ingress, annotated for a ClusterIssuer if one is named."""
        annotations = {"certbotk8s.io/cluster-issuer": issuer} if issuer else {}
        self.create(self.ingress_path(), self.ingress_manifest(name, tls, annotations, **more))

    @contextlib.contextmanager
    def application(self, name: str = "web", *, redirect_to: str = "", redirect_from: str = "") -> Iterator[str]:
        """A small HTTP server behind a Service; requests for `redirect_from` are redirected to `redirect_to`."""

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host = self.headers.get("Host", "").partition(":")[0]
                if redirect_from and host == redirect_from:
                    self.send_response(301)
                    self.send_header("Location", f"http://{redirect_to}{self.path}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = f"hello from {name}\n".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                address, port = "127.0.0.1", server.server_port
                with self.lab.exposed(self.namespace, name, [Backend(address, port, port, "/")]) as service:
                    wait_for(lambda: _answers(service, 80), f"Service {self.namespace}/{name} answers")
                    yield service
            finally:
                server.shutdown()
                thread.join()

    def served(self, host: str, *, root: bytes | None = None) -> Served:
        """One new TLS connection through Traefik: what it serves for `host`, verified against `root` if given."""
        context = ssl.create_default_context(cadata=root.decode()) if root else ssl._create_unverified_context()
        with (
            socket.create_connection(("127.0.0.1", self.lab.https_port), timeout=10) as connection,
            context.wrap_socket(connection, server_hostname=host) as tls,
        ):
            der = tls.getpeercert(binary_form=True)
        assert der
        certificate = x509.load_der_x509_certificate(der)
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found = tuple(names.get_values_for_type(x509.DNSName))
        except x509.ExtensionNotFound:
            found = ()
        serial, end = f"{certificate.serial_number:x}", certificate.not_valid_after_utc.timestamp()
        return Served(serial, end, found, root is not None)

    def request(self, host: str, root: bytes) -> str:
        """GET https://host/ through Traefik, verified; the body."""
        context = ssl.create_default_context(cadata=root.decode())
        with (
            socket.create_connection(("127.0.0.1", self.lab.https_port), timeout=10) as connection,
            context.wrap_socket(connection, server_hostname=host) as tls,
        ):
            tls.sendall(f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: tls.recv(4096), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0], head.decode()
        return body.decode()

    def challenges(self) -> list[str]:
        """The challenge Ingresses that stand in the controller's namespace."""
        return [each["metadata"]["name"] for each in self.challenge_ingresses()]

    def challenge_ingresses(self, certificate: str = "") -> list[dict[str, Any]]:
        """The challenge Ingresses that stand; those of one Certificate of this namespace, if one is named."""
        path = f"/apis/networking.k8s.io/v1/namespaces/{self.lab.namespace}/ingresses"
        key = f"{self.namespace}/{certificate}"
        return [
            each
            for each in self._items(f"{path}?labelSelector=certbotk8s.io/role%3Dchallenge")
            if not certificate or each["metadata"]["annotations"]["certbotk8s.io/certificate"] == key
        ]

    def next_keys(self) -> list[str]:
        """The next-key Secrets that stand in this namespace."""
        path = f"/api/v1/namespaces/{self.namespace}/secrets?labelSelector=certbotk8s.io/role%3Dnext-key"
        found: Any = self.lab.api(path)["items"]
        return [each["metadata"]["name"] for each in found]

    def nothing_left(self) -> None:
        """Wait until no challenge and no next key stands; AssertionError if one does."""
        wait_for(lambda: not self.challenges() and not self.next_keys(), "challenges and next keys gone")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
