"""Failures of the API server as the words that reconcilers know."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient, Configuration

from certbotk8s.domain.api import CERTIFICATE, CLUSTER_ISSUER, SECRET
from certbotk8s.domain.errors import AlreadyExists, Conflict, PermanentError, TemporaryError
from certbotk8s.kube.api import Api, Expired, NotFound, connect
from certbotk8s.kube.cluster import _matcher
from tests.fakes.apiserver import Answer, ScriptedApiServer, answer, hang_up, json, status
from tests.fakes.clock import FakeClock

MANIFEST = {"metadata": {"namespace": "shop", "name": "web"}}


def failure(verb: str, reply: Answer) -> Exception:
    """What a call raises when the API server answers so."""
    calls: dict[str, Callable[[Api], object]] = {
        "read": lambda api: api.get(SECRET, "shop", "web"),
        "create": lambda api: api.create(SECRET, MANIFEST),
        "apply": lambda api: api.apply(SECRET, MANIFEST),
        "change": lambda api: api.merge(SECRET, "shop", "web", {}),
        "delete": lambda api: api.delete(SECRET, "shop", "web"),
        "list": lambda api: list(api.pages(SECRET)),
        "watch": lambda api: api.watch(SECRET, "", "5", seconds=300),
    }
    # Reads are repeated once when their connection breaks.
    with ScriptedApiServer(answers=[reply], watches=[reply, reply]) as server:
        with pytest.raises((TemporaryError, PermanentError)) as raised:
            calls[verb](server.api())
        assert server.unexpected == []
        return raised.value


NAMED = {"name": "web"}
TERMINATING = {"name": "web", "causes": [{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]}
OTHER_UID = {"name": "web", "causes": [{"reason": "FieldValueInvalid", "field": "metadata.uid"}]}


@pytest.mark.parametrize(
    ("verb", "reply", "error", "words"),
    [
        ("create", status(409, "taken", reason="AlreadyExists"), AlreadyExists, "Secret shop/web exists already"),
        ("create", status(409, "quota moved", reason="Conflict"), Conflict, "changed since it was read: quota moved"),
        ("apply", status(409, "modified", reason="Conflict"), Conflict, "Secret shop/web changed since it was read"),
        ("apply", status(404, "not found", details=NAMED), Conflict, "Secret shop/web is gone: not found"),
        ("apply", status(422, "immutable", details=OTHER_UID), Conflict, "is another one than was read"),
        ("apply", status(422, "bad", details=NAMED), PermanentError, "refuses to apply Secret shop/web as it is: bad"),
        ("create", status(404, 'namespaces "shop" not found', details=NAMED), NotFound, 'namespaces "shop" not found'),
        ("read", status(404, "the server could not find the requested resource"), TemporaryError, "not installed"),
        ("read", answer(404, b"404 page not found\n"), TemporaryError, "not installed"),
        ("delete", status(404, "not found", details=NAMED), NotFound, "not found"),
        ("change", status(404, "not found", details=NAMED), NotFound, "not found"),
        ("list", status(410, "too old"), Expired, "no longer has this version of secrets: too old"),
        ("watch", status(410, "too old"), Expired, "no longer has this version of secrets: too old"),
        ("create", status(401, "Unauthorized"), TemporaryError, "does not accept the credentials: Unauthorized"),
        ("create", status(403, "no right", details=NAMED), TemporaryError, "does not allow to create Secret shop/web"),
        ("create", status(403, "x", details=TERMINATING), TemporaryError, "its namespace is being deleted"),
        ("create", status(400, "strict decoding error"), PermanentError, "as it is: strict decoding error"),
        ("create", status(413, "too large"), PermanentError, "as it is: too large"),
        (
            "read",
            status(500, "etcdserver: leader changed"),
            TemporaryError,
            "could not read Secret shop/web: etcdserver",
        ),
        ("read", answer(502, b"<html>\n<body>bad gateway"), TemporaryError, "could not read Secret shop/web: <html>"),
        ("read", answer(302, b"", Location="http://127.0.0.1:1/"), TemporaryError, "could not read .*: HTTP 302 Found"),
        ("list", answer(200, b"<html>"), TemporaryError, "the list of secrets from .* cannot be read"),
        ("watch", hang_up, TemporaryError, "cannot be reached: the connection was cut"),
    ],
)
def test_table_of_errors(verb: str, reply: Answer, error: type[Exception], words: str) -> None:
    """Each answer becomes the word that the reconciler acts on, with a sentence. (Break: swap any two rows.)"""
    raised = failure(verb, reply)
    assert type(raised) is error
    assert re.search(words, str(raised))


@pytest.mark.parametrize(
    ("reply", "seconds"),
    [
        (status(429, "slow down", Retry_After="7"), 7),
        (status(503, "later", Retry_After="3"), 3),
        (status(504, "timeout", details={"retryAfterSeconds": 5}), 5),
        (status(429, "for ever", Retry_After="999999999999"), None),
        (status(429, "long", Retry_After="99999999"), 3600),
        (status(503, "no word"), None),
        (status(503, "a date", Retry_After="Fri, 20 Nov 2026 10:00:00 GMT"), None),
    ],
)
def test_retry_after(reply: Answer, seconds: int | None) -> None:
    """The API server's own word on when to come back is kept, within an hour. (Break: read the header only.)"""
    raised = failure("apply", reply)
    assert isinstance(raised, TemporaryError)
    assert raised.retry_after == (None if seconds is None else timedelta(seconds=seconds))


