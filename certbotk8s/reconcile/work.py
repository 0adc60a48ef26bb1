"""What the certificate reconciler remembers of an issuance between two steps, and what a step answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Generator
    from datetime import timedelta

    from certbotk8s.domain.acme import Order
    from certbotk8s.domain.api import Certificate, CertificateFacts, Issuance
    from certbotk8s.domain.errors import PermanentError
    from certbotk8s.domain.issuance import Outcome, State
    from certbotk8s.domain.plan import Finding
    from certbotk8s.ports import Key


@dataclass(frozen=True)
class Wait:
    """The step is not done: look again after this; `finding` says what is waited for."""

    after: timedelta
    finding: Finding


@dataclass(frozen=True)
class Rest:
    """Nothing is under way: come back after this, or only when something changes. `waits`: for a place (see Places)."""

    after: timedelta | None
    waits: bool = False


@dataclass
class Work:
    """An issuance as this process knows it. `stored` is what stands in status; everything else may be lost.

    `since` (monotonic seconds) is when the state was entered, `due` until when its step waits, `looks` how often the CA
    or the challenge was looked at in it, `errors` how many tries in a row failed, `to_answer` the challenges that the
    CA waits for us to answer (None: it is to be asked which), `orders` the URLs of orders that the CA gave and whose
    end is still to be told. `overruled`: somebody else wrote the status, so that what is known here may be wrong.
    """

    key: Key
    certificate: Certificate
    state: State
    issuance: Issuance | None = None
    stored: Issuance | None = None
    since: float = 0.0
    due: float = 0.0
    looks: int = 0
    errors: int = 0
    shown: object = None
    order: Order | None = None
    to_answer: tuple[str, ...] | None = ()
    chain: bytes | None = None
    installed: CertificateFacts | None = None
    failure: PermanentError | None = None
    orders: set[str] = field(default_factory=set)
    overruled: bool = False


Step: TypeAlias = "Generator[Any, Any, Outcome | Wait | Rest]"
