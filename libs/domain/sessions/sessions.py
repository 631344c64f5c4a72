"""Sessions as their participants see them, and how they end."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, select, text

from libs.domain.outbox.append import append
from libs.domain.outbox.events import EventName
from libs.domain.pages import Page, page_of
from libs.domain.sessions import expiry
from libs.domain.tables import sessions
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.guardrails import Principal, Role, SessionContext, SessionKind, SessionRef, SessionStatus
from libs.guardrails.operations import LIVE, CompleteSession, ViewSession

_log: Final = logger("sessions")


@dataclass(frozen=True, slots=True)
class Session:
    """A session as stored; times are UTC. `response_deadline` is when a waiting text session expires
    unless the doctor answers, and is None until the patient's first message."""

    id: int
    tenant_id: int
    kind: SessionKind
    modality: str
    source: str
    status: SessionStatus
    appointment_id: int | None
    patient_id: int
    doctor_id: int
    created_at: datetime
    response_deadline: datetime | None
    activated_at: datetime | None
    connected_at: datetime | None
    ended_at: datetime | None
    end_reason: str | None
    units_charged: int

    @property
    def context(self) -> str:
        return str(SessionRef(self.kind, self.id))


_COLUMNS: Final = [sessions.c[name] for name in Session.__dataclass_fields__]

_END: Final = text(
    """
    UPDATE sessions SET status = 'ended', ended_at = clock(), ended_by = :ended_by, end_reason = :reason,
        ended_seq = (SELECT last_seq FROM conversations WHERE id = :conversation_id)
    WHERE id = :id
    """
)
_COMPLETE: Final = text(
    "UPDATE appointments SET status = 'COMPLETED', updated_at = clock() WHERE id = :id AND status = 'IN_PROGRESS'"
)


async def view(tx: Transaction, context: SessionContext[ViewSession]) -> Session:
    assert context.session is not None
    return await _get(tx, context.session.id)


async def listed(
    tx: Transaction, caller: Principal, *, status: SessionStatus | None, cursor: int | None, limit: int
) -> Page[Session]:
    """The caller's sessions, newest first; an operator sees those of the tenant."""
    statement = select(*_COLUMNS).where(sessions.c.tenant_id == caller.tenant_id)
    match caller.role:
        case Role.PATIENT:
            statement = statement.where(sessions.c.patient_id == caller.user_id)
        case Role.DOCTOR:
            statement = statement.where(sessions.c.doctor_id == caller.user_id)
    if status is not None:
        statement = statement.where(sessions.c.status == status)
    return await page_of(tx, statement, sessions.c.id, cursor, limit, _session)


async def end(tx: Transaction, context: SessionContext[CompleteSession], reason: str | None) -> tuple[Session, bool]:
    """Ends the session, whose row the context holds locked; answers it and whether it was over before.

    The appointment is completed and both parties become free in the same transaction. `ended_seq` is
    read under the lock, so no message can get a number after it.
    """
    facts = context.session
    assert facts is not None
    if facts.overdue:
        await expiry.expire_sessions(tx, only=facts.id)
    elif facts.status in LIVE:
        reason = reason or f"ended_by_{context.caller.role}"
        parameters = {
            "id": facts.id,
            "conversation_id": facts.conversation_id,
            "ended_by": context.caller.user_id,
            "reason": reason,
        }
        await tx.execute(_END, parameters)
        if facts.appointment_id is not None:
            await tx.execute(_COMPLETE, {"id": facts.appointment_id})
        await _announce_end(tx, context, reason)
        return await _get(tx, facts.id), False
    return await _get(tx, facts.id), True


async def _announce_end(tx: Transaction, context: SessionContext[CompleteSession], reason: str) -> None:
    facts = context.session
    assert facts is not None
    await append(
        tx,
        EventName.SESSION_ENDED,
        tenant_id=context.caller.tenant_id,
        aggregate=f"appointment:{facts.appointment_id}" if facts.appointment_id else f"session:{facts.id}",
        payload={
            "appointment_id": facts.appointment_id,
            "session_id": facts.id,
            "session_context": str(facts.ref),
            "end_reason": reason,
            "patient_id": facts.patient_id,
            "doctor_id": facts.doctor_id,
        },
    )
    await expiry.unblock(tx, [facts.patient_id, facts.doctor_id], session_ended=True)
    tx.changed(facts.conversation_id)
    _log.info(
        "session_state_changed",
        session_id=facts.id,
        appointment_id=facts.appointment_id,
        status="ended",
        user_id=context.caller.user_id,
    )


async def _get(tx: Transaction, session_id: int) -> Session:
    return _session((await tx.execute(select(*_COLUMNS).where(sessions.c.id == session_id))).one())


def _session(row: Row[Any]) -> Session:
    return session_of(row._mapping)


def session_of(row: Any) -> Session:
    """From a mapping that has the columns named as the fields."""
    fields = {name: row[name] for name in Session.__dataclass_fields__}
    return Session(**fields | {"kind": SessionKind(row["kind"]), "status": SessionStatus(row["status"])})
