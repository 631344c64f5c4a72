"""The SQL that turns due appointments into sessions: one set-based statement per batch.

It reads top to bottom as the story goes: select what is due, lock what nobody else holds, judge each
row by the rules of a new session, insert the sessions that are possible, and write what follows from
the outcome. Everything happens in one transaction or not at all.

Two details carry the guarantee. The rows are judged as they are *after* the lock, so whatever
happened since the selection is seen and skipped. And `ON CONFLICT DO NOTHING` without a target covers
all three unique indexes of `sessions` (appointment, live patient, live doctor): a row that the
database did not return is a conflict, whatever the judge believed.
"""

from typing import Final

from libs.domain.conversion.causes import CAUSES, MAX_FAILURES, SkipReason
from libs.domain.outbox.events import LANES, EventName, deliver
from libs.domain.tables import BACKLOG, DUE, LIVE

LOCK_KEY: Final = 0x5E5510
"""Advisory lock of the one converter; parallel ones would only deadlock each other."""

DUE_AT: Final = "greatest(starts_at, next_attempt_at)"
"""When an appointment is due; `greatest` ignores a null."""

SELECT_DUE: Final = f"""
    SELECT id FROM appointments
    WHERE {DUE} AND {DUE_AT} <= clock() AND id <> ALL ($3::bigint[])
    ORDER BY {DUE_AT}, id
    LIMIT $2
"""

# Recovery looks at starts_at alone: it neither waits for the next attempt nor passes over the parked.
SELECT_RECOVERABLE: Final = f"""
    SELECT id FROM (
        SELECT id, starts_at FROM appointments WHERE {DUE}
        UNION ALL
        SELECT id, starts_at FROM appointments
        WHERE parked_at IS NOT NULL AND status = 'CONFIRMED' AND session_id IS NULL AND kind = 'consultation'
    ) AS recoverable
    WHERE starts_at < clock() AND starts_at >= coalesce(clock() - $3::interval, '-infinity')
      AND id <> ALL ($4::bigint[])
    ORDER BY starts_at, id
    LIMIT $2
"""

# Only what is not due: the rest is for the worker's own conversion. Nor may it take a party away from an appointment
# that comes first.
SELECT_EARLY: Final = f"""
    SELECT id FROM (
        SELECT id, tenant_id, modality, starts_at, starts_at = least(
            min(starts_at) OVER (PARTITION BY patient_id), min(starts_at) OVER (PARTITION BY doctor_id)
        ) AS comes_first
        FROM appointments
        WHERE {DUE} AND starts_at <= clock() + interval '5 minutes' AND ends_at > clock()
    ) AS upcoming
    WHERE comes_first AND modality = 'text' AND starts_at > clock()
      AND tenant_id <> ALL ($3::bigint[]) AND id <> ALL ($4::bigint[])
    ORDER BY starts_at, id
    LIMIT $2
"""

SELECT_ONE: Final = "SELECT $2::bigint AS id"

_JUDGE: Final = f"""
    locked AS MATERIALIZED (
        SELECT a.* FROM appointments a
        WHERE a.id IN (SELECT id FROM selected)
        {{lock}}
    ),
    judged AS MATERIALIZED (
        SELECT a.*,
            CASE
                WHEN a.session_id IS NOT NULL THEN '{SkipReason.SESSION_ID_ALREADY_SET}'
                WHEN a.status <> 'CONFIRMED' THEN '{SkipReason.STATUS_CHANGED}'
            END AS skip,
            CASE
                WHEN a.modality NOT IN ('text', 'voice', 'video') THEN 'unknown_modality'
                WHEN a.ends_at <= a.starts_at THEN 'ends_before_start'
                WHEN patient.id IS NULL THEN 'patient_inactive'
                WHEN doctor.id IS NULL THEN 'doctor_inactive'
                WHEN balance.subscriptions = 0 THEN 'no_subscription'
                WHEN balance.units = 0 THEN 'no_units'
            END AS cause
        FROM locked a
        LEFT JOIN users patient ON patient.id = a.patient_id AND patient.role = 'patient' AND patient.active
        LEFT JOIN users doctor ON doctor.id = a.doctor_id AND doctor.role = 'doctor' AND doctor.active
        CROSS JOIN LATERAL (
            SELECT count(*) AS subscriptions,
                coalesce(sum(CASE a.modality
                    WHEN 'text' THEN s.text_sessions_remaining
                    WHEN 'voice' THEN s.voice_calls_remaining
                    WHEN 'video' THEN s.video_calls_remaining
                END), 0) AS units
            FROM subscriptions s
            WHERE s.patient_id = a.patient_id AND s.starts_at <= clock() AND clock() < s.ends_at
        ) AS balance
    )"""

