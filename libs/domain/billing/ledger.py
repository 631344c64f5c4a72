"""The ledger as it is read, and how a charge is taken back.

Double entry, only ever added to: the entries of a transaction sum to zero per commodity, which is a modality's
units or a currency in its minor unit. A correction is a transaction of its own that reverses another.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import text

from libs.domain import audit
from libs.domain.billing.posting import allowance
from libs.domain.conversion.unblocking import unblock
from libs.domain.outbox.append import append
from libs.domain.outbox.events import EventName
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.guardrails import AppointmentRef, Principal, Reason, Refused, SessionContext, SessionRef
from libs.guardrails.operations import ViewBilling

_log: Final = logger("billing")


@dataclass(frozen=True, slots=True)
class Entry:
    """One side of a transaction. `account` is `subscription`, `consumed`, `wallet` or `payable`."""

    account: str
    subscription_id: int | None
    doctor_id: int | None
    commodity: str
    amount: int


@dataclass(frozen=True, slots=True)
class Line:
    """A transaction with its entries; `reverses` is the id of the one that it takes back."""

    id: int
    kind: str
    unit: int | None
    reverses: int | None
    created_at: datetime
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Wallet:
    """What a doctor has, in the minor unit of the currency."""

    currency: str
    balance_minor: int


_LINE: Final = """
    SELECT t.id, t.kind, t.unit, t.reverses, t.created_at, (
        SELECT jsonb_agg(jsonb_build_object('account', e.account, 'subscription_id', e.subscription_id,
            'doctor_id', e.doctor_id, 'commodity', e.commodity, 'amount', e.amount) ORDER BY e.id)
        FROM {entries} e WHERE e.transaction_id = t.id
    ) AS entries
    FROM {transactions} t"""
_LINES: Final = text(
    _LINE.format(entries="ledger_entries", transactions="ledger_transactions")
    + " WHERE t.session_id = :session_id ORDER BY t.id"
)

_PATIENT: Final = "CAST(:user_id AS bigint)"
_UNITS: Final = text(
    "SELECT " + ", ".join(f"{allowance(_PATIENT, repr(name))} AS {name}" for name in ("text", "voice", "video"))
)
_WALLETS: Final = text("SELECT currency, balance AS balance_minor FROM wallets WHERE doctor_id = :user_id ORDER BY 1")

# Whose charges are taken back: locked first, as whoever charges does.
_LOCK_SESSION: Final = text(
    """
    SELECT id, appointment_id, patient_id, doctor_id FROM sessions
    WHERE id = :id AND kind = :kind AND tenant_id = :tenant_id FOR NO KEY UPDATE
    """
)
_LOCK_APPOINTMENT: Final = text(
    """
    SELECT id, id AS appointment_id, patient_id, doctor_id FROM appointments
    WHERE id = :id AND tenant_id = :tenant_id FOR NO KEY UPDATE
    """
)
_REFUND: Final = """
    WITH charge AS MATERIALIZED (
        SELECT t.* FROM ledger_transactions t
        WHERE t.{owner} = :id AND t.kind = '{kind}' AND (CAST(:unit AS int) IS NULL OR t.unit = :unit)
          AND NOT EXISTS (SELECT FROM ledger_transactions r WHERE r.reverses = t.id)
    ),
    locked AS MATERIALIZED (
        SELECT s.id FROM subscriptions s
        WHERE s.id IN (SELECT e.subscription_id FROM ledger_entries e JOIN charge ON charge.id = e.transaction_id)
        ORDER BY s.id FOR NO KEY UPDATE
    ),
    posted AS (
        INSERT INTO ledger_transactions (tenant_id, idempotency_key, kind, session_id, appointment_id, unit, reverses)
        SELECT tenant_id, 'refund:' || id, 'refund', session_id, appointment_id, unit, id FROM charge ORDER BY id
        RETURNING id, kind, unit, reverses, created_at
    ),
    entered AS (
        INSERT INTO ledger_entries (tenant_id, transaction_id, account, subscription_id, doctor_id, commodity, amount)
        SELECT e.tenant_id, posted.id, e.account, e.subscription_id, e.doctor_id, e.commodity, -e.amount
        FROM posted JOIN ledger_entries e ON e.transaction_id = posted.reverses
        WHERE (SELECT count(*) FROM locked) >= 0 -- always; but what nobody reads is not locked
        RETURNING id, transaction_id, account, subscription_id, doctor_id, commodity, amount
    )
    {line} ORDER BY t.id
