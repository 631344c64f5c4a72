"""Billing by appointment, at the addresses that older clients know."""

from typing import Annotated

from fastapi import Request

from libs.guardrails import AppointmentRef, Reason, SessionContext
from libs.guardrails.operations import EndSession, ProcessDeduction, ProcessPayment
from services.api.billing.schemas import BillOut, DeductionIn
from services.api.guards import Subject, Tx, can, guarded_router, runtime_of
from services.api.schemas import IdPath, creating

router = guarded_router("", tag="legacy", base="/api", sessions_only=True)

_BILLING = creating(
    Reason.APPOINTMENT_NOT_FOUND,
    Reason.SESSION_BILLING_REQUIRED,
    Reason.SESSION_NOT_CONNECTED,
    Reason.INVALID_TRANSITION,
)


async def _in_path(appointment_id: IdPath) -> Subject:
    return AppointmentRef(appointment_id)


async def _in_body(body: DeductionIn) -> Subject:
    return AppointmentRef(body.appointment_id)


@router.post("/appointments/{appointment_id}/end-session", responses=_BILLING)
async def end_session_by_appointment(
    context: Annotated[SessionContext[EndSession], can(EndSession, _in_path)], request: Request, tx: Tx
) -> BillOut:
    """Ends the appointment's session and bills it; without a session, completes the appointment for one unit."""
    return BillOut.model_validate(await runtime_of(request).legacy_billing.end_session(tx, context))


@router.post("/appointments/{appointment_id}/process-payment", responses=_BILLING)
async def process_payment(
    context: Annotated[SessionContext[ProcessPayment], can(ProcessPayment, _in_path)], request: Request, tx: Tx
) -> BillOut:
    """Bills what has run of the appointment's session; without a session, completes the appointment for one unit."""
    return BillOut.model_validate(await runtime_of(request).legacy_billing.process_payment(tx, context))


@router.post("/text-appointments/process-deduction", responses=_BILLING)
async def process_deduction(
    context: Annotated[SessionContext[ProcessDeduction], can(ProcessDeduction, _in_body)],
    request: Request,
    tx: Tx,
    body: DeductionIn,
) -> BillOut:
    """Bills what has run, and never more than that; a manual end also the unit that has begun."""
    billing = runtime_of(request).legacy_billing
    return BillOut.model_validate(await billing.process_deduction(tx, context, body.sessions_to_deduct, body.reason))
