"""What is asked about an order beside its own status: why it fails, and what is to be given up with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.issuance import Outcome, order_outcome
from certbotk8s.domain.problems import judge
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import call
from certbotk8s.reconcile.challenges import OVER, authorization_failure

if TYPE_CHECKING:
    from collections.abc import Container, Generator

    from certbotk8s.domain.acme import Order
    from certbotk8s.ports import Session


def explain(
    pool: str, session: Session, order: Order, names: str, answered: Container[str] = ()
) -> Generator[Any, Any, bool]:
    """Why an order for `names` is invalid, or still pending: its authorizations know.

    The CA is asked by `pool`. Raises PermanentError with the reason; when nothing has gone wrong, whether the CA has
    heard the answers to all challenges of these URLs.
    """
    heard = True
    for url in order.authorizations:
        authorization = yield from call(pool, session.authorization, url)
        if authorization.status in OVER:
            raise authorization_failure(authorization)
        challenges = authorization.challenges if authorization.status == "pending" else ()
        heard &= not any(each.status == "pending" and each.url in answered for each in challenges)
    if order_outcome(order.status) is not Outcome.ORDER_INVALID:
        return heard
    if order.error:
        raise judge(order.error, retry_after=None, doing=f"issuing for {names}")
    raise PermanentError(Reason.ORDER_INVALID, f"The CA gave up the order for {names} and does not say why.")


def give_up_authorizations(pool: str, session: Session, order: Order) -> Generator[Any, Any, None]:
    """Deactivate what is pending of an order that nobody wants any more (RFC 8555 section 7.5.2): CAs ration those."""
    for url in order.authorizations:
        authorization = yield from call(pool, session.authorization, url)
        if authorization.status == "pending":
            yield from call(pool, session.deactivate, url)
