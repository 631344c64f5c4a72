"""Opening a session for an operation inside a transaction: lock, decide, and only then act."""

from typing import TypeVar

from libs.domain.sessions import expiry, facts
from libs.domain.transaction import Transaction
from libs.guardrails import Claim, Guard, Operation, SessionContext, SessionStatus

Op = TypeVar("Op", bound=Operation)


async def open_session(tx: Transaction, guard: Guard, claim: Claim[Op]) -> SessionContext[Op]:
    """A context that holds until the transaction ends, or `Refused`.

    A session found past its deadline by an operation that it would have to be live for is expired on
    the spot; that is kept although the request is refused.
    """
    operation = claim.operation
    known = await facts.load(tx, claim.subject, claim.caller.tenant_id, lock=not operation.reads)
    expired = False
    if known.session and known.session.overdue and SessionStatus.EXPIRED not in operation.passes:
        expired = bool(await expiry.expire_sessions(tx, only=known.session.id))
    return guard.open(claim, known, keep=expired)
