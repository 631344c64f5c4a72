"""Sessions ended per second over HTTP, each with its last units, payouts, appointment and events, by an API process
as in production with all telemetry on; beside the same statements run bare, on the same rows: 16 connections each.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import asyncpg
from sqlalchemy import TextClause
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from libs.domain.conversion.unblocking import UNBLOCK_AFTER_SESSION
from libs.domain.sessions.settlement import LOCK_ONE, SETTLE
from libs.guardrails import Principal, Role
from services.cli.embedded import DATABASE, LOGIN
from tests.benchmarks.harness import Figures, Result, fresh_copy, interleaved, named, percentile, speeds
from tests.benchmarks.http_load import Once, Request, load
from tests.benchmarks.send import open_rooms
from tests.population import settle
from tests.processes import running_api_process
from tests.running import token_of
from tests.servers import migrate, running_servers, url_of

SESSIONS: Final = 4000
WARM_UP: Final = 800
CONNECTIONS: Final = 16

# As after 25 minutes of which the worker has charged nothing yet: three units are due at the end.
_BEGIN: Final = """
    UPDATE sessions SET status = 'active', activated_at = clock() - interval '25 minutes',
        connected_at = CASE kind WHEN 'call' THEN clock() - interval '25 minutes' END, allowance_units = 10,
        expires_at = clock() + interval '75 minutes', tick_at = clock()
"""
_SESSIONS: Final = "SELECT id, tenant_id, patient_id, doctor_id, kind || '_session:' || id AS context FROM sessions"


async def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        async with running_servers(durable=True) as servers:
            await migrate(servers)
            owner = url_of(servers, DATABASE)
            await open_rooms(owner, SESSIONS)
            connection = await asyncpg.connect(owner)
            await connection.execute(_BEGIN)
            await settle(connection)
            sessions = await connection.fetch(_SESSIONS)
            await connection.close()

            async def product() -> Figures:
                async with (
                    fresh_copy(servers, DATABASE) as name,
                    running_api_process(
                        url_of(servers, name, LOGIN), servers.redis_url, Path(folder) / f"{name}.jsonl"
                    ) as api,
                ):
                    requests = [_end(session) for session in sessions]
                    return await load(Once(api.port, requests, connections=CONNECTIONS, warm_up=WARM_UP))

            async def bare_sql() -> Figures:
                async with fresh_copy(servers, DATABASE) as name:
                    return await _bare(url_of(servers, name, LOGIN), sessions)

            figures = await interleaved({"product": product, "bare_sql": bare_sql})
    return Result(
        figures=named(figures),
        ratios=speeds(figures, "product", "bare_sql"),
        goals={"bare_sql": "0.4, goal 0.7"},
    )


def _end(session: Any) -> Request:
    patient = Principal(session["patient_id"], session["tenant_id"], Role.PATIENT)
    return Request.post(f"/api/v1/sessions/{session['context']}/end", b"", token_of(patient))


async def _bare(url: str, sessions: Sequence[Any]) -> Figures:
    """The three statements of an end, in a transaction on a held connection, and nothing around them."""
    lock, end, unblock = _Prepared(LOCK_ONE), _Prepared(SETTLE), _Prepared(UNBLOCK_AFTER_SESSION)
    left = iter(enumerate(sessions))
    latencies: list[float] = []
    counted_from = 0.0

    async def work() -> None:
        nonlocal counted_from
        connection = await asyncpg.connect(url)
        await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        for number, session in left:
            if number == WARM_UP:
                counted_from = time.perf_counter()
            began = time.perf_counter()
            async with connection.transaction():
                await lock.run(connection, id=session["id"])
                await end.run(
                    connection,
                    ids=[session["id"]],
                    verb="end",
                    reason="ended_by_patient",
                    words=None,
                    ended_by=session["patient_id"],
                    carrier={},
                )
                await unblock.run(connection, users=[session["patient_id"], session["doctor_id"]])
            if number >= WARM_UP:
                latencies.append(time.perf_counter() - began)
        await connection.close()

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    took = time.perf_counter() - counted_from
    latencies.sort()
    return {
        "per_second": len(latencies) / took,
        "p50_ms": percentile(latencies, 0.50) * 1000,
        "p99_ms": percentile(latencies, 0.99) * 1000,
    }


class _Prepared:
    """A statement of the product as the driver takes it."""

    def __init__(self, statement: TextClause) -> None:
        compiled = statement.compile(dialect=PGDialect_asyncpg())  # type: ignore[no-untyped-call]
        self._sql, self._names = str(compiled), compiled.positiontup or []

    async def run(self, connection: "asyncpg.Connection[Any]", **values: Any) -> None:
        await connection.fetch(self._sql, *(values[name] for name in self._names))
