"""How late a session is when 200 appointments are due at one instant: a worker process as in production."""

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import asyncpg

from services.cli.embedded import DATABASE, LOGIN, Servers
from tests.benchmarks.harness import ROUNDS, Result, console
from tests.population import populate, settle
from tests.processes import PATIENCE_SECONDS, running_worker, until
from tests.servers import copy_of, migrate, running_servers, url_of

APPOINTMENTS: Final = 200
LEAD: Final = timedelta(seconds=5)

_LATE: Final = """
    SELECT percentile_disc($1::float8) WITHIN GROUP (ORDER BY extract(epoch FROM s.created_at - a.starts_at)::float8)
    FROM sessions s JOIN appointments a ON a.id = s.appointment_id
"""


async def run() -> Result:
    p50s, p99s, seen = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        async with running_servers(durable=True) as servers:
            await migrate(servers)
            for number in range(ROUNDS):
                async with copy_of(servers, DATABASE, f"latency_{number}") as name:
                    p50, p99, visible = await _measure(servers, name, Path(folder) / f"{name}.jsonl")
                console.print(f"  round {number + 1} of {ROUNDS}: p99 {p99 * 1000:.1f} ms", style="dim")
                p50s.append(p50)
                p99s.append(p99)
                seen.append(visible)
    # The worst round counts: a median would hide a late one.
    return Result({"p50_ms": max(p50s) * 1000, "p99_ms": max(p99s) * 1000, "all_visible_ms": max(seen) * 1000})


async def _measure(servers: Servers, name: str, log: Path) -> tuple[float, float, float]:
    """p50 and p99 of created_at - starts_at, and when the last session could be seen; in seconds."""
    connection = await asyncpg.connect(url_of(servers, name))
    due = datetime.now(UTC) + LEAD
    await populate(connection, APPOINTMENTS, due)
    await settle(connection)

    async def all_there() -> bool:
        return bool(await connection.fetchval("SELECT count(*) = $1 FROM sessions", APPOINTMENTS))

    nothing_early = {"DISABLE_LEGACY_APPOINTMENT_TRIGGERS": "true"}
    async with running_worker(url_of(servers, name, LOGIN), servers.redis_url, log, **nothing_early):
        await until(all_there, LEAD.total_seconds() + PATIENCE_SECONDS)
        visible = (datetime.now(UTC) - due).total_seconds()
        p50, p99 = await connection.fetchval(_LATE, 0.5), await connection.fetchval(_LATE, 0.99)
    await connection.close()
    return p50, p99, visible
