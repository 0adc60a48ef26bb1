"""HTTPS to one ACME server: capped, timed, never redirected, always verified.

Written on urllib3 and not on `acme.client.ClientNetwork`, which drops the nonces of error answers, reads Retry-After
dates in local time, caps nothing and follows redirects. What the server answers is judged elsewhere: this module
raises only where there is no answer, or none that may be read.
"""

from __future__ import annotations

import re
import socket
import ssl
from contextlib import contextmanager, suppress
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.client import HTTPException
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

import urllib3
from urllib3 import exceptions as http
from urllib3.connection import HTTPSConnection
from urllib3.util import parse_url

from certbotk8s import __version__
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from certbotk8s.domain.addresses import Egress
    from certbotk8s.ports import Clock

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
BODY_LIMIT = 1 << 20
URL_LIMIT = 2048
RETRY_AFTER_LIMIT = timedelta(days=1)

# RFC 3986 without user information and fragments: two parsers cannot disagree about the host of what this lets through.
_URL = re.compile(
    r"(?i:https)://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?(?:[/?][A-Za-z0-9._~!$&'()*+,;=:@/?%-]*)?"
)
_SECONDS = re.compile(r"-?[0-9]{1,12}(?:\.[0-9]*)?")


class AddressRefused(http.HTTPError):
    """None of a server's addresses may be asked."""


# What each exception means to the reader; the first that fits counts. {seconds} is the read timeout.
_CAUSES: tuple[tuple[type[Exception], str], ...] = (
    (AddressRefused, "{words}. If that is meant, allow it with --allow-addresses"),
    (http.NameResolutionError, "its name cannot be resolved. Check the name and this cluster's DNS"),
    (http.NewConnectionError, "no connection{error}. Check the address, routes and firewalls"),
    (http.ConnectTimeoutError, f"no connection within {CONNECT_SECONDS:.0f} s{{error}}. Check routes and firewalls"),
    (http.TimeoutError, "no answer within {seconds:.0f} s"),
    (TimeoutError, "no answer within {seconds:.0f} s"),
    (http.SSLError, "the TLS handshake failed{error}"),
    (ssl.SSLError, "the TLS handshake failed{error}"),
    (http.ProxyError, "the proxy could not reach it{error}"),
    (http.ProxySchemeUnsupported, "the proxy's kind is not supported"),
    (http.LocationValueError, "its URL cannot be used"),
    (http.ProtocolError, "the connection broke{error}"),
    (http.PoolError, "the connection was closed on our side"),
    (http.HTTPError, "it does not speak HTTP as it should{error}"),
    (HTTPException, "it does not speak HTTP as it should{error}"),
    (OSError, "the connection broke{error}"),
)
_BUNDLE = "If the CA is a private one, put its root certificate into spec.acme.caBundle of the issuer"
# OpenSSL's X509_V_ERR codes; any other is a chain that leads to no trusted root.
_UNTRUSTED = {
    9: "Its certificate is not valid yet: check this machine's clock",
    10: "Its certificate has expired",
    62: "Check the host name in spec.acme.server of the issuer",
    64: "Check the address in spec.acme.server of the issuer",
}


class Address(NamedTuple):
    """A URL that may be asked: written as it is sent, and `https://host:port`, by which hosts are compared."""

    url: str
    origin: str


