"""What the worker does by the clock: each job in every slot of a minute, once among all workers.

The clock is the database's, and the slot is a row: whoever writes it does the job. A slot in which no worker was
there is not made up for; the jobs look at what there is to do, and the next slot finds it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from libs.domain.db import Database
from libs.domain.telemetry import logger

_log: Final = logger("worker")

SLOT_SECONDS: Final = 60
RETRY_SECONDS: Final = 5.0

_SLOT: Final = f"date_bin('{SLOT_SECONDS} seconds', clock(), 'epoch')"
_CLAIM: Final = f"""
    WITH forgotten AS (DELETE FROM cron_runs WHERE slot < clock() - interval '1 day')
    INSERT INTO cron_runs (name, slot) SELECT name, {_SLOT} FROM unnest($1::text[]) AS name ORDER BY name
    ON CONFLICT DO NOTHING RETURNING name
"""
_NEXT_SLOT: Final = f"SELECT extract(epoch FROM {_SLOT} + interval '{SLOT_SECONDS} seconds' - clock())::float8"


class Cron:
    """Runs `jobs`, by their names, until stopped."""

    def __init__(self, database: Database, jobs: Mapping[str, Callable[[], Awaitable[Any]]]) -> None:
        self._database = database
        self._jobs = jobs
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Ends `run` once it has finished what it is doing."""
        self._stopped.set()

    async def run(self) -> None:
        """Does what is to be done in each slot. A job that fails is logged, and tried again in the next slot."""
        while not self._stopped.is_set():
            try:
                sleep = await self.slot()
            except Exception as error:
                self._failed(error)
                sleep = RETRY_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(sleep):
                    await self._stopped.wait()

    async def slot(self) -> float:
        """Does what no other worker does in this slot; answers for how many seconds there is no other slot."""
        async with self._database.autocommit() as connection:
            claimed = {row["name"] for row in await connection.fetch(_CLAIM, list(self._jobs))}
        for name, job in self._jobs.items():
            if name in claimed and not self._stopped.is_set():
                try:
                    await job()
                except Exception as error:
                    self._failed(error, name)
        async with self._database.autocommit() as connection:
            return float(await connection.fetchval(_NEXT_SLOT))

    def _failed(self, error: Exception, name: str | None = None) -> None:
        _log.error("cron_failed", exc_info=error, exception_type=type(error).__name__, task=name)