"""
_REFUNDED: Final = _LINE.format(entries="entered", transactions="posted")
_REFUND_SESSION: Final = text(_REFUND.format(owner="session_id", kind="charge", line=_REFUNDED))
_REFUND_APPOINTMENT: Final = text(_REFUND.format(owner="appointment_id", kind="legacy", line=_REFUNDED))


async def lines(tx: Transaction, context: SessionContext[ViewBilling]) -> list[Line]:
    """What was charged for the session and taken back, oldest first."""
    assert context.session is not None
    return [_line(row) for row in await tx.execute(_LINES, {"session_id": context.session.id})]


async def units_left(tx: Transaction, patient_id: int) -> dict[str, int]:
    """What the patient has left now, in units per modality."""
    return dict((await tx.execute(_UNITS, {"user_id": patient_id})).one()._mapping)


async def wallets(tx: Transaction, doctor_id: int) -> list[Wallet]:
    """What the doctor has earned, per currency; currencies are never added up."""
    return [Wallet(**row._mapping) for row in await tx.execute(_WALLETS, {"user_id": doctor_id})]


async def refund(
    tx: Transaction,
    tenant_id: int,
    actor: Principal | None,
    subject: SessionRef | AppointmentRef,
    *,
    unit: int | None = None,
    reason: str | None = None,
) -> list[Line]:
    """Takes back what was charged for a session, or for an appointment that was billed the legacy way: one `unit`
    of it, or all that was not taken back before. `actor` is None at the command line.

    The patient gets the units back into the subscriptions they came from, and the doctor's wallet gives back
    what it got. Raises `Refused`: `SESSION_NOT_FOUND`, `APPOINTMENT_NOT_FOUND`, or `NOTHING_TO_REFUND`.
    """
    parameters: dict[str, Any] = {"id": subject.id, "tenant_id": tenant_id}
    if isinstance(subject, SessionRef):
        lock, post, missing = _LOCK_SESSION, _REFUND_SESSION, Reason.SESSION_NOT_FOUND
        parameters["kind"] = subject.kind.value
    else:
        lock, post, missing = _LOCK_APPOINTMENT, _REFUND_APPOINTMENT, Reason.APPOINTMENT_NOT_FOUND
    owner = (await tx.execute(lock, parameters)).one_or_none()
    if owner is None:
        raise Refused(missing)
    # The patient will have units again. Appointments are locked before subscriptions, as by whoever bills them.
    await unblock(tx, [owner.patient_id])
    refunded = [_line(row) for row in await tx.execute(post, {"id": subject.id, "unit": unit})]
    if not refunded:
        raise Refused(Reason.NOTHING_TO_REFUND)
    transactions = [line.id for line in refunded]
    context = str(subject) if isinstance(subject, SessionRef) else None
    session_id = subject.id if isinstance(subject, SessionRef) else None
    about = context or f"appointment:{subject.id}"
    await audit.write(
        tx,
        tenant_id,
        actor.user_id if actor else None,
        "charges_refunded",
        about,
        {"transactions": transactions, "units": [line.unit for line in refunded], "reason": reason},
    )
    await append(
        tx,
        EventName.CHARGES_REFUNDED,
        tenant_id=tenant_id,
        aggregate=f"appointment:{owner.appointment_id}" if owner.appointment_id else f"session:{owner.id}",
        payload={
            "appointment_id": owner.appointment_id,
            "session_id": session_id,
            "session_context": context,
            "patient_id": owner.patient_id,
            "doctor_id": owner.doctor_id,
            "transactions": transactions,
            "units_refunded": len(refunded),
        },
    )
    tx.after_commit(
        lambda: _log.info(
            "charges_refunded",
            tenant_id=tenant_id,
            session_id=session_id,
            appointment_id=owner.appointment_id,
            units=len(refunded),
        )
    )
    return refunded


def _line(row: Any) -> Line:
    entries = tuple(Entry(**entry) for entry in row.entries)
    return Line(row.id, row.kind, row.unit, row.reverses, row.created_at, entries)
