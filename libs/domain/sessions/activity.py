"""Activity: a text session in which neither party does anything any more ends, and costs no more.

Whatever the guard allows a party to do in an active text session keeps it alive. That is noted here and written
for all sessions together about every second, so that sending a message stays one statement. Frames that pass no
guard, such as the pings of a window nobody looks at, keep nothing alive; calls have a sign of their own.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Final

from libs.domain.db import Database
from libs.domain.sessions.facts import FORSAKEN_AT
from libs.domain.telemetry import logger
from libs.guardrails import Claim, Facts, Flags, Operation, Role, SessionKind, SessionStatus, Verdict

_log: Final = logger("sessions")

FLUSH_SECONDS: Final = 1.0
"""Less than `FORSAKEN_AT` allows for, so that no session ends because what was done in it is not written yet."""

LIMIT: Final = 100_000
"""At most so many sessions are noted; the others are once they do something again."""

BATCH: Final = 500
STOP_SECONDS: Final = 2.0
"""How long the end of the process waits for what is noted to be written."""

_PARTIES: Final = {Role.PATIENT, Role.DOCTOR}

# $1 sessions, $2 how long each stays active from now on. Answers those that somebody holds. What is over already
# stays over.
_KEEP_ALIVE: Final = f"""
    WITH live AS MATERIALIZED (
        SELECT id FROM sessions s
        WHERE id = ANY ($1::bigint[]) AND status = 'active'
          AND (s.idle_at IS NULL OR {FORSAKEN_AT} > clock())
    ),
    free AS MATERIALIZED (
        SELECT id FROM sessions s WHERE id IN (SELECT id FROM live) AND status = 'active'
        ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
    ),
    kept AS (UPDATE sessions s SET idle_at = clock() + $2::interval FROM free WHERE s.id = free.id)
    SELECT id FROM live WHERE id NOT IN (SELECT id FROM free)
"""


class Activity:
    """What the parties of text sessions have just done, as a witness of this process's guard."""

    def __init__(self, database: Database, *, inactivity: timedelta) -> None:
        self._database = database
        self._inactivity = inactivity
        self._noted: set[int] = set()
        self._writing = asyncio.Lock()
        self._stopped = asyncio.Event()

    def saw(self, claim: Claim[Operation], facts: Facts, flags: Flags, verdict: Verdict) -> None:
        session = facts.session
        if (
            verdict.refusal is None
            and session is not None
            and session.kind is SessionKind.TEXT
            and session.status is SessionStatus.ACTIVE
            and claim.caller.role in _PARTIES
            and len(self._noted) < LIMIT
        ):
            self._noted.add(session.id)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Writes for the length of the block, and what is left at its end."""
        writer = asyncio.create_task(self._run(), name="activity")
        try:
            yield
        finally:
            self._stopped.set()
            done, _ = await asyncio.wait({writer}, timeout=STOP_SECONDS)
            if not done:
                writer.cancel()
                await asyncio.wait({writer})

    async def _run(self) -> None:
        while not self._stopped.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._stopped.wait()
            try:
                await self.flush()
            except Exception as error:
                _log.warning("activity_not_written", exception_type=type(error).__name__, waiting=len(self._noted))

    async def flush(self) -> None:
        """Writes all that is noted by now; what somebody holds, and what could not be written, stays for the next
        time."""
        async with self._writing:
            noted = list(self._noted)
            for batch in (noted[begin : begin + BATCH] for begin in range(0, len(noted), BATCH)):
                self._noted.difference_update(batch)
                try:
                    async with self._database.autocommit() as connection:
                        held = await connection.fetch(_KEEP_ALIVE, batch, self._inactivity)
                except BaseException:
                    self._noted.update(batch)
                    raise
                self._noted.update(row["id"] for row in held)
