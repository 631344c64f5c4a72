"""How a call comes about: one party rings, the other answers, and both say that they hear each other.

It takes two to be charged. Nobody answers one's own ring, and units run only from the moment at which somebody
is connected. Whoever goes on saying so keeps the call alive.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import text

from libs.domain.billing.posting import UNIT_SQL, allowance
from libs.domain.jobs import ConvertDue
from libs.domain.sessions.sessions import Session, get
from libs.domain.sessions.settlement import Ending, Settlement
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.guardrails import Reason, Refused, SessionContext, SessionFacts, SessionStatus
from libs.guardrails.operations import Answer, Connect, Decline, Ring

_log: Final = logger("sessions")

_RING: Final = text(
    """
    UPDATE sessions SET rung_by = :user_id, rung_at = clock(), response_deadline = clock() + :ring_timeout
    WHERE id = :id AND status = 'connecting' AND rung_by IS NULL RETURNING id
    """
)
_ANSWER: Final = text(
    """
    UPDATE sessions SET status = 'active', activated_at = clock(), tick_at = clock(), idle_at = clock() + :inactivity,
        -- Answered at the last moment, there is still time to connect.
        expires_at = greatest(expires_at, clock() + :inactivity)
    WHERE id = :id AND rung_by <> :user_id RETURNING id
    """
)
_CONNECT: Final = text(
    f"""
    UPDATE sessions s
    SET connected_at = clock(), allowance_units = allowance.units, expires_at = clock() + allowance.units * {UNIT_SQL},
        tick_at = clock(), idle_at = clock() + :inactivity
    FROM (
        SELECT {allowance("call.patient_id", "call.modality")} AS units FROM sessions AS call WHERE call.id = :id
    ) AS allowance
    WHERE s.id = :id
    """
)
_STAY: Final = text("UPDATE sessions SET idle_at = clock() + :inactivity WHERE id = :id")


@dataclass(frozen=True, slots=True)
class Calls:
    """What participants do with a call, each time under the lock of its context. A call that rings is missed after
    `ring_timeout`, and one in which nobody is connected any more ends after `inactivity`."""

    settlement: Settlement
    ring_timeout: timedelta
    inactivity: timedelta

    async def ring(self, tx: Transaction, context: SessionContext[Ring]) -> Session:
        """Calls the other party. The first ring counts; ringing again gives no more time to answer."""
        facts, user_id = _facts(context), context.caller.user_id
        if await _changes(tx, _RING, id=facts.id, user_id=user_id, ring_timeout=self.ring_timeout):
            tx.changed(facts.conversation_id)
        return await get(tx, facts.id)

    async def answer(self, tx: Transaction, context: SessionContext[Answer]) -> Session:
        """connecting → active, by whoever did not ring; answering an active call changes nothing.

        Raises `Refused(INVALID_TRANSITION)` when nobody rang but the caller.
        """
        facts, user_id = _facts(context), context.caller.user_id
        if facts.status is SessionStatus.CONNECTING:
            if not await _changes(tx, _ANSWER, id=facts.id, user_id=user_id, inactivity=self.inactivity):
                raise _no_way("active: the other party has not rung.")
            tx.changed(facts.conversation_id)
            tx.ring(ConvertDue())
            tx.after_commit(
                lambda: _log.info(
                    "session_state_changed",
                    session_id=facts.id,
                    appointment_id=facts.appointment_id,
                    status=SessionStatus.ACTIVE,
                    user_id=user_id,
                )
            )
        return await get(tx, facts.id)

    async def connect(self, tx: Transaction, context: SessionContext[Connect]) -> Session:
        """Notes that the caller is connected. The first time starts the units and their allowance, once for all;
        every time keeps the call from ending for want of a sign.

        Raises `Refused(INVALID_TRANSITION)` when nobody has answered.
        """
        facts = _facts(context)
        if facts.status is SessionStatus.CONNECTING:
            raise _no_way("connected: nobody has answered.")
        parameters = {"id": facts.id, "inactivity": self.inactivity}
        if facts.begun:
            await tx.execute(_STAY, parameters)
        else:
            await tx.execute(_CONNECT, parameters)
            tx.changed(facts.conversation_id)
            tx.ring(ConvertDue())
        return await get(tx, facts.id)

    async def decline(self, tx: Transaction, context: SessionContext[Decline]) -> Session:
        """connecting → declined, which frees both parties; declining again changes nothing."""
        facts, caller = _facts(context), context.caller
        await self.settlement.one(tx, facts.id, Ending("decline", caller.user_id, f"declined_by_{caller.role}"))
        return await get(tx, facts.id)


def _facts(context: SessionContext[Any]) -> SessionFacts:
    assert context.session is not None
    return context.session


async def _changes(tx: Transaction, statement: Any, **parameters: Any) -> bool:
    return (await tx.execute(statement, parameters)).one_or_none() is not None


def _no_way(wanted: str) -> Refused:
    return Refused(Reason.INVALID_TRANSITION, f"The call is {SessionStatus.CONNECTING} and cannot become {wanted}")
