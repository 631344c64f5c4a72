"""The audit that the worker makes by itself, now and then."""

import asyncio
import time
from typing import Final

import orjson

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
_FOUND: Final = """
    WITH forgotten AS (DELETE FROM audits WHERE checked_at < $1)
    INSERT INTO audits (checked_at, violations) VALUES ($1, $2)
"""
_NEXT_SLOT: Final = f"SELECT extract(epoch FROM {_SLOT} + make_interval(secs => $1) - clock())::float8"


class Auditor:
    """Audits every `interval` seconds, 0 for never, once among all workers; no statement may take longer than
    `patience` seconds. What was found is a row, and every worker's gauges tell it."""

    def __init__(self, database: Database, metrics: Metrics, *, interval: float, patience: float) -> None:
        self._database = database
        self._interval = interval
        self._patience = patience
        metrics.gauge("audit_interval_seconds").set(interval)

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
        """Audits if no other worker does in this slot."""
        async with self._database.autocommit() as connection:
            claimed = await connection.fetchval(_CLAIM, self._interval)
        if claimed:
            await self.audit()

    async def audit(self) -> bool:
        """Whether it was this one who did it."""
        async with invariants.snapshot(self._database, self._patience) as connection:
            if not await connection.fetchval(_LOCK, invariants.LOCK_KEY):
                return False
            result = await invariants.audit(connection)
        found = orjson.dumps({finding.invariant.name: finding.violations for finding in result.findings}).decode()
        async with self._database.autocommit() as connection:
            await connection.execute(_FOUND, result.checked_at, found)
        for finding in result.violated:
            _log.error(
                "audit_violation",
                invariant=finding.invariant.name,
                violations=finding.violations,
                examples=finding.examples,
            )
        return True
