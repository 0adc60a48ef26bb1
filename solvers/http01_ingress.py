"""HTTP-01 (RFC 8555 section 8.3) through a temporary Ingress in the controller's own namespace.

One Ingress per order, one rule per name; its backend is the Service of the responder, behind which every replica is.
It is named after the presentation's id, so that nothing needs to be remembered to remove it. The look from here that
precedes the CA's is advisory; it does what a CA does, within limits of time and size, because DNS answers, redirects
and bodies may come from anybody.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
from datetime import UTC, datetime
from functools import cached_property
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urljoin, urlsplit

import dns.exception
import dns.nameserver
import dns.resolver

from certbotk8s.domain.api import (
    ANNOTATION_CERTIFICATE,
    ANNOTATION_CERTIFICATE_UID,
    INGRESS,
    INGRESS_CLASS,
    LABEL_ROLE,
    ROLE_CHALLENGE,
)
from certbotk8s.domain.errors import AlreadyExists, PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason
from solvers.http01_responder import CHALLENGE_PATH, TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Address, IPv6Address

    from _typeshed import WriteableBuffer

    from certbotk8s.domain.api import Certificate, Ingress, PendingChallenge
    from certbotk8s.ports import Presentation, SolverContext

SERVICE = "certbotk8s-http01"
NAME_PREFIX = f"{SERVICE}-"

# What keeps ingress controllers and their neighbours from treating the Ingress like one of an application. Each knows
# its own annotation and ignores the rest.
_ANNOTATIONS = {
    # external-dns would create or delete records for the hosts.
    "external-dns.kubernetes.io/controller": "none",
    "external-dns.alpha.kubernetes.io/controller": "none",
    # Traefik: the longest rule wins, unless somebody else's has a priority of its own. Fits 32 bits.
    "traefik.ingress.kubernetes.io/router.priority": "2000000000",
    # ingress-nginx: an allow-list set for all Ingresses would shut out the CA.
    "nginx.ingress.kubernetes.io/whitelist-source-range": "0.0.0.0/0,::/0",
    # Redirects to HTTPS that are on for every Ingress which does not object: Skipper, HAProxy Technologies.
    "zalando.org/skipper-ingress-redirect": "false",
    "haproxy.org/ssl-redirect": "false",
}
_LEGACY_CLASS = "kubernetes.io/ingress.class"
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_DEFAULT_CLASS = "ingressclass.kubernetes.io/is-default-class"

# Both become part of a configuration file in some ingress controllers: nothing but these characters may get there.
_CLASS_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_HOST = re.compile(r"(?=.{1,253}$)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")

_LOOK_SECONDS = 20.0  # all challenges of an order
_CHALLENGE_SECONDS = 5.0
_CONNECT_SECONDS = 2.0
_DNS_SECONDS = 1.0
_DNS_KEPT_SECONDS = 5.0
_DNS_KEPT = 1000  # names
_MAX_ADDRESSES = 8
_MAX_REDIRECTS = 10
_MAX_HEADERS = 65536
_MAX_BODY = 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_BACKEND_MISSING = frozenset({502, 503, 504})


class IngressSolver:
    """`ports.Solver` for HTTP-01, placement ControllerNamespace."""

    challenge_type = "http-01"

    def __init__(self, context: SolverContext) -> None:
        self._cluster = context.cluster
        self._namespace = context.namespace
        self._clock = context.clock
        self._look = _Look(context)

    def present(self, presentation: Presentation) -> None:
        """Create the Ingress. PermanentError for a name or token that fits no Ingress, and without an ingress class."""
        rules = [_rule(challenge) for challenge in presentation.challenges]
        manifest = self._manifest(presentation, rules)
        try:
            self._write(manifest)
        except (PermanentError, TemporaryError) as error:
            # ingress-nginx before 1.12.6, 1.13.2 and 1.14.0 refuses a dot in a path of type Exact.
            if "pathtype" not in str(error).lower().replace(" ", ""):
                raise
            for rule in rules:
                rule["http"]["paths"][0]["pathType"] = "ImplementationSpecific"
            self._write(manifest)

    def is_ready(self, presentation: Presentation) -> str:
        """ "" when every challenge is answered as the CA wants it, else what the first other one does instead."""
        end = self._clock.monotonic() + _LOOK_SECONDS
        for challenge in presentation.challenges:
            missing = self._look.at(challenge, end)
            if missing:
                key = f"{self._namespace}/{NAME_PREFIX}{presentation.id}"
                return missing if self._cluster.store(INGRESS).get(key) else f"Ingress {key} is gone"
        return ""

    def clean_up(self, presentation_id: str) -> None:
        """Delete the Ingress, if there is one."""
        self._cluster.delete(INGRESS, self._namespace, NAME_PREFIX + presentation_id)

    def leftovers(self) -> Iterable[str]:
        """The ids of presentations whose Ingress exists."""
        return [
            ingress.metadata.name.removeprefix(NAME_PREFIX)
            for ingress in self._cluster.store(INGRESS).all()
            if ingress.metadata.namespace == self._namespace
            and ingress.metadata.labels.get(LABEL_ROLE) == ROLE_CHALLENGE
            and ingress.metadata.name.startswith(NAME_PREFIX)
        ]

    def _write(self, manifest: Mapping[str, Any]) -> None:
        try:
            self._cluster.create(INGRESS, manifest)
        except AlreadyExists:
            self._cluster.apply(INGRESS, manifest)

    def _manifest(self, presentation: Presentation, rules: list[dict[str, Any]]) -> dict[str, Any]:
        certificate = presentation.certificate
        chosen = self._class(presentation)
        annotations = {
            ANNOTATION_CERTIFICATE: certificate.key,
            ANNOTATION_CERTIFICATE_UID: certificate.metadata.uid,
            **_ANNOTATIONS,
        }
        if chosen.legacy:
            annotations[_LEGACY_CLASS] = chosen.name
        return {
            "apiVersion": INGRESS.api_version,
            "kind": INGRESS.kind,
            "metadata": {
                "name": NAME_PREFIX + presentation.id,
                "namespace": self._namespace,
                "labels": {LABEL_ROLE: ROLE_CHALLENGE},
                "annotations": annotations,
            },
            "spec": {"rules": rules} | ({} if chosen.legacy else {"ingressClassName": chosen.name}),
        }

    def _class(self, presentation: Presentation) -> _Class:
        """The issuer's ingress class, else that of the Ingress that asked, else the default one."""
        http01 = presentation.spec.http01
        if http01 is not None and http01.ingress is not None and http01.ingress.ingress_class_name:
            return _Class(http01.ingress.ingress_class_name)
        asking = self._asking_ingress(presentation.certificate)
        if asking is not None:
            if asking.spec.ingress_class_name:
                return _Class(asking.spec.ingress_class_name)
            legacy = asking.metadata.annotations.get(_LEGACY_CLASS, "")
            if _CLASS_NAME.fullmatch(legacy):
                return _Class(legacy, legacy=True)
        defaults = [
            each
            for each in self._cluster.store(INGRESS_CLASS).all()
            if each.metadata.annotations.get(_DEFAULT_CLASS) == "true"
        ]
        if not defaults:
            ref = presentation.certificate.spec.issuer_ref
            raise PermanentError(
                Reason.NO_INGRESS_CLASS,
                f"No ingress class for the challenge of {presentation.challenges[0].identifier}: set ingressClassName "
                f"in the HTTP-01 solver of {ref.kind} {ref.name}"
                + (f" or in Ingress {asking.key}" if asking is not None else "")
                + f', or annotate an IngressClass with {_DEFAULT_CLASS}: "true".',
            )
        # As the API server chooses among several: the youngest, then by name.
        defaults.sort(key=lambda each: each.metadata.name)
        return _Class(max(defaults, key=lambda each: each.metadata.creation_timestamp or _LONG_AGO).metadata.name)

    def _asking_ingress(self, certificate: Certificate) -> Ingress | None:
        """The Ingress that the Certificate was made for, if it was made for one."""
        for owner in certificate.metadata.owner_references:
            if owner.kind == INGRESS.kind and owner.api_version == INGRESS.api_version:
                found = self._cluster.store(INGRESS).get(f"{certificate.metadata.namespace}/{owner.name}")
                if found is not None and found.metadata.uid == owner.uid:
                    return found
        return None


