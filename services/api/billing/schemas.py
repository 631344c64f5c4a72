from datetime import datetime
from typing import Annotated

from pydantic import Field

from libs.domain.appointments.transitions import Status
from libs.domain.billing.legacy import DeductionReason
from services.api.schemas import Id, In, Out, SafeStr


class DeductionIn(In):
    """`sessions_to_deduct` never makes it charge more than has run."""

    appointment_id: Id
    sessions_to_deduct: Annotated[int, Field(strict=True, ge=1, le=1_000)]
    reason: DeductionReason


class BillOut(Out):
    """What the appointment comes to: `units_charged` in all, `units_added` by this request."""

    appointment_id: int
    status: Status
    units_charged: int
    units_added: int
    session_context: str | None


class DeductedOut(Out):
    """`units_charged` in all, `units_added` by this request."""

    units_charged: int
    units_added: int


class EntryOut(Out):
    """`amount` is in units of a modality, or in the minor unit of a currency."""

    account: str
    subscription_id: int | None
    doctor_id: int | None
    commodity: str
    amount: int


class LineOut(Out):
    """A transaction of the ledger, whose entries sum to zero per commodity."""

    id: int
    kind: str
    unit: int | None
    reverses: int | None
    created_at: datetime
    entries: list[EntryOut]


class LedgerOut(Out):
    """`units_refunded` of the units that were charged have been taken back."""

    session_context: str
    units_charged: int
    units_refunded: int
    items: list[LineOut]


class UnitsOut(Out):
    text: int
    voice: int
    video: int


class WalletOut(Out):
    currency: str
    balance_minor: int


class BalanceOut(Out):
    """Of a patient the units that remain; of a doctor the wallets. The other is null."""

    units: UnitsOut | None
    wallets: list[WalletOut] | None


class RefundIn(In):
    """`context` is a session's, or the id of an appointment that was billed the legacy way; without `unit`, all that
    was charged for it is taken back."""

    context: SafeStr
    unit: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    reason: Annotated[SafeStr, Field(max_length=500)] | None = None


class RefundOut(Out):
    units_refunded: int
    items: list[LineOut]