def test_writes_are_sent_once() -> None:
    """A create whose connection breaks is not sent again; a read is, once. (Break: allowed_methods=None.)"""
    with ScriptedApiServer(answers=[hang_up]) as server:
        with pytest.raises(TemporaryError, match=f"the API server at {server.host} cannot be reached"):
            server.api().create(SECRET, MANIFEST)
        assert len(server.requests) == 1
        server.answers += [hang_up, json({"kind": "Secret"})]
        assert server.api().get(SECRET, "shop", "web") is not None
        assert len(server.requests) == 3


def test_what_is_sent() -> None:
    """Requests carry content type, field manager, force and strict validation. (Break: leave the content type out.)"""
    with ScriptedApiServer(answers=[json({}) for _ in range(5)]) as server:
        api = server.api()
        api.create(SECRET, MANIFEST)
        api.apply(CERTIFICATE, MANIFEST, "status")
        api.apply(CERTIFICATE, MANIFEST)
        api.delete(SECRET, "shop", "web", "u-1")
        api.get(CLUSTER_ISSUER, "", "letsencrypt")
        created, replaced, applied, deleted, read = server.requests
    assert (created.method, created.path) == ("POST", "/api/v1/namespaces/shop/secrets")
    assert created.headers["Content-Type"] == "application/json"
    assert created.query == {"fieldManager": "certbotk8s", "fieldValidation": "Strict"}
    assert (replaced.method, replaced.headers["Content-Type"]) == ("PUT", "application/json")
    assert replaced.path == "/apis/certbotk8s.io/v1/namespaces/shop/certificates/web/status"
    assert replaced.query == {"fieldManager": "certbotk8s", "fieldValidation": "Strict"}
    assert applied.method == "PATCH"
    assert applied.path == "/apis/certbotk8s.io/v1/namespaces/shop/certificates/web"
    assert applied.headers["Content-Type"] == "application/apply-patch+yaml"
    assert applied.query == {"fieldManager": "certbotk8s", "force": "true", "fieldValidation": "Strict"}
    assert b'"apiVersion":"certbotk8s.io/v1","kind":"Certificate"' in applied.body
    assert b'"preconditions":{"uid":"u-1"}' in deleted.body
    assert b'"propagationPolicy":"Background"' in deleted.body
    assert read.path == "/apis/certbotk8s.io/v1/clusterissuers/letsencrypt"


def client(host: str) -> Api:
    return Api(ApiClient(Configuration(host=host, no_proxy="*", retries=False)))


