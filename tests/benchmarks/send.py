"""Guarded sends per second over HTTP, by an API process as in production with all telemetry on, beside endpoints
that only store: 16 connections, 1,000 sessions, one process each.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import asyncpg
import orjson

from libs.domain.conversion.runs import Converter
from libs.domain.db import Database
from libs.guardrails import Principal, Role
from services.cli.embedded import DATABASE, LOGIN
from tests.benchmarks.harness import Figures, Result, fresh_copy, interleaved, named, speeds
from tests.benchmarks.http_load import Load, Request, load
from tests.benchmarks.serving import serving
from tests.clinic import ACTIVATE
from tests.population import populate, settle
from tests.processes import running_api_process
from tests.running import token_of
from tests.servers import migrate, running_servers, url_of

SESSIONS: Final = 1000
BODY: Final = "The tablets help, but I still wake up at night. Should I take them in the morning instead?"

SPOKEN: Final = 10
"""Messages that there are in each conversation from the beginning."""

_HISTORY: Final = """
    WITH numbered AS (UPDATE conversations SET last_seq = $1::int RETURNING *)
    INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body)
    SELECT c.tenant_id, c.id, n, p.user_id, 'earlier ' || n, 'text', 'Good morning!'
    FROM numbered c JOIN participants p ON p.conversation_id = c.id AND p.role = 'patient'
    CROSS JOIN generate_series(1, $1::int) n
"""
_PARTIES: Final = """
    SELECT s.tenant_id, s.patient_id, c.id AS conversation_id, s.kind || '_session:' || s.id AS context
    FROM sessions s JOIN conversations c ON c.session_id = s.id ORDER BY s.id
"""


@dataclass(frozen=True)
class Room:
    """A session, and the patient who writes in it."""

    context: str
    conversation_id: int
    patient: Principal


async def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        async with running_servers(durable=True) as servers, serving("endpoints:collector") as collector:
            await migrate(servers)
            rooms = await open_rooms(url_of(servers, DATABASE), SESSIONS)
            to_the_product = [_to_the_product(room) for room in rooms]
            to_the_others = [_to_the_others(room) for room in rooms]

            async def product() -> Figures:
                async with (
                    fresh_copy(servers, DATABASE) as name,
                    running_api_process(
                        url_of(servers, name, LOGIN),
                        servers.redis_url,
                        Path(folder) / f"{name}.jsonl",
                        SESSIONGATE_CHAT_MESSAGES_PER_MINUTE="1000000",
                        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.port}",
                    ) as api,
                ):
                    return await load(Load(api.port, to_the_product))

            async def bare_asyncpg() -> Figures:
                return await other("bare")

            async def orm_insert() -> Figures:
                return await other("orm")

            async def other(endpoint: str) -> Figures:
                async with (
                    fresh_copy(servers, DATABASE) as name,
                    serving(f"endpoints:{endpoint}", DATABASE_URL=url_of(servers, name, LOGIN)) as served,
                ):
                    return await load(Load(served.port, to_the_others))

            figures = await interleaved({"product": product, "bare_asyncpg": bare_asyncpg, "orm_insert": orm_insert})
    return Result(
        figures=named(figures),
        ratios=speeds(figures, "product", "bare_asyncpg", "orm_insert"),
        goals={
            "bare_asyncpg": "0.5, goal 0.75",
            "orm_insert": "2.5, goal 5",
            "product_p99_ms": "at most 20, goal 10",
        },
    )


async def open_rooms(owner_url: str, number: int) -> Sequence[Room]:
    """Fills an empty database with so many live sessions, made from appointments by conversion."""
    connection = await asyncpg.connect(owner_url)
    await populate(connection, number, datetime.now(UTC) - timedelta(minutes=1))
    database = Database(owner_url, application="benchmark")
    await Converter(database, lambda *_: None, worker="benchmark", counts=False).auto_start(wait=True)
    await database.close()
    # As after the doctor's first message, which changes more than others do.
    await connection.execute(f"{ACTIVATE} WHERE kind = 'text'")
    # A table known to be empty would be read from end to end by each statement, until its statistics are renewed.
    await connection.execute(_HISTORY, SPOKEN)
    await settle(connection)
    rows = await connection.fetch(_PARTIES)
    await connection.close()
    return [
        Room(row["context"], row["conversation_id"], Principal(row["patient_id"], row["tenant_id"], Role.PATIENT))
        for row in rows
    ]


def _to_the_product(room: Room) -> Request:
    body = orjson.dumps({"client_message_id": "%d", "body": BODY})
    return Request.post(f"/api/v1/chat/{room.context}/messages", body, token_of(room.patient))


def _to_the_others(room: Room) -> Request:
    body = orjson.dumps(
        {
            "tenant_id": room.patient.tenant_id,
            "conversation_id": room.conversation_id,
            "sender_id": room.patient.user_id,
            "client_message_id": "%d",
            "body": BODY,
        }
    )
    return Request.post("/messages", body)
