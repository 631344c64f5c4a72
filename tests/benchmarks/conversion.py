"""Conversions per second: the product with all telemetry on, beside one bare statement per batch that
writes the same rows and judges nothing, and beside the loop that most programs would have.
"""

import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg

from libs.domain.conversion.report import Reporter
from libs.domain.conversion.runs import Converter
from libs.domain.db import WORKER_TIMEOUTS, Database
from libs.domain.runtime import telemetry
from libs.domain.settings import Settings
from services.cli.embedded import DATABASE, LOGIN, Servers
from tests.benchmarks.harness import Figures, Result, fresh_copy, interleaved, named, speeds
from tests.benchmarks.row_loop import convert_row_by_row
from tests.population import populate, settle
from tests.servers import migrate, running_servers, url_of

APPOINTMENTS: Final = 20_000
BATCH: Final = 1000
ROWS_OF_THE_LOOP: Final = 1000
"""The loop is timed on the first rows only; it would take minutes."""

_BARE: Final = """
    WITH due AS MATERIALIZED (
        SELECT * FROM appointments
        WHERE status = 'CONFIRMED' AND session_id IS NULL AND kind = 'consultation' AND parked_at IS NULL
          AND greatest(starts_at, next_attempt_at) <= clock()
        ORDER BY greatest(starts_at, next_attempt_at), id LIMIT $1
    ),
    created AS (
        INSERT INTO sessions (tenant_id, kind, modality, source, appointment_id, patient_id, doctor_id, status,
                              expires_at)
        SELECT tenant_id, CASE modality WHEN 'text' THEN 'text' ELSE 'call' END, modality, 'APPOINTMENT', id,
               patient_id, doctor_id, CASE modality WHEN 'text' THEN 'waiting' ELSE 'connecting' END, ends_at
        FROM due
        RETURNING id, appointment_id, kind
    ),
    started AS (
        UPDATE appointments a SET session_id = c.id, status = 'IN_PROGRESS'
        FROM created c WHERE a.id = c.appointment_id
    ),
    conversation AS (
        INSERT INTO conversations (tenant_id, appointment_id, session_id)
        SELECT d.tenant_id, d.id, c.id FROM due d JOIN created c ON c.appointment_id = d.id
        RETURNING id, appointment_id
    ),
    joined AS (
        INSERT INTO participants (tenant_id, conversation_id, user_id, role)
        SELECT d.tenant_id, c.id, party.user_id, party.role
        FROM conversation c JOIN due d ON d.id = c.appointment_id
        CROSS JOIN LATERAL (VALUES (d.patient_id, 'patient'), (d.doctor_id, 'doctor')) AS party(user_id, role)
    ),
    attempted AS (
        INSERT INTO conversion_attempts (tenant_id, appointment_id, run_id, attempt, modality, result, session_id)
        SELECT d.tenant_id, d.id, gen_random_uuid(), 1, d.modality, 'created', c.id
        FROM due d JOIN created c ON c.appointment_id = d.id
    ),
    event AS (
        INSERT INTO outbox_events (tenant_id, name, aggregate, payload)
        SELECT d.tenant_id, 'session_started', 'appointment:' || d.id,
               jsonb_build_object('appointment_id', d.id, 'session_id', c.id, 'patient_id', d.patient_id,
                                  'doctor_id', d.doctor_id)
        FROM due d JOIN created c ON c.appointment_id = d.id
        RETURNING id, aggregate
    ),
    delivery AS (
        INSERT INTO outbox_deliveries (event_id, consumer, lane, aggregate)
        SELECT id, 'notifications', 'urgent', aggregate FROM event
    )
    SELECT count(*) FROM created
"""


async def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        async with running_servers(durable=True) as servers:
            await migrate(servers)
            connection = await asyncpg.connect(url_of(servers, DATABASE))
            await populate(connection, APPOINTMENTS, datetime.now(UTC) - timedelta(minutes=1))
            await settle(connection)
            await connection.close()

            async def product() -> Figures:
                return {"per_second": await measure_product(servers, DATABASE, Path(folder))}

            async def bare() -> Figures:
                async with fresh_copy(servers, DATABASE) as name:
                    return {"per_second": await _bare(url_of(servers, name, LOGIN))}

            async def loop() -> Figures:
                async with fresh_copy(servers, DATABASE) as name:
                    return {"per_second": await convert_row_by_row(url_of(servers, name, LOGIN), ROWS_OF_THE_LOOP)}

            figures = await interleaved({"product": product, "bare_sql": bare, "row_loop": loop})
    return Result(
        figures=named(figures),
        ratios=speeds(figures, "product", "bare_sql", "row_loop"),
        goals={"bare_sql": "0.5, goal 0.8", "row_loop": "50, goal 100"},
    )


async def measure_product(servers: Servers, template: str, folder: Path, limit: int | None = None) -> float:
    """Conversions per second of the product on a copy of `template`: as a worker does it, with attempts,
    outbox, metrics, and logs written to a file."""
    async with fresh_copy(servers, template) as name:
        url = url_of(servers, name, LOGIN)
        settings: Any = {"database_url": url, "redis_url": servers.redis_url, "log_file": folder / f"{name}.jsonl"}
        async with telemetry(Settings(**settings), "sessiongate-worker") as (metrics, _):
            database = Database(url, application="benchmark", timeouts=WORKER_TIMEOUTS)
            converter = Converter(database, Reporter(metrics).batch, worker="benchmark", counts=True, batch_limit=BATCH)
            # The connection is there in a worker, too, when the first appointment becomes due.
            async with database.autocommit() as connection:
                await connection.fetchval("SELECT 1")
            began = time.perf_counter()
            done = await converter.auto_start(wait=True, limit=limit)
            took = time.perf_counter() - began
            await database.close()
    assert done.created_count == done.attempted_count, "The benchmark's appointments must all be convertible."
    return done.created_count / took


async def _bare(url: str) -> float:
    connection = await asyncpg.connect(url, server_settings={"jit": "off"})
    try:
        began, converted = time.perf_counter(), 0
        while batch := await connection.fetchval(_BARE, BATCH):
            converted += batch
        return converted / (time.perf_counter() - began)
    finally:
        await connection.close()
