import time
from datetime import timedelta
from typing import Annotated

from fastapi import Request

from libs.domain.appointments import appointments
from libs.domain.appointments.transitions import Status
from libs.guardrails import Permission, Principal, Reason, Refused, Role
from libs.observability.tracing import exemplar, span
from services.api.appointments.schemas import (
    AppointmentOut,
    BookAppointment,
    CancelAppointment,
    ProposeTime,
    SessionPollOut,
)
from services.api.guards import Tx, acting, guarded_router, runtime_of
from services.api.schemas import DEFAULT_LIMIT, Cursor, IdPath, Limit, PageOut, creating, page_out, refusals

router = guarded_router("/appointments", tag="appointments")

# Strangers must get 404 before participants get 403, so these routes admit everyone who can take part in
# an appointment, and the domain asks for the permission of the change once it has found it.
Participant = Annotated[Principal, acting(Permission.SEE_APPOINTMENTS)]

_CHANGES = refusals(Reason.APPOINTMENT_NOT_FOUND, Reason.INVALID_TRANSITION)


@router.post("", status_code=201, responses=creating(Reason.SLOT_TAKEN))
async def book_appointment(
    caller: Annotated[Principal, acting(Permission.BOOK_APPOINTMENTS)], tx: Tx, new: BookAppointment, request: Request
) -> AppointmentOut:
    """Books an appointment, which a doctor or an operator then confirms."""
    metrics = runtime_of(request).metrics
    began = time.perf_counter()
    with span("scheduling.book"):
        try:
            booked = await appointments.book(
                tx,
                caller,
                appointments.NewAppointment(
                    patient_id=_patient_of(caller, new),
                    doctor_id=new.doctor_id,
                    modality=new.modality,
                    starts_at=new.starts_at,
                    duration=timedelta(minutes=new.duration_minutes),
                    reason=new.reason,
                ),
            )
        except Refused as refused:
            if refused.reason is Reason.SLOT_TAKEN:
                metrics.counter("scheduling_book_conflict_total").inc()
            raise
        finally:
            took = time.perf_counter() - began
            metrics.histogram("scheduling_book_duration_seconds").observe(took, exemplar())
            # Nobody else is asked while booking, so all of it is our own time.
            metrics.histogram("booking_post_own_duration_seconds").observe(took, exemplar())
    return AppointmentOut.model_validate(booked)


@router.get("", responses=refusals())
async def list_appointments(
    caller: Participant,
    tx: Tx,
    status: Status | None = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[AppointmentOut]:
    """Your appointments, newest first; operators see those of the tenant."""
    page = await appointments.listed(tx, caller, status=status, cursor=cursor, limit=limit)
    return page_out(page, AppointmentOut.model_validate)


@router.get("/{appointment_id}", responses=refusals(Reason.APPOINTMENT_NOT_FOUND))
async def get_appointment(appointment_id: IdPath, caller: Participant, tx: Tx) -> AppointmentOut:
    found = await appointments.find(tx, caller, appointment_id, Permission.SEE_APPOINTMENTS)
    return AppointmentOut.model_validate(found)


@router.post("/{appointment_id}/confirm", responses=_CHANGES)
async def confirm_appointment(appointment_id: IdPath, caller: Participant, tx: Tx) -> AppointmentOut:
    """Confirms a pending appointment before it is due (doctor, operator)."""
    return AppointmentOut.model_validate(await appointments.confirm(tx, caller, appointment_id))


@router.post("/{appointment_id}/cancel", responses=_CHANGES)
async def cancel_appointment(
    appointment_id: IdPath, caller: Participant, tx: Tx, body: CancelAppointment | None = None
) -> AppointmentOut:
    """Cancels an appointment that has no session yet and frees the slot."""
    reason = body.reason if body else None
    return AppointmentOut.model_validate(await appointments.cancel(tx, caller, appointment_id, reason))


@router.post("/{appointment_id}/reschedule", responses=_CHANGES)
async def propose_new_time(appointment_id: IdPath, caller: Participant, tx: Tx, body: ProposeTime) -> AppointmentOut:
    """Proposes another time (doctor, operator); the old one stays taken until the patient answers."""
    return AppointmentOut.model_validate(await appointments.propose(tx, caller, appointment_id, body.starts_at))


@router.post("/{appointment_id}/reschedule/accept", responses={**_CHANGES, **refusals(Reason.SLOT_TAKEN)})
async def accept_new_time(appointment_id: IdPath, caller: Participant, tx: Tx) -> AppointmentOut:
    """Accepts the proposed time (patient)."""
    return AppointmentOut.model_validate(await appointments.accept(tx, caller, appointment_id))


@router.post("/{appointment_id}/reschedule/reject", responses=_CHANGES)
async def reject_new_time(appointment_id: IdPath, caller: Participant, tx: Tx) -> AppointmentOut:
    """Keeps the old time (patient)."""
    return AppointmentOut.model_validate(await appointments.reject(tx, caller, appointment_id))


@router.post("/{appointment_id}/presence", status_code=204, responses=refusals(Reason.APPOINTMENT_NOT_FOUND))
async def report_presence(appointment_id: IdPath, caller: Participant, tx: Tx) -> None:
    """Says that you have turned up (patient, doctor)."""
    await appointments.report_presence(tx, caller, appointment_id)


@router.get("/{appointment_id}/session", responses=refusals(Reason.APPOINTMENT_NOT_FOUND))
async def poll_session(appointment_id: IdPath, caller: Participant, tx: Tx) -> SessionPollOut:
    """Whether the session has started, and its context if so."""
    return SessionPollOut.model_validate(await appointments.poll_session(tx, caller, appointment_id))


def _patient_of(caller: Principal, new: BookAppointment) -> int:
    if caller.role is Role.PATIENT:
        if new.patient_id not in (None, caller.user_id):
            raise _bad_patient("A patient books for oneself.")
        return caller.user_id
    if new.patient_id is None:
        raise _bad_patient("An operator says for whom.")
    return new.patient_id


def _bad_patient(detail: str) -> Refused:
    return Refused(Reason.VALIDATION_FAILED, errors=[{"pointer": "/patient_id", "in": "body", "detail": detail}])
