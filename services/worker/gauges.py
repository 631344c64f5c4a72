"""What the worker writes down and exports about the state of the database, from one place.

A heartbeat every second proves that a worker lives and that its pulse beats; as often, flags whose tripwire
is crossed are turned off. Every 15 seconds the gauges are set and the backlog sampled, runs made at the
command line are added to the counters, each exactly once, and old idempotency keys, decisions, alerts and lines of
the log are forgotten. Each of these is tried whatever becomes of the others.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

from libs.domain import alerts, idempotency
from libs.domain.conversion import monitor
from libs.domain.conversion.report import count
from libs.domain.decisions import log as decisions
from libs.domain.doorbell import Doorbell
from libs.domain.flags import tripwires
from libs.domain.invariants import INVARIANTS
from libs.domain.logs import search as logs
from libs.domain.runtime import Runtime
from libs.domain.tables import PENDING_DELIVERY
from libs.domain.telemetry import logger

_log: Final = logger("worker")

HEARTBEAT_SECONDS: Final = 1.0

_BEAT: Final = """
    INSERT INTO workers (name) VALUES ($1) ON CONFLICT (name) DO UPDATE SET beat_at = clock()
"""
_LEAVE: Final = "DELETE FROM workers WHERE name = $1 OR beat_at < clock() - interval '1 day'"

# A receiver that does not answer is no lag of ours, and what it has not taken is its operator's to mend.
_OUTBOX: Final = f"""
    SELECT count(*) AS depth,
        -- What was replayed, or waits to be tried again, is late since then.
        greatest(0, extract(epoch FROM clock() - min(greatest(e.created_at, d.available_at))
            FILTER (WHERE d.lane <> 'webhooks')))::float8 AS lag,
        (SELECT count(*) FROM outbox_deliveries WHERE dead_at IS NOT NULL AND lane <> 'webhooks') AS dead
    FROM outbox_deliveries d JOIN outbox_events e ON e.id = d.event_id
    WHERE {PENDING_DELIVERY}
"""

_AUDIT: Final = "SELECT checked_at, violations FROM audits ORDER BY checked_at DESC LIMIT 1"

_COUNT_RUNS: Final = """
    WITH run AS (
        UPDATE conversion_runs SET counted = true
        WHERE NOT counted AND (finished_at IS NOT NULL OR started_at < clock() - interval '5 minutes')
        RETURNING run_id, task, started_at
    )
    SELECT run.task, a.result, a.modality, a.reason, count(*)::int AS number
    FROM run JOIN conversion_attempts a ON a.run_id = run.run_id AND a.started_at >= run.started_at
    GROUP BY 1, 2, 3, 4
"""


_MEASURED: Final = (
    ("appointments_due_count",),
    ("appointments_overdue",),
    ("appointments_needs_attention",),
    ("outbox_dispatch_lag_seconds",),
    ("outbox_dead",),
    ("worker_queue_depth", "outbox"),
    ("worker_queue_depth", "arq"),
    ("audit_last_run_timestamp_seconds",),
    *(("audit_violations", invariant.name) for invariant in INVARIANTS),
)


class Gauges:
    def __init__(self, runtime: Runtime, doorbell: Doorbell, worker: str, is_well: Callable[[], bool]) -> None:
        self._runtime = runtime
        self._doorbell = doorbell
        self._worker = worker
        self._is_well = is_well

    async def run(self) -> None:
        """Beats and measures until cancelled."""
        database = self._runtime.database
        measured_at = float("-inf")
        loop = asyncio.get_running_loop()
        while True:
            if self._is_well():
                await self._try("beat", self._execute(_BEAT))
            if loop.time() - measured_at >= monitor.SAMPLE_SECONDS:
                measured_at = loop.time()
                if not await self._try("measure", self.measure()):
                    for series in _MEASURED:
                        self._runtime.metrics.gauge(*series).set(math.nan)
                await self._try("idempotency", idempotency.prune(database))
                await self._try("decisions", decisions.prune(database))
                await self._try("alerts", alerts.prune(database))
                await self._try("log_lines", self._prune_log_lines())
            await self._try("tripwires", self.trip_flags())
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _try(self, task: str, work: Awaitable[object]) -> bool:
        """Whether it could be done; if not, why is in the log."""
        try:
            await work
        except Exception as error:
            _log.error("gauges_failed", exc_info=error, exception_type=type(error).__name__, task=task)
            return False
        return True

    async def measure(self) -> None:
        metrics, database = self._runtime.metrics, self._runtime.database
        appointments = await monitor.sample(database)
        metrics.gauge("appointments_due_count").set(appointments.due)
        metrics.gauge("appointments_overdue").set(appointments.overdue)
        metrics.gauge("appointments_needs_attention").set(appointments.needs_attention)
        async with database.autocommit() as connection:
            outbox = await connection.fetchrow(_OUTBOX)
            runs = await connection.fetch(_COUNT_RUNS)
            audit = await connection.fetchrow(_AUDIT)
        assert outbox is not None
        metrics.gauge("outbox_dispatch_lag_seconds").set(outbox["lag"])
        metrics.gauge("outbox_dead").set(outbox["dead"])
        metrics.gauge("worker_queue_depth", "outbox").set(outbox["depth"])
        metrics.gauge("worker_queue_depth", "arq").set(await self._doorbell.waiting())
        if audit is not None:
            metrics.gauge("audit_last_run_timestamp_seconds").set(audit["checked_at"].timestamp())
            for invariant in INVARIANTS:
                metrics.gauge("audit_violations", invariant.name).set(audit["violations"].get(invariant.name, 0))
        for run in runs:
            count(metrics, run["task"], [(run["result"], run["modality"], run["reason"], run["number"])])
        metrics.gauge("gauges_last_run_timestamp_seconds").set(time.time())

    async def _prune_log_lines(self) -> None:
        settings = self._runtime.settings
        await logs.prune(self._runtime.database, hours=settings.log_search_hours, lines=settings.log_search_lines)

    async def trip_flags(self) -> None:
        async with self._runtime.begin() as tx:
            tripped = await tripwires.trip(tx)
        for each in tripped:
            each.tell(self._runtime.metrics)

    async def leave(self) -> None:
        """Takes this worker off the list, when it stops in good order."""
        await self._execute(_LEAVE)

    async def _execute(self, statement: str) -> None:
        async with self._runtime.database.autocommit() as connection:
            await connection.execute(statement, self._worker)
