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
    """Open accounts by their Issuer, and their sessions by Issuer and account URI; shared by all workers.

    A URI alone proves nothing: any server can claim that of another's account, and would get that one's orders.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_issuer: dict[Key, Account] = {}
        self._sessions: dict[tuple[Key, str], Session] = {}
        self._doubted: set[tuple[Key, str]] = set()

    def put(self, issuer: Key, account: Account) -> None:
        """An Issuer's account is open."""
        with self._lock:
            self._by_issuer[issuer] = account
            self._sessions[issuer, account.session.account_uri] = account.session
            self._doubted = {doubt for doubt in self._doubted if doubt[0] != issuer}

    def close(self, issuer: Key) -> None:
        """New orders no longer use this account; those under way still find its session by URI."""
        with self._lock:
            self._by_issuer.pop(issuer, None)

    def doubt(self, issuer: Key, account_uri: str) -> None:
        """The CA says that it does not know this account: it is closed, and the CA is asked before it is used again."""
        with self._lock:
            account = self._by_issuer.get(issuer)
            if account and account.session.account_uri == account_uri:
                del self._by_issuer[issuer]
                self._doubted.add((issuer, account_uri))

    def is_doubted(self, issuer: Key, account_uri: str) -> bool:
        """Whether the CA has to be asked whether it still knows that account."""
        return (issuer, account_uri) in self._doubted

    def of(self, issuer: Key) -> Account | None:
        """The open account of an Issuer."""
        return self._by_issuer.get(issuer)

    def session(self, issuer: Key, account_uri: str) -> Session | None:
        """The session of an account that an Issuer has or had, for an order placed with it."""
        return self._sessions.get((issuer, account_uri))
