"""The audit that the worker makes by itself, now and then."""

import asyncio
import time
from typing import Final

from libs.domain import invariants
from libs.domain.db import Database
from libs.domain.telemetry import logger
from libs.observability.registry import Metrics

_log: Final = logger("audit")

REST: Final = 9.0
"""A pause is at least so many times as long as what comes before it, however short the interval."""

_LOCK: Final = "SELECT pg_try_advisory_xact_lock($1)"

# Each interval is a slot of the database's clock, and whoever writes its row audits in it.
_SLOT: Final = "date_bin(make_interval(secs => $1), clock(), 'epoch')"
_CLAIM: Final = f"INSERT INTO cron_runs (name, slot) VALUES ('audit', {_SLOT}) ON CONFLICT DO NOTHING RETURNING true"
_NEXT_SLOT: Final = f"SELECT extract(epoch FROM {_SLOT} + make_interval(secs => $1) - clock())::float8"


class Auditor:
    """Audits every `interval` seconds, once among all workers; no statement may take longer than `patience` seconds."""

    def __init__(self, database: Database, metrics: Metrics, *, interval: float, patience: float) -> None:
        self._database = database
        self._metrics = metrics
        self._interval = interval
        self._patience = patience

    async def run(self) -> None:
        """Audits until cancelled, first in the next slot: workers that restart do not begin with it."""
        while True:
            began = time.monotonic()
            pause = self._interval
            try:
                async with self._database.autocommit() as connection:
                    pause = await connection.fetchval(_NEXT_SLOT, self._interval)
                await asyncio.sleep(pause)
                began = time.monotonic()
                await self.slot()
            except Exception as error:
                _log.error("audit_failed", exc_info=error, exception_type=type(error).__name__)
                await asyncio.sleep(pause)
            await asyncio.sleep(REST * (time.monotonic() - began))

    async def slot(self) -> None:
        """Audits if no other worker does in this slot. Whoever does not has nothing to say of violations any more:
        what one worker found would otherwise be told after another has seen it mended."""
        async with self._database.autocommit() as connection:
            claimed = await connection.fetchval(_CLAIM, self._interval)
        if claimed:
            await self.audit()
        else:
            for invariant in invariants.INVARIANTS:
                self._metrics.gauge("audit_violations", invariant.name).set(0)

    async def audit(self) -> bool:
        """Whether it was this one who did it."""
        async with invariants.snapshot(self._database, self._patience) as connection:
            if not await connection.fetchval(_LOCK, invariants.LOCK_KEY):
                return False
            result = await invariants.audit(connection)
        for finding in result.findings:
            self._metrics.gauge("audit_violations", finding.invariant.name).set(finding.violations)
        for finding in result.violated:
            _log.error(
                "audit_violation",
                invariant=finding.invariant.name,
                violations=finding.violations,
                examples=finding.examples,
            )
        self._metrics.gauge("audit_last_run_timestamp_seconds").set(result.checked_at.timestamp())
        return True