class _Class(NamedTuple):
    """An ingress class, and whether the Ingress names it by annotation, as before Kubernetes 1.18."""

    name: str
    legacy: bool = False


def _rule(challenge: PendingChallenge) -> dict[str, Any]:
    """The rule of an Ingress for one challenge; PermanentError when its name or token may not stand in one."""
    if not _HOST.fullmatch(challenge.identifier):
        raise PermanentError(
            Reason.CHALLENGE_FAILED,
            f'"{challenge.identifier[:253]}" cannot be validated by HTTP-01 through an Ingress: it is no DNS name.',
        )
    if not TOKEN.fullmatch(challenge.token):
        raise PermanentError(
            Reason.CHALLENGE_FAILED,
            f"The CA's token for {challenge.identifier} is not 1 to 128 characters of base64url "
            "(RFC 8555 section 8.3), so it is not served.",
        )
    backend = {"service": {"name": SERVICE, "port": {"number": 80}}}
    path = {"path": CHALLENGE_PATH + challenge.token, "pathType": "Exact", "backend": backend}
    return {"host": challenge.identifier, "http": {"paths": [path]}}


# --- the look from here -----------------------------------------------------------------------------------------------


class _Missing(Exception):
    """The look ended early; the text goes on after the name looked at: "does not resolve here"."""


