"""The audit that the worker makes by itself, now and then."""

import asyncio
import random
import time
from typing import Final

from libs.domain import invariants
from libs.domain.db import Database
from libs.domain.telemetry import logger
from libs.observability.registry import Metrics

_log: Final = logger("audit")

JITTER: Final = 0.2
"""The share by which a pause is longer or shorter, so that workers that start together do not stay together."""

REST: Final = 9.0
"""A pause is at least so many times as long as what comes before it, however short the interval."""

_LOCK: Final = "SELECT pg_try_advisory_xact_lock($1)"


class Auditor:
    """Audits about every `interval` seconds, unless another worker is at it; no statement may take longer than
    `patience` seconds."""

    def __init__(self, database: Database, metrics: Metrics, *, interval: float, patience: float) -> None:
        self._database = database
        self._metrics = metrics
        self._interval = interval
        self._patience = patience

    async def run(self) -> None:
        """Audits until cancelled, first after a part of the interval: workers that restart do not begin with it."""
        pause = self._interval * random.random()  # noqa: S311 not for secrecy
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            try:
                await self.audit()
            except Exception as error:
                _log.error("audit_failed", exc_info=error, exception_type=type(error).__name__)
            pause = max(self._interval, REST * (time.monotonic() - began))
            pause *= random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 not for secrecy

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
