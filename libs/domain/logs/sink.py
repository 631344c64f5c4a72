"""The sink: from the lines of a process's log to rows that can be searched, never on the way of a request.

The thread that writes the log hands over each line as it was written, masked and encoded; a task stores them
together, once a second and before the process ends. Warnings and worse have a queue of their own, which nothing else
can fill. Of DEBUG and INFO, so many are taken in a second. What finds no room, because there is too much of it or
because the database is away, is not stored, and counted; nothing waits for it.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

from libs.domain.db import Database, is_transient
from libs.domain.settings import Settings
from libs.domain.telemetry import logger
from libs.observability.logging import Logging, is_urgent
from libs.observability.registry import Metrics

_COMPONENT: Final = "logs"
_log: Final = logger(_COMPONENT)

FLUSH_SECONDS: Final = 1.0
BATCH: Final = 1_000

ROUTINE_PER_SECOND: Final = 100
"""Lines below WARNING that are taken in a second; a busy API writes a thousand, most of them of the same kind."""

ROUTINE_ROOM: Final = 3_000
URGENT_ROOM: Final = 10_000
"""Lines that may wait while the database takes none."""

STOP_SECONDS: Final = 2.0
"""How long the end of the process waits for the last lines to be stored."""

COMPLAINT_SECONDS: Final = 60.0

# A line whose storing the server did not confirm may be stored twice: not worth a look at each.
_STORE: Final = """
    INSERT INTO log_lines (at, level, urgent, event, category, component, service, correlation_id, user_id, session_id,
                           tenant_id, line)
    SELECT at::timestamptz, level, urgent, event, category, component, service, correlation_id, user_id, session_id,
           tenant_id, line
    FROM unnest($1::text[], $2::text[], $3::bool[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
                $9::bigint[], $10::bigint[], $11::bigint[], $12::text[])
        AS l (at, level, urgent, event, category, component, service, correlation_id, user_id, session_id,
              tenant_id, line)
"""


class Line(NamedTuple):
    """A row to be."""

    at: str
    level: str
    urgent: bool
    event: str
    category: str | None
    component: str | None
    service: str
    correlation_id: str | None
    user_id: int | None
    session_id: int | None
    tenant_id: int | None
    line: str


class LogSink:
    """The lines of one process on their way to the database."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._urgent: deque[Line] = deque()
        self._routine: deque[Line] = deque()
        self._urgent_lost = metrics.counter("log_lines_not_stored_total", "urgent")
        self._routine_lost = metrics.counter("log_lines_not_stored_total", "routine")
        self._second = 0
        self._taken = 0
        self._complained_at = float("-inf")
        self._stopped = asyncio.Event()

    def __call__(self, fields: Mapping[str, Any], line: bytes) -> None:
        """Takes a line; see `libs.observability.logging.Sink`."""
        if fields.get("component") == _COMPONENT:
            return  # What it says itself would keep it busy with itself.
        if is_urgent(fields["level"]):
            if len(self._urgent) < URGENT_ROOM:
                self._urgent.append(_line(fields, line, urgent=True))
            else:
                self._urgent_lost.inc()
        elif self._keeps_pace() and len(self._routine) < ROUTINE_ROOM:
            self._routine.append(_line(fields, line, urgent=False))
        else:
            self._routine_lost.inc()

    def _keeps_pace(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._taken = second, 0
        self._taken += 1
        return self._taken <= ROUTINE_PER_SECOND

    @asynccontextmanager
    async def storing(self, logging: Logging) -> AsyncIterator[None]:
        """Stores what is logged for the length of the block, what is left at its end included."""
        logging.tee(self)
        writer = asyncio.create_task(self._run(), name="log lines")
        try:
            yield
        finally:
            await asyncio.to_thread(logging.flush)
            logging.tee(None)
            self._stopped.set()
            done, _ = await asyncio.wait({writer}, timeout=STOP_SECONDS)
            if not done:
                writer.cancel()
                await asyncio.wait({writer})
            self._urgent_lost.inc(len(self._urgent))
            self._routine_lost.inc(len(self._routine))

    async def _run(self) -> None:
        last = False
        while not last:
            last = self._stopped.is_set()
            try:
                await self._flush()
            except Exception as error:
                self._complain(error)
            if not last:
                with suppress(TimeoutError):
                    async with asyncio.timeout(FLUSH_SECONDS):
                        await self._stopped.wait()

    def _complain(self, error: Exception) -> None:
        present = time.monotonic()
        if present - self._complained_at >= COMPLAINT_SECONDS:
            self._complained_at = present
            waiting = len(self._urgent) + len(self._routine)
            _log.warning("log_lines_not_stored", exception_type=type(error).__name__, waiting=waiting)

    async def _flush(self) -> None:
        for queue, lost in ((self._urgent, self._urgent_lost), (self._routine, self._routine_lost)):
            while queue:
                batch = [queue.popleft() for _ in range(min(len(queue), BATCH))]
                try:
                    await self._store(batch)
                except BaseException as error:
                    if isinstance(error, Exception) and not is_transient(error):
                        lost.inc(len(batch))  # it would be refused again, and hold up the others
                    else:
                        queue.extendleft(reversed(batch))
                    raise

    async def _store(self, batch: list[Line]) -> None:
        async with self._database.autocommit() as connection:
            await connection.execute(_STORE, *zip(*batch, strict=True))


@asynccontextmanager
async def searchable(logging: Logging, settings: Settings, database: Database, metrics: Metrics) -> AsyncIterator[None]:
    """Has what is logged stored for the length of the block, if that is wanted at all."""
    if settings.log_search_hours:
        async with LogSink(database, metrics).storing(logging):
            yield
    else:
        yield


def _line(fields: Mapping[str, Any], line: bytes, *, urgent: bool) -> Line:
    return Line(
        at=fields["timestamp"],
        level=fields["level"],
        urgent=urgent,
        event=fields.get("event", ""),
        category=fields.get("category"),
        component=fields.get("component"),
        service=fields["service"],
        correlation_id=fields.get("correlation_id"),
        user_id=_id(fields.get("user_id")),
        session_id=_id(fields.get("session_id")),
        tenant_id=_id(fields.get("tenant_id")),
        line=line.decode().rstrip("\n"),
    )


def _id(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 2**63 else None
