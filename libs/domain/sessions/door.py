"""Opening a session for an operation inside a transaction: lock, decide, and only then act."""

from dataclasses import dataclass
from typing import TypeVar

from libs.domain.sessions import facts
from libs.domain.sessions.settlement import Settlement
from libs.domain.transaction import Transaction
from libs.guardrails import Claim, Guard, Operation, SessionContext, SessionFacts, SessionStatus

Op = TypeVar("Op", bound=Operation)


@dataclass(frozen=True, slots=True)
class Door:
    guard: Guard
    settlement: Settlement

    async def open(self, tx: Transaction, claim: Claim[Op]) -> SessionContext[Op]:
        """A context that holds until the transaction ends, or `Refused`.

        A session found past its deadline by an operation that it would have to be live for is ended on
        the spot; that is kept although the request is refused.
        """
        operation = claim.operation
        known = await facts.load(tx, claim.subject, claim.caller.tenant_id, lock=not operation.reads)
        session, ended = known.session, False
        if session and session.overdue and _is_refused(operation, session):
            ended = await self.settlement.one(tx, session.id) is not None
        return self.guard.open(claim, known, keep=ended)


def _is_refused(operation: type[Operation], overdue: SessionFacts) -> bool:
    """Whether the operation is refused because the session is over, or was over before its units began."""
    return SessionStatus.EXPIRED not in operation.passes or (operation.charges and not overdue.begun)