_NEW_SPAN: Final = "substr(replace(gen_random_uuid()::text, '-', ''), 17, 16)"

# After so many failures in a row, the wait before the next attempt.
_BACKOFF: Final = "least(interval '1 hour', interval '1 minute' * power(2, least({}, 7) - 1))"

_WRITE: Final = f"""
    created AS (
        INSERT INTO sessions (tenant_id, kind, modality, source, appointment_id, patient_id, doctor_id,
                              status, expires_at)
        SELECT tenant_id, CASE modality WHEN 'text' THEN 'text' ELSE 'call' END, modality, 'APPOINTMENT', id,
               patient_id, doctor_id, CASE modality WHEN 'text' THEN 'waiting' ELSE 'connecting' END,
               greatest(ends_at, clock() + (ends_at - starts_at))
        FROM judged WHERE skip IS NULL AND cause IS NULL
        ORDER BY starts_at, id
        ON CONFLICT DO NOTHING
        RETURNING id, appointment_id, kind
    ),
    outcome AS MATERIALIZED (
        SELECT j.id, j.tenant_id, j.patient_id, j.doctor_id, j.modality, j.carrier,
            j.conversion_attempts + 1 AS attempt, j.ends_at,
            extract(epoch FROM clock() - greatest(j.starts_at, j.next_attempt_at) + clock_timestamp() - now())::float8
                AS delay,
            c.id AS session_id, c.kind || '_session:' || c.id AS session_context,
            CASE WHEN left_alone.skip IS NOT NULL THEN 'skipped' WHEN c.id IS NULL THEN 'failed' ELSE 'created'
                END AS result,
            left_alone.skip,
            CASE WHEN left_alone.skip IS NULL AND c.id IS NULL THEN coalesce(j.cause, 'party_busy') END AS cause,
            CASE WHEN c.id IS NOT NULL AND j.carrier ? 'traceparent' THEN {_NEW_SPAN} END AS span_id
        FROM judged j LEFT JOIN created c ON c.appointment_id = j.id
        CROSS JOIN LATERAL (
            SELECT coalesce(j.skip, CASE WHEN c.id IS NULL AND j.starts_at > clock()
                THEN '{SkipReason.NOT_DUE_YET}' END) AS skip
        ) AS left_alone
    ),
    started AS (
        UPDATE appointments a
        SET session_id = o.session_id, status = 'IN_PROGRESS', conversion_attempts = o.attempt,
            next_attempt_at = NULL, parked_at = NULL, updated_at = clock()
        FROM outcome o WHERE a.id = o.id AND o.result = 'created'
    ),
    backed_off AS (
        UPDATE appointments a
        SET conversion_attempts = o.attempt, updated_at = clock(), (conversion_failures, next_attempt_at, parked_at) = (
            -- A busy party is nobody's fault: until the slot is over, try again soon and do not count it.
            SELECT failures,
                clock() + CASE WHEN counts
                    THEN {_BACKOFF.format("failures")}
                    ELSE interval '10 seconds' END,
                CASE WHEN counts AND failures >= {MAX_FAILURES} THEN clock() END
            FROM (SELECT NOT (o.cause = 'party_busy' AND o.ends_at > clock()) AS counts) AS blame,
                LATERAL (SELECT a.conversion_failures + counts::int AS failures) AS tally
        )
        FROM outcome o WHERE a.id = o.id AND o.result = 'failed'
        RETURNING a.id, a.parked_at IS NOT NULL AS parked
    ),
    conversation AS (
        -- One that began by appointment id, before the session, is adopted.
        INSERT INTO conversations (tenant_id, appointment_id, session_id)
        SELECT tenant_id, id, session_id FROM outcome WHERE result = 'created'
        ON CONFLICT (appointment_id) DO UPDATE SET session_id = excluded.session_id
        RETURNING id, appointment_id
    ),
    joined AS (
        INSERT INTO participants (tenant_id, conversation_id, user_id, role)
        SELECT o.tenant_id, c.id, party.user_id, party.role
        FROM conversation c JOIN outcome o ON o.id = c.appointment_id
        CROSS JOIN LATERAL (VALUES (o.patient_id, 'patient'), (o.doctor_id, 'doctor')) AS party (user_id, role)
        ON CONFLICT DO NOTHING
    ),
    attempted AS (
        INSERT INTO conversion_attempts (tenant_id, appointment_id, run_id, attempt, modality, result, reason,
                                         error_message, session_id, duration_ms)
        SELECT o.tenant_id, o.id, $1::uuid, o.attempt, o.modality, o.result, coalesce(o.skip, known.reason),
               known.message, o.session_id, extract(epoch FROM clock_timestamp() - now()) * 1000
        FROM outcome o LEFT JOIN known ON known.cause = o.cause
    ),
    event AS (
        INSERT INTO outbox_events (tenant_id, name, aggregate, payload, correlation_id, trace_context)
        SELECT tenant_id, '{EventName.SESSION_STARTED}', 'appointment:' || id,
               jsonb_build_object('appointment_id', id, 'session_id', session_id, 'modality', modality,
                                  'session_context', session_context,
                                  'patient_id', patient_id, 'doctor_id', doctor_id),
               carrier ->> 'correlation_id',
               CASE WHEN span_id IS NULL THEN carrier ELSE carrier || jsonb_build_object(
                   'traceparent', overlay(carrier ->> 'traceparent' PLACING span_id FROM 37)) END
        FROM outcome WHERE result = 'created'
        RETURNING id, tenant_id, name, aggregate
    ),
    delivery AS ({deliver(f"'{LANES[EventName.SESSION_STARTED]}'")})
    SELECT o.id AS appointment_id, o.tenant_id, o.modality, o.result, o.attempt, o.session_id, o.span_id, o.carrier,
           o.delay, coalesce(o.skip, known.reason) AS reason, known.message AS error_message,
           coalesce(b.parked, false) AS parked
    FROM outcome o LEFT JOIN known ON known.cause = o.cause LEFT JOIN backed_off b ON b.id = o.id
"""