class Answer(NamedTuple):
    """An HTTP answer, read to its end. `retry_after` is its header in either form, clamped to [0, 1 day]."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    retry_after: timedelta | None


class Transport:
    """Connections to one ACME server, shared by threads."""

    def __init__(self, ca_bundle: bytes, clock: Clock, egress: Egress) -> None:
        """`ca_bundle`: the only PEM roots to trust; empty: the system's. PermanentError when it holds none.

        `egress` says which addresses are asked.
        """
        self._clock = clock
        self._pool = urllib3.PoolManager(
            num_pools=8,
            maxsize=16,
            ssl_context=_context(ca_bundle),
            headers={"User-Agent": f"certbotk8s/{__version__}"},
        )
        self._pool.pool_classes_by_scheme = {"https": _pool_class(egress)}

    def request(
        self,
        method: str,
        address: Address,
        *,
        body: bytes | None = None,
        seconds: float = READ_SECONDS,
        accept: str = "application/json",
    ) -> Answer:
        """One request, never repeated here; TemporaryError when no whole answer of at most 1 MiB comes."""
        headers = {**self._pool.headers, "Accept": accept}
        if body is not None:
            headers["Content-Type"] = "application/jose+json"
        deadline = self._clock.monotonic() + CONNECT_SECONDS + seconds
        with told(address.origin, seconds):
            response = self._pool.urlopen(
                method,
                address.url,
                body=body,
                headers=headers,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=seconds),
            )
            try:
                received = bytearray()
                while chunk := response.read1(65536):
                    received += chunk
                    if len(received) > BODY_LIMIT:
                        raise TemporaryError(f"The CA's server {address.origin} sent more than {BODY_LIMIT} bytes.")
                    # The read timeout is one of silence; a server that sends a byte now and then must end as well.
                    if self._clock.monotonic() > deadline:
                        raise TimeoutError
            finally:
                response.close()  # one that was read to its end has given its connection back already
        after = retry_after(response.headers.get("Retry-After", ""), self._clock.now())
        return Answer(address.url, response.status, response.headers, bytes(received), after)


@lru_cache(maxsize=8)
def _pool_class(egress: Egress) -> type[urllib3.HTTPSConnectionPool]:
    """A pool whose connections lead to no address that `egress` refuses, whatever DNS says at this moment."""

    class Connection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            # The name is resolved once, here, so that what is connected to is what was looked at.
            name, port = self._dns_host, self.port or 443
            try:
                found = socket.getaddrinfo(name.strip("[]"), port, type=socket.SOCK_STREAM)
            except OSError as error:
                raise http.NameResolutionError(name, self, socket.gaierror(str(error))) from error
            addresses = list(dict.fromkeys(ip_address(str(each[4][0]).partition("%")[0]) for each in found))
            refused = {each: egress.refusal(each) for each in addresses}
            asked = [each for each in addresses if not refused[each]]
            if not asked:
                raise AddressRefused(f"it is at {addresses[0]}, which is never asked: {refused[addresses[0]]}")
            try:
                for each in asked[:-1]:
                    self._dns_host = str(each)
                    with suppress(http.NewConnectionError, http.ConnectTimeoutError):
                        return super()._new_conn()
                self._dns_host = str(asked[-1])
                return super()._new_conn()
            finally:
                self._dns_host = name

    class Pool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Connection

    return Pool


def address(url: str) -> Address | None:
    """The URL in the form in which urllib3 sends it (a JWS must name just that), or None when it is not plain https."""
    if len(url) > URL_LIMIT or not _URL.fullmatch(url):
        return None
    try:
        parsed = parse_url(url)
    except http.LocationParseError:
        return None
    return Address(parsed.url, f"https://{parsed.host}:{parsed.port or 443}")


def retry_after(value: str, now: datetime) -> timedelta | None:
    """RFC 9110 section 10.2.3: seconds, or a date, here as a length from `now`; in [0, 1 day]. None: no such thing."""
    value = value.strip()
    if _SECONDS.fullmatch(value):
        length = timedelta(seconds=float(value))
    else:
        try:
            date = parsedate_to_datetime(value)
            length = (date if date.tzinfo else date.replace(tzinfo=UTC)) - now
        except (ValueError, OverflowError):
            return None
    return min(max(length, timedelta(0)), RETRY_AFTER_LIMIT)


@contextmanager
def told(origin: str, seconds: float) -> Iterator[None]:
    """Everything that urllib3, ssl and sockets raise, as a TemporaryError whose sentence names the host and why."""
    try:
        yield
    except tuple(kind for kind, _ in _CAUSES) as error:
        raise TemporaryError(f"No answer from the CA's server {origin}: {_cause(error, seconds)}.") from error


def _cause(error: Exception, seconds: float) -> str:
    chain = _chain(error)
    untrusted = next((e for e in chain if isinstance(e, ssl.SSLCertVerificationError)), None)
    if untrusted:
        advice = _UNTRUSTED.get(untrusted.verify_code, _BUNDLE)
        return f"its TLS certificate was refused ({untrusted.verify_message.rstrip('.')}). {advice}"
    words = next((e.strerror for e in chain if isinstance(e, OSError) and isinstance(e.strerror, str)), "")
    sentence = next(sentence for kind, sentence in _CAUSES if isinstance(error, kind))
    return sentence.format(words=error, seconds=seconds, error=f" ({words.splitlines()[0]})" if words else "")


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those that it was made from: urllib3 keeps them as cause, as argument, or as `reason`."""
    found = [error]
    for one in found:
        inner = (one.__cause__, one.__context__, *one.args)
        found += [e for e in inner if isinstance(e, BaseException) and e not in found][: 10 - len(found)]
    return found


@lru_cache(maxsize=64)
def _context(ca_bundle: bytes) -> ssl.SSLContext:
    """Shared by all servers with the same roots: the system's take a megabyte."""
    if not ca_bundle:
        return ssl.create_default_context()
    try:
        # Bundles carry comments in UTF-8, which OpenSSL does not need.
        return ssl.create_default_context(cadata=ca_bundle.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise PermanentError(
            Reason.CA_BUNDLE_INVALID,
            "spec.acme.caBundle of the issuer holds no PEM certificate that can be read. Give the CA's root there.",
        ) from error
