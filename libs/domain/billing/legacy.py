"""Billing by appointment, as older clients do.

An appointment that has a session is billed by settling the session, under the same keys of the ledger: whoever
bills in both ways charges nothing twice. One that has none is completed by being billed, whichever of the three
ways comes first.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sqlalchemy import text

from libs.domain.appointments.transitions import Status
from libs.domain.billing.closing import CHARGED, close, closing
from libs.domain.billing.posting import elapsed_units
from libs.domain.sessions.settlement import Ending, Settlement
from libs.domain.transaction import Transaction
from libs.guardrails import AppointmentFacts, Operation, Reason, Refused, SessionContext, SessionFacts
from libs.guardrails.operations import EndSession, ProcessDeduction, ProcessPayment
from libs.observability.registry import Metrics


class DeductionReason(StrEnum):
    """Why a client asks for a deduction: time has passed, somebody ended, or nobody does anything any more."""

    INTERVAL = "interval"
    MANUAL_END = "manual_end"
    NO_ACTIVITY = "no_activity"


@dataclass(frozen=True, slots=True)
class Bill:
    """What an appointment comes to: `units_charged` in all, `units_added` by this request."""

    appointment_id: int
    status: Status
    units_charged: int
    units_added: int
    session_context: str | None


# :asked is how many units more somebody asks for, of those that have run and, if that :ends it, the one that has
# begun; null asks for one unit in all. Once somebody has ended it, there are no more.
_BILL: Final = closing(
    f"""
    SELECT *, CASE WHEN ended THEN charged ELSE greatest(charged, CASE WHEN CAST(:asked AS int) IS NULL THEN 1
        ELSE least(charged + CAST(:asked AS int), elapsed + ends::int) END) END AS wanted
    FROM (
        SELECT a.id, a.tenant_id, a.patient_id, a.doctor_id, a.modality, a.starts_at AS begun_at,
            {CHARGED} AS charged, {elapsed_units("a.starts_at", "least(clock(), a.ends_at)")} AS elapsed,
            true AS pays, '{Status.COMPLETED}' AS next, a.ended_at IS NOT NULL AS ended, CAST(:ends AS bool) AS ends
        FROM appointments a
        WHERE a.id = :id AND (a.closed_at IS NOT NULL AND a.status = '{Status.COMPLETED}'
            OR a.status = '{Status.CONFIRMED}' AND a.starts_at <= clock())
    ) AS judged
    """
)
_BY_SESSION: Final = text(
    "SELECT a.status, s.units_charged FROM sessions s JOIN appointments a ON a.session_id = s.id WHERE s.id = :id"
)


class LegacyBilling:
    """The three ways. Each raises `Refused(INVALID_TRANSITION)` for an appointment without a session that is neither
    confirmed and due, nor was completed by one of them."""

    def __init__(self, settlement: Settlement, metrics: Metrics) -> None:
        self._settlement = settlement
        self._metrics = metrics

    async def end_session(self, tx: Transaction, context: SessionContext[EndSession]) -> Bill:
        """Ends the session; or charges one unit in all, which ends the appointment."""
        return await self._bill(tx, context, ends=True)

    async def process_payment(self, tx: Transaction, context: SessionContext[ProcessPayment]) -> Bill:
        """Charges the units of the session that have run; or one unit in all, which ends the appointment."""
        return await self._bill(tx, context, ends=False)

    async def process_deduction(
        self, tx: Transaction, context: SessionContext[ProcessDeduction], asked: int, reason: DeductionReason
    ) -> Bill:
        """Charges the units of the session that have run, or ends it, however many units are `asked` for. Without a
        session, charges as many more as have run until somebody ends it, and for the end the one that has begun."""
        return await self._bill(tx, context, ends=reason is DeductionReason.MANUAL_END, asked=asked)

    async def _bill(
        self, tx: Transaction, context: SessionContext[Operation], *, ends: bool, asked: int | None = None
    ) -> Bill:
        appointment, session = context.appointment, context.session
        assert appointment is not None
        if session is not None:
            ending = Ending("end", context.caller.user_id, f"ended_by_{context.caller.role}") if ends else None
            return await self._settle(tx, appointment, session, ending)
        parameters = {"id": appointment.id, "asked": asked, "ends": ends or asked is None}
        closed = await close(tx, self._metrics, _BILL, parameters)
        if closed is None:
            early = " before it begins" if appointment.status == Status.CONFIRMED else ""
            detail = f"The appointment is {appointment.status} and cannot become {Status.COMPLETED}{early}."
            raise Refused(Reason.INVALID_TRANSITION, detail)
        return Bill(appointment.id, closed.status, closed.units_charged, closed.units_added, None)

    async def _settle(
        self, tx: Transaction, appointment: AppointmentFacts, session: SessionFacts, ending: Ending | None
    ) -> Bill:
        settled = await self._settlement.one(tx, session.id, ending)
        row = (await tx.execute(_BY_SESSION, {"id": session.id})).one()
        added = settled.units_added if settled else 0
        return Bill(appointment.id, Status(row.status), row.units_charged, added, str(session.ref))
