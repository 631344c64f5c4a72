"""The SQL that charges units: each one a transaction of its own, paid to the doctor once.

A unit is ten minutes. Whoever charges says in a CTE `billed` how many units there should be in all; what is
missing is taken from the patient's subscriptions, first in, first out, as long as they have any, and each
unit taken is paid to the doctor by the rate of the doctor's country, unless nobody is to be paid. The key of a
transaction names the unit, so none is ever charged twice.
"""

from datetime import timedelta
from typing import Final

UNIT: Final = timedelta(minutes=10)
UNIT_SQL: Final = f"interval '{UNIT.seconds} seconds'"

_REMAINING: Final = """
    CASE {modality} WHEN 'text' THEN s.text_sessions_remaining WHEN 'voice' THEN s.voice_calls_remaining
        WHEN 'video' THEN s.video_calls_remaining END"""


def allowance(patient: str, modality: str) -> str:
    """The SQL of how many units the patient has left now; both arguments are SQL expressions, whose columns must
    name their table."""
    return f"""(
        SELECT coalesce(sum({_REMAINING.format(modality=modality)}), 0)::int FROM subscriptions s
        WHERE s.patient_id = {patient} AND s.starts_at <= clock() AND clock() < s.ends_at
    )"""


def elapsed_units(begun_at: str, until: str) -> str:
    """The SQL of how many whole units lie between two moments, which are SQL expressions."""
    return f"greatest(0, floor(extract(epoch FROM {until} - {begun_at}) / {UNIT.seconds})::int)"


def _posting(kind: str, *, key: str, session: str, appointment: str, pays: str) -> str:
    return f"""
    -- Locked in an order that all share, and in a step of its own: what remains is read under the lock.
    stock AS MATERIALIZED (
        SELECT s.id, s.starts_at, b.id AS billed_id, {_REMAINING.format(modality="b.modality")} AS remaining
        FROM billed b JOIN subscriptions s
            ON s.patient_id = b.patient_id AND s.starts_at <= b.begun_at AND b.begun_at < s.ends_at
        WHERE b.wanted > b.charged
        ORDER BY s.id
        FOR NO KEY UPDATE OF s
    ),
    shelf AS (
        SELECT *, sum(remaining) OVER (PARTITION BY billed_id ORDER BY starts_at, id) - remaining AS before FROM stock
    ),
    unit AS MATERIALIZED (
        SELECT b.*, b.charged + n AS number, shelf.id AS subscription_id, rate.currency, rate.amount_minor
        FROM billed b
        CROSS JOIN LATERAL generate_series(1, b.wanted - b.charged) AS n
        JOIN shelf ON shelf.billed_id = b.id AND n > shelf.before AND n <= shelf.before + shelf.remaining
        JOIN users doctor ON doctor.id = b.doctor_id
        -- Without any rate the entry has no amount, which the table refuses: nobody works for nothing unnoticed.
        LEFT JOIN LATERAL (
            SELECT currency, amount_minor FROM payout_rates WHERE country IN (doctor.country, '*')
            ORDER BY country = '*' LIMIT 1
        ) AS rate ON true
    ),
    posted AS (
        INSERT INTO ledger_transactions (tenant_id, idempotency_key, kind, session_id, appointment_id, unit)
        SELECT tenant_id, {key}, '{kind}', {session}, {appointment}, number FROM unit ORDER BY id, number
        RETURNING id, coalesce(session_id, appointment_id) AS billed_id, unit
    ),
    entered AS (
        INSERT INTO ledger_entries (tenant_id, transaction_id, account, subscription_id, doctor_id, commodity, amount)
        SELECT u.tenant_id, posted.id, entry.*
        FROM posted JOIN unit u ON u.id = posted.billed_id AND u.number = posted.unit
        CROSS JOIN LATERAL (VALUES
            ('subscription', u.subscription_id, NULL::bigint, u.modality, -1::bigint),
            ('consumed', NULL, NULL, u.modality, 1),
            ('wallet', NULL, u.doctor_id, u.currency, u.amount_minor),
            ('payable', NULL, NULL, u.currency, -u.amount_minor)
        ) AS entry (account, subscription_id, doctor_id, commodity, amount)
        WHERE entry.account IN ('subscription', 'consumed') OR {pays}
    ),
    charged AS MATERIALIZED (
        SELECT id, count(*)::int AS added,
            coalesce(jsonb_agg(jsonb_build_object('amount_minor', amount_minor, 'currency', currency))
                FILTER (WHERE {pays}), '[]') AS payouts
        FROM unit GROUP BY id
    )"""


CHARGE_SESSIONS: Final = _posting(
    "charge", key="'session:' || id || ':unit:' || number", session="id", appointment="NULL", pays="true"
)
"""CTEs that charge the sessions of the CTE `billed` (id, tenant_id, patient_id, doctor_id, modality, begun_at,
`charged` units so far, `wanted` units in all). `charged` answers (id, added, payouts) for those that were."""

CHARGE_APPOINTMENTS: Final = _posting(
    "legacy", key="'appointment:' || id || ':legacy:' || number", session="NULL", appointment="id", pays="pays"
)
"""Likewise for appointments without a session, which the legacy paths bill; `pays` tells whether the doctor is
paid."""
