"""The two words for failure, and what the border of each adapter translates into them.

`TemporaryError` changes no state: the step is tried again, after `retry_after` where somebody named a time.
`PermanentError` ends the attempt: repeating the same step cannot help. Its `reason` is shown to the user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from datetime import timedelta

    from certbotk8s.domain.reasons import Reason


class Problem(msgspec.Struct, frozen=True):
    """An ACME error as the CA told it (RFC 8555 section 6.7, RFC 7807); hostile input, already cut to size.

    `type` is without its `urn:ietf:params:acme:error:` prefix; `status` is the HTTP status of the answer (0: the
    problem stood inside an order or a challenge); `identifiers` are the names that its subproblems blame.
    """

    type: str
    detail: str = ""
    status: int = 0
    subproblems: tuple[Problem, ...] = ()
    identifier: str = ""
    instance: str = ""
    algorithms: tuple[str, ...] = ()

    def identifiers(self) -> tuple[str, ...]:
        """The names that the CA blames, each once, in its order."""
        named = [self.identifier, *(sub.identifier for sub in self.subproblems)]
        return tuple(dict.fromkeys(name for name in named if name))

    def words(self) -> str:
        """One line in the CA's own words, the subproblems' among them."""
        parts = [self.detail or self.type]
        parts += [
            f"{sub.identifier}: {sub.detail or sub.type}" if sub.identifier else sub.detail for sub in self.subproblems
        ]
        return "; ".join(part for part in parts if part)


class TemporaryError(Exception):
    """Not now: the same step again later. `retry_after` is the other side's own word, if it gave one."""

    def __init__(self, message: str, *, retry_after: timedelta | None = None, problem: Problem | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.problem = problem


class Conflict(TemporaryError):
    """The object changed since it was read (HTTP 409): read again and decide again."""


class AlreadyExists(Conflict):
    """Somebody else made an object of that name first (HTTP 409 on create): read and judge it."""


class PermanentError(Exception):
    """Not like this: the attempt has failed, for this reason."""

    def __init__(self, reason: Reason, message: str, *, problem: Problem | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.problem = problem
