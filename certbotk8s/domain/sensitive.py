"""What no text may show: private keys, HMAC keys, credentials."""

from __future__ import annotations


class Sensitive(bytes):
    """Bytes for programs only: as text, in a log line or in a message they are `(not shown)`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "(not shown)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)
