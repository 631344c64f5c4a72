"""The flags of a running process: all overrides in memory, and never for long behind the database.

A change is heard by LISTEN and, should the message be lost, found by a look once a second. Whoever loses the
database keeps the last values, and reads everything anew when it is back.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from libs.domain.db import Database
from libs.domain.flags import overrides
from libs.domain.telemetry import logger
from libs.guardrails import Flag, Flags, Rollout
from libs.observability.registry import Metrics

if TYPE_CHECKING:
    import asyncpg

_log: Final = logger("flags")

POLL_SECONDS: Final = 1.0
READ_SECONDS: Final = 2.0
FIRST_WAIT: Final = 0.1
LONGEST_WAIT: Final = 1.0
CANCEL_AGAIN_SECONDS: Final = 0.5


class LiveFlags:
    """The `FlagSource` of a process. Until `following` has begun, and while there has never been a database, the
    flags are those of the environment."""

    def __init__(self, environment: Flags, *, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._reading = asyncio.Lock()
        self._tried = asyncio.Event()
        self._wait = FIRST_WAIT
        self._adopt(Rollout(environment))

    @property
    def rollout(self) -> Rollout:
        """The flags and where they come from, as this process knows them now."""
        return self._rollout

    def for_tenant(self, tenant_id: int) -> Flags:
        flags = self._by_tenant.get(tenant_id)
        if flags is None:
            flags = self._by_tenant[tenant_id] = self._rollout.for_tenant(tenant_id)
        return flags

    async def reload(self) -> None:
        """Takes in what is committed by now, for whoever has just committed a change and may not wait."""
        async with self._database.autocommit() as connection:
            await self._read(connection)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follows every change for as long as the block lasts. The block begins once the overrides are known, or
        cannot be; the log then names those that shadow the environment."""
        task = asyncio.create_task(self._follow(), name="flags")
        try:
            await self._tried.wait()
            for override in self._rollout.shadowing():
                _log.warning(
                    "flag_environment_shadowed",
                    flag=override.flag.value,
                    tenant_id=override.tenant_id,
                    target=override.target.as_json(),
                    environment=self._rollout.environment[override.flag],
                )
            yield
        finally:
            while not task.done():  # one that is just connecting may lose a cancellation
                task.cancel()
                await asyncio.wait([task], timeout=CANCEL_AGAIN_SECONDS)

    async def _follow(self) -> None:
        """Listens for ever; a connection that is lost, or could not be had, is replaced."""
        while True:
            try:
                async with self._database.alone("flags") as connection:
                    await self._listen(connection)
            except Exception as error:
                if self._wait == FIRST_WAIT:  # the others in a row say nothing new
                    _log.warning("flags_not_followed", exc_info=error, exception_type=type(error).__name__)
            self._tried.set()
            await asyncio.sleep(self._wait)
            self._wait = min(2 * self._wait, LONGEST_WAIT)

    async def _listen(self, connection: "asyncpg.Connection[Any]") -> None:
        """Reads everything, then anew whenever it is told to or a second has passed. Raises once the
        connection is lost."""
        changed = asyncio.Event()
        await connection.add_listener(overrides.CHANNEL, lambda *_: changed.set())
        connection.add_termination_listener(lambda *_: changed.set())
        while True:
            changed.clear()
            await self._read(connection)
            self._tried.set()
            self._wait = FIRST_WAIT
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await changed.wait()

    async def _read(self, connection: "asyncpg.Connection[Any]") -> None:
        async with self._reading:  # so that what was read first cannot be taken in last
            found = await overrides.read(connection, timeout=READ_SECONDS)
            rollout = Rollout.of(self._rollout.environment, found)
            if rollout != self._rollout:
                self._adopt(rollout)

    def _adopt(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._by_tenant: dict[int, Flags] = {}
        for flag in Flag:
            self._metrics.gauge("feature_flag_enabled", flag.value).set(rollout.value(flag, None).enabled)
