"""Connections to PostgreSQL: two small pools over one address, and single ones, all made by asyncpg.

`Database.begin` opens a transaction. `Database.autocommit` hands out a bare asyncpg connection for
the few hot operations that are one statement each: it skips BEGIN, COMMIT, the reset query and SQLAlchemy,
so nothing that runs on it may leave session state behind. `Database.alone` is for who keeps a connection.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, Final, Self, cast

import asyncpg
import orjson
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from libs.domain.statements import trace_engine, trace_statements
from libs.observability.registry import Metrics

CONNECT_TIMEOUT: Final = 3.0
POOL_TIMEOUT: Final = 2.0
CLOSE_TIMEOUT: Final = 2.0

WORKER_TIMEOUTS: Final[Mapping[str, str]] = {
    "statement_timeout": "30s",
    "transaction_timeout": "35s",
}
"""Longer than those the login role has by default; background work has nobody waiting for it."""

# Short statements over few rows: compiling them takes longer than running them, and the default price of
# an index is that of a spinning disk, at which whole tables of people would be read for each batch.
_PLANNING: Final[Mapping[str, str]] = {"jit": "off", "random_page_cost": "1.1"}

# By way of pg_settings, so that a server too old to know one of them is no obstacle.
_CONFIGURE: Final = """
    SELECT set_config(known.name, wanted.value, false)
    FROM unnest($1::text[], $2::text[]) AS wanted(name, value)
    JOIN pg_settings known USING (name)