def test_credentials_are_looked_at_once_a_second() -> None:
    """Many requests ask the client's configuration once, and a new token is used a second later.

    Mutations: ask for every request; keep the first answer for ever.
    """
    asked = []

    def refresh(configuration: Configuration) -> None:
        asked.append(True)
        configuration.api_key["authorization"] = f"Bearer {len(asked)}"

    with ScriptedApiServer(answers=[json({})] * 4) as server:
        configuration = Configuration(host=f"http://{server.host}", no_proxy="*", retries=False)
        configuration.refresh_api_key_hook = refresh  # type: ignore[assignment]
        configuration.api_key["authorization"] = "none yet"
        api, clock = Api(ApiClient(configuration)), FakeClock()
        api._clock = clock
        for pause in (0, 0.5, 0.4, 0.2):
            clock.advance(pause)
            api.get(SECRET, "shop", "web")
    tokens = [request.headers["authorization"] for request in server.requests]
    assert tokens == ["Bearer 1", "Bearer 1", "Bearer 1", "Bearer 2"]


def test_network_failures_have_plain_words() -> None:
    """What goes wrong on the way is told without the names of Python types. (Break: use str(error).)"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for host, words in (
        (f"http://127.0.0.1:{port}", "Connection refused"),
        ("http://no-such-host.invalid", "its name cannot be resolved"),
    ):
        with pytest.raises(TemporaryError) as raised:
            client(host).get(SECRET, "shop", "web")
        assert str(raised.value).endswith(f"cannot be reached: {words}")


def test_plain_http_server_behind_https() -> None:
    """A server that speaks no TLS is told as such. (Break: the SSLError row is removed.)"""
    with ScriptedApiServer() as server, pytest.raises(TemporaryError, match="the TLS handshake failed"):
        client(f"https://{server.host}").create(SECRET, MANIFEST)


def test_a_silent_server_does_not_hold_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and says nothing is given up on. (Break: no read timeout.)"""
    monkeypatch.setattr("certbotk8s.kube.api.READ_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = client(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(TemporaryError, match="no answer in time"):
            silent.create(SECRET, MANIFEST)


def test_connect_takes_the_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and context named, $KUBECONFIG, and what is said when there is none. (Break: ignore the context.)"""
    context = {"cluster": "one", "user": "one"}
    file = tmp_path / "config"
    content: dict[str, Any] = {
        "current-context": "one",
        "clusters": [{"name": name, "cluster": {"server": f"http://{name}.invalid:80"}} for name in ("one", "two")],
        "users": [{"name": "one", "user": {"token": "t"}}],
        "contexts": [{"name": "one", "context": context}, {"name": "two", "context": {**context, "cluster": "two"}}],
    }
    file.write_text(yaml.safe_dump(content))
    assert connect(kubeconfig=str(file)).host == "one.invalid:80"
    assert connect(kubeconfig=str(file), context="two").host == "two.invalid:80"
    monkeypatch.setenv("KUBECONFIG", str(file))
    assert connect().host == "one.invalid:80"
    with pytest.raises(TemporaryError, match="there is no way to the API server"):
        connect(kubeconfig=str(tmp_path / "nothing"))
    monkeypatch.setenv("KUBECONFIG", "")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    with pytest.raises(TemporaryError, match="there is no way to the API server"):
        connect()


@pytest.mark.parametrize(
    ("selector", "labels", "matches"),
    [
        ("", {}, True),
        ("role", {"role": ""}, True),
        ("role", {}, False),
        ("role=tls", {"role": "tls"}, True),
        ("role=tls", {"role": "key"}, False),
        ("role in (tls, key)", {"role": "key"}, True),
        ("role in (tls, key)", {"role": "other"}, False),
        ("role in (tls,key),app", {"role": "key", "app": "x"}, True),
        ("role==tls, app", {"role": "tls"}, False),
    ],
)
def test_selectors_match_as_the_server_does(selector: str, labels: dict[str, str], matches: bool) -> None:
    """Own writes are put into a cache by the same rule as the server's. (Break: ignore all terms but the first.)"""
    assert _matcher(selector)(labels) is matches


@pytest.mark.parametrize("selector", ["!role", "role!=tls", "role notin (a)", "role in (a", "a b"])
def test_unknown_selectors_are_refused(selector: str) -> None:
    """A selector that could not be matched here is refused at once. (Break: skip what does not parse.)"""
    with pytest.raises(ValueError, match="label selector"):
        _matcher(selector)
