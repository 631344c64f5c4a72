from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from libs.guardrails import SessionKind, SessionStatus
from services.api.schemas import Id, In, Out, SafeStr


class StartSession(In):
    doctor_id: Id
    modality: Literal["text", "voice", "video"]
    reason: Annotated[SafeStr, Field(max_length=500)] | None = None


class EndSession(In):
    reason: Annotated[SafeStr, Field(max_length=200)] | None = None


class SessionOut(Out):
    """`response_deadline` is when a waiting text session expires unless the doctor answers, and a call that rings is
    missed; `remaining_seconds` is null while no allowance runs."""

    id: int
    context: str
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
    remaining_seconds: int | None


class PayoutOut(Out):
    amount_minor: int
    currency: str


class BillingOut(Out):
    """What ending charged: `units_charged` in all, `units_added` by this request."""

    units_charged: int
    units_added: int
    payouts: list[PayoutOut]


class EndedOut(Out):
    session: SessionOut
    billing: BillingOut
    already_ended: bool
