"""Appointments by the thousand, each with a doctor and a patient of its own."""

from datetime import datetime
from typing import Any

import asyncpg

# $1 how many, $2 when the first is due, $3 seconds from one to the next, $4 pairs of people to each of them.
_POPULATE = """
    WITH tenant AS (INSERT INTO tenants (name) VALUES ('Crowd') RETURNING id),
    doctor AS (
        INSERT INTO users (tenant_id, role, name, country)
        SELECT tenant.id, 'doctor', 'Doctor ' || n, 'MW' FROM tenant, generate_series(1, $1::int * $4::int) n
        RETURNING id, tenant_id
    ),
    patient AS (
        INSERT INTO users (tenant_id, role, name, country)
        SELECT tenant.id, 'patient', 'Patient ' || n, 'KE' FROM tenant, generate_series(1, $1::int * $4::int) n
        RETURNING id, tenant_id
    ),
    subscription AS (
        INSERT INTO subscriptions (tenant_id, patient_id, plan, starts_at, ends_at, text_sessions_remaining,
                                   voice_calls_remaining, video_calls_remaining)
        SELECT tenant_id, id, 'basic', clock() - interval '1 day', clock() + interval '30 days', 10, 10, 10 FROM patient
    ),
    pair AS (
        SELECT d.id AS doctor_id, p.id AS patient_id, d.tenant_id, d.number / $4 AS number
        FROM (SELECT *, row_number() OVER (ORDER BY id) AS number FROM doctor) d
        JOIN (SELECT *, row_number() OVER (ORDER BY id) AS number FROM patient) p USING (number)
        WHERE number % $4 = 0
    ),
    appointment AS (
        INSERT INTO appointments (tenant_id, patient_id, doctor_id, modality, status, starts_at, ends_at)
        SELECT tenant_id, patient_id, doctor_id, (ARRAY['text', 'voice', 'video'])[1 + number % 3], 'CONFIRMED',
               $2::timestamptz + (number - 1) * make_interval(secs => $3::float8),
               $2::timestamptz + (number - 1) * make_interval(secs => $3::float8) + interval '30 minutes'
        FROM pair
        RETURNING id, tenant_id, doctor_id, starts_at, ends_at
    ),
    slot AS (
        INSERT INTO busy_intervals (tenant_id, doctor_id, appointment_id, during)
        SELECT tenant_id, doctor_id, id, tstzrange(starts_at, ends_at) FROM appointment
    )
    SELECT count(*) FROM appointment
"""

# What a table collects in its life: four in five are long over, one is confirmed for later. $1 how many.
_AGE = """
    INSERT INTO appointments (tenant_id, patient_id, doctor_id, modality, status, starts_at, ends_at)
    SELECT patient.tenant_id, patient.id, doctor.id, 'text', status, starts_at, starts_at + interval '30 minutes'
    FROM (SELECT *, row_number() OVER (ORDER BY id) - 1 AS number FROM users WHERE role = 'patient') patient
    JOIN (SELECT *, row_number() OVER (ORDER BY id) - 1 AS number FROM users WHERE role = 'doctor') doctor
        USING (number)
    JOIN generate_series(100, 99 + $1::int) n ON n % (SELECT count(*) FROM users WHERE role = 'patient') = number
    CROSS JOIN LATERAL (
        SELECT (ARRAY['COMPLETED', 'CANCELLED', 'NO_SHOW', 'EXPIRED', 'CONFIRMED'])[1 + n % 5] AS status,
               clock() + make_interval(mins => CASE WHEN n % 5 = 4 THEN n ELSE -n END) AS starts_at
    ) AS slot
"""


async def populate(
    connection: "asyncpg.Connection[Any]", number: int, first_due: datetime, *, apart: float = 0.0, crowd: int = 1
) -> None:
    """`number` confirmed appointments, due `apart` seconds from one to the next. One of `crowd` patients and
    doctors has such an appointment."""
    await connection.execute(_POPULATE, number, first_due, apart, crowd)


async def age(connection: "asyncpg.Connection[Any]", number: int) -> None:
    """Adds so many appointments that are not due, of the people there are."""
    await connection.execute(_AGE, number)


async def settle(connection: "asyncpg.Connection[Any]") -> None:
    """Leaves nothing to autovacuum, so that no contestant pays for the population."""
    await connection.execute("VACUUM ANALYZE")
    await connection.execute("CHECKPOINT")
