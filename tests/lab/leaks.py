"""Looks for secrets where none may be: every private key and HMAC key that a lab ever held, in all that was said."""

from __future__ import annotations

import base64
import http.client
import re
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.lab.api import https_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.lab import Lab

_SECRETS = "/api/v1/secrets"
_OURS = "/apis/certbotk8s.io/v1"
_SAYING = ("/api/v1/events", f"{_OURS}/certificates", f"{_OURS}/issuers", f"{_OURS}/clusterissuers")
_SHORTEST = 16  # characters of a form that is looked for
# What the first line of a key tells is its kind, the same for all of that kind.
_KIND_ALONE = re.compile(r"MI[A-Za-z0-9+/]{0,40}A*=*")


class Watched:
    """From its start on, every Secret of a lab, and everything that was said in its objects. A context.

    `secrets` are the confidential members of Secrets: what they are of, and their content. `said` are Events and our
    objects, in each version, as lines of JSON.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.secrets: dict[bytes, str] = {}
        self.said: list[str] = []
        self._stopped = threading.Event()
        self._connections: list[http.client.HTTPSConnection] = []

    def __enter__(self) -> Self:
        for path in (_SECRETS, *_SAYING):
            threading.Thread(target=self._watch, args=(path,), daemon=True, name=f"watch {path}").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for connection in list(self._connections):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(2)

    def _watch(self, path: str) -> None:
        address = urlsplit(self._lab.api_server)
        headers = {"Authorization": f"Bearer {self._lab.api_token}"}
        while not self._stopped.wait(0.2):
            connection = http.client.HTTPSConnection(
                address.hostname or "", address.port, context=https_context(self._lab.api_ca_bundle)
            )
            self._connections.append(connection)
            with suppress(OSError, http.client.HTTPException):
                connection.request("GET", f"{path}?watch=true", headers=headers)
                answer = connection.getresponse()
                for line in answer if answer.status == 200 else ():
                    self._take(msgspec.json.decode(line)["object"])
            self._connections.remove(connection)
            connection.close()

    def _take(self, obj: dict[str, Any]) -> None:
        if obj.get("kind") != "Secret":
            self.said.append(msgspec.json.encode(obj).decode())
            return
        meta = obj["metadata"]
        for member, encoded in (obj.get("data") or {}).items():
            content = base64.b64decode(encoded)
            if b"PRIVATE KEY" in content or member == "secret":
                self.secrets[content] = f"{member} of Secret {meta['namespace']}/{meta['name']}"


def forms(content: bytes) -> set[str]:
    """Every form in which a secret could be told: PEM lines, base64 of PEM and DER, the private members of its JWK."""
    text = content.decode("latin-1").strip()
    found = {base64.b64encode(content).decode().rstrip("="), base64.urlsafe_b64encode(content).decode().rstrip("=")}
    if "PRIVATE KEY" not in text:
        bare = text.rstrip("=")
        found |= {bare, bare.translate(str.maketrans("-_", "+/")), bare.translate(str.maketrans("+/", "-_"))}
    else:
        lines = [line for line in text.splitlines() if line and not line.startswith("-")]
        found |= {*lines, "".join(lines).rstrip("=")}
        for number in _private_numbers(content):
            raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
            found |= {raw.hex(), base64.urlsafe_b64encode(raw).decode().rstrip("="), str(number)}
    return {form for form in found if len(form) >= _SHORTEST and not _KIND_ALONE.fullmatch(form)}


def _private_numbers(content: bytes) -> list[int]:
    try:
        key = load_pem_private_key(content, None, unsafe_skip_rsa_key_validation=True)
    except ValueError:  # a test's broken key
        return []
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return [key.private_numbers().private_value]
    if isinstance(key, rsa.RSAPrivateKey):
        private = key.private_numbers()
        return [private.d, private.p, private.q]
    return []


def leaks(secrets: dict[bytes, str], files: Sequence[Path], folder: Path) -> list[str]:
    """Which secret stands in which file and line; the secret itself is not told. `folder` is for the list of forms.

    By grep: it looks for ten thousand strings at once in the time of one.
    """
    wanted = {form: what for content, what in secrets.items() for form in forms(content)}
    patterns = folder / "forms"
    patterns.write_text("\n".join(wanted) + "\n")
    try:
        outcome = subprocess.run(
            ["grep", "-aoHnF", "-f", str(patterns), "--", *map(str, files)],
            capture_output=True,
            text=True,
            check=False,
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        )
    finally:
        patterns.unlink()
    assert outcome.returncode in (0, 1), outcome.stderr
    found = (line.split(":", 2) for line in outcome.stdout.splitlines())
    return list(dict.fromkeys(f"{wanted[form]} stands in {place} line {line}" for place, line, form in found))


def log_files(lab: Lab) -> list[Path]:
    """The logs of the lab's parts and controllers, and the API server's audit log."""
    return [path for path in (*sorted(Path(lab.logs).iterdir()), Path(lab.audit_log)) if path.is_file()]
