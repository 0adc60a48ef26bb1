"""The fault-injecting proxies of the lab do what their scripts say, and nothing else: other tests rely on that."""

from __future__ import annotations

import json
import queue
import secrets
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import urllib3

from certbotk8s.ca.authority import Authority
from certbotk8s.ca.keys import Keys
from certbotk8s.clock import SystemClock
from certbotk8s.domain.acme import Identifier
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.ports import Binding, Server
from tests.lab.acme import BLOCKED_NAME
from tests.lab.acme_proxy import AcmeProxy, acme_proxy, document, held, kind_of, problem
from tests.lab.acme_proxy import to as asking
from tests.lab.kube_proxy import KubeProxy, kube_proxy, refused, to
from tests.lab.proxy import Answer, dropped, late
from tests.site import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certbotk8s.ca.authority import Session
    from tests.lab.lab import Lab

BROKEN = (urllib3.exceptions.HTTPError, OSError)


class Client:
    """A client of the API server behind a proxy, for the ConfigMaps of one namespace."""

    def __init__(self, lab: Lab, proxy: KubeProxy, namespace: str) -> None:
        self.path = f"/api/v1/namespaces/{namespace}/configmaps"
        self._url = proxy.url
        self._pool = urllib3.PoolManager(
            retries=False, timeout=10, headers={"Authorization": f"Bearer {lab.api_token}"}
        )

    def ask(self, method: str, path: str = "", body: object = None, **more: Any) -> urllib3.BaseHTTPResponse:
        """One request for the collection, or something in it."""
        data = None if body is None else json.dumps(body).encode()
        return self._pool.request(method, f"{self._url}{self.path}{path}", body=data, **more)

    def create(self, name: str) -> int:
        """The status of the answer."""
        return self.ask("POST", body={"metadata": {"name": name}}).status

    def change(self, name: str, patch: object) -> int:
        """The status of the answer to a merge patch."""
        headers = {**self._pool.headers, "Content-Type": "application/merge-patch+json"}
        return self.ask("PATCH", f"/{name}", patch, headers=headers).status

    def names(self) -> set[str]:
        """What there is."""
        return {item["metadata"]["name"] for item in self.ask("GET").json()["items"]} - {"kube-root-ca.crt"}

    @contextmanager
    def watch(self) -> Iterator[queue.Queue[str]]:
        """The names of what is added from now on, and "end" when the watch is over."""
        version = self.ask("GET").json()["metadata"]["resourceVersion"]
        response = self.ask("GET", f"?watch=true&resourceVersion={version}", preload_content=False)
        events: queue.Queue[str] = queue.Queue()

        def read() -> None:
            buffer = b""
            try:
                for chunk in response.stream(65536):
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        found = json.loads(line)["object"]
                        events.put(found.get("metadata", {}).get("name") or str(found.get("code")))
            except Exception:  # urllib3, http.client and sockets each have their own for a cut connection
                pass
            events.put("end")

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield events
        finally:
            response.shutdown() if thread.is_alive() else None
            thread.join()
            response.close()


@pytest.fixture
def proxy(lab: Lab) -> Iterator[KubeProxy]:
    with kube_proxy(lab) as running:
        yield running


@pytest.fixture
def client(lab: Lab, proxy: KubeProxy, namespace: str) -> Client:
    return Client(lab, proxy, namespace)


def test_passes_on_and_records(client: Client, proxy: KubeProxy) -> None:
    """Every verb and a watch go through to the API server and back; the record has what was asked and answered.

    Mutation: leave Content-Length out of what is passed on, and the API server gets no body.
    """
    with client.watch() as events:
        assert client.create("a") == 201
        assert events.get(timeout=10) == "a"
    assert client.change("a", {"data": {"x": "y" * 100_000}}) == 200
    assert client.ask("DELETE", "/a").status == 200
    assert client.ask("GET", "/a").status == 404
    told = [(each.method, each.path.removeprefix(client.path), each.reached, each.status) for each in proxy.requests()]
    assert told == [
        ("GET", "", True, 200),
        ("GET", "", True, 200),
        ("POST", "", True, 201),
        ("PATCH", "/a", True, 200),
        ("DELETE", "/a", True, 200),
        ("GET", "/a", True, 404),
    ]


