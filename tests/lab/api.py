"""The least client of the lab's API server and of the parts' management addresses."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

import msgspec


def https_context(bundle: Path | str) -> ssl.SSLContext:
    """TLS that trusts the CA certificates in the PEM file `bundle` and nothing else."""
    return ssl.create_default_context(cafile=str(bundle))


def fetch(
    url: str,
    *,
    bundle: Path | str | None = None,
    token: str | None = None,
    method: str | None = None,
    body: object = None,
    timeout: float = 30,
) -> bytes:
    """The body of one HTTP answer. `body` is sent as JSON; without `method` it is GET, or POST with a body.

    Raises urllib.error.HTTPError on a status of 400 and over, with the server's words in its message, and
    urllib.error.URLError or OSError when there is no answer.
    """
    request = urllib.request.Request(url, method=method, data=None if body is None else msgspec.json.encode(body))
    if body is not None:
        request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    context = https_context(bundle) if bundle is not None else None
    try:
        with urllib.request.urlopen(request, timeout=timeout, context=context) as answer:
            data: bytes = answer.read()
            return data
    except urllib.error.HTTPError as error:
        with error:
            words = error.read().decode(errors="replace")
        raise urllib.error.HTTPError(url, error.code, f"{error.reason}: {words}", error.headers, None) from None
