"""What the guard judges, read from the database."""

from typing import Any, Final

from sqlalchemy import text

from libs.domain.tables import BEGUN_AT
from libs.domain.transaction import Transaction
from libs.guardrails import (
    AppointmentFacts,
    AppointmentRef,
    Facts,
    SessionFacts,
    SessionKind,
    SessionRef,
    SessionStatus,
)

UNANSWERED: Final = "(s.status IN ('waiting', 'connecting') AND least(s.response_deadline, s.expires_at) <= clock())"
"""Whether nobody took up session `s` in time. At exactly the deadline it is too late."""

# What somebody did in the last moment may not be written down yet.
FORSAKEN_AT: Final = "s.idle_at + interval '2 seconds'"
"""When active session `s` is over because nobody has done anything."""

OVERDUE: Final = f"({UNANSWERED} OR s.status = 'active' AND least(s.expires_at, {FORSAKEN_AT}) <= clock())"
"""Whether session `s` is over, though that may not be stored yet: not taken up, its allowance spent, or forgotten."""

SESSION_COLUMNS: Final = f"""
    s.id AS session_id, s.kind, s.status AS session_status, s.patient_id, s.doctor_id, s.appointment_id,
    c.id AS conversation_id, {OVERDUE} AS overdue, {BEGUN_AT} IS NOT NULL AS begun"""

_BY_SESSION: Final = f"""
    SELECT {SESSION_COLUMNS}
    FROM sessions s JOIN conversations c ON c.session_id = s.id
    WHERE s.id = :id AND s.kind = :kind AND s.tenant_id = :tenant_id
"""
_SESSION: Final = text(_BY_SESSION)
_LOCKED_SESSION: Final = text(_BY_SESSION + " FOR NO KEY UPDATE OF s")

_BY_APPOINTMENT: Final = """
    SELECT a.id, a.status, a.patient_id, a.doctor_id, a.parked_at IS NOT NULL AS parked, a.session_id,
        (SELECT kind FROM sessions WHERE id = a.session_id) AS session_kind,
        extract(epoch FROM a.starts_at - clock())::float8 AS due_in
    FROM appointments a WHERE a.id = :id AND a.tenant_id = :tenant_id
"""
_APPOINTMENT: Final = text(_BY_APPOINTMENT)
_LOCKED_APPOINTMENT: Final = text(_BY_APPOINTMENT + " FOR NO KEY UPDATE OF a")


def session_facts(row: Any) -> SessionFacts:
    """From a mapping that has the columns of `SESSION_COLUMNS`."""
    return SessionFacts(
        id=row["session_id"],
        kind=SessionKind(row["kind"]),
        status=SessionStatus(row["session_status"]),
        patient_id=row["patient_id"],
        doctor_id=row["doctor_id"],
        appointment_id=row["appointment_id"],
        conversation_id=row["conversation_id"],
        overdue=row["overdue"],
        begun=row["begun"],
    )


async def load(tx: Transaction, subject: SessionRef | AppointmentRef, tenant_id: int, *, lock: bool) -> Facts:
    """The facts about `subject` at this moment; with `lock` they stay true until the transaction ends.

    Locks are taken session first: that is the order of whoever ends one. Only an appointment that has
    no session is locked itself, which keeps the conversion away from it meanwhile. Whether the caller is
    active is for the caller of this to know.
    """
    if isinstance(subject, SessionRef):
        return Facts(caller_active=True, session=await _session(tx, subject, tenant_id, lock=lock))
    parameters = {"id": subject.id, "tenant_id": tenant_id}
    row = (await tx.execute(_APPOINTMENT, parameters)).one_or_none()
    if row is not None and row.session_id is None and lock:
        step = await (await tx.connection()).begin_nested()
        row = (await tx.execute(_LOCKED_APPOINTMENT, parameters)).one()
        if row.session_id is not None:
            # This waited for a conversion, whose session only a new statement sees. Let go of the appointment first.
            await step.rollback()
            row = (await tx.execute(_APPOINTMENT, parameters)).one()
        else:
            await step.commit()
    if row is None:
        return Facts(caller_active=True)
    session = None
    if row.session_id is not None:
        ref = SessionRef(SessionKind(row.session_kind), row.session_id)
        session = await _session(tx, ref, tenant_id, lock=lock)
    appointment = AppointmentFacts(
        id=row.id,
        status=row.status,
        patient_id=row.patient_id,
        doctor_id=row.doctor_id,
        due_in=row.due_in,
        parked=row.parked,
    )
    return Facts(caller_active=True, appointment=appointment, session=session)


async def _session(tx: Transaction, ref: SessionRef, tenant_id: int, *, lock: bool) -> SessionFacts | None:
    statement = _LOCKED_SESSION if lock else _SESSION
    parameters = {"id": ref.id, "kind": ref.kind.value, "tenant_id": tenant_id}
    row = (await tx.execute(statement, parameters)).one_or_none()
    return None if row is None else session_facts(row._mapping)