_KNOWN: Final = "known (cause, reason, message) AS (VALUES {})".format(
    ", ".join(f"('{name}', '{cause.reason}', '{cause.message}')" for name, cause in CAUSES.items())
)


def _converting(select: str, *, lock: str = "FOR UPDATE SKIP LOCKED") -> str:
    return f"WITH selected AS MATERIALIZED ({select}), {_KNOWN}, {_JUDGE.format(lock=lock)}, {_WRITE}"


CONVERT_DUE: Final = _converting(SELECT_DUE)
"""$1 run id, $2 limit, $3 ids to leave alone."""

CONVERT_RECOVERABLE: Final = _converting(SELECT_RECOVERABLE)
"""$1 run id, $2 limit, $3 lookback or null for all, $4 ids already attempted in this run."""

CONVERT_EARLY: Final = _converting(SELECT_EARLY)
"""$1 run id, $2 limit, $3 ids of tenants to leave alone, $4 ids already attempted in this run. What cannot be
converted yet is skipped, and none the worse for it when it is due."""

CONVERT_ONE: Final = _converting(SELECT_ONE, lock="FOR UPDATE")
"""$1 run id, $2 appointment id, whose row the transaction holds already."""


def lockable(select: str) -> str:
    """The rows that a selection names and nobody else holds, locked."""
    return f"SELECT id, $1::uuid FROM appointments WHERE id IN ({select}) ORDER BY id FOR UPDATE SKIP LOCKED"


