"""The story of one appointment: all that happened to it and to its session, in order.

Gathered by one statement from the rows of every room. What happens in one transaction has one time, so what
comes of something else is told after it: each kind of event has its rank. Nothing that a person wrote is told,
neither messages nor reasons, and nobody's name.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from libs.domain.db import Database
from libs.guardrails import AppointmentRef, SessionRef

DECISIONS_TOLD: Final = 1_000
"""The latest ones; how many came before them is told as well."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; `facts` are ids, states and words of ours, fit for JSON. The time is UTC."""

    at: datetime
    kind: str
    facts: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        return {"at": _written(self.at), "kind": self.kind, **self.facts}


_FIND_SESSION: Final = "SELECT id AS session_id, appointment_id FROM sessions WHERE id = $1 AND kind = $2"
_FIND_APPOINTMENT: Final = "SELECT session_id, id AS appointment_id FROM appointments WHERE id = $1"


def _utc(moment: str) -> str:
    return f"""to_char(({moment}) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""


# What was told of it first names the time that it was booked for; it may have been moved since.
_BOOKED_FOR: Final = (
    "coalesce((SELECT (payload ->> 'starts_at')::timestamptz FROM told ORDER BY id LIMIT 1), starts_at)"
)

# A person may have given another reason, which is not told.
_OUR_WORDS: Final = "^(deadline|inactivity|allowance_spent|never_connected|(ended|declined)_by_[a-z]+)$"

# $1 appointment id, $2 session id; either may be null.
_STORY: Final = f"""
    WITH appointment AS (SELECT * FROM appointments WHERE id = $1),
    session AS (SELECT *, kind || '_session:' || id AS context FROM sessions WHERE id = $2),
    -- The first condition on names is in the words of the index; rows of their own tell of what the second leaves out.
    told AS (
        SELECT * FROM outbox_events
        WHERE aggregate = 'appointment:' || $1::bigint AND name NOT IN ('session_started', 'session_ended')
          AND name NOT IN ('session_charged', 'session_ending_soon', 'charges_refunded')
    ),
    -- Each with the side of the patient and that of the doctor; a legacy no-show has no second.
    posted AS (
        SELECT t.*, units.commodity AS modality, units.subscription_id, payout.doctor_id, payout.amount,
            payout.commodity AS currency
        FROM ledger_transactions t
        LEFT JOIN ledger_entries units ON units.transaction_id = t.id AND units.account = 'subscription'
        LEFT JOIN ledger_entries payout ON payout.transaction_id = t.id AND payout.account = 'wallet'
        WHERE t.session_id = $2 OR t.appointment_id = $1
    ),
    party AS (
        SELECT patient_id AS user_id FROM appointment UNION SELECT doctor_id FROM appointment
        UNION SELECT patient_id FROM session UNION SELECT doctor_id FROM session
    ),
    decision AS (
        SELECT *, row_number() OVER (ORDER BY id DESC) AS place
        FROM decisions WHERE (appointment_id = $1 OR session_id = $2) AND verdict <> 'allowed'
    ),
    event (at, rank, id, kind, facts) AS (
        SELECT created_at, 0, id, 'booked', jsonb_build_object(
            'appointment_id', id, 'patient_id', patient_id, 'doctor_id', doctor_id, 'modality', modality,
            'starts_at', {_utc(_BOOKED_FOR)})
        FROM appointment
        UNION ALL
        SELECT occurred_at, 1, id, name, jsonb_build_object(
            'starts_at', {_utc("(payload ->> 'starts_at')::timestamptz")}, 'correlation_id', correlation_id)
        FROM told
        UNION ALL
        SELECT starts_at, 2, id, 'due', '{{}}' FROM appointment
        WHERE starts_at <= clock() AND (status IN ('CONFIRMED', 'IN_PROGRESS', 'COMPLETED', 'NO_SHOW')
            OR conversion_attempts > 0 AND status <> 'RESCHEDULE_PROPOSED')
        UNION ALL
        SELECT started_at, 3, id, 'conversion_' || result, jsonb_build_object(
            'attempt', attempt, 'reason', reason, 'error_message', error_message, 'run_id', run_id)
        FROM conversion_attempts WHERE appointment_id = $1
        UNION ALL
        SELECT parked_at, 4, id, 'parked', jsonb_build_object('failures', conversion_failures)
        FROM appointment WHERE parked_at IS NOT NULL
        UNION ALL
        SELECT created_at, 5, id, 'session_created', jsonb_build_object(
            'session_context', context, 'source', source, 'modality', modality,
            'patient_id', patient_id, 'doctor_id', doctor_id)
        FROM session
        UNION ALL
        SELECT first.sent_at, 6, first.id, 'first_message',
            jsonb_build_object('user_id', p.user_id, 'role', p.role, 'seq', first.seq)
        FROM conversations c JOIN participants p ON p.conversation_id = c.id
        CROSS JOIN LATERAL (
            SELECT m.id, m.seq, m.sent_at FROM messages m
            WHERE m.conversation_id = c.id AND m.sender_id = p.user_id ORDER BY m.seq LIMIT 1
        ) AS first
        WHERE c.appointment_id = $1 OR c.session_id = $2
        UNION ALL
        SELECT rung_at, 7, id, 'rang', jsonb_build_object('user_id', rung_by) FROM session WHERE rung_at IS NOT NULL
        UNION ALL
        SELECT activated_at, 8, id, 'activated', '{{}}' FROM session WHERE activated_at IS NOT NULL
        UNION ALL
        SELECT connected_at, 9, id, 'connected', '{{}}' FROM session WHERE connected_at IS NOT NULL
        UNION ALL
        SELECT min(at), 10, 0, 'earlier_decisions', jsonb_build_object('number', count(*))
        FROM decision WHERE place > {DECISIONS_TOLD} HAVING count(*) > 0
        UNION ALL
        SELECT at, 10, id, verdict, jsonb_build_object(
            'operation', operation, 'identifier', identifier, 'reason', reason, 'flag', flag,
            'user_id', user_id, 'role', role, 'client', client, 'correlation_id', correlation_id)
        FROM decision WHERE place <= {DECISIONS_TOLD}
        UNION ALL
        SELECT created_at, 11, 2 * id,
            CASE kind WHEN 'charge' THEN 'unit_charged' WHEN 'legacy' THEN 'legacy_billed' ELSE 'unit_refunded' END,
            jsonb_build_object('transaction_id', id, 'reverses', reverses, 'unit', unit, 'modality', modality,
                'subscription_id', subscription_id)
        FROM posted
        UNION ALL
        SELECT created_at, 11, 2 * id + 1, CASE WHEN amount > 0 THEN 'paid_out' ELSE 'payout_taken_back' END,
            jsonb_build_object('transaction_id', id, 'unit', unit, 'amount_minor', abs(amount), 'currency', currency,
                'user_id', doctor_id, 'role', 'doctor')
        FROM posted WHERE doctor_id IS NOT NULL
        UNION ALL
        SELECT warned_at, 12, id, 'ending_soon', '{{}}' FROM session WHERE warned_at IS NOT NULL
        UNION ALL
        SELECT ended_at, 13, id, 'session_' || status, jsonb_build_object(
            'ended_by', ended_by, 'messages', ended_seq, 'units_charged', units_charged,
            'reason', CASE WHEN end_reason ~ '{_OUR_WORDS}' THEN end_reason END)
        FROM session WHERE ended_at IS NOT NULL
        UNION ALL
        SELECT n.created_at, 14, n.id, 'notified', jsonb_build_object('user_id', n.user_id, 'notification', n.kind)
        FROM notifications n
        WHERE n.user_id IN (SELECT user_id FROM party) AND (n.appointment_id = $1 OR n.session_id = $2)
    )
    SELECT at, kind, jsonb_strip_nulls(facts) AS facts FROM event ORDER BY at, rank, id
"""


async def story(database: Database, reference: SessionRef | AppointmentRef) -> list[Event] | None:
    """All events of an appointment, or of the session that is named, whichever of both there is; None when
    nothing has that name."""
    async with database.autocommit() as connection:
        if isinstance(reference, AppointmentRef):
            found = await connection.fetchrow(_FIND_APPOINTMENT, reference.id)
        else:
            found = await connection.fetchrow(_FIND_SESSION, reference.id, reference.kind.value)
        if found is None:
            return None
        rows = await connection.fetch(_STORY, found["appointment_id"], found["session_id"])
    return [Event(**row) for row in rows]


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
