"""The API server over HTTP: JSON bytes in and out, and every failure as one of the words of `domain.errors`.

`kubernetes` brings configuration, authentication, TLS and the connection pool; its typed models are left aside: they
cost a second and 70 MiB at start, drop fields that they do not know, and choose content types by themselves. What
remains is this thin layer. URLs and semantics: https://kubernetes.io/docs/reference/using-api/api-concepts/.
"""

from __future__ import annotations

import os
import re
import ssl
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import msgspec
import urllib3
from kubernetes import config
from kubernetes.client import ApiClient, Configuration
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util.retry import Retry
from yaml import YAMLError

import certbotk8s
from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import FIELD_MANAGER, Resource, Struct
from certbotk8s.domain.errors import AlreadyExists, Conflict, PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from certbotk8s.domain.api import Kind
    from certbotk8s.ports import Clock

PAGE_SIZE = 500
CONNECT_SECONDS = 5.0
READ_SECONDS = 15.0
# For so long the client's headers are used again.
CREDENTIALS_SECONDS = 1.0
# The API server sends a bookmark at least every two minutes: a watch that is silent for longer leads nowhere any more.
SILENCE_SECONDS = 150.0

_MERGE_PATCH = "application/merge-patch+json"
_APPLY_PATCH = "application/apply-patch+yaml"  # JSON is YAML
_JSON = "application/json"
_METADATA_ONLY = "application/json;as=PartialObjectMetadata{list};g=meta.k8s.io;v=v1,application/json"

# Names come from tenants' objects and end in a URL path.
_PATH_SEGMENT = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.:]{0,252}")
_LONGEST_WAIT = timedelta(hours=1)

# Once more when no connection came about, or a GET met one that had just been closed; the rest is for the queue.
_RETRIES = Retry(total=1, redirect=False, status=0, respect_retry_after_header=False, allowed_methods={"GET"})
_ONCE = Retry(total=0, redirect=False, status=0, respect_retry_after_header=False)


class Expired(TemporaryError):
    """HTTP 410: the resource version or the continue token is too old; list again."""


class NotFound(TemporaryError):
    """HTTP 404 for an object, or for the namespace of one that was to be made."""


class _Cause(Struct, frozen=True):
    reason: str = ""
    message: str = ""
    field: str = ""


class _Details(Struct, frozen=True):
    name: str = ""
    uid: str = ""
    causes: tuple[_Cause, ...] = ()
    retry_after_seconds: int = 0


class Status(Struct, frozen=True):
    """metav1.Status: what the API server answers instead of an object."""

    kind: str = ""
    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None

    @property
    def tags(self) -> set[str]:
        """What the table of errors goes by: the reason, the causes, and whether a single object is meant."""
        details = self.details or _Details()
        tags = {self.reason, *(cause.reason for cause in details.causes), *(cause.field for cause in details.causes)}
        return tags | {"named"} if details.name else tags


class _Rule(NamedTuple):
    """One row of the table of errors; an empty verb or tag fits all."""

    verb: str
    status: int
    tag: str
    error: type[TemporaryError | PermanentError]
    sentence: str


# The first row that fits counts. What none fits, 429 and 5xx among them, is a TemporaryError.
_ERRORS = (
    _Rule("create", 409, "AlreadyExists", AlreadyExists, "{what} exists already"),
    _Rule("", 409, "", Conflict, "{what} changed since it was read: {message}"),
    _Rule("apply", 404, "named", Conflict, "{what} is gone: {message}"),
    _Rule("apply", 422, "metadata.uid", Conflict, "{what} is another one than was read: {message}"),
    _Rule("", 404, "named", NotFound, "there is no place for {what}: {message}"),
    _Rule("", 404, "", TemporaryError, "the API server does not know {what}; its resource type is not installed"),
    _Rule("", 410, "", Expired, "the API server no longer has this version of {what}: {message}"),
    _Rule("", 401, "", TemporaryError, "the API server at {host} does not accept the credentials: {message}"),
    _Rule("", 403, "NamespaceTerminating", TemporaryError, "{what} cannot be written: its namespace is being deleted"),
    _Rule("", 403, "", TemporaryError, "the API server does not allow to {verb} {what}: {message}"),
    *(
        _Rule("", status, "", PermanentError, "the API server refuses to {verb} {what} as it is: {message}")
        for status in (400, 413, 422)
    ),
)