_RECORD_FAILURE: Final = """
    WITH culprit AS ({culprit}), attempted AS (
        INSERT INTO conversion_attempts (tenant_id, appointment_id, run_id, attempt, modality, result, reason,
                                         error_message, duration_ms)
        SELECT tenant_id, id, $1::uuid, conversion_attempts, modality, 'failed', $3::text, $4::text,
               extract(epoch FROM clock_timestamp() - now()) * 1000
        FROM culprit
    )
    SELECT id AS appointment_id, tenant_id, modality, 'failed' AS result, conversion_attempts AS attempt,
           NULL::bigint AS session_id, NULL::text AS span_id, carrier, $3::text AS reason, $4::text AS error_message,
           parked_at IS NOT NULL AS parked
    FROM culprit
"""

RECORD_CULPRIT: Final = _RECORD_FAILURE.format(
    culprit=f"""
        UPDATE appointments
        SET conversion_attempts = conversion_attempts + 1, conversion_failures = conversion_failures + 1,
            next_attempt_at = clock() + {_BACKOFF.format("conversion_failures + 1")},
            parked_at = CASE WHEN conversion_failures + 1 >= {MAX_FAILURES} THEN clock() END,
            updated_at = clock()
        WHERE id = $2
        RETURNING id, tenant_id, modality, conversion_attempts, carrier, parked_at
    """
)
"""$1 run id, $2 appointment id, $3 reason, $4 scrubbed error text: for the row on which the database
raised an error."""

RECORD_UNTOUCHABLE: Final = _RECORD_FAILURE.format(
    culprit="""
        SELECT id, tenant_id, modality, conversion_attempts + 1 AS conversion_attempts, carrier, parked_at
        FROM appointments WHERE id = $2
    """
)
"""Likewise, for a row that the database does not let anyone change."""

FORESEE: Final = f"""
    WITH selected AS MATERIALIZED ({SELECT_RECOVERABLE}), {_KNOWN}, {_JUDGE.format(lock="")},
    foreseen AS (
        SELECT j.*, coalesce(j.cause, CASE
            WHEN EXISTS (SELECT FROM sessions s WHERE {LIVE} AND j.patient_id = s.patient_id)
              OR EXISTS (SELECT FROM sessions s WHERE {LIVE} AND j.doctor_id = s.doctor_id)
              OR row_number() OVER (PARTITION BY j.patient_id, j.cause ORDER BY j.starts_at, j.id) > 1
              OR row_number() OVER (PARTITION BY j.doctor_id, j.cause ORDER BY j.starts_at, j.id) > 1
            THEN 'party_busy' END) AS verdict
        FROM judged j WHERE skip IS NULL
    )
    SELECT $1::uuid AS run_id, f.id AS appointment_id, f.tenant_id, f.modality,
           CASE WHEN verdict IS NULL THEN 'created' ELSE 'failed' END AS result,
           f.conversion_attempts + 1 AS attempt, NULL::bigint AS session_id, NULL::text AS span_id, f.carrier,
           known.reason, known.message AS error_message, f.parked_at IS NOT NULL AS parked
    FROM foreseen f LEFT JOIN known ON known.cause = f.verdict
    ORDER BY f.starts_at, f.id
"""
"""What recovery would do, read only. Parameters as for `CONVERT_RECOVERABLE`."""

COUNT_DUE: Final = f"SELECT count(*) FROM appointments WHERE {BACKLOG}"

RECORD_RUN: Final = """
    INSERT INTO conversion_runs AS run (run_id, task, worker, counted, due_count, created_count, skipped_count,
                                        failed_count, runtime_ms)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    ON CONFLICT (run_id) DO UPDATE
    SET created_count = run.created_count + excluded.created_count,
        skipped_count = run.skipped_count + excluded.skipped_count,
        failed_count = run.failed_count + excluded.failed_count,
        runtime_ms = excluded.runtime_ms
"""

FINISH_RUN: Final = "UPDATE conversion_runs SET finished_at = clock(), runtime_ms = $2 WHERE run_id = $1"