"""


# 08 connection, 40 rollback (deadlock, serialisation), 53 resources, 57 operator (shutdown, cancelled),
# 55P03 lock not available, 25P03 and 25P04 idle in transaction and transaction timeout.
_TRANSIENT_CLASSES: Final = {"08", "40", "53", "57"}
_TRANSIENT_STATES: Final = {"55P03", "25P03", "25P04"}
_CONFLICT_STATES: Final = {"40001", "40P01"}


class Database:
    """The pools of one process. `application` names it in `pg_stat_activity`."""

    def __init__(
        self,
        dsn: str,
        *,
        application: str,
        pool_size: int = 10,
        command_timeout: float = 10.0,
        timeouts: Mapping[str, str] | None = None,
    ) -> None:
        async def connect(
            name: str = application, patience: float | None = None, **options: Any
        ) -> "asyncpg.Connection[Any]":
            connection: asyncpg.Connection[Any] = await asyncpg.connect(
                dsn,
                timeout=CONNECT_TIMEOUT,
                command_timeout=patience or command_timeout,
                server_settings={"application_name": name, "timezone": "UTC", **_PLANNING},
                **options,
            )
            try:
                chosen = timeouts if patience is None else _patient(patience)
                if chosen:
                    await connection.execute(_CONFIGURE, list(chosen), list(chosen.values()))
            except BaseException:
                connection.terminate()  # or nobody ever closes it
                raise
            trace_statements(connection)
            return connection

        self.max_connections: Final = 2 * pool_size
        self._timed_out: Callable[[], None] = lambda: None
        self._application = application
        self._connect = connect
        self._transactions: Final = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda *_, **__: connect(),
            poolclass=AsyncAdaptedQueuePool,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT,
            pool_pre_ping=True,
            hide_parameters=True,
            json_deserializer=orjson.loads,
        )
        trace_engine(self._transactions.sync_engine)
        self._statements: Final = asyncpg.create_pool(
            connect=lambda *_, **options: connect(**options),
            init=_read_json,
            reset=_nothing,
            min_size=0,
            max_size=pool_size,
            max_queries=1_000_000_000,
            max_inactive_connection_lifetime=0,
        )

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction: committed at the end, rolled back on any exception."""
        async with AsyncExitStack() as stack:
            with self._waiting():
                connection = await stack.enter_async_context(self._transactions.begin())
            yield connection

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        """A bare asyncpg connection on which each statement is its own transaction."""
        pool = await self._statements  # opened by the first who comes
        with self._waiting():
            connection = await pool.acquire(timeout=POOL_TIMEOUT)
        try:
            yield cast("asyncpg.Connection[Any]", connection)
        except asyncio.CancelledError:
            connection.terminate()  # or its return would wait for a server that may be frozen
            raise
        finally:
            await pool.release(connection)

    @asynccontextmanager
    async def alone(self, purpose: str, *, patience: float | None = None) -> AsyncIterator["asyncpg.Connection[Any]"]:
        """A connection outside of the pools, for whoever listens or reads for long; `purpose` is added to its name.

        With `patience` each statement may take so many seconds, and a transaction as long as it likes.
        """
        connection = await self._connect(f"{self._application} {purpose}", patience)
        try:
            yield connection
        finally:
            connection.terminate()  # whoever listens or reads has nothing to finish, and the server may be gone

    def observed(self, metrics: Metrics, pool: str) -> Self:
        """Has `metrics` tell how many connections there may be, whenever it is asked how many are in use, and how often
        somebody waited for one in vain."""
        metrics.gauge("db_connections_max", pool).set(self.max_connections)
        metrics.gauge("db_connections_in_use", pool).set_function(self.in_use)
        self._timed_out = metrics.counter("db_pool_timeouts_total", pool).inc
        return self

    def in_use(self) -> int:
        """Connections checked out at this moment, of both pools."""
        in_transactions = cast(AsyncAdaptedQueuePool, self._transactions.pool).checkedout()
        return in_transactions + self._statements.get_size() - self._statements.get_idle_size()

    async def connect(self) -> AsyncConnection:
        """A connection of the transactional pool, not yet in a transaction; the caller closes it."""
        with self._waiting():
            return await self._transactions.connect()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """While a connection of a pool is waited for."""
        try:
            yield
        except (TimeoutError, PoolTimeout):
            self._timed_out()
            raise

    async def close(self) -> None:
        """Takes leave of the server, but not for longer than `CLOSE_TIMEOUT` of one that does not answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.gather(self._transactions.dispose(), (await self._statements).close())


def _patient(seconds: float) -> Mapping[str, str]:
    return {"statement_timeout": f"{seconds:.0f}s", "transaction_timeout": "0"}


def driver_error(error: BaseException) -> BaseException:
    """What the driver raised, without what SQLAlchemy wraps around it."""
    cause = getattr(error, "orig", None)
    return getattr(cause, "__cause__", None) or cause or error


def is_conflict(error: BaseException) -> bool:
    """Whether the server undid the transaction in favour of another one: repeated, it can succeed at once."""
    return getattr(driver_error(error), "sqlstate", None) in _CONFLICT_STATES


def is_transient(error: BaseException) -> bool:
    """Whether trying again later can help: locks, deadlocks, timeouts, overload, a lost connection.

    Everything else is the fault of the data or of the statement.
    """
    error = driver_error(error)
    if isinstance(error, asyncpg.PostgresError):
        state: str = error.sqlstate or ""
        return state[:2] in _TRANSIENT_CLASSES or state in _TRANSIENT_STATES
    # The driver's internal error is what a connection that the server cut between two messages comes to.
    lost = OSError | TimeoutError | PoolTimeout | asyncpg.InterfaceError | asyncpg.InternalClientError
    return isinstance(error, lost)


async def driver(connection: AsyncConnection) -> "asyncpg.Connection[Any]":
    """The asyncpg connection beneath, in whose transaction the statements then run."""
    raw = await connection.get_raw_connection()
    return cast("asyncpg.Connection[Any]", raw.driver_connection)


async def _read_json(connection: "asyncpg.Connection[Any]") -> None:
    """Has JSON read as SQLAlchemy has it on the connections of its pool; it is written as text."""
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=str, decoder=orjson.loads)


async def _nothing(_: object) -> None:
    """In place of the reset query."""
