"""A proxy with faults between a controller and the API server: plain HTTP in, TLS out, so that it tells watches apart.

The lab's other parts, and the test itself, go on to speak to the API server directly.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tests.lab.api import https_context
from tests.lab.proxy import Fault, Proxy, answered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.lab.lab import Lab
    from tests.lab.proxy import Exchange, Request


class KubeProxy(Proxy):
    """The way of one replica to the API server. `lag` delays its watches."""

    def __init__(self, lab: Lab, kubeconfig: Path) -> None:
        """Writes `kubeconfig`: user certbotk8s, through this proxy."""
        super().__init__(lab.api_server, https_context(lab.api_ca_bundle), streams=is_watch)
        self._kubeconfig = kubeconfig
        known: dict[str, Any] = msgspec.json.decode(Path(lab.controller_kubeconfig).read_bytes())
        known["clusters"] = [{"name": "lab", "cluster": {"server": self.url}}]
        kubeconfig.write_bytes(msgspec.json.encode(known))
        kubeconfig.chmod(0o600)

    @property
    def environment(self) -> Mapping[str, str]:
        """For `Controller(lab, environment=...)`: the replica that comes this way."""
        return {"KUBECONFIG": str(self._kubeconfig)}

    def requests(self, since: int = 0) -> list[Exchange]:
        """What the replica asked since a length of `exchanges`, its leases apart."""
        return [each for each in self.exchanges[since:] if "/leases" not in each.path]


@contextlib.contextmanager
def kube_proxy(lab: Lab) -> Iterator[KubeProxy]:
    """A new proxy for one replica of the controller."""
    kubeconfig = Path(lab.kubeconfig).with_name(f"proxied-{secrets.token_hex(4)}.kubeconfig")
    with KubeProxy(lab, kubeconfig) as proxy:
        try:
            yield proxy
        finally:
            kubeconfig.unlink()


def is_watch(request: Request | Exchange) -> bool:
    """Whether it asks for a watch, of which the answer is a stream."""
    return "watch=true" in request.target.partition("?")[2].split("&")


def to(method: str, path: str, *, watch: bool = False) -> Callable[[Request], bool]:
    """Requests by their method and by a regular expression that the whole path matches; watches only if asked for."""
    pattern = re.compile(path)
    return lambda request: (
        request.method == method and bool(pattern.fullmatch(request.path)) and is_watch(request) == watch
    )


def refused(code: int, reason: str, message: str, *, passed_on: bool = False, **headers: str) -> Fault:
    """The API server's way to say no: a Status. With `passed_on` it has acted all the same."""
    return answered(code, _status(code, reason, message), passed_on=passed_on, Content_Type=_JSON, **headers)


_JSON = "application/json"


def _status(code: int, reason: str, message: str) -> bytes:
    return msgspec.json.encode(
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }
    )
