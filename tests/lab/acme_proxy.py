"""A proxy with faults in front of a CA: what Pebble cannot show, such as rate limits and orders that take their time.

Pebble makes its URLs from the Host header, which is passed on: every URL that it names leads through the proxy.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from tests.lab.acme import AcmeServer
from tests.lab.api import https_context
from tests.lab.pki import Authority
from tests.lab.proxy import Answer, Fault, Proxy, answered, changed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.lab import Lab
    from tests.lab.proxy import Exchange, Request

# What a URL of Pebble's is for, in the words of RFC 8555 section 7.1.
_KINDS = {
    "dir": "directory",
    "nonce-plz": "newNonce",
    "sign-me-up": "newAccount",
    "order-plz": "newOrder",
    "my-order": "order",
    "authZ": "authorization",
    "chalZ": "challenge",
    "finalize-order": "finalize",
    "certZ": "certificate",
    "my-account": "account",
}
_PROBLEM = "application/problem+json"


class AcmeProxy(Proxy):
    """The way to a CA. `exchanges` is the record of all ACME requests, `kind` tells what each was for."""

    def count(self, kind: str, since: int = 0) -> int:
        """How many requests of that kind have reached the CA since a length of `exchanges`."""
        return sum(each.reached and kind_of(each) == kind for each in self.exchanges[since:])

    def asked(self, since: int = 0) -> list[Exchange]:
        """Every request since a length of `exchanges`, answered by the CA or not, nonce fetches apart."""
        return [each for each in self.exchanges[since:] if kind_of(each) != "newNonce"]


@contextlib.contextmanager
def acme_proxy(lab: Lab, ca: AcmeServer | None = None) -> Iterator[tuple[AcmeServer, AcmeProxy]]:
    """The lab's CA, or another one, as it is seen through a new proxy, and that proxy."""
    behind = ca or lab.acme
    folder = Path(lab.kubeconfig).with_name(f"acme-proxy-{secrets.token_hex(4)}")
    folder.mkdir()
    authority = Authority(folder)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*authority.issue("acme-proxy", ["localhost", "127.0.0.1"]))
    bundle = folder / "bundle.pem"  # the CA's management interface is not behind the proxy
    bundle.write_bytes(authority.bundle.read_bytes() + Path(behind.ca_bundle).read_bytes())
    with AcmeProxy(behind.directory, https_context(behind.ca_bundle), tls=tls) as proxy:
        seen = msgspec.structs.replace(
            behind, directory=f"{proxy.url}{urlsplit(behind.directory).path}", ca_bundle=str(bundle)
        )
        yield seen, proxy


def kind_of(request: Request | Exchange) -> str:
    """What a request is for: directory, newNonce, newOrder, order, finalize, ..., or its path if for none of these."""
    return _KINDS.get(request.path.split("/")[1], request.path)


def to(*kinds: str) -> Callable[[Request], bool]:
    """Requests of these kinds."""
    return lambda request: kind_of(request) in kinds


def problem(status: int, kind: str, detail: str, *, passed_on: bool = False, **headers: str) -> Fault:
    """An ACME error (RFC 8555 section 6.7), for example of kind rateLimited, with headers such as Retry_After."""
    document = {"type": f"urn:ietf:params:acme:error:{kind}", "detail": detail, "status": status}
    body = msgspec.json.encode(document)
    return answered(status, body, passed_on=passed_on, Content_Type=_PROBLEM, **headers)


def document(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Fault:
    """The client gets what `change` makes of the JSON document in the CA's answer; errors stay as they are."""

    def respond(answer: Answer) -> Answer:
        if answer.status >= 400:
            return answer
        return answer._replace(body=msgspec.json.encode(change(msgspec.json.decode(answer.body))))

    return changed(respond)


def held(retry_after: str = "") -> Fault:
    """An issued order is shown as `processing`, as a CA does that validates an organisation; for `order`, `finalize`.

    `retry_after` goes with it, if given.
    """

    def respond(answer: Answer) -> Answer:
        if answer.status >= 400 or not _ISSUED.search(answer.body):
            return answer
        order = msgspec.json.decode(answer.body)
        order["status"] = "processing"
        order.pop("certificate", None)
        headers = tuple(each for each in answer.headers if each[0].lower() != "retry-after")
        if retry_after:
            headers = (*headers, ("Retry-After", retry_after))
        return Answer(answer.status, headers, msgspec.json.encode(order))

    return changed(respond)


_ISSUED = re.compile(rb'"status":\s*"(valid|processing)"')