class _ListMeta(Struct, frozen=True):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class Page(Struct, frozen=True):
    """A part of a collection: `items` are the objects as JSON; an empty list of metadata says null."""

    metadata: _ListMeta
    items: tuple[msgspec.Raw, ...] | None = None


decode_status = msgspec.json.Decoder(Status).decode
_decode_page = msgspec.json.Decoder(Page).decode


def connect(*, kubeconfig: str = "", context: str = "") -> Api:
    """An Api by the usual rules: the file named, $KUBECONFIG, the Pod's ServiceAccount, ~/.kube/config.

    Exec plugins, client certificates, tokens and proxies are honoured. Raises TemporaryError when there is no usable
    configuration.
    """
    configuration = Configuration()
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    try:
        if kubeconfig or context or os.environ.get("KUBECONFIG") or not in_pod:
            file = kubeconfig or os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
            config.load_kube_config(file, context=context or None, client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as error:
        raise TemporaryError(f"there is no way to the API server: {error}") from error
    except YAMLError as error:
        words = " ".join(str(error).split())
        raise TemporaryError(f"there is no way to the API server: the kubeconfig is no YAML: {words}") from error
    configuration.keep_alive = True
    configuration.retries = False
    # Every watch holds a connection; a smaller pool would open and throw away one per request beyond it.
    configuration.connection_pool_maxsize = 256
    client = ApiClient(configuration)
    client.user_agent = f"certbotk8s/{certbotk8s.__version__}"
    return Api(client)


class Api:
    """One API server. Thread-safe. Every call is one request with its own time limit.

    Raises TemporaryError, Conflict, AlreadyExists, Expired or PermanentError(INVALID_SPEC) with the API server's words.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._clock: Clock = SystemClock()  # credentials age by it, whatever time it is in a test
        self._credentials: tuple[float, dict[str, str]] = (0.0, {})
        self.host: str = urlsplit(client.configuration.host).netloc

    def get(self, kind: Kind[Any], namespace: str, name: str, *, seconds: float | None = None) -> bytes | None:
        """The object's JSON, or None when there is no such object. `seconds`: as of `create`."""
        path = _object_path(kind, namespace, name)
        try:
            return self._exchange("read", _named(kind, namespace, name), "GET", path, seconds=seconds)
        except NotFound:
            return None

    def pages(
        self, kind: Kind[Any], namespace: str = "", *, label_selector: str = "", field_selector: str = ""
    ) -> Iterator[Page]:
        """The collection in pages, each asked for when the one before has been taken; all of one version."""
        token = ""
        while True:
            query = [*_selectors(label_selector, field_selector), ("limit", str(PAGE_SIZE)), ("continue", token)]
            body = self._exchange(
                "list",
                kind.plural,
                "GET",
                kind.path(namespace),
                query=[(name, value) for name, value in query if value],
                accept=_accept(kind, "List"),
            )
            try:
                page = _decode_page(body)
            except msgspec.MsgspecError as error:
                raise TemporaryError(f"the list of {kind.plural} from {self.host} cannot be read: {error}") from error
            yield page
            token = page.metadata.continue_
            if not token:
                return

    def watch(
        self,
        kind: Kind[Any],
        namespace: str,
        version: str,
        *,
        seconds: int,
        label_selector: str = "",
        field_selector: str = "",
    ) -> urllib3.BaseHTTPResponse:
        """Open a watch from `version` on, which the server ends after `seconds`; the caller reads and closes it.

        Reading raises urllib3's ReadTimeoutError when it brings nothing, not even a bookmark, for SILENCE_SECONDS.
        """
        query = [
            *_selectors(label_selector, field_selector),
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", version),
            ("timeoutSeconds", str(seconds)),
        ]
        response = self._send("GET", kind.path(namespace), query, _accept(kind, ""), read=SILENCE_SECONDS)
        if response.status != 200:
            try:
                body = response.read(64 * 1024)
            except (HTTPError, OSError) as error:
                raise self._unreachable(error) from error
            finally:
                response.close()
            raise self._error("watch", kind.plural, response, body)
        return response

    def create(self, kind: Kind[Any], manifest: Mapping[str, Any], *, seconds: float | None = None) -> bytes:
        """POST; the object as stored. Raises AlreadyExists when the name is taken.

        With `seconds` the request is sent once, and an answer is waited for no longer than that.
        """
        namespace, name = _identity(manifest)
        _object_path(kind, namespace, name)
        query = [("fieldManager", FIELD_MANAGER), ("fieldValidation", "Strict")]
        body = _manifest(kind, manifest)
        return self._exchange(
            "create",
            _named(kind, namespace, name),
            "POST",
            kind.path(namespace),
            query=query,
            body=body,
            seconds=seconds,
        )

    def apply(
        self, kind: Kind[Any], manifest: Mapping[str, Any], subresource: str = "", *, seconds: float | None = None
    ) -> bytes:
        """Server-side apply, forced; the object as stored. Raises Conflict when a uid or a version does not hold.

        A subresource is replaced as a whole (PUT): apply removes only what no other manager has written there.
        `seconds`: as of `create`.
        """
        namespace, name = _identity(manifest)
        query = [("fieldManager", FIELD_MANAGER), ("fieldValidation", "Strict")]
        return self._exchange(
            "apply",
            _named(kind, namespace, name),
            "PUT" if subresource else "PATCH",
            _object_path(kind, namespace, name, subresource),
            query=query if subresource else [*query, ("force", "true")],
            body=_manifest(kind, manifest),
            content_type=_JSON if subresource else _APPLY_PATCH,
            seconds=seconds,
        )

    def merge(self, kind: Kind[Any], namespace: str, name: str, patch: Mapping[str, Any]) -> bytes:
        """JSON merge patch (RFC 7396); the object as stored. Raises NotFound when there is none."""
        return self._exchange(
            "change",
            _named(kind, namespace, name),
            "PATCH",
            _object_path(kind, namespace, name),
            query=[("fieldManager", FIELD_MANAGER)],
            body=msgspec.json.encode(patch),
            content_type=_MERGE_PATCH,
        )

    def delete(self, kind: Kind[Any], namespace: str, name: str, uid: str = "", version: str = "") -> bytes:
        """Delete in the background; the Status, or the object when a finalizer holds it.

        Raises NotFound when there is none, Conflict when it has another uid or resourceVersion.
        """
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        preconditions = {"uid": uid, "resourceVersion": version}
        if given := {name: value for name, value in preconditions.items() if value}:
            options["preconditions"] = given
        path = _object_path(kind, namespace, name)
        what = _named(kind, namespace, name)
        return self._exchange("delete", what, "DELETE", path, body=msgspec.json.encode(options))

    def _exchange(
        self,
        verb: str,
        what: str,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
        seconds: float | None = None,
    ) -> bytes:
        response = self._send(method, path, query, accept, body=body, content_type=content_type, total=seconds)
        if not 200 <= response.status < 300:
            raise self._error(verb, what, response, response.data)
        return response.data

    def _send(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]],
        accept: str,
        *,
        body: bytes | None = None,
        content_type: str = _JSON,
        read: float | None = None,
        total: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """One request. With `read` (seconds without a byte) the body is left to the caller as a stream.

        With `total` (seconds for connection and answer) it is sent once.
        """
        try:
            headers = self._headers() | {"Accept": accept}
            if body is not None:
                headers["Content-Type"] = content_type
            url = self._client.configuration.host + path + ("?" + urlencode(query, quote_via=quote) if query else "")
            response: urllib3.BaseHTTPResponse = self._client.rest_client.pool_manager.request(
                method,
                url,
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(total=total, connect=CONNECT_SECONDS, read=read or READ_SECONDS),
                retries=_ONCE if total else _RETRIES,
                preload_content=read is None,
            )
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        except config.ConfigException as error:  # an exec plugin or a token file that should give new credentials
            raise TemporaryError(f"there are no credentials for the API server at {self.host}: {error}") from error
        return response

    def _headers(self) -> dict[str, str]:
        """What every request says of us. The client looks through all its configuration for that, and we once a second.

        Raises ConfigException.
        """
        now = self._clock.monotonic()
        since, headers = self._credentials
        if not headers or now - since >= CREDENTIALS_SECONDS:
            _, _, headers, _, _ = self._client.param_serialize("GET", "", auth_settings=["BearerToken"])
            self._credentials = now, headers
        return headers

    def _unreachable(self, error: Exception) -> TemporaryError:
        return TemporaryError(f"the API server at {self.host} cannot be reached: {_network_words(error)}")

    def _error(self, verb: str, what: str, response: urllib3.BaseHTTPResponse, body: bytes) -> Exception:
        status = _status(body)
        message = status.message or f"HTTP {response.status} {response.reason or ''}".strip()
        words = {"verb": verb, "what": what, "message": message[:1000], "host": self.host}
        for rule in _ERRORS:
            if rule.verb in ("", verb) and rule.status == response.status and (not rule.tag or rule.tag in status.tags):
                sentence = rule.sentence.format(**words)
                if issubclass(rule.error, PermanentError):
                    return rule.error(Reason.INVALID_SPEC, sentence)
                return rule.error(sentence)
        sentence = "the API server at {host} could not {verb} {what}: {message}".format(**words)
        return TemporaryError(sentence, retry_after=_retry_after(response, status))