def test_a_lag_is_for_watches_alone(client: Client, proxy: KubeProxy) -> None:
    """What is created is read at once while the watch does not tell of it yet; it does so later.

    Mutation: read the lag as 0, and the watch tells at once.
    """
    with client.watch() as events:
        proxy.lag = 2.0
        assert client.create("a") == 201
        assert client.names() == {"a"}
        assert events.empty()
        assert events.get(timeout=20) == "a"


def test_cut_and_mended(client: Client, proxy: KubeProxy) -> None:
    """A cut ends the watch and refuses new connections; mended, all is as before.

    Mutation: keep the listener open, and a new connection is accepted.
    """
    with client.watch() as events:
        proxy.cut()
        assert events.get(timeout=10) == "end"
        with pytest.raises(BROKEN, match="Connection refused"):
            client.names()
    proxy.mend()
    assert client.names() == set()


def test_a_cut_of_the_streams_alone(client: Client, proxy: KubeProxy) -> None:
    """The watch ends, requests and new watches are answered.

    Mutation: abort no stream, and the watch goes on.
    """
    with client.watch() as events:
        proxy.cut_streams()
        assert events.get(timeout=10) == "end"
    with client.watch() as events:
        assert client.create("a") == 201
        assert events.get(timeout=10) == "a"


def test_a_silent_watch(client: Client, proxy: KubeProxy) -> None:
    """A watch that is open says nothing more, and does not end; a new one works.

    Mutation: open every stream silent.
    """
    with client.watch() as silent:
        proxy.silence_streams()
        with client.watch() as events:
            assert client.create("a") == 201
            assert events.get(timeout=10) == "a"
        assert silent.empty()


def test_refused_with_and_without_effect(client: Client, proxy: KubeProxy) -> None:
    """An answer of the script reaches the client as often as was said, after the server has acted or without it.

    Mutation: pass every request on.
    """
    with proxy.inject(
        to("POST", ".*/configmaps"), refused(429, "TooManyRequests", "busy", Retry_After="7"), times=2
    ) as hit:
        for _ in range(2):
            answer = client.ask("POST", body={"metadata": {"name": "a"}})
            assert (answer.status, answer.headers["Retry-After"], answer.json()["message"]) == (429, "7", "busy")
        assert client.names() == set()
        assert client.create("a") == 201
        assert hit.hits == 2
    with proxy.inject(to("POST", ".*/configmaps"), refused(500, "InternalError", "oops", passed_on=True)):
        assert client.create("b") == 500
    assert client.names() == {"a", "b"}
    assert client.create("c") == 201


def test_dropped_with_and_without_effect(client: Client, proxy: KubeProxy) -> None:
    """A dropped connection is closed without an answer, after the server has acted or without it.

    Mutation: pass every request on.
    """
    proxy.inject(to("POST", ".*/configmaps"), dropped(passed_on=False), times=1)
    proxy.inject(to("POST", ".*/configmaps"), dropped(), times=1)
    for name in ("a", "b"):
        with pytest.raises(BROKEN):
            client.create(name)
    assert client.names() == {"b"}
    assert client.create("c") == 201


def test_late(client: Client, proxy: KubeProxy) -> None:
    """A late request is passed on after a while, other requests at once.

    Mutation: do not wait.
    """
    answers: queue.Queue[int] = queue.Queue()
    with proxy.inject(to("POST", ".*/configmaps"), late(1.0), times=1):
        thread = threading.Thread(target=lambda: answers.put(client.create("a")))
        thread.start()
        wait_for(lambda: any(each.method == "POST" for each in proxy.exchanges), "the request comes")
        assert client.names() == set()
        assert answers.empty()
        assert answers.get(timeout=10) == 201
        thread.join()


def test_a_watch_is_refused(client: Client, proxy: KubeProxy) -> None:
    """A fault for watches meets watches alone, and one for other requests leaves watches alone.

    Mutation: let `to` fit watches too where none were asked for.
    """
    path = ".*/configmaps"
    proxy.inject(to("GET", path), refused(500, "InternalError", "no list"), times=1)
    assert client.ask("GET", "?watch=true&timeoutSeconds=1").status == 200
    assert client.ask("GET").status == 500
    proxy.inject(to("GET", path, watch=True), refused(410, "Expired", "too old"), times=1)
    assert client.ask("GET").status == 200
    assert client.ask("GET", "?watch=true").status == 410