class _Place(NamedTuple):
    """Where a look leads. `port` is that of the URL, 80 or 443 but for a lab."""

    scheme: str
    host: str
    port: int
    path: str


class _Reply(NamedTuple):
    status: int
    location: str
    body: bytes
    address: str


class _Look:
    """Asks for a challenge as a CA does (RFC 8555 section 8.3), once and within limits.

    `http_port` is where the CA connects. 80, and redirects lead to 80 and 443 only; a lab that says otherwise has an
    HTTPS port of its own as well, and there they may lead to any.
    """

    def __init__(self, context: SolverContext) -> None:
        self._clock = context.clock
        self._http_port = context.http01_port
        self._nameservers = context.nameservers
        self._known: dict[str, tuple[float, list[IPv4Address | IPv6Address]]] = {}
        self._egress = context.egress

    def at(self, challenge: PendingChallenge, end: float) -> str:
        """ "" when the challenge is answered, else what happens instead; never what the answer says.

        `end` is on the clock's monotonic scale.
        """
        deadline = min(end, self._clock.monotonic() + _CHALLENGE_SECONDS)
        place = _Place("http", challenge.identifier, 80, CHALLENGE_PATH + challenge.token)
        subject = place.host
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                reply = self._get(place, deadline)
                if reply.status not in _REDIRECTS:
                    return _judge(subject, reply, challenge.key_authorization)
                place = self._redirect(place, reply.location)
                subject = f"{challenge.identifier}, which redirects to {place.scheme}://{place.host},"
        except _Missing as missing:
            return f"{subject} {missing}"
        return f"{challenge.identifier} redirects more than {_MAX_REDIRECTS} times"

    def _redirect(self, place: _Place, location: str) -> _Place:
        try:
            parts = urlsplit(urljoin(f"{place.scheme}://{place.host}:{place.port}{place.path}", location))
            port = parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError) as error:
            raise _Missing("redirects to something that is no web address") from error
        host = (parts.hostname or "").removesuffix(".")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme not in _PORTS or not _HOST.fullmatch(host) or not re.fullmatch(r"[!-~]{1,2000}", path):
            raise _Missing("redirects to something that is no web address with a DNS name")
        if port not in _PORTS.values() and self._http_port == 80:
            raise _Missing(f"redirects to port {port}; a CA follows to 80 and 443 only")
        return _Place(parts.scheme, host, port, path)

    def _get(self, place: _Place, deadline: float) -> _Reply:
        port = self._http_port if place.port == 80 else place.port
        problem = ""
        for address in self._resolve(place.host, deadline):
            where = f"{address} port {port}"
            try:
                with socket.create_connection((str(address), port), self.left(deadline, _CONNECT_SECONDS)) as plain:
                    return self._exchange(plain, place, port, str(address), deadline)
            except TimeoutError:
                problem = f"does not answer in time at {where}"
            except ConnectionRefusedError:
                problem = f"refuses the connection at {where}"
            except ssl.SSLError:
                raise _Missing(f"speaks no TLS at {where}") from None
            except http.client.HTTPException:
                raise _Missing(f"speaks no HTTP at {where}") from None
            except OSError as error:
                problem = f"cannot be reached from here at {where} ({error.strerror or 'no reason given'})"
        raise _Missing(problem)

    def _exchange(self, plain: socket.socket, place: _Place, port: int, address: str, deadline: float) -> _Reply:
        plain.settimeout(self.left(deadline))
        secure = place.scheme == "https"
        connection = _any_certificate.wrap_socket(plain, server_hostname=place.host) if secure else plain
        host = place.host if port == _PORTS[place.scheme] else f"{place.host}:{port}"
        with connection:
            connection.sendall(
                f"GET {place.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: certbotk8s\r\n"
                "Accept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
            )
            stream = _Stream(self, connection, deadline)
            with http.client.HTTPResponse(cast("socket.socket", stream), method="GET") as response:
                response.begin()
                body = response.read(_MAX_BODY + 1)
                return _Reply(response.status, response.getheader("Location", ""), body, address)

    def _resolve(self, host: str, deadline: float) -> list[IPv4Address | IPv6Address]:
        """The addresses of a name, those of IPv6 first, as CAs prefer them. Asked for once in a few seconds."""
        since, known = self._known.get(host, (0.0, []))
        if known and self._clock.monotonic() - since < _DNS_KEPT_SECONDS:
            return known
        until = min(deadline, self._clock.monotonic() + _DNS_SECONDS)
        found: list[IPv4Address | IPv6Address] = []
        why = "no address"
        for kind in ("AAAA", "A"):
            try:
                answer = self._resolver.resolve(
                    f"{host}.", kind, raise_on_no_answer=False, lifetime=self.left(until, _DNS_SECONDS)
                )
            except dns.resolver.NXDOMAIN:
                raise _Missing("does not exist in the DNS asked from here") from None
            except (dns.exception.Timeout, TimeoutError):
                why = "no answer in time"
            except (dns.exception.DNSException, OSError):
                why = "no usable answer"
            else:
                found += [ip_address(record.address) for record in answer.rrset or ()]
        if not found:
            raise _Missing(f"does not resolve here ({why})")
        asked = [address for address in found if not self._egress.refusal(address)]
        if not asked:
            raise _Missing(f"points to {found[0]}, which is never asked: {self._egress.refusal(found[0])}")
        if len(self._known) >= _DNS_KEPT:
            self._known.clear()
        self._known[host] = self._clock.monotonic(), asked[:_MAX_ADDRESSES]
        return asked[:_MAX_ADDRESSES]

    @cached_property
    def _resolver(self) -> dns.resolver.Resolver:
        resolver = dns.resolver.Resolver(configure=not self._nameservers)
        if self._nameservers:
            resolver.nameservers = [_nameserver(text) for text in self._nameservers]
        return resolver

    def left(self, deadline: float, most: float = _CHALLENGE_SECONDS) -> float:
        """Seconds until `deadline`, `most` at most; TimeoutError when it has passed."""
        left = deadline - self._clock.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, most)


