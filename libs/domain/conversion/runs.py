"""Running conversions: batches under one advisory lock, culprits isolated, every batch reported."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal, NamedTuple, cast
from uuid import UUID, uuid4

import asyncpg

from libs.domain.conversion import statement
from libs.domain.conversion.causes import FailureReason
from libs.domain.db import Database, is_transient
from libs.observability.redaction import scrub_error
from libs.observability.tracing import span

Task = Literal["auto_start", "recovery", "legacy"]
Result = Literal["created", "skipped", "failed"]

SOURCE: Final = "APPOINTMENT"

UNTOUCHABLE_SECONDS: Final = 60.0
"""How long a converter leaves a row alone whose failure it could not even write down in it."""

_SPANS: Final[dict[Task, str]] = {
    "auto_start": "appointments.auto_start",
    "recovery": "appointments.recover",
    "legacy": "legacy.activate_booked_appointments",
}


class Outcome(NamedTuple):
    """What became of one appointment.

    `delay` is how long ago, in seconds, it became due or could be tried again; None where nobody was to try.
    `carrier` is that of whoever confirmed it; `span_id` is set when that was within a trace, and is the id
    under which the outbox row already refers to this conversion.
    """

    appointment_id: int
    tenant_id: int
    modality: str
    result: Result
    attempt: int
    session_id: int | None
    reason: str | None
    error_message: str | None
    parked: bool
    delay: float | None
    span_id: str | None
    carrier: dict[str, str]


@dataclass(slots=True)
class Run:
    """One run: the fields of its log event and of its row."""

    task: Task
    due_count: int = 0
    run_id: UUID = field(default_factory=uuid4)
    created_count: int = 0
    skipped_count: int = 0
    failed_count: int = 0
    runtime_ms: float = 0.0

    @property
    def attempted_count(self) -> int:
        return self.created_count + self.skipped_count + self.failed_count

    def add(self, outcomes: Sequence[Outcome]) -> None:
        results = [outcome.result for outcome in outcomes]
        self.created_count += results.count("created")
        self.skipped_count += results.count("skipped")
        self.failed_count += results.count("failed")

    def fields(self) -> dict[str, Any]:
        return {
            "run_id": str(self.run_id),
            "due_count": self.due_count,
            "attempted_count": self.attempted_count,
            "created_count": self.created_count,
            "skipped_count": self.skipped_count,
            "failed_count": self.failed_count,
            "runtime_ms": round(self.runtime_ms, 2),
            "source": SOURCE,
        }


OnBatch = Callable[[Run, list[Outcome], int], None]
"""Told of every committed batch, with the Unix time in ns at which it began; see `Reporter.batch`. Called
in a thread, one batch after the other, each while the database has the next one."""


class _Selection(NamedTuple):
    """Which appointments a run takes: the query, the conversion of what it finds, and their arguments after the
    limit, given the ids that the run has attempted."""

    select: str
    convert: str
    arguments: Callable[[list[int]], list[Any]]


class ConverterBusy(Exception):
    """Another process is converting; whoever meant to can leave it to that one."""


class Converter:
    """Converts due appointments on behalf of one process.

    `worker` names it in the run rows. `counts` tells whether this process also counts its outcomes in
    its own metrics; those of a command line are counted by a worker later, from the rows.
    """

    def __init__(
        self, database: Database, on_batch: OnBatch, *, worker: str, counts: bool, batch_limit: int = 1000
    ) -> None:
        self._database = database
        self._on_batch = on_batch
        self._worker = worker
        self._counts = counts
        self._batch_limit = batch_limit
        self._untouchable: dict[int, float] = {}

    async def auto_start(self, *, limit: int | None = None, wait: bool = False) -> Run:
        """One run over everything that is due, at most `limit` appointments.

        Raises `ConverterBusy` when another process converts at this moment, unless `wait` is set.
        """
        due = await self._fetch_value(statement.COUNT_DUE)
        selection = _Selection(statement.SELECT_DUE, statement.CONVERT_DUE, lambda _: [self._left_alone()])
        return await self._run(Run("auto_start", due), selection, limit, wait=wait)

    async def recover(self, *, lookback: timedelta | None, limit: int) -> Run:
        """Converts what has been due within `lookback` (None: ever), parked appointments included,
        without waiting for their next attempt. Idempotent: it is the same conversion."""
        due = len(await self.foresee(lookback=lookback, limit=limit))
        selection = _Selection(
            statement.SELECT_RECOVERABLE, statement.CONVERT_RECOVERABLE, lambda seen: [lookback, seen]
        )
        return await self._run(Run("recovery", due), selection, limit, wait=True)

    async def activate_early(self, run: Run, *, except_tenants: list[int]) -> None:
        """Converts the text appointments that are due within five minutes, of all tenants but these. Whatever
        breaks it off, `run` has what was done; while another process converts for long, the rest is left to a later
        run."""
        selection = _Selection(statement.SELECT_EARLY, statement.CONVERT_EARLY, lambda seen: [except_tenants, seen])
        with suppress(asyncpg.LockNotAvailableError):
            await self._run(run, selection, None, wait=True)

    async def foresee(self, *, lookback: timedelta | None, limit: int) -> list[Outcome]:
        """What `recover` would do at this moment. Writes nothing."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(statement.FORESEE, uuid4(), limit, lookback, [])
        return [_outcome(row) for row in rows]

    async def _run(self, run: Run, selection: _Selection, limit: int | None, *, wait: bool) -> Run:
        with span(_SPANS[run.task], root=True):
            return await self._run_batches(run, selection, limit, wait)

    async def _run_batches(self, run: Run, selection: _Selection, limit: int | None, wait: bool) -> Run:
        started = time.perf_counter()
        seen: list[int] = []
        reporting = asyncio.create_task(asyncio.sleep(0))
        try:
            while True:
                size = self._batch_limit if limit is None else min(self._batch_limit, limit - run.attempted_count)
                if size == 0:
                    break
                began_ns = time.time_ns()
                outcomes = await self._batch(run, selection, [size, *selection.arguments(seen)], wait, started)
                seen += [outcome.appointment_id for outcome in outcomes]
                if outcomes:
                    await reporting
                    reporting = asyncio.create_task(asyncio.to_thread(self._on_batch, run, outcomes, began_ns))
                if len(outcomes) < size:
                    break
        finally:
            await reporting
        run.runtime_ms = (time.perf_counter() - started) * 1000
        if run.attempted_count:
            async with self._database.autocommit() as connection:
                await connection.execute(statement.FINISH_RUN, run.run_id, run.runtime_ms)
        return run

    async def _batch(
        self, run: Run, selection: _Selection, parameters: list[Any], wait: bool, started: float
    ) -> list[Outcome]:
        lock = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
        async with self._database.autocommit() as connection, connection.transaction():
            if await connection.fetchval(f"SELECT {lock}($1)", statement.LOCK_KEY) is False:
                raise ConverterBusy
            try:
                async with connection.transaction():
                    rows = await connection.fetch(selection.convert, run.run_id, *parameters)
            except asyncpg.PostgresError as error:
                if is_transient(error) and not isinstance(error, asyncpg.LockNotAvailableError):
                    raise
                rows = await self._one_by_one(connection, run, selection, parameters)
            outcomes = [_outcome(row) for row in rows]
            if outcomes:
                batch = Run(run.task)
                batch.add(outcomes)
                await connection.execute(
                    statement.RECORD_RUN,
                    run.run_id,
                    run.task,
                    self._worker,
                    self._counts,
                    run.due_count,
                    batch.created_count,
                    batch.skipped_count,
                    batch.failed_count,
                    (time.perf_counter() - started) * 1000,
                )
        run.add(outcomes)
        return outcomes

    async def _one_by_one(
        self, connection: "asyncpg.Connection[Any]", run: Run, selection: _Selection, parameters: list[Any]
    ) -> list[Any]:
        """Repeats a batch that the database refused, so that only the culprit fails."""
        ids = await connection.fetch(statement.lockable(selection.select), run.run_id, *parameters)
        rows: list[Any] = []
        for record in ids:
            try:
                async with connection.transaction():
                    rows += await connection.fetch(statement.CONVERT_ONE, run.run_id, record["id"])
            except asyncpg.LockNotAvailableError:
                continue  # one of its parties is being changed; the next run finds it again
            except asyncpg.PostgresError as error:
                if is_transient(error):
                    raise
                rows += await self._record(connection, run, record["id"], error)
        return rows

    async def _record(
        self, connection: "asyncpg.Connection[Any]", run: Run, appointment_id: int, error: asyncpg.PostgresError
    ) -> list[Any]:
        refused = isinstance(error, asyncpg.IntegrityConstraintViolationError)
        reason = FailureReason.DB_UPDATE_FAILED if refused else FailureReason.UNKNOWN_ERROR
        failure = (run.run_id, appointment_id, reason, scrub_error(error))
        try:
            async with connection.transaction():
                return await connection.fetch(statement.RECORD_CULPRIT, *failure)
        except asyncpg.PostgresError as again:
            if is_transient(again):
                raise
            # It would come first in every batch from now on, and hold up all others.
            self._untouchable[appointment_id] = time.monotonic() + UNTOUCHABLE_SECONDS
            return await connection.fetch(statement.RECORD_UNTOUCHABLE, *failure)

    def _left_alone(self) -> list[int]:
        present = time.monotonic()
        self._untouchable = {each: until for each, until in self._untouchable.items() if until > present}
        return list(self._untouchable)

    async def _fetch_value(self, sql: str) -> int:
        async with self._database.autocommit() as connection:
            return cast(int, await connection.fetchval(sql))


def _outcome(row: Any) -> Outcome:
    return Outcome(
        appointment_id=row["appointment_id"],
        tenant_id=row["tenant_id"],
        modality=row["modality"],
        result=row["result"],
        attempt=row["attempt"],
        session_id=row["session_id"],
        reason=row["reason"],
        error_message=row["error_message"],
        parked=row["parked"],
        delay=row.get("delay"),
        span_id=row["span_id"],
        carrier=row["carrier"],
    )
