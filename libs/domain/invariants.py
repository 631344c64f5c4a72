"""What must always be true of the stored rows, each as the SQL that finds what violates it.

Constraints and triggers keep most of this from ever becoming false. The audit believes none of them: it reads the
rows, so it also finds what a restored backup, a disabled trigger or a hand at the console has left behind.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg

from libs.domain.appointments.transitions import HOLDS_SLOT
from libs.domain.db import Database
from libs.domain.tables import BEGUN_AT, LIVE

EXAMPLES: Final = 5
"""Of how many violating rows the audit tells the ids, at most."""

LOCK_KEY: Final = 0x5E55A0D1
"""Held by the worker that audits."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """Something that is always true, and the statement that answers the `id` of each `subject` it is not true of."""

    name: str
    sentence: str
    subject: str
    sql: str


@dataclass(frozen=True, slots=True)
class Finding:
    """How many rows violate an invariant, and the first of them, such as `session:7`."""

    invariant: Invariant
    violations: int
    examples: list[str]


@dataclass(frozen=True, slots=True)
class Audit:
    """What one look at all invariants found; the time is UTC."""

    checked_at: datetime
    findings: list[Finding]

    @property
    def violated(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.violations]

    def fields(self) -> dict[str, Any]:
        """The answer of `sessiongate audit --json`."""
        return {
            "ok": not self.violated,
            "checked_at": self.checked_at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "invariants": [
                {"name": each.invariant.name, "violations": each.violations, "examples": each.examples}
                for each in self.findings
            ],
        }


_UNIT: Final = "t.kind IN ('charge', 'legacy')"

INVARIANTS: Final = (
    Invariant(
        "one_session_per_appointment",
        "No appointment has two sessions.",
        "appointment",
        """
        SELECT appointment_id AS id FROM sessions WHERE appointment_id IS NOT NULL
        GROUP BY appointment_id HAVING count(*) > 1
        """,
    ),
    Invariant(
        "appointment_in_progress_has_session",
        "Every appointment in progress names its session, which is live.",
        "appointment",
        f"""
        SELECT a.id FROM appointments a WHERE a.status = 'IN_PROGRESS' AND NOT EXISTS (
            SELECT FROM sessions WHERE id = a.session_id AND appointment_id = a.id AND {LIVE}
        )
        """,
    ),
    Invariant(
        "live_session_has_appointment_in_progress",
        "No live session belongs to an appointment that is over, or that does not name it.",
        "session",
        f"""
        SELECT s.id FROM (SELECT * FROM sessions WHERE {LIVE}) s JOIN appointments a ON a.id = s.appointment_id
        WHERE (a.status, a.session_id) IS DISTINCT FROM ('IN_PROGRESS', s.id)
        """,
    ),
    Invariant(
        "patient_in_one_live_session",
        "No patient is in two live sessions.",
        "patient",
        f"SELECT patient_id AS id FROM sessions WHERE {LIVE} GROUP BY patient_id HAVING count(*) > 1",
    ),
    Invariant(
        "doctor_in_one_live_session",
        "No doctor is in two live sessions.",
        "doctor",
        f"SELECT doctor_id AS id FROM sessions WHERE {LIVE} GROUP BY doctor_id HAVING count(*) > 1",
    ),
    Invariant(
        "doctor_not_double_booked",
        "No two appointments take the same time of a doctor.",
        "appointment",
        """
        SELECT DISTINCT appointment_id AS id FROM (
            SELECT appointment_id, lower(during) < max(upper(during)) OVER (
                PARTITION BY doctor_id ORDER BY lower(during), id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) AS again
            FROM busy_intervals WHERE active AND NOT isempty(during)
        ) AS booked WHERE again
        """,
    ),
    Invariant(
        "appointment_holds_its_slot",
        "Every appointment that is asked for, agreed or going on takes its doctor's time.",
        "appointment",
        f"""
        SELECT id FROM appointments a
        WHERE status IN ({", ".join(f"'{status}'" for status in sorted(HOLDS_SLOT))}) AND ends_at > starts_at
            AND NOT EXISTS (SELECT FROM busy_intervals WHERE appointment_id = a.id AND active)
        """,
    ),
    Invariant(
        "messages_numbered",
        "The messages of a conversation are numbered from 1 to its last number, without a gap.",
        "conversation",
        """
        SELECT c.id FROM conversations c LEFT JOIN (
            SELECT conversation_id, count(*) AS stored, count(DISTINCT seq) AS numbers, min(seq) AS first,
                max(seq) AS last
            FROM messages GROUP BY conversation_id
        ) AS m ON m.conversation_id = c.id
        WHERE c.last_seq <> coalesce(m.last, 0) OR m.first <> 1 OR m.stored <> m.last OR m.numbers <> m.last
        """,
    ),
    Invariant(
        "ended_session_has_last_number",
        "Every session that has ended tells the number of its last message.",
        "session",
        f"SELECT id FROM sessions WHERE NOT ({LIVE}) AND ended_seq IS NULL",
    ),
    Invariant(
        "no_message_after_the_end",
        "No message has a number after its session's end.",
        "message",
        """
        SELECT m.id FROM sessions s JOIN conversations c ON c.session_id = s.id
        JOIN messages m ON m.conversation_id = c.id AND m.seq > s.ended_seq
        """,
    ),
    Invariant(
        "ledger_sums_to_zero",
        "Every ledger transaction has entries, which sum to zero in each commodity.",
        "ledger_transaction",
        """
        SELECT DISTINCT id FROM (
            SELECT t.id FROM ledger_transactions t LEFT JOIN ledger_entries e ON e.transaction_id = t.id
            GROUP BY t.id, e.commodity HAVING coalesce(sum(e.amount), 1) <> 0
        ) AS unbalanced
        """,
    ),
    Invariant(
        "subscription_balances",
        "What remains of a subscription is what was granted, and the sum of its entries.",
        "subscription",
        """
        SELECT s.id FROM subscriptions s LEFT JOIN (
            SELECT subscription_id, sum(amount) FILTER (WHERE commodity = 'text') AS text,
                sum(amount) FILTER (WHERE commodity = 'voice') AS voice,
                sum(amount) FILTER (WHERE commodity = 'video') AS video
            FROM ledger_entries WHERE account = 'subscription' GROUP BY subscription_id
        ) AS e ON e.subscription_id = s.id
        WHERE text_sessions_remaining <> text_sessions_granted + coalesce(e.text, 0)
            OR voice_calls_remaining <> voice_calls_granted + coalesce(e.voice, 0)
            OR video_calls_remaining <> video_calls_granted + coalesce(e.video, 0)
        """,
    ),
    Invariant(
        "wallet_balances",
        "The balance of a doctor's wallet is the sum of its entries.",
        "doctor",
        """
        SELECT coalesce(w.doctor_id, e.doctor_id) AS id FROM wallets w FULL JOIN (
            SELECT doctor_id, commodity, sum(amount) AS balance
            FROM ledger_entries WHERE account = 'wallet' GROUP BY doctor_id, commodity
        ) AS e ON e.doctor_id = w.doctor_id AND e.commodity = w.currency
        WHERE coalesce(w.balance, 0) <> coalesce(e.balance, 0)
        """,
    ),
    Invariant(
        "consumed_balances",
        "What a clinic's patients consumed is what was taken from their subscriptions.",
        "tenant",
        """
        SELECT DISTINCT tenant_id AS id FROM (
            SELECT tenant_id FROM ledger_entries WHERE account IN ('subscription', 'consumed')
            GROUP BY tenant_id, commodity HAVING sum(amount) <> 0
        ) AS unbalanced
        """,
    ),
    Invariant(
        "charged_session_has_begun",
        "No session is charged whose units never began to run.",
        "session",
        f"""
        SELECT id FROM sessions WHERE {BEGUN_AT} IS NULL AND (
            units_charged > 0 OR id IN (SELECT session_id FROM ledger_transactions WHERE kind = 'charge')
        )
        """,
    ),
    Invariant(
        "units_counted",
        "A session counts as many units as the ledger charged for it.",
        "session",
        """
        SELECT s.id FROM sessions s LEFT JOIN (
            SELECT session_id, count(*) AS charged FROM ledger_transactions WHERE kind = 'charge' GROUP BY session_id
        ) AS t ON t.session_id = s.id
        WHERE s.units_charged <> coalesce(t.charged, 0)
        """,
    ),
    Invariant(
        "units_within_allowance",
        "No session is charged more units than its patient had left.",
        "session",
        "SELECT id FROM sessions WHERE units_charged > coalesce(allowance_units, 0)",
    ),
    Invariant(
        "units_numbered",
        "The units charged for a session or an appointment are numbered from 1, without a gap.",
        "ledger_transaction",
        f"""
        SELECT min(t.id) AS id FROM ledger_transactions t WHERE {_UNIT}
        GROUP BY t.session_id, t.appointment_id HAVING min(t.unit) <> 1 OR max(t.unit) <> count(DISTINCT t.unit)
        """,
    ),
    Invariant(
        "no_unit_charged_twice",
        "No unit of a session or an appointment is charged twice.",
        "ledger_transaction",
        f"""
        SELECT max(t.id) AS id FROM ledger_transactions t WHERE {_UNIT}
        GROUP BY t.session_id, t.appointment_id, t.unit HAVING count(*) > 1
        """,
    ),
    Invariant(
        "legacy_bill_has_no_session",
        "No appointment is billed by a legacy path that has a session or can still get one.",
        "appointment",
        """
        SELECT DISTINCT a.id FROM ledger_transactions t JOIN appointments a ON a.id = t.appointment_id
        WHERE t.kind = 'legacy' AND (a.status NOT IN ('COMPLETED', 'NO_SHOW')
            OR EXISTS (SELECT FROM sessions s WHERE s.appointment_id = a.id))
        """,
    ),
    Invariant(
        "unit_taken_once",
        "Each charged unit is taken once, from a subscription of the patient.",
        "ledger_transaction",
        f"""
        SELECT t.id FROM ledger_transactions t
        LEFT JOIN sessions s ON s.id = t.session_id LEFT JOIN appointments a ON a.id = t.appointment_id
        LEFT JOIN ledger_entries e ON e.transaction_id = t.id AND e.account = 'subscription'
        LEFT JOIN subscriptions u ON u.id = e.subscription_id
        WHERE {_UNIT} GROUP BY t.id
        HAVING sum(e.amount) IS DISTINCT FROM -1 OR count(e.id) <> 1
            OR bool_or(u.patient_id <> coalesce(s.patient_id, a.patient_id)
                OR e.commodity <> coalesce(s.modality, a.modality))
        """,
    ),
    Invariant(
        "unit_paid_once",
        "Each charged unit is paid once and at one rate, to the doctor; a legacy no-show need not be paid.",
        "ledger_transaction",
        f"""
        SELECT t.id FROM ledger_transactions t
        LEFT JOIN sessions s ON s.id = t.session_id LEFT JOIN appointments a ON a.id = t.appointment_id
        LEFT JOIN ledger_entries e ON e.transaction_id = t.id AND e.account = 'wallet'
        WHERE {_UNIT} GROUP BY t.id
        HAVING count(e.id) <> 1 AND NOT (count(e.id) = 0 AND t.kind = 'legacy' AND bool_and(a.status = 'NO_SHOW'))
            OR bool_or(e.amount < 0 OR e.doctor_id <> coalesce(s.doctor_id, a.doctor_id))
        """,
    ),
    Invariant(
        "refund_reverses_one_charge",
        "A refund has the entries of one charge with the opposite sign, and no charge is refunded twice.",
        "ledger_transaction",
        """
        SELECT r.id FROM ledger_transactions r JOIN ledger_transactions t ON t.id = r.reverses
        WHERE t.kind = 'refund' OR (r.session_id, r.appointment_id) IS DISTINCT FROM (t.session_id, t.appointment_id)
            OR EXISTS (SELECT FROM ledger_transactions o WHERE o.reverses = r.reverses AND o.id < r.id)
            OR EXISTS (
                SELECT account, subscription_id, doctor_id, commodity FROM ledger_entries
                WHERE transaction_id IN (r.id, t.id) GROUP BY 1, 2, 3, 4 HAVING sum(amount) <> 0
            )
        """,
    ),
    Invariant(
        "delivery_ends_once",
        "No delivery is both dispatched and given up.",
        "delivery",
        "SELECT id FROM outbox_deliveries WHERE dispatched_at IS NOT NULL AND dead_at IS NOT NULL",
    ),
)
"""Everything the audit proves, in the order in which it is told."""


@asynccontextmanager
async def snapshot(database: Database, patience: float) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """A connection on which all statements see the same moment, none for longer than `patience` seconds."""
    async with (
        database.alone("audit", patience=patience) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        yield connection


async def audit(
    connection: "asyncpg.Connection[Any]", show: Callable[[int, int], None] = lambda done, total: None
) -> Audit:
    """Checks every invariant; `show` is told how many are done, of how many."""
    checked_at = await connection.fetchval("SELECT clock()")
    findings = []
    for number, invariant in enumerate(INVARIANTS):
        show(number, len(INVARIANTS))
        findings.append(await _check(connection, invariant))
    return Audit(checked_at, findings)


async def violations(connection: "asyncpg.Connection[Any]") -> dict[str, list[str]]:
    """The first examples of what violates an invariant, by its name, where anything does."""
    return {finding.invariant.name: finding.examples for finding in (await audit(connection)).violated}


async def _check(connection: "asyncpg.Connection[Any]", invariant: Invariant) -> Finding:
    row = await connection.fetchrow(
        f"""
        WITH violation AS MATERIALIZED ({invariant.sql})
        SELECT (SELECT count(*) FROM violation) AS violations,
            ARRAY(SELECT id FROM violation ORDER BY id LIMIT {EXAMPLES}) AS examples
        """
    )
    assert row is not None
    return Finding(invariant, row["violations"], [f"{invariant.subject}:{id_}" for id_ in row["examples"]])
