"""The CA of the lab: Pebble, which demands External Account Binding, and challtestsrv, the DNS server that it asks."""

import base64
import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.lab.api import fetch
from tests.lab.network import Ports
from tests.lab.pki import Authority
from tests.lab.processes import Child, Children

# The paths that Pebble logs. It logs an order's as /my-order/, without its number.
NEW_NONCE = "/nonce-plz"
NEW_ORDER = "/order-plz"
BLOCKED_NAME = "blocked.example.test"
# Pebble picks one at random for an order that asks for none.
PROFILES: Mapping[str, Mapping[str, object]] = {
    "default": {"description": "certificates for 90 days", "validityPeriod": 90 * 24 * 3600},
    "shortlived": {"description": "certificates for 60 s", "validityPeriod": 60},
}

_REQUEST = re.compile(r"(\S+) (\S+) -> calling handler\(\)$")


class AcmeRequest(NamedTuple):
    """A request that reached a handler of the CA; also one that it answered with an error, such as badNonce."""

    method: str
    path: str

    @property
    def is_new_nonce(self) -> bool:
        """Whether it only fetched a nonce: counted apart, since it depends on how many are in stock."""
        return self.path == NEW_NONCE


class AcmeServer(msgspec.Struct, frozen=True, rename="camel"):
    """Where a CA is, and what reached it."""

    directory: str
    """URL of the directory."""
    ca_bundle: str
    """PEM file of the CA that signed its listener's certificate."""
    management: str
    """URL of Pebble's own management interface."""
    root: str
    """URL of the root certificate that it issues under, in PEM."""
    log: str
    """What Pebble says."""

    def root_pem(self) -> bytes:
        """The root certificate that it issues under, in PEM."""
        return fetch(self.root, bundle=self.ca_bundle)

    def mark(self) -> int:
        """A place in the record of requests, for `requests` and `orders`."""
        return Path(self.log).stat().st_size

    def requests(self, since: int = 0) -> list[AcmeRequest]:
        """The requests that reached it since a mark, oldest first; nonce fetches among them (`is_new_nonce`)."""
        with Path(self.log).open("rb") as log:
            log.seek(since)
            lines = log.read().decode(errors="replace").splitlines()
        return [AcmeRequest(found[1], found[2]) for line in lines if (found := _REQUEST.search(line))]

    def orders(self, since: int = 0) -> int:
        """How many newOrder requests reached it since a mark."""
        return sum(request == ("POST", NEW_ORDER) for request in self.requests(since))

    def issued(self, since: int = 0) -> int:
        """How many certificates it has issued since a mark."""
        return self._said(b"Issued certificate serial", since)

    def registered(self, since: int = 0) -> int:
        """How many accounts it has made since a mark."""
        return self._said(b"accounts in memory", since)

    def _said(self, words: bytes, since: int) -> int:
        with Path(self.log).open("rb") as log:
            log.seek(since)
            return log.read().count(words)


class Dns(msgspec.Struct, frozen=True):
    """A running challtestsrv. It answers every name with A 127.0.0.1 that it was not told otherwise about."""

    address: str
    """host:port, UDP and TCP."""
    management: str
    """URL of its management interface."""


def new_eab_keys() -> dict[str, str]:
    """Two key ids with new HMAC keys, base64url without padding."""
    keys = {key_id: secrets.token_bytes(32) for key_id in ("kid-1", "kid-2")}
    return {key_id: base64.urlsafe_b64encode(key).rstrip(b"=").decode() for key_id, key in keys.items()}


def start_dns(bin_folder: Path, ports: Ports, children: Children) -> Dns:
    """Starts challtestsrv; returns when it answers."""
    dns, management = ports.take(), ports.take()
    child = children.start(
        "challtestsrv",
        [
            bin_folder / "pebble-challtestsrv",
            f"-dnsserver=127.0.0.1:{dns}",
            f"-management=127.0.0.1:{management}",
            "-http01=",
            "-https01=",
            "-tlsalpn01=",
            "-doh=",
            "-defaultIPv4=127.0.0.1",
            "-defaultIPv6=",
        ],
    )
    for port in (dns, management):
        child.wait_listening("127.0.0.1", port)
    return Dns(address=f"127.0.0.1:{dns}", management=f"http://127.0.0.1:{management}")


@contextlib.contextmanager
def running_pebble(
    name: str,
    *,
    folder: Path,
    logs: Path,
    bin_folder: Path,
    dns: str,
    http_port: int,
    eab: dict[str, str],
    nonce_reject: int = 0,
    retry_after: int = 0,
    eab_required: bool = True,
    authorization_reuse: int = 0,
    profiles: Mapping[str, Mapping[str, object]] = PROFILES,
) -> Iterator[tuple[AcmeServer, Child]]:
    """A Pebble of its own, with its own account store and root, in the new folder `folder`; killed at the end.

    `nonce_reject` is the percentage of good nonces that it refuses, `retry_after` the seconds that it asks clients to
    wait (0: it does not say), `authorization_reuse` the percentage of names that need no validation again in another
    order of the same account. Validations ask `dns` (host:port) and connect to `http_port`.
    """
    folder.mkdir(parents=True)
    authority = Authority(folder)
    certificate, key = authority.issue("pebble", ["localhost", "127.0.0.1"])
    with Ports() as ports:
        listen, management = ports.take(), ports.take()
        configuration = folder / "pebble.json"
        configuration.write_bytes(
            msgspec.json.encode(
                {
                    "pebble": {
                        "listenAddress": f"127.0.0.1:{listen}",
                        "managementListenAddress": f"127.0.0.1:{management}",
                        "certificate": str(certificate),
                        "privateKey": str(key),
                        "httpPort": http_port,
                        "tlsPort": ports.take(),  # no tls-alpn-01: nothing listens there
                        "externalAccountBindingRequired": eab_required,
                        "externalAccountMACKeys": eab,
                        "domainBlocklist": [BLOCKED_NAME],
                        "retryAfter": {"authz": retry_after, "order": retry_after},
                        "keyAlgorithm": "ecdsa",
                        "profiles": profiles,
                    }
                }
            )
        )
        log = logs / f"{name}.log"
        child = Child(
            name,
            [bin_folder / "pebble", "-config", configuration, "-strict", "-dnsserver", dns],
            log,
            env={
                **os.environ,
                "PEBBLE_VA_NOSLEEP": "1",
                "PEBBLE_AUTHZREUSE": str(authorization_reuse),
                "PEBBLE_WFE_NONCEREJECT": str(nonce_reject),
            },
        )
        try:
            for port in (management, listen):
                child.wait_listening("127.0.0.1", port)
            server = AcmeServer(
                directory=f"https://127.0.0.1:{listen}/dir",
                ca_bundle=str(authority.bundle),
                management=f"https://127.0.0.1:{management}",
                root=f"https://127.0.0.1:{management}/roots/0",
                log=str(log),
            )
            yield server, child
        finally:
            child.kill()