def _object_path(kind: Kind[Any], namespace: str, name: str, subresource: str = "") -> str:
    segments = (namespace, name) if kind.namespaced else (name,)
    if not all(_PATH_SEGMENT.fullmatch(segment) for segment in segments):
        where = "/".join(segment[:253] for segment in segments)
        raise PermanentError(Reason.INVALID_SPEC, f"{where!r} is no name that a {kind.kind} can have")
    return kind.path(namespace, name, subresource)


def _identity(manifest: Mapping[str, Any]) -> tuple[str, str]:
    metadata = manifest["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _manifest(kind: Kind[Any], manifest: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode({"apiVersion": kind.api_version, "kind": kind.kind, **manifest})


def _named(kind: Kind[Any], namespace: str, name: str) -> str:
    return f"{kind.kind} {namespace}/{name}" if namespace else f"{kind.kind} {name}"


def _selectors(label_selector: str, field_selector: str) -> list[tuple[str, str]]:
    pairs = [("labelSelector", label_selector), ("fieldSelector", field_selector)]
    return [(name, value) for name, value in pairs if value]


def _accept(kind: Kind[Any], suffix: str) -> str:
    """A kind of which nothing but the metadata is decoded is asked for as metadata."""
    metadata_only = kind.parse is None and kind.type.__struct_fields__ == Resource.__struct_fields__
    return _METADATA_ONLY.format(list=suffix) if metadata_only else _JSON


def _status(body: bytes) -> Status:
    try:
        return decode_status(body)
    except msgspec.MsgspecError:  # a proxy's page, not the API server's answer
        lines = body[:200].decode("utf-8", "replace").strip().splitlines()
        return Status(message=lines[0] if lines else "")


def _retry_after(response: urllib3.BaseHTTPResponse, status: Status) -> timedelta | None:
    text = response.headers.get("Retry-After", "")
    seconds = int(text) if text.isdecimal() and len(text) < 9 else 0
    if not seconds and status.details:
        seconds = max(status.details.retry_after_seconds, 0)
    return min(timedelta(seconds=seconds), _LONGEST_WAIT) if seconds else None


def _network_words(error: BaseException) -> str:
    """What went wrong on the way, without the names of Python types that urllib3's own messages are made of."""
    while isinstance(error, MaxRetryError) and error.reason:
        error = error.reason
    cause = error.__cause__ or error.__context__
    if isinstance(error, SSLError) and error.args and isinstance(error.args[0], ssl.SSLError):
        cause = error.args[0]
    match error, cause:
        case (NameResolutionError(), _):
            return "its name cannot be resolved"
        case (NewConnectionError(), OSError(strerror=str() as message)):
            return message
        case (ConnectTimeoutError(), _):
            return f"no connection within {CONNECT_SECONDS:.0f} s"
        case (ReadTimeoutError(), _):
            return "no answer in time"
        case (SSLError(), ssl.SSLCertVerificationError(verify_message=str() as message)):
            return f"its certificate is not trusted ({message})"
        case (SSLError(), _):
            return "the TLS handshake failed"
        case (OSError(strerror=str() as message), _):
            return message
        case _:
            return "the connection was cut"
