"""How many sockets a user has open, over all API processes.

Each open socket holds one of its user's numbered slots: a row that PostgreSQL lets nobody else insert. Each process
holds a row as well, and renews it. The others give up one that does not, which frees its slots; should it only have
been away, it comes back and takes slots anew for the sockets that it still has. None of them is closed for want of
one: the user just gets no further sockets until there are fewer.

Closing waits for nothing. What is in the table and not in memory, for whatever reason, goes with the next renewal.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg

from libs.domain.db import Database
from libs.domain.telemetry import logger
from libs.guardrails import Principal, Reason, Refused

_log: Final = logger("realtime")

RENEWAL_SECONDS: Final = 10.0
PATIENCE: Final = timedelta(seconds=30)
"""For how long a process may not be seen until the others give it up."""

RETRY_SECONDS: Final = 1.0
STOP_SECONDS: Final = 1.0
"""How long the end of the process waits for its slots to be free."""

# $1 this process, $2 patience. Whoever was not seen is given up only by those who were seen meanwhile: while the
# database is away nobody is.
_RENEW: Final = """
    WITH given_up AS (
        DELETE FROM api_processes other USING api_processes this
        WHERE this.id = $1 AND other.seen_at < this.seen_at - $2::interval
    )
    INSERT INTO api_processes (id) VALUES ($1) ON CONFLICT (id) DO UPDATE SET seen_at = clock()
"""
_LEAVE: Final = "DELETE FROM api_processes WHERE id = $1"

# $1 this process, $2 slots of a user, $3 sockets, $4 their tenants, $5 their users. Answers the sockets that there was
# a slot for, and whether they have it or somebody else was faster. The rows are inserted in order, so that no two
# processes wait for each other.
_TAKE: Final = """
    WITH wanted AS (
        SELECT *, row_number() OVER (PARTITION BY user_id) AS nth
        FROM unnest($3::uuid[], $4::bigint[], $5::bigint[]) AS socket (socket_id, tenant_id, user_id)
    ),
    free AS (
        SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY slot) AS nth
        FROM (
            SELECT user_id, generate_series(1, $2::int) AS slot FROM wanted
            EXCEPT
            SELECT user_id, slot FROM socket_slots WHERE user_id = ANY ($5)
        ) AS unheld
    ),
    taken AS (
        INSERT INTO socket_slots (user_id, slot, tenant_id, process_id, socket_id)
        SELECT user_id, slot, tenant_id, $1, socket_id FROM wanted JOIN free USING (user_id, nth)
        ORDER BY user_id, slot
        ON CONFLICT (user_id, slot) DO NOTHING
        RETURNING socket_id
    )
    SELECT socket_id, socket_id IN (SELECT socket_id FROM taken) AS taken FROM wanted JOIN free USING (user_id, nth)
"""
_TAKEN: Final = "SELECT socket_id FROM socket_slots WHERE process_id = $1"
_FREE: Final = "DELETE FROM socket_slots WHERE process_id = $1 AND socket_id = ANY ($2)"


class Slots:
    """The slots that sockets of this process hold."""

    def __init__(self, database: Database, *, per_user: int) -> None:
        self._database = database
        self._per_user = per_user
        self._process_id = uuid4()
        self._opening: set[UUID] = set()
        self._open: dict[UUID, Principal] = {}
        self._closed: set[UUID] = set()
        self._woken = asyncio.Event()
        self._renewing = asyncio.Lock()

    @asynccontextmanager
    async def held(self, caller: Principal) -> AsyncIterator[None]:
        """One of the caller's slots, for the life of a socket. Raises `Refused(RATE_LIMITED)` when none is free, and
        whatever keeps the database from saying so."""
        socket_id = uuid4()
        self._opening.add(socket_id)
        try:
            await self._take_one(socket_id, caller)
            self._open[socket_id] = caller
        finally:
            self._opening.remove(socket_id)
        try:
            yield
        finally:
            del self._open[socket_id]
            self._closed.add(socket_id)
            self._woken.set()

    async def run(self) -> None:
        """Renews and frees until cancelled, whatever becomes of the database meanwhile."""
        renew_at = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(renew_at - time.monotonic()):
                    await self._woken.wait()
            self._woken.clear()
            closed, self._closed = self._closed, set()
            try:
                if time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + RENEWAL_SECONDS
                    await self._renew()
                else:
                    await self._free(closed)
            except Exception as error:
                _log.warning("socket_slots_failed", exception_type=type(error).__name__)
                renew_at = 0.0
                await asyncio.sleep(RETRY_SECONDS)

    async def leave(self) -> None:
        """Frees all of them at once."""
        try:
            async with asyncio.timeout(STOP_SECONDS), self._database.autocommit() as connection:
                await connection.execute(_LEAVE, self._process_id)
        except Exception as error:
            _log.warning("socket_slots_failed", exception_type=type(error).__name__)

    async def _take_one(self, socket_id: UUID, caller: Principal) -> None:
        for _ in range(self._per_user + 1):  # Others are faster once for each slot at most, unless some are freed.
            try:
                async with self._database.autocommit() as connection:
                    found = await self._take(connection, {socket_id: caller})
            except asyncpg.ForeignKeyViolationError:
                await self._renew()  # This process was given up, or is too young to be known.
                continue
            if not found:
                break
            if found[socket_id]:
                return
        raise Refused(Reason.RATE_LIMITED, f"You have {self._per_user} sockets open; close one of them first.")

    async def _renew(self) -> None:
        """Has the table say of this process what is true."""
        async with self._renewing, self._database.autocommit() as connection:
            await connection.execute(_RENEW, self._process_id, PATIENCE)
            before = list(self._open)
            taken = {row["socket_id"] for row in await connection.fetch(_TAKEN, self._process_id)}
            lost = {each: self._open[each] for each in before if each in self._open and each not in taken}
            if lost:
                await self._take(connection, lost)
            if left := taken - self._open.keys() - self._opening:
                await connection.execute(_FREE, self._process_id, left)

    async def _take(self, connection: "asyncpg.Connection[Any]", sockets: Mapping[UUID, Principal]) -> dict[UUID, bool]:
        """Which of the sockets there was a slot for, and whether they have it."""
        callers = sockets.values()
        rows = await connection.fetch(
            _TAKE,
            self._process_id,
            self._per_user,
            list(sockets),
            [caller.tenant_id for caller in callers],
            [caller.user_id for caller in callers],
        )
        return {row["socket_id"]: row["taken"] for row in rows}

    async def _free(self, sockets: Collection[UUID]) -> None:
        async with self._database.autocommit() as connection:
            await connection.execute(_FREE, self._process_id, sockets)


@asynccontextmanager
async def open_slots(database: Database, *, per_user: int) -> AsyncIterator[Slots]:
    """Slots that are kept for the length of the block; `per_user` is how many a user has over all processes."""
    slots = Slots(database, per_user=per_user)
    renewing = asyncio.create_task(slots.run(), name="slots")
    try:
        yield slots
    finally:
        renewing.cancel()
        await asyncio.wait({renewing})
        await slots.leave()
