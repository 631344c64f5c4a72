from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from libs.domain.appointments.transitions import Status
from libs.guardrails import SessionStatus
from services.api.schemas import Id, In, Out, SafeStr, Timestamp

ReasonText = Annotated[SafeStr, Field(max_length=500)]


class BookAppointment(In):
    """`patient_id` is left out by patients, who book for themselves, and given by operators."""

    doctor_id: Id
    patient_id: Id | None = None
    modality: Literal["text", "voice", "video"]
    starts_at: Timestamp
    duration_minutes: Annotated[int, Field(strict=True, ge=5, le=480)] = 30
    reason: ReasonText | None = None


class CancelAppointment(In):
    reason: ReasonText | None = None


class ProposeTime(In):
    starts_at: Timestamp


class AppointmentOut(Out):
    id: int
    patient_id: int
    doctor_id: int
    modality: str
    status: Status
    starts_at: datetime
    ends_at: datetime
    duration_minutes: int
    reason: str | None
    session_id: int | None
    session_context: str | None
    created_at: datetime
    updated_at: datetime


class SessionPollOut(Out):
    """Poll until `session_context` is there; wait `retry_after` seconds in between."""

    appointment_id: int
    status: Status
    modality: str
    starts_at: datetime
    session_id: int | None
    session_context: str | None
    session_status: SessionStatus | None
    response_deadline: datetime | None
    retry_after: int | None
