"""The pulse: a loop on the monotonic clock that finds due work in PostgreSQL, whatever Redis does.

Each beat first settles the sessions that are due, which ends those that are over, and then converts, so
that back-to-back appointments of one doctor follow each other. Between beats it sleeps until the next due
moment, at most a second.
"""

import asyncio
import time
from typing import Final

from libs.domain.appointments.expiry import expire_pending
from libs.domain.conversion.report import Reporter
from libs.domain.conversion.runs import Converter, ConverterBusy, Run
from libs.domain.conversion.statement import DUE_AT
from libs.domain.jobs import DispatchOutbox
from libs.domain.runtime import Runtime
from libs.domain.sessions.settlement import due_sessions
from libs.domain.tables import DUE
from libs.domain.telemetry import logger

_log: Final = logger("conversion")

LONGEST_SLEEP: Final = 1.0
BUSY_SLEEP: Final = 0.05
"""Seconds until the next look when something is due that another process holds."""

SUMMARY_SECONDS: Final = 60.0
WELL_SECONDS: Final = 10.0
STUCK_SECONDS: Final = 60.0

# Each is the head of an index.
_NEXT_DUE: Final = f"""
    SELECT extract(epoch FROM least(
        (SELECT {DUE_AT} FROM appointments WHERE {DUE} ORDER BY {DUE_AT} LIMIT 1),
        (SELECT least(response_deadline, expires_at) FROM sessions WHERE status IN ('waiting', 'connecting')
            ORDER BY least(response_deadline, expires_at) LIMIT 1),
        (SELECT tick_at FROM sessions WHERE status = 'active' ORDER BY tick_at LIMIT 1),
        (SELECT starts_at FROM appointments WHERE status = 'PENDING' ORDER BY starts_at LIMIT 1)
    ) - clock())::float8
"""


class Pulse:
    def __init__(self, runtime: Runtime, converter: Converter, reporter: Reporter) -> None:
        self._runtime = runtime
        self._converter = converter
        self._reporter = reporter
        self._woken = asyncio.Event()
        self._stopped = False
        self._summary_at = time.monotonic() + SUMMARY_SECONDS
        self._beat_at = self._well_at = time.monotonic()

    @property
    def is_well(self) -> bool:
        """Whether a beat went well of late."""
        return time.monotonic() - self._well_at < WELL_SECONDS

    @property
    def is_stuck(self) -> bool:
        """Whether not even a beat that failed has ended for long: then only a new process helps."""
        return time.monotonic() - self._beat_at > STUCK_SECONDS

    def wake(self) -> None:
        """Something may be due now: beat without waiting for the end of the sleep."""
        self._woken.set()

    def stop(self) -> None:
        """Ends `run` once it has finished what it is doing."""
        self._stopped = True
        self._woken.set()

    async def run(self) -> None:
        """Beats until stopped. A beat that fails is logged, and the next one comes."""
        while not self._stopped:
            self._woken.clear()
            sleep = LONGEST_SLEEP
            try:
                sleep = await self.beat()
                self._well_at = time.monotonic()
            except Exception as error:
                _log.error("pulse_beat_failed", exc_info=error, exception_type=type(error).__name__)
            self._beat_at = time.monotonic()
            try:
                async with asyncio.timeout(sleep):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def beat(self) -> float:
        """Does what is due; answers for how many seconds nothing will be."""
        run: Run | None = Run("auto_start")
        due_in = await self._due_in()
        if due_in <= 0:
            settled = await self._settle()
            run = await self._convert()
            due_in = max(await self._due_in(), BUSY_SLEEP) if settled else LONGEST_SLEEP
        if run is not None:
            self._account_for(run)
        return min(due_in, LONGEST_SLEEP)

    async def _due_in(self) -> float:
        async with self._runtime.database.autocommit() as connection:
            due_in = await connection.fetchval(_NEXT_DUE)
        return LONGEST_SLEEP if due_in is None else float(due_in)

    async def _settle(self) -> bool:
        """Whether all went well. Conversion does not wait for what cannot be ended, nor one session for another."""
        well = True
        try:
            async with self._runtime.begin() as tx:
                await self._runtime.settlement.due(tx)
        except Exception as error:
            self._failed(error)
            well = False
            async with self._runtime.begin() as tx:
                due = await due_sessions(tx)
            for session_id in due:
                try:
                    async with self._runtime.begin() as tx:
                        await self._runtime.settlement.free(tx, session_id)
                except Exception as error:
                    self._failed(error, session_id)
        try:
            async with self._runtime.begin() as tx:
                await expire_pending(tx)
        except Exception as error:
            self._failed(error)
            well = False
        return well

    def _failed(self, error: Exception, session_id: int | None = None) -> None:
        _log.error("settlement_failed", exc_info=error, exception_type=type(error).__name__, session_id=session_id)

    async def _convert(self) -> Run | None:
        """The run, or None when another process converts."""
        try:
            run = await self._converter.auto_start()
        except ConverterBusy:
            return None
        if run.created_count:
            self._runtime.bell.ring(DispatchOutbox())
        return run

    def _account_for(self, run: Run) -> None:
        """Every run that did something is told; those that did nothing are told once a minute as one."""
        self._reporter.ran(run)
        if run.attempted_count:
            self._reporter.finished(run)
        elif time.monotonic() >= self._summary_at:
            self._reporter.finished(run)
            self._summary_at = time.monotonic() + SUMMARY_SECONDS
