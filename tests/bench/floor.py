"""The floor: what a bare client with the `acme` library does, with threads and nothing else, at a CA of the same kind.

Each thread makes a key and a CSR and takes an order to its certificate, as `acme.client` does it. HTTP-01 is answered
from memory, without an ingress controller. It is a program of its own, so that its CPU is its own.
"""

from __future__ import annotations

import json
import os
import secrets
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from acme import challenges, messages
from acme.client import ClientNetwork, ClientV2
from acme.crypto_util import make_csr
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from josepy.jwa import ES256
from josepy.jwk import JWKEC

from tests.lab.acme import running_pebble
from tests.lab.lab import Lab
from tests.lab.network import Ports

THREADS = 8
_PAUSE = 0.01  # seconds between two looks at what the CA works on
_ANSWERS: dict[str, str] = {}


def floor(lab: Lab, count: int, key: str) -> dict[str, float]:
    """The bare client's figures for `count` certificates with keys of that algorithm, at a Pebble of its own."""
    home = Path(lab.kubeconfig).parent / f"floor-{secrets.token_hex(3)}"
    with Ports() as ports:
        port = ports.take()
        pebble = running_pebble(
            home.name,
            folder=home,
            logs=Path(lab.logs),
            bin_folder=Path(lab.bin),
            dns=lab.dns,
            http_port=port,
            eab=lab.eab,
        )
        with pebble as (server, _):
            task = {"directory": server.directory, "port": port, "hmac": lab.eab["kid-1"], "count": count, "key": key}
            outcome = subprocess.run(
                [sys.executable, "-m", "tests.bench.floor", json.dumps(task)],
                env={**os.environ, "REQUESTS_CA_BUNDLE": server.ca_bundle},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            figures: dict[str, float] = json.loads(outcome.stdout)
            figures["requests to the CA"] = sum(not each.is_new_nonce for each in server.requests()) / (count + 1)
            figures["certificates issued by the CA"] = server.issued() - 1
    return {name: round(figure, 3) for name, figure in figures.items()}


class _Responder(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        body = _ANSWERS.get(self.rfile.readline().split()[1].decode().rpartition("/")[2], "").encode()
        while self.rfile.readline().strip():
            pass
        head = f"HTTP/1.0 {200 if body else 404} .\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def _responder(port: int) -> Iterator[None]:
    with _Server(("127.0.0.1", port), _Responder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


class _Account:
    """An account, with a client for each thread."""

    def __init__(self, directory: str, hmac: str) -> None:
        self._directory = directory
        self._key = JWKEC(key=ec.generate_private_key(ec.SECP256R1()))
        self._local = threading.local()
        net = ClientNetwork(self._key, alg=ES256)
        client = ClientV2(ClientV2.get_directory(directory, net), net)
        binding = messages.ExternalAccountBinding.from_data(
            self._key.public_key(), "kid-1", hmac, client.directory, "HS256"
        )
        registration = messages.NewRegistration.from_data(
            terms_of_service_agreed=True, external_account_binding=binding
        )
        self._registration = client.new_account(registration)

    def _client(self) -> ClientV2:
        if not hasattr(self._local, "client"):
            net = ClientNetwork(self._key, account=self._registration, alg=ES256)
            self._local.client = ClientV2(ClientV2.get_directory(self._directory, net), net)
        client: ClientV2 = self._local.client
        return client

    def issue(self, name: str, key: str) -> str:
        """A certificate for one name with a new key; the PEM chain."""
        made = (
            ec.generate_private_key(ec.SECP256R1())
            if key == "ECDSA"
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        client = self._client()
        order = client.new_order(make_csr(pem, [name]), profile="default")
        for authorization in order.authorizations:
            offered = next(each for each in authorization.body.challenges if each.chall.typ == challenges.HTTP01.typ)
            response, _ANSWERS[offered.chall.encode("token")] = offered.chall.response_and_validation(self._key)
            client.answer_challenge(offered, response)
            while authorization.body.status != messages.STATUS_VALID:
                time.sleep(_PAUSE)
                authorization, _ = client.poll(authorization)
        order = client.begin_finalization(order)
        while True:
            time.sleep(_PAUSE)
            body = messages.Order.from_json(client._post_as_get(order.uri).json())
            if body.certificate:
                return client._post_as_get(body.certificate).text


def main() -> None:
    """Figures as JSON, for the task that the first argument gives."""
    task = json.loads(sys.argv[1])
    suffix = f"{secrets.token_hex(4)}.example.test"
    with _responder(task["port"]), ThreadPoolExecutor(THREADS) as threads:
        account = _Account(task["directory"], task["hmac"])
        started = time.monotonic()
        account.issue(f"alone.{suffix}", task["key"])
        alone = time.monotonic() - started
        started, cpu = time.monotonic(), time.process_time()
        for chain in threads.map(lambda n: account.issue(f"c{n}.{suffix}", task["key"]), range(task["count"])):
            assert "BEGIN CERTIFICATE" in chain
        seconds, used = time.monotonic() - started, time.process_time() - cpu
    figures = {
        "certificates per second": task["count"] / seconds,
        "one alone, seconds from apply to Ready": alone,
        "CPU of the controller, ms": used / task["count"] * 1000,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
