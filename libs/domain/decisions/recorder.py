"""The recorder: from the guard's verdicts to rows, never on the way of a request.

What is worth a row of its own (refusals of known callers, calls allowed with a warning, and a sample of what
was simply allowed) is queued; of everything else, minutes are counted. A task writes both together, twice a
second and before the process ends. A process that is killed takes its last half second along.

The queue has two bounds. Beyond the first, samples are dropped, and whoever was refused waits for room before
the answer is sent (`room`), which slows down those who fill the queue and nobody else. The second is never
reached unless the database takes no rows for long: beyond it everything is dropped, and counted.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple

import asyncpg
import orjson

from libs.domain.db import Database
from libs.domain.telemetry import logger
from libs.guardrails import AppointmentRef, Claim, Facts, Flag, Flags, Operation, Reason, Verdict
from libs.observability.context import client, correlation_id
from libs.observability.registry import Metrics

_log: Final = logger("decisions")

FLUSH_SECONDS: Final = 0.4
"""How long decisions wait; with the writing they are rows within half a second."""

LONGEST_WAIT: Final = 5.0
"""Between two attempts at a database that is away, in seconds."""

ROOM: Final = 10_000
"""So many decisions may wait before samples are dropped and the refused wait."""

LIMIT: Final = 4 * ROOM
PATIENCE_SECONDS: Final = 5.0
"""How long a refused request waits for room."""

BATCH: Final = 5_000
STOP_SECONDS: Final = 2.0
"""How long the end of the process waits for the last decisions to be written."""

_WRITE: Final = """
    WITH recorded AS (
        INSERT INTO decisions (at, tenant_id, operation, identifier, appointment_id, session_id, user_id, role,
                               client, verdict, reason, flag, flags, correlation_id)
        SELECT at, tenant_id, operation, identifier, appointment_id, session_id, user_id, role,
               client, verdict, reason, flag, flags::jsonb, correlation_id
        FROM unnest($1::timestamptz[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[],
                    $8::text[], $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[])
            AS d (at, tenant_id, operation, identifier, appointment_id, session_id, user_id, role,
                  client, verdict, reason, flag, flags, correlation_id)
    ), counted AS (
        INSERT INTO decision_totals AS total (minute, tenant_id, operation, verdict, flag, requests)
        SELECT date_trunc('minute', at), tenant_id, operation, verdict, flag, sum(requests)
        FROM unnest($15::timestamptz[], $16::bigint[], $17::text[], $18::text[], $19::text[], $20::bigint[])
            AS t (at, tenant_id, operation, verdict, flag, requests)
        GROUP BY 1, 2, 3, 4, 5
        ORDER BY 1, 2, 3, 4, 5 -- the same for all processes, so that they never wait for each other crosswise
        ON CONFLICT (minute, tenant_id, operation, verdict, flag)
            DO UPDATE SET requests = total.requests + excluded.requests
    )
    SELECT pg_current_xact_id()::text
"""
_STATUS: Final = "SELECT pg_xact_status($1::text::xid8)"


class Decision(NamedTuple):
    """A row to be, but for its time: `at` is on this process's monotonic clock, in seconds."""

    at: float
    tenant_id: int
    operation: str
    identifier: str
    appointment_id: int | None
    session_id: int | None
    user_id: int
    role: str
    client: str
    verdict: str
    reason: str | None
    flag: str | None
    flags: str
    correlation_id: str | None


class Total(NamedTuple):
    """What is counted together; `at` is a whole second of the monotonic clock."""

    at: int
    tenant_id: int
    operation: str
    verdict: str
    flag: str


class Batch(NamedTuple):
    """What is being written: the head of the queue, and totals; `transaction` is the id of the one it is in."""

    decisions: list[Decision]
    totals: Counter[Total]
    transaction: str | None = None


class Recorder:
    """The decision log of one process, and a witness of its guard. `sample_rate` is the share of simply
    allowed calls that become rows."""

    def __init__(self, database: Database, metrics: Metrics, *, sample_rate: float) -> None:
        self._database = database
        self._metrics = metrics
        self._sample_rate = sample_rate
        self._queue: list[Decision] = []
        self._totals: Counter[Total] = Counter()
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._stopped = asyncio.Event()
        self._in_doubt: Batch | None = None

    def saw(self, claim: Claim[Operation], facts: Facts, flags: Flags, verdict: Verdict) -> None:
        if verdict.refusal is Reason.UNAUTHENTICATED:
            return  # nobody we know, and so of no tenant
        present = time.monotonic()
        word, operation, flag = verdict.word, claim.operation.name, verdict.flag
        self._totals[Total(int(present), claim.caller.tenant_id, operation, word, flag.value if flag else "")] += 1
        noteworthy = word != "allowed"
        if not noteworthy and random.random() >= self._sample_rate:  # noqa: S311 not for secrecy
            return
        if len(self._queue) >= (LIMIT if noteworthy else ROOM):
            self._metrics.counter("guard_decisions_dropped_total", word).inc()
            return
        self._queue.append(_decision(present, claim, facts, flags, verdict))
        if len(self._queue) >= ROOM:
            self._roomy.clear()

    async def room(self) -> None:
        """Waits while too many decisions are waiting to be written, for `PATIENCE_SECONDS` at most. Whoever
        calls this holds no connection."""
        if not self._roomy.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._roomy.wait()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Writes for the length of the block, and what is left at its end."""
        writer = asyncio.create_task(self._run(), name="decisions")
        try:
            yield
        finally:
            self._stopped.set()
            done, _ = await asyncio.wait({writer}, timeout=STOP_SECONDS)
            if not done:
                writer.cancel()
                await asyncio.wait({writer})
                self._tell(TimeoutError())

    async def _run(self) -> None:
        wait = FLUSH_SECONDS
        last = False
        while not last:
            last = self._stopped.is_set()
            try:
                await self._flush()
                wait = FLUSH_SECONDS
            except Exception as error:
                wait = min(2 * wait, LONGEST_WAIT)
                self._tell(error)
            if not last:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._stopped.wait()

    def _tell(self, error: Exception) -> None:
        _log.warning("decisions_not_written", exception_type=type(error).__name__, waiting=len(self._queue))

    async def _flush(self) -> None:
        while self._queue or self._totals:
            async with self._database.autocommit() as connection:
                await self._resolve(connection)
                await self._write(connection, Batch(self._queue[:BATCH], Counter(self._totals)))

    async def _write(self, connection: "asyncpg.Connection[Any]", batch: Batch) -> None:
        """Writes all of a batch or, raising, none of it: it then stays where it is."""
        present: datetime = await connection.fetchval("SELECT clock()")
        began = present - timedelta(seconds=time.monotonic())  # of the monotonic clock, on that of the database
        rows = [(began + timedelta(seconds=decision.at), *decision[1:]) for decision in batch.decisions]
        counted = [(began + timedelta(seconds=total.at), *total[1:], number) for total, number in batch.totals.items()]
        columns = *_columns(rows, len(Decision._fields)), *_columns(counted, len(Total._fields) + 1)
        async with connection.transaction():
            self._in_doubt = batch._replace(transaction=await connection.fetchval(_WRITE, *columns))
        self._written(batch)

    async def _resolve(self, connection: "asyncpg.Connection[Any]") -> None:
        """Finds out what became of a batch whose commit nobody answered, so that nothing is counted twice."""
        if self._in_doubt is None:
            return
        match await connection.fetchval(_STATUS, self._in_doubt.transaction):
            case "committed":
                self._written(self._in_doubt)
            case "in progress":
                raise TimeoutError("The server has not noticed yet that the connection was lost.")
        self._in_doubt = None

    def _written(self, batch: Batch) -> None:
        self._in_doubt = None
        del self._queue[: len(batch.decisions)]
        self._totals = self._totals - batch.totals
        if len(self._queue) < ROOM:
            self._roomy.set()


def _columns(rows: list[tuple[Any, ...]], width: int) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True)) if rows else [()] * width


def _decision(at: float, claim: Claim[Operation], facts: Facts, flags: Flags, verdict: Verdict) -> Decision:
    caller, session = claim.caller, facts.session
    reason = verdict.refusal or verdict.shadow
    # What the caller named is noted even where nothing has that name.
    appointment_id = session_id = None
    if session is not None:
        appointment_id, session_id = session.appointment_id, session.id
    elif isinstance(claim.subject, AppointmentRef):
        appointment_id = claim.subject.id
    else:
        session_id = claim.subject.id
    return Decision(
        at=at,
        tenant_id=caller.tenant_id,
        operation=claim.operation.name,
        identifier=str(claim.subject),
        appointment_id=appointment_id,
        session_id=session_id,
        user_id=caller.user_id,
        role=caller.role.value,
        client=client(),
        verdict=verdict.word,
        reason=reason.code if reason else None,
        flag=verdict.flag.value if verdict.flag else None,
        flags=_json(flags),
        correlation_id=correlation_id(),
    )


@lru_cache
def _json(flags: Flags) -> str:
    return orjson.dumps({flag.value: flags[flag] for flag in Flag}).decode()
