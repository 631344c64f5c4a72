"""What ends by itself: sessions nobody took up in time, and requests nobody confirmed in time."""

from typing import Any, Final

from sqlalchemy import text

from libs.domain.jobs import ConvertDue, DispatchOutbox
from libs.domain.outbox.events import LANES, EventName, Lane, deliver
from libs.domain.sessions.facts import OVERDUE
from libs.domain.tables import BACKLOG
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction

_log: Final = logger("sessions")

# Whether an appointment waits for its next attempt may not be visible yet: a conversion that is just failing
# holds its row. All that could be tried are taken, and waited for.
_UNBLOCK: Final = f"""
    UPDATE appointments SET next_attempt_at = clock()
    WHERE id IN (
        SELECT id FROM appointments
        WHERE {BACKLOG} AND id IN (SELECT appointment_id FROM appointment_parties WHERE user_id = ANY (:users))
        {{lock}}
    )
"""
_UNBLOCK_PARTIES: Final = text(_UNBLOCK.format(lock="FOR UPDATE"))
# A conversion that holds one of them may be waiting for the end of this very session.
_UNBLOCK_AFTER_SESSION: Final = text(_UNBLOCK.format(lock="FOR UPDATE SKIP LOCKED"))

EXPIRED_AT_ONCE: Final = 1000
"""At most so many rows are expired by one statement."""

_EXPIRE_SESSIONS: Final = f"""
    WITH candidate AS MATERIALIZED (
        SELECT s.id, s.tenant_id, s.kind, s.modality, s.appointment_id, s.patient_id, s.doctor_id
        FROM sessions s
        WHERE {OVERDUE} AND (CAST(:only AS bigint) IS NULL OR s.id = :only)
        ORDER BY least(s.response_deadline, s.expires_at)
        LIMIT :limit
        FOR UPDATE SKIP LOCKED
    ),
    free AS MATERIALIZED (
        SELECT id FROM appointments WHERE id IN (SELECT appointment_id FROM candidate) FOR UPDATE SKIP LOCKED
    ),
    overdue AS MATERIALIZED (
        SELECT * FROM candidate WHERE appointment_id IS NULL OR appointment_id IN (SELECT id FROM free)
    ),
    ended AS (
        UPDATE sessions s
        SET status = CASE s.kind WHEN 'text' THEN 'expired' ELSE 'missed' END, ended_at = clock(),
            ended_seq = (SELECT last_seq FROM conversations WHERE session_id = s.id),
            end_reason = 'deadline'
        FROM overdue o WHERE s.id = o.id
        RETURNING s.id, s.status
    ),
    missed AS (
        UPDATE appointments SET status = 'NO_SHOW', updated_at = clock()
        WHERE id IN (SELECT appointment_id FROM overdue) AND status = 'IN_PROGRESS'
    ),
    event AS (
        INSERT INTO outbox_events (tenant_id, name, aggregate, payload)
        SELECT tenant_id, :name, coalesce('appointment:' || appointment_id, 'session:' || id),
               jsonb_build_object('appointment_id', appointment_id, 'session_id', id, 'modality', modality,
                                  'session_context', kind || '_session:' || id, 'end_reason', 'deadline',
                                  'patient_id', patient_id, 'doctor_id', doctor_id)
        FROM overdue
        RETURNING id, tenant_id, name, aggregate
    ),
    delivery AS ({deliver(":lane")})
    SELECT o.id, o.tenant_id, o.appointment_id, o.patient_id, o.doctor_id, e.status,
        (SELECT id FROM conversations WHERE session_id = o.id) AS conversation_id
    FROM overdue o JOIN ended e ON e.id = o.id
"""
_EXPIRE: Final = text(_EXPIRE_SESSIONS)
_OVERDUE: Final = text(
    f"SELECT s.id FROM sessions s WHERE {OVERDUE} ORDER BY least(s.response_deadline, s.expires_at) LIMIT :limit"
)

_EXPIRE_PENDING: Final = text(
    f"""
    WITH expired AS (
        UPDATE appointments SET status = 'EXPIRED', updated_at = clock()
        WHERE id IN (
            SELECT id FROM appointments WHERE status = 'PENDING' AND starts_at <= clock()
            ORDER BY starts_at LIMIT :limit FOR UPDATE SKIP LOCKED
        )
        RETURNING id, tenant_id, patient_id, doctor_id
    ),
    event AS (
        INSERT INTO outbox_events (tenant_id, name, aggregate, payload)
        SELECT tenant_id, :name, 'appointment:' || id,
               jsonb_build_object('appointment_id', id, 'patient_id', patient_id, 'doctor_id', doctor_id)
        FROM expired
        RETURNING id, tenant_id, name, aggregate
    ),
    delivery AS ({deliver(":lane")})
    SELECT count(*) FROM expired
    """
)


async def unblock(tx: Transaction, users: list[int], *, session_ended: bool = False) -> None:
    """Appointments of these people that wait for their next attempt may try again now. `session_ended` tells
    that this transaction also ends a session of theirs."""
    await tx.execute(_UNBLOCK_AFTER_SESSION if session_ended else _UNBLOCK_PARTIES, {"users": users})
    tx.ring(ConvertDue())


async def expire_sessions(tx: Transaction, *, only: int | None = None) -> list[int]:
    """Stores that sessions past their deadline are over: a text session expired, a call missed, the
    appointment a no-show. Costs nobody anything. Answers their ids."""
    parameters: dict[str, Any] = {
        "only": only,
        "limit": EXPIRED_AT_ONCE,
        "name": EventName.SESSION_ENDED.value,
        "lane": LANES[EventName.SESSION_ENDED].value,
    }
    rows = (await tx.execute(_EXPIRE, parameters)).all()
    if rows:
        await unblock(tx, [user for row in rows for user in (row.patient_id, row.doctor_id)], session_ended=True)
        tx.ring(DispatchOutbox())
    for row in rows:
        tx.changed(row.conversation_id)
        _log.info(
            "session_state_changed",
            tenant_id=row.tenant_id,
            session_id=row.id,
            appointment_id=row.appointment_id,
            status=row.status,
            end_reason="deadline",
        )
    return [row.id for row in rows]


async def overdue_sessions(tx: Transaction) -> list[int]:
    """The ids of the sessions that are past their deadline and not yet expired."""
    return list((await tx.execute(_OVERDUE, {"limit": EXPIRED_AT_ONCE})).scalars())


async def expire_pending(tx: Transaction) -> int:
    """Requests for an appointment that nobody confirmed before they were due; answers how many."""
    parameters = {
        "limit": EXPIRED_AT_ONCE,
        "name": EventName.APPOINTMENT_EXPIRED.value,
        "lane": Lane.NORMAL.value,
    }
    expired: int = (await tx.execute(_EXPIRE_PENDING, parameters)).scalar_one()
    if expired:
        tx.ring(DispatchOutbox())
    return expired
