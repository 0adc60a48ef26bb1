"""The challenges of an order: which to solve for each authorization, by which solver; presenting, cleaning up."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from msgspec import structs

from certbotk8s.domain import api
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.names import listing
from certbotk8s.domain.plan import issuer_name
from certbotk8s.domain.problems import judge
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Presentation, call

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from certbotk8s.domain.acme import Authorization
    from certbotk8s.domain.api import Issuance, PendingChallenge, SolverSpec
    from certbotk8s.domain.plan import Observed
    from certbotk8s.ports import Cluster, Session, Solver

log = logging.getLogger(__name__)

POOL = "solver"
# How many kinds of challenges a sentence names: no CA offers more.
_OFFERED = 10
# RFC 8555 section 7.1.6: an authorization of these statuses will never be valid. One that no RFC knows is waited out,
# as an order's is.
OVER = frozenset({"invalid", "deactivated", "expired", "revoked"})


def authorization_failure(authorization: Authorization) -> PermanentError:
    """Why an authorization that is over ended, in the CA's words."""
    name = authorization.identifier.value
    problem = next((challenge.error for challenge in authorization.challenges if challenge.error), None)
    if problem is None:
        return PermanentError(
            Reason.CHALLENGE_FAILED, f"The authorization for {name} is {authorization.status}; the CA does not say why."
        )
    # It stood inside the authorization, whatever status the CA gave it: that is final for the attempt.
    inside = structs.replace(problem, identifier=problem.identifier or name, status=0)
    failure = judge(inside, retry_after=None, doing=f"validating {name}")
    assert isinstance(failure, PermanentError)
    return failure


class Challenges:
    """The installed solvers at work on the orders of Certificates; `solvers` by the name of their entry point."""

    def __init__(self, cluster: Cluster, solvers: Mapping[str, Solver]) -> None:
        self._cluster = cluster
        self._solvers = solvers

    def choose(self, seen: Observed, authorization: Authorization, session: Session) -> tuple[PendingChallenge, bool]:
        """The challenge to solve for a pending authorization, and whether it was answered already.

        Raises PermanentError(NotPreauthorized) when the CA offers none that the issuer has a solver for.
        """
        name = f"*.{authorization.identifier.value}" if authorization.wildcard else authorization.identifier.value
        offered = {challenge.type: challenge for challenge in authorization.challenges}
        solvable = set()
        for spec in seen.issuer.spec.acme.solvers if seen.issuer else ():
            solver = self._solvers.get(_entry_point(spec))
            if solver is None:
                continue
            solvable.add(solver.challenge_type)
            challenge = offered.get(solver.challenge_type)
            if challenge and challenge.token:
                chosen = api.PendingChallenge(
                    identifier=name,
                    type=challenge.type,
                    url=challenge.url,
                    token=challenge.token,
                    key_authorization=session.key_authorization(challenge.token),
                    solver=_entry_point(spec),
                )
                return chosen, challenge.status != "pending"
        raise PermanentError(
            Reason.NOT_PREAUTHORIZED,
            f"The CA has not validated {name} for this account and offers "
            f"{listing(sorted(offered), most=_OFFERED) or 'no challenge'}; {issuer_name(seen.certificate)} solves "
            f"{listing(sorted(solvable)) or 'none'}. Have the name validated at the CA, or add a solver to the issuer.",
        )

    def present(self, seen: Observed, issuance: Issuance) -> Generator[Any, Any, None]:
        """Make every challenge of the order answerable; those that are already stay so."""
        for solver, presentation in self._presentations(seen, issuance):
            yield from call(POOL, solver.present, presentation)

    def missing(self, seen: Observed, issuance: Issuance) -> Generator[Any, Any, str]:
        """One look at each challenge: "" when all are served as seen from here, else what is missing."""
        for solver, presentation in self._presentations(seen, issuance):
            missing = yield from call(POOL, solver.is_ready, presentation)
            if missing:
                return missing
        return ""

    def clean_up(self, uid: str, issuance: Issuance) -> Generator[Any, Any, None]:
        """Take away what was presented for the order of a Certificate, which `uid` names."""
        for name in sorted({challenge.solver for challenge in issuance.challenges} & set(self._solvers)):
            yield from call(POOL, self._solvers[name].clean_up, _presentation_id(uid, issuance.order_url))

    def sweep(self) -> None:
        """Remove what is presented for no order: a crash between an order's end and its clean-up leaves that."""
        # First what stands, then what is wanted: an order is remembered before its challenges are presented.
        standing = [(solver, ident) for solver in self._solvers.values() for ident in solver.leftovers()]
        live = {
            _presentation_id(certificate.metadata.uid, certificate.status.issuance.order_url)
            for certificate in self._cluster.store(api.CERTIFICATE).all()
            if certificate.status.issuance
        }
        for solver, left in [each for each in standing if each[1] not in live]:
            log.info("Removing challenge %s, which belongs to no order", left)
            try:
                solver.clean_up(left)
            except (TemporaryError, PermanentError) as error:
                log.warning("Challenge %s is left to the next sweep: %s", left, error)

    def _presentations(self, seen: Observed, issuance: Issuance) -> list[tuple[Solver, Presentation]]:
        """What each solver has to serve for the order; its settings are read again from the issuer each time."""
        ident = _presentation_id(seen.certificate.metadata.uid, issuance.order_url)
        specs: dict[str, SolverSpec] = {}
        for spec in seen.issuer.spec.acme.solvers if seen.issuer else ():
            specs.setdefault(_entry_point(spec), spec)  # the first that fits, as it was chosen
        found = []
        for name, spec in specs.items():
            mine = tuple(challenge for challenge in issuance.challenges if challenge.solver == name)
            if mine and name in self._solvers:
                found.append((self._solvers[name], Presentation(ident, seen.certificate, spec, mine)))
        return found


def _presentation_id(uid: str, order_url: str) -> str:
    return hashlib.sha256(f"{uid} {order_url}".encode()).hexdigest()[:20]


def _entry_point(spec: SolverSpec) -> str:
    """The solver that serves this part of an issuer; "" for none."""
    return "http01-ingress" if spec.http01 and spec.http01.ingress else ""
