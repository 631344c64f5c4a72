"""Closing an appointment that has no session: its bill, its status and who hears of it, in one statement.

What is closed can never be converted. The keys of its units name the appointment, so whoever closes it how often,
none is charged twice.
"""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import TextClause, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from libs.domain.appointments.transitions import Status
from libs.domain.billing.counting import count
from libs.domain.billing.posting import CHARGE_APPOINTMENTS
from libs.domain.jobs import DispatchOutbox
from libs.domain.outbox.events import EventName, Lane, deliver
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.observability.context import carrier
from libs.observability.registry import Metrics

_log: Final = logger("billing")

CHARGED: Final = """(
    SELECT coalesce(max(t.unit), 0) FROM ledger_transactions t WHERE t.appointment_id = a.id AND t.kind = 'legacy'
)"""
"""How many units appointment `a` was charged so far, those that were refunded included."""


@dataclass(frozen=True, slots=True)
class Closed:
    """What became of an appointment: `units_charged` in all, `units_added` this time."""

    appointment_id: int
    status: Status
    units_charged: int
    units_added: int


def closing(billed: str) -> TextClause:
    """The statement that closes the appointments of the query `billed`, which has their rows locked: (id, tenant_id,
    patient_id, doctor_id, modality, begun_at, `charged` units so far, `wanted` units in all, whether it `pays` the
    doctor, the `next` status, whether it `ends` now, so that nothing is charged any more)."""
    return text(
        f"""
        WITH billed AS MATERIALIZED ({billed}),
        {CHARGE_APPOINTMENTS},
        outcome AS MATERIALIZED (
            SELECT b.*, coalesce(charged.added, 0) AS added, b.charged + coalesce(charged.added, 0) AS units,
                coalesce(charged.payouts, '[]') AS payouts
            FROM billed b LEFT JOIN charged ON charged.id = b.id
        ),
        closed AS (
            UPDATE appointments a SET status = o.next, closed_at = coalesce(a.closed_at, clock()),
                ended_at = CASE WHEN o.ends THEN clock() END, updated_at = clock()
            FROM outcome o WHERE a.id = o.id AND (a.status <> o.next OR o.ends AND a.ended_at IS NULL)
        ),
        event AS (
            INSERT INTO outbox_events (tenant_id, name, aggregate, payload, correlation_id, trace_context)
            SELECT o.tenant_id, happened.name, 'appointment:' || o.id,
                jsonb_build_object('appointment_id', o.id, 'patient_id', o.patient_id, 'doctor_id', o.doctor_id,
                    'starts_at', o.begun_at) || happened.facts,
                CAST(:carrier AS jsonb) ->> 'correlation_id', CAST(:carrier AS jsonb)
            FROM outcome o
            CROSS JOIN LATERAL (VALUES
                (1, '{EventName.APPOINTMENT_CANCELLED}', '{{}}'::jsonb, o.next = '{Status.CANCELLED}'),
                (2, '{EventName.LEGACY_CHARGED}', jsonb_build_object('modality', o.modality, 'status', o.next,
                    'units_charged', o.units, 'units_added', o.added, 'payouts', o.payouts), o.added > 0)
            ) AS happened (rank, name, facts, did)
            WHERE happened.did
            ORDER BY o.id, happened.rank
            RETURNING id, tenant_id, name, aggregate
        ),
        delivery AS ({deliver(f"'{Lane.NORMAL}'")})
        SELECT id, tenant_id, modality, next, units, added, payouts FROM outcome
        """
    ).bindparams(bindparam("carrier", type_=JSONB))


async def close(tx: Transaction, metrics: Metrics, statement: TextClause, parameters: dict[str, Any]) -> Closed | None:
    """Closes the one appointment that `statement` finds; None if it finds none."""
    row = (await tx.execute(statement, parameters | {"carrier": carrier()})).one_or_none()
    if row is None:
        return None
    tx.ring(DispatchOutbox())
    if row.added:
        tx.after_commit(lambda: _tell(metrics, row))
    return Closed(row.id, Status(row.next), row.units, row.added)


def _tell(metrics: Metrics, row: Any) -> None:
    count(metrics, row.modality, row.added, row.payouts)
    _log.info(
        "legacy_charged",
        tenant_id=row.tenant_id,
        appointment_id=row.id,
        status=row.next,
        units_added=row.added,
        units_charged=row.units,
    )