# --- the CA -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ca(lab: Lab) -> Iterator[tuple[Session, AcmeProxy]]:
    """A new account at the lab's CA behind a proxy, and that proxy."""
    with acme_proxy(lab) as (seen, proxy):
        server = Server(seen.directory, Path(seen.ca_bundle).read_bytes())
        authority, key = Authority(SystemClock()), Keys().account_key()
        uri = authority.register(server, key, "", Binding("kid-1", lab.eab["kid-1"].encode())).uri
        yield authority.session(server, key, uri), proxy


def name() -> list[Identifier]:
    """A new one."""
    return [Identifier("dns", f"{secrets.token_hex(4)}.example.test")]


def test_every_url_leads_through_the_proxy(lab: Lab, ca: tuple[Session, AcmeProxy]) -> None:
    """Signed requests are accepted, and what the CA names lies behind the proxy; the record tells them apart.

    Mutation: give the CA its own address as Host.
    """
    session, proxy = ca
    order = session.new_order(name(), "default")
    authorization = session.authorization(order.authorizations[0])
    session.order(order.url)
    named = [session.account_uri, order.url, order.finalize, *order.authorizations, authorization.challenges[0].url]
    assert {url.startswith(f"{proxy.url}/") for url in named} == {True}
    kinds = [kind_of(each) for each in proxy.asked()]
    assert kinds == ["directory", "newAccount", "newOrder", "authorization", "order"]
    assert proxy.count("newOrder") == 1


@pytest.mark.parametrize(
    ("value", "least", "most"), [("120", 120, 120), ("Fri, 20 Nov 2099 12:00:00 GMT", 86400, 86400)]
)
def test_a_rate_limit(ca: tuple[Session, AcmeProxy], value: str, least: int, most: int) -> None:
    """A problem of the script reaches the client with its Retry-After, and the CA has not heard of it.

    Mutation: answer without the headers of the script.
    """
    session, proxy = ca
    proxy.inject(asking("newOrder"), problem(429, "rateLimited", "too many", Retry_After=value), times=1)
    with pytest.raises(TemporaryError, match="too many") as caught:
        session.new_order(name(), "default")
    assert caught.value.retry_after
    assert least <= caught.value.retry_after.total_seconds() <= most
    assert proxy.count("newOrder") == 0
    session.new_order(name(), "default")
    assert proxy.count("newOrder") == 1


def test_an_answer_lost_after_the_ca_acted(lab: Lab, ca: tuple[Session, AcmeProxy]) -> None:
    """The CA has the order, the client got nothing.

    Mutation: pass no request on whose answer is dropped.
    """
    session, proxy = ca
    since = lab.acme.mark()
    proxy.inject(asking("newOrder"), dropped(), times=1)
    with pytest.raises(TemporaryError, match="the connection broke"):
        session.new_order(name(), "default")
    assert lab.acme.orders(since) == 1


def test_a_document_is_changed(ca: tuple[Session, AcmeProxy]) -> None:
    """What the CA says is changed on its way, an error is not.

    Mutation: change errors too.
    """
    session, proxy = ca
    with proxy.inject(asking("newOrder"), document(lambda each: each | {"status": "ready", "detail": "changed"})):
        order = session.new_order(name(), "default")
        assert order.status == "ready"
        with pytest.raises(PermanentError, match="forbidden by policy"):
            session.new_order([Identifier("dns", BLOCKED_NAME)], "default")
    assert session.order(order.url).status == "pending"


@pytest.mark.parametrize(
    ("status", "shown"),
    [("pending", "pending"), ("ready", "ready"), ("processing", "processing"), ("valid", "processing")],
)
def test_an_order_is_held(status: str, shown: str) -> None:
    """Only an order that was finalized is shown as processing, without its certificate, and with Retry-After if asked.

    Mutation: leave the certificate in.
    """
    order = {"status": status, "certificate": "https://ca.example.test/certZ/1"}
    answer = held("3").respond(Answer(200, (("Retry-After", "9"),), json.dumps(order).encode()))
    assert answer
    told = json.loads(answer.body)
    assert told["status"] == shown
    assert ("certificate" in told, answer.header("Retry-After")) == (
        (False, "3") if shown == "processing" else (True, "9")
    )
    assert held().respond(Answer(404)) == Answer(404)
