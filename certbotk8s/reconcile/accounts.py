"""The ACME accounts that are open: the issuer reconciler opens them, the certificate reconciler uses them.

Memory only: after a restart the issuer reconciler opens them again from the Secrets, which asks the CA nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from certbotk8s.domain.bindings import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Collection

    from certbotk8s.domain.api import AccountStatus
    from certbotk8s.domain.errors import PermanentError
    from certbotk8s.ports import Key, Session


@dataclass(frozen=True)
class Inputs:
    """All that an account was opened with: which Issuer, as of which spec and which wish, and versions of Secrets."""

    issuer_uid: str
    generation: int
    rollover: str
    key_version: str
    binding_version: str


@dataclass(frozen=True)
class Account:
    """An open account of an Issuer. `note` is what a reader should know besides, `unsettled` whether something is left
    to do about it, `rollover` the wish for a new key that was answered last.
    """

    session: Session
    inputs: Inputs
    status: AccountStatus
    note: str = ""
    unsettled: bool = False
    rollover: str = ""

    @property
    def issuer_uid(self) -> str:
        """Which Issuer's it is."""
        return self.inputs.issuer_uid


class Accounts:
    """Open accounts by their Issuer and name, and sessions by Issuer and account URI; shared by all workers.

    A URI alone proves nothing: any server can claim that of another's account, and would get that one's orders.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_issuer: dict[Key, dict[str, Account]] = {}
        self._sessions: dict[tuple[Key, str], Session] = {}
        self._doubts: dict[tuple[Key, str], PermanentError] = {}

    def put(self, issuer: Key, account: Account) -> None:
        """An account is open, and no longer in doubt."""
        with self._lock:
            self._by_issuer.setdefault(issuer, {})[account.status.name] = account
            self._sessions[issuer, account.session.account_uri] = account.session
            self._doubts.pop((issuer, account.session.account_uri), None)

    def keep(self, issuer: Key, session: Session) -> None:
        """A former account: it takes no new orders, and finishes those under way."""
        with self._lock:
            self._sessions.setdefault((issuer, session.account_uri), session)

    def close(self, issuer: Key, name: str) -> None:
        """New orders no longer use this account; those under way still find its session by URI."""
        with self._lock:
            self._by_issuer.get(issuer, {}).pop(name, None)

    def close_all(self, issuer: Key, *, but: Collection[str] = ()) -> None:
        """The same for all accounts of an Issuer but those of these names."""
        with self._lock:
            open_ones = self._by_issuer.pop(issuer, {})
            if kept := {name: account for name, account in open_ones.items() if name in but}:
                self._by_issuer[issuer] = kept

    def doubt(self, issuer: Key, account_uri: str, why: PermanentError) -> None:
        """The CA refused an order for its account: that is closed, and looked at before it is used again."""
        with self._lock:
            open_ones = self._by_issuer.get(issuer, {})
            for name, account in list(open_ones.items()):
                if account.session.account_uri == account_uri:
                    del open_ones[name]
                    self._doubts[issuer, account_uri] = why

    def doubt_about(self, issuer: Key, account_uri: str) -> PermanentError | None:
        """Why the CA has to be asked about that account, or None."""
        return self._doubts.get((issuer, account_uri))

    def settle(self, issuer: Key, account_uri: str) -> None:
        """The doubt was told: the next try is one without it."""
        with self._lock:
            self._doubts.pop((issuer, account_uri), None)

    def of(self, issuer: Key, name: str = DEFAULT) -> Account | None:
        """The open account of an Issuer, of that name."""
        return self._by_issuer.get(issuer, {}).get(name)

    def has_open(self, issuer: Key) -> bool:
        """Whether any account of an Issuer is open."""
        return bool(self._by_issuer.get(issuer))

    def session(self, issuer: Key, account_uri: str) -> Session | None:
        """The session of an account that an Issuer has or had, for an order placed with it."""
        return self._sessions.get((issuer, account_uri))
