"""Direct sessions: a patient turns to a doctor who is free, without an appointment."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import text

from libs.domain import people
from libs.domain.billing.posting import allowance
from libs.domain.outbox.append import append
from libs.domain.outbox.events import EventName
from libs.domain.sessions.sessions import Session, get
from libs.domain.tables import DUE
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.guardrails import Principal, Reason, Refused, Role

_log: Final = logger("sessions")

LASTS: Final = timedelta(hours=24)
"""How long a direct session waits to be taken up."""

SPOKEN_FOR: Final = timedelta(minutes=10)
"""So long before an appointment its doctor starts nothing else."""

_PROSPECTS: Final = text(
    f"""
    SELECT {allowance("CAST(:patient_id AS bigint)", ":modality")} AS units, EXISTS (
        SELECT FROM appointments WHERE {DUE} AND doctor_id = :doctor_id AND starts_at <= clock() + :spoken_for
            AND ends_at > clock()
    ) AS spoken_for
    """
)

# As in conversion, the two indexes of live sessions decide who is free.
_START: Final = text(
    """
    WITH started AS (
        INSERT INTO sessions (tenant_id, kind, modality, source, patient_id, doctor_id, status, expires_at, reason)
        VALUES (:tenant_id, CASE :modality WHEN 'text' THEN 'text' ELSE 'call' END, :modality, 'DIRECT', :patient_id,
                :doctor_id, CASE :modality WHEN 'text' THEN 'waiting' ELSE 'connecting' END, clock() + :lasts, :reason)
        ON CONFLICT DO NOTHING
        RETURNING id, tenant_id, patient_id, doctor_id
    ),
    conversation AS (
        INSERT INTO conversations (tenant_id, session_id) SELECT tenant_id, id FROM started RETURNING id
    ),
    joined AS (
        INSERT INTO participants (tenant_id, conversation_id, user_id, role)
        SELECT s.tenant_id, c.id, party.user_id, party.role
        FROM started s CROSS JOIN conversation c
        CROSS JOIN LATERAL (VALUES (s.patient_id, 'patient'), (s.doctor_id, 'doctor')) AS party (user_id, role)
    )
    SELECT id FROM started
    """
)


@dataclass(frozen=True, slots=True)
class NewSession:
    doctor_id: int
    modality: str
    reason: str | None


async def start(tx: Transaction, patient: Principal, new: NewSession) -> Session:
    """Starts a session that the doctor takes up within a day, or not at all.

    Raises `Refused`: `VALIDATION_FAILED` when the tenant has no such doctor, `NO_SESSIONS_REMAINING`, or
    `SESSION_CONFLICT` when one of both is in a live session or the doctor is about to have an appointment.
    """
    await people.require(tx, patient.tenant_id, Role.DOCTOR, new.doctor_id, "/doctor_id")
    parties = {"patient_id": patient.user_id, "doctor_id": new.doctor_id}
    wanted = parties | {"modality": new.modality}
    prospects = (await tx.execute(_PROSPECTS, wanted | {"spoken_for": SPOKEN_FOR})).one()
    if not prospects.units:
        raise Refused(Reason.NO_SESSIONS_REMAINING)
    if prospects.spoken_for:
        raise Refused(Reason.SESSION_CONFLICT, "The doctor has an appointment within the next 10 minutes.")
    parameters = wanted | {"tenant_id": patient.tenant_id, "lasts": LASTS, "reason": new.reason}
    session_id = (await tx.execute(_START, parameters)).scalar_one_or_none()
    if session_id is None:
        raise Refused(Reason.SESSION_CONFLICT)
    session = await get(tx, session_id)
    await append(
        tx,
        EventName.SESSION_STARTED,
        tenant_id=session.tenant_id,
        aggregate=f"session:{session.id}",
        payload={
            "appointment_id": None,
            "session_id": session.id,
            "session_context": session.context,
            **wanted,
        },
    )
    tx.after_commit(
        lambda: _log.info(
            "session_state_changed", session_id=session.id, status=session.status, user_id=patient.user_id
        )
    )
    return session