class _Stream(io.RawIOBase):
    """A socket for `http.client`, which knows a time limit for each read but none for the whole answer, nor a size."""

    def __init__(self, look: _Look, connection: socket.socket, deadline: float) -> None:
        self._look = look
        self._connection = connection
        self._deadline = deadline
        self._most = _MAX_HEADERS + _MAX_BODY

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002 - what a socket has
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._most <= 0:
            raise http.client.HTTPException("too long")
        self._connection.settimeout(self._look.left(self._deadline))
        count = self._connection.recv_into(buffer)
        self._most -= count
        return count


def _judge(subject: str, reply: _Reply, key_authorization: str) -> str:
    if reply.status == 200:
        if len(reply.body) <= _MAX_BODY and reply.body.rstrip() == key_authorization.encode():
            return ""
        return f"{subject} answers something else at {reply.address}"
    words = f"{subject} answers {reply.status} at {reply.address}"
    if reply.status in _BACKEND_MISSING:
        words += f": the ingress controller does not reach Service {SERVICE}"
    return words


def _nameserver(text: str) -> dns.nameserver.Do53Nameserver:
    """A nameserver from `address`, `address:port` or `[address]:port`."""
    match = re.fullmatch(r"(?:\[(.+)\]|([^:]+))(?::(\d+))?", text)
    address, port = (match[1] or match[2], int(match[3] or 53)) if match else (text, 53)
    return dns.nameserver.Do53Nameserver(address, port)


# CAs accept any certificate after a redirect to HTTPS: there is none yet.
_any_certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_any_certificate.check_hostname = False
_any_certificate.verify_mode = ssl.CERT_NONE
