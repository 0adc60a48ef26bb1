"""The ACME accounts that are open: the issuer reconciler opens them, the certificate reconciler uses them.

Memory only: after a restart the issuer reconciler opens them again from the Secrets, which asks the CA nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from certbotk8s.ports import Key, Session


@dataclass(frozen=True)
class Account:
    """An open account of an Issuer: `issuer_uid` and `generation` tell which Issuer, as of which spec."""

    session: Session
    issuer_uid: str
    generation: int


class Accounts:
    """Open accounts by their Issuer, and their sessions by account URI; shared by all workers."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_issuer: dict[Key, Account] = {}
        self._sessions: dict[str, Session] = {}

    def put(self, issuer: Key, account: Account) -> None:
        """An Issuer's account is open."""
        with self._lock:
            self._by_issuer[issuer] = account
            self._sessions[account.session.account_uri] = account.session

    def close(self, issuer: Key) -> None:
        """New orders no longer use this account; those under way still find its session by URI."""
        with self._lock:
            self._by_issuer.pop(issuer, None)

    def of(self, issuer: Key) -> Account | None:
        """The open account of an Issuer."""
        return self._by_issuer.get(issuer)

    def session(self, account_uri: str) -> Session | None:
        """The session of an account, for an order placed with it."""
        return self._sessions.get(account_uri)
