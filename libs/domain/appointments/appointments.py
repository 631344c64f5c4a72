"""Booking an appointment and changing it, each change under the transition table."""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Row, Select, TextClause, bindparam, select, text
from sqlalchemy.dialects.postgresql import JSONB

from libs.domain import people
from libs.domain.appointments.transitions import TRANSITIONS, Status
from libs.domain.jobs import ConvertDue
from libs.domain.outbox.append import append
from libs.domain.outbox.events import EventName
from libs.domain.pages import Page, page_of
from libs.domain.tables import appointment_parties, appointments, sessions
from libs.domain.transaction import Transaction
from libs.guardrails import Permission, Principal, Reason, Refused, Role, SessionKind, SessionRef, SessionStatus
from libs.guardrails.decision import PARKED_RETRY_AFTER
from libs.observability.context import carrier

_CAN_STILL_START: Final = {Status.PENDING, Status.CONFIRMED, Status.RESCHEDULE_PROPOSED}

MAX_AHEAD: Final = timedelta(days=366)


@dataclass(frozen=True, slots=True)
class NewAppointment:
    patient_id: int
    doctor_id: int
    modality: str
    starts_at: datetime
    duration: timedelta
    reason: str | None


@dataclass(frozen=True, slots=True)
class Appointment:
    """An appointment as stored; times are UTC."""

    id: int
    tenant_id: int
    patient_id: int
    doctor_id: int
    modality: str
    status: Status
    starts_at: datetime
    ends_at: datetime
    proposed_starts_at: datetime | None
    reason: str | None
    session_id: int | None
    created_at: datetime
    updated_at: datetime

    @property
    def duration_minutes(self) -> int:
        return int((self.ends_at - self.starts_at).total_seconds() // 60)

    @property
    def session_context(self) -> str | None:
        if self.session_id is None:
            return None
        kind = SessionKind.TEXT if self.modality == "text" else SessionKind.CALL
        return str(SessionRef(kind, self.session_id))


@dataclass(frozen=True, slots=True)
class SessionPoll:
    """Whether the appointment's session is there; `retry_after` in seconds while it may still come."""

    appointment_id: int
    status: Status
    modality: str
    starts_at: datetime
    session_id: int | None
    session_context: str | None
    session_status: SessionStatus | None
    response_deadline: datetime | None
    retry_after: int | None


_NAMES: Final = tuple(Appointment.__dataclass_fields__)
_COLUMNS: Final = [appointments.c[name] for name in _NAMES]
_RETURNING: Final = ", ".join(f"a.{name}" for name in _NAMES)

# One statement: the exclusion constraint decides, without a lock and without a deadlock.
_BOOK: Final = text(
    f"""
    WITH a AS (
        INSERT INTO appointments (tenant_id, patient_id, doctor_id, modality, starts_at, ends_at, reason)
        VALUES (:tenant_id, :patient_id, :doctor_id, :modality, :starts_at, :ends_at, :reason)
        RETURNING *
    ),
    slot AS (
        INSERT INTO busy_intervals (tenant_id, doctor_id, appointment_id, during)
        SELECT tenant_id, doctor_id, id, tstzrange(starts_at, ends_at) FROM a
        ON CONFLICT DO NOTHING
        RETURNING appointment_id
    )
    SELECT {_RETURNING}, EXISTS (SELECT FROM slot) AS free FROM a
    """
)
_NOW: Final = text("SELECT clock()")
_LOCK_DOCTOR: Final = text("SELECT pg_advisory_xact_lock(:namespace, hashint8(:doctor_id))")
_DOCTOR_NAMESPACE: Final = 0x5E55

NEARLY_DUE: Final = timedelta(seconds=2)
"""So soon a worker that has just looked might look again too late."""

_CHANGE: Final = f"UPDATE appointments a SET {{changes}}, updated_at = clock() WHERE a.id = :id RETURNING {_RETURNING}"
_CONFIRM: Final = text(_CHANGE.format(changes="status = 'CONFIRMED', carrier = :carrier")).bindparams(
    bindparam("carrier", type_=JSONB)
)
_CANCEL: Final = text(_CHANGE.format(changes="status = 'CANCELLED', cancel_reason = :reason"))
_PROPOSE: Final = text(_CHANGE.format(changes="status = 'RESCHEDULE_PROPOSED', proposed_starts_at = :starts_at"))
_REJECT: Final = text(_CHANGE.format(changes="status = 'CONFIRMED', proposed_starts_at = NULL"))
_ACCEPT: Final = text(
    _CHANGE.format(
        changes="status = 'CONFIRMED', starts_at = a.proposed_starts_at,"
        " ends_at = a.proposed_starts_at + (a.ends_at - a.starts_at), proposed_starts_at = NULL,"
        " conversion_failures = 0, next_attempt_at = NULL, parked_at = NULL, carrier = :carrier"
    )
).bindparams(bindparam("carrier", type_=JSONB))
_RELEASE: Final = text("UPDATE busy_intervals SET active = false WHERE appointment_id = :id AND active")
_OCCUPY: Final = text(
    """
    INSERT INTO busy_intervals (tenant_id, doctor_id, appointment_id, during)
    SELECT tenant_id, doctor_id, id, tstzrange(starts_at, ends_at) FROM appointments WHERE id = :id
    ON CONFLICT DO NOTHING RETURNING id
    """
)
_PRESENT: Final = {
    Role.PATIENT: text(
        "UPDATE appointments SET patient_present_at = coalesce(patient_present_at, clock()) WHERE id = :id"
    ),
    Role.DOCTOR: text(
        "UPDATE appointments SET doctor_present_at = coalesce(doctor_present_at, clock()) WHERE id = :id"
    ),
}


async def book(tx: Transaction, caller: Principal, new: NewAppointment) -> Appointment:
    """Books a PENDING appointment.

    Raises `Refused`: `VALIDATION_FAILED` with the pointer of the fault, or `SLOT_TAKEN` when the
    doctor has an overlapping appointment.
    """
    await _require_future(tx, new.starts_at)
    await people.require(tx, caller.tenant_id, Role.DOCTOR, new.doctor_id, "/doctor_id")
    await people.require(tx, caller.tenant_id, Role.PATIENT, new.patient_id, "/patient_id")
    parameters = {
        "tenant_id": caller.tenant_id,
        "patient_id": new.patient_id,
        "doctor_id": new.doctor_id,
        "modality": new.modality,
        "starts_at": new.starts_at,
        "ends_at": new.starts_at + new.duration,
        "reason": new.reason,
    }
    row = (await tx.execute(_BOOK, parameters)).one()
    if not row.free:
        raise Refused(Reason.SLOT_TAKEN)
    return _appointment(row)


async def find(
    tx: Transaction, caller: Principal, appointment_id: int, permission: Permission, *, lock: bool = False
) -> Appointment:
    """The appointment, if the caller takes part in it and has the permission.

    Raises `Refused`: `APPOINTMENT_NOT_FOUND` to strangers, `ROLE_NOT_ALLOWED` to participants.
    """
    statement = _seen_by(caller).where(appointments.c.id == appointment_id)
    if lock:
        statement = statement.with_for_update()
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise Refused(Reason.APPOINTMENT_NOT_FOUND)
    if not caller.may(permission):
        raise Refused(Reason.ROLE_NOT_ALLOWED)
    return _appointment(row)


async def listed(
    tx: Transaction, caller: Principal, *, status: Status | None, cursor: int | None, limit: int
) -> Page[Appointment]:
    """The caller's appointments, newest first; an operator sees those of the tenant."""
    statement, key = _seen_by(caller), appointments.c.id
    if caller.role is not Role.OPERATOR:
        key = appointment_parties.c.appointment_id
        statement = statement.join_from(appointments, appointment_parties).where(
            appointment_parties.c.user_id == caller.user_id
        )
    if status is not None:
        statement = statement.where(appointments.c.status == status.value)
    return await page_of(tx, statement, key, cursor, limit, _appointment)


async def confirm(tx: Transaction, caller: Principal, appointment_id: int) -> Appointment:
    """PENDING → CONFIRMED, before it is due. Remembers the caller's trace for the conversion to come."""
    found = await find(tx, caller, appointment_id, Permission.CONFIRM_APPOINTMENTS, lock=True)
    if found.status is not Status.PENDING:
        raise _no_way(found.status, Status.CONFIRMED)
    if found.starts_at <= await now(tx):
        raise _no_way(Status.EXPIRED, Status.CONFIRMED)
    return await _change(tx, _CONFIRM, EventName.APPOINTMENT_CONFIRMED, found, carrier=carrier())


async def cancel(tx: Transaction, caller: Principal, appointment_id: int, reason: str | None) -> Appointment:
    found = await find(tx, caller, appointment_id, Permission.CANCEL_APPOINTMENTS, lock=True)
    if Status.CANCELLED not in TRANSITIONS[found.status]:
        raise _no_way(found.status, Status.CANCELLED)
    return await _change(tx, _CANCEL, EventName.APPOINTMENT_CANCELLED, found, reason=reason)


async def propose(tx: Transaction, caller: Principal, appointment_id: int, starts_at: datetime) -> Appointment:
    """CONFIRMED → RESCHEDULE_PROPOSED; the old time stays taken until the patient answers."""
    found = await find(tx, caller, appointment_id, Permission.PROPOSE_NEW_TIMES, lock=True)
    if Status.RESCHEDULE_PROPOSED not in TRANSITIONS[found.status]:
        raise _no_way(found.status, Status.RESCHEDULE_PROPOSED)
    await _require_future(tx, starts_at)
    return await _change(tx, _PROPOSE, EventName.RESCHEDULE_PROPOSED, found, starts_at=starts_at)


async def accept(tx: Transaction, caller: Principal, appointment_id: int) -> Appointment:
    """RESCHEDULE_PROPOSED → CONFIRMED at the proposed time, if the doctor is still free then."""
    found = await find(tx, caller, appointment_id, Permission.ANSWER_PROPOSALS)
    # Moving frees one interval and takes another: two such moves of a doctor must not interleave.
    await tx.execute(_LOCK_DOCTOR, {"namespace": _DOCTOR_NAMESPACE, "doctor_id": found.doctor_id})
    found = await find(tx, caller, appointment_id, Permission.ANSWER_PROPOSALS, lock=True)
    if found.status is not Status.RESCHEDULE_PROPOSED or found.proposed_starts_at is None:
        raise _no_way(found.status, Status.CONFIRMED)
    if found.proposed_starts_at <= await now(tx):
        raise Refused(Reason.INVALID_TRANSITION, "RESCHEDULE_PROPOSED to CONFIRMED: the proposed time has passed.")
    await tx.execute(_RELEASE, {"id": found.id})
    moved = await _change(tx, _ACCEPT, EventName.RESCHEDULE_ACCEPTED, found, carrier=carrier())
    if (await tx.execute(_OCCUPY, {"id": found.id})).one_or_none() is None:
        raise Refused(Reason.SLOT_TAKEN)
    return moved


async def reject(tx: Transaction, caller: Principal, appointment_id: int) -> Appointment:
    """RESCHEDULE_PROPOSED → CONFIRMED at the old time, which may be due by now."""
    found = await find(tx, caller, appointment_id, Permission.ANSWER_PROPOSALS, lock=True)
    if found.status is not Status.RESCHEDULE_PROPOSED:
        raise _no_way(found.status, Status.CONFIRMED)
    return await _change(tx, _REJECT, EventName.RESCHEDULE_REJECTED, found)


async def report_presence(tx: Transaction, caller: Principal, appointment_id: int) -> None:
    """Notes that a party has turned up; the first time counts."""
    found = await find(tx, caller, appointment_id, Permission.REPORT_PRESENCE, lock=True)
    await tx.execute(_PRESENT[caller.role], {"id": found.id})


async def poll_session(tx: Transaction, caller: Principal, appointment_id: int) -> SessionPoll:
    statement = (
        _seen_by(caller)
        .outerjoin(sessions, sessions.c.id == appointments.c.session_id)
        .add_columns(
            sessions.c.status.label("session_status"),
            sessions.c.response_deadline,
            appointments.c.parked_at,
            text("extract(epoch FROM appointments.starts_at - clock())::float8 AS due_in"),
        )
        .where(appointments.c.id == appointment_id)
    )
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise Refused(Reason.APPOINTMENT_NOT_FOUND)
    found = _appointment(row)
    waiting = found.session_id is None and found.status in _CAN_STILL_START
    retry_after = PARKED_RETRY_AFTER if row.parked_at else max(1, math.ceil(row.due_in))
    return SessionPoll(
        appointment_id=found.id,
        status=found.status,
        modality=found.modality,
        starts_at=found.starts_at,
        session_id=found.session_id,
        session_context=found.session_context,
        session_status=SessionStatus(row.session_status) if row.session_status else None,
        response_deadline=row.response_deadline,
        retry_after=retry_after if waiting else None,
    )


async def now(tx: Transaction) -> datetime:
    """The present time, from the one clock that counts."""
    moment: datetime = (await tx.execute(_NOW)).scalar_one()
    return moment


async def _require_future(tx: Transaction, starts_at: datetime) -> None:
    present = await now(tx)
    if not present < starts_at <= present + MAX_AHEAD:
        detail = "Must be after now and at most 366 days ahead."
        raise Refused(Reason.VALIDATION_FAILED, errors=[{"pointer": "/starts_at", "detail": detail}])


async def _change(
    tx: Transaction, statement: TextClause, event: EventName, found: Appointment, **values: Any
) -> Appointment:
    """Applies a change to the locked appointment and tells both parties."""
    changed = _appointment((await tx.execute(statement, {"id": found.id, **values})).one())
    if changed.status is Status.CONFIRMED and changed.starts_at < changed.updated_at + NEARLY_DUE:
        tx.ring(ConvertDue())
    await append(
        tx,
        event,
        tenant_id=changed.tenant_id,
        aggregate=f"appointment:{changed.id}",
        payload={
            "appointment_id": changed.id,
            "patient_id": changed.patient_id,
            "doctor_id": changed.doctor_id,
            "starts_at": changed.starts_at.isoformat(),
        },
    )
    return changed


def _seen_by(caller: Principal) -> Select[Any]:
    statement = select(*_COLUMNS).where(appointments.c.tenant_id == caller.tenant_id)
    match caller.role:
        case Role.PATIENT:
            return statement.where(appointments.c.patient_id == caller.user_id)
        case Role.DOCTOR:
            return statement.where(appointments.c.doctor_id == caller.user_id)
        case _:
            return statement


def _no_way(present: Status, wanted: Status) -> Refused:
    return Refused(Reason.INVALID_TRANSITION, f"The appointment is {present} and cannot become {wanted}.")


def _appointment(row: Row[Any]) -> Appointment:
    fields = {name: getattr(row, name) for name in _NAMES}
    fields["status"] = Status(row.status)
    return Appointment(**fields)
