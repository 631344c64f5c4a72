"""PostgreSQL and Redis for tests and benchmarks, run as `sessiongate up` runs them, in a folder that goes
away afterwards."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg

from services.cli import embedded
from services.cli.embedded import DATABASE, OWNER, Servers
from services.cli.home import Home
from services.cli.migrate import upgrade


@contextmanager
def prepared_servers() -> Iterator[Servers]:
    """Servers for whoever starts and stops them by himself."""
    folder = Path(tempfile.mkdtemp(prefix="sessiongate-tests-"))
    folder.chmod(0o711)
    home = Home(folder / "home")
    home.create()
    try:
        with home.lock() as lock, embedded.prepare(home, lock) as servers:
            yield servers
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def running_servers(*, durable: bool) -> AsyncIterator[Servers]:
    """Empty servers. Unless they are to be durable nothing is synced to disk, which only a power cut could tell."""
    with prepared_servers() as servers:
        async with servers.postgres(), servers.redis():
            if not durable:
                await configure(servers, fsync="off", full_page_writes="off")
            yield servers


async def configure(servers: Servers, **settings: str) -> None:
    """Changes settings of PostgreSQL that need no restart."""
    async with administration(servers) as connection:
        for name, value in settings.items():
            await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        await connection.execute("SELECT pg_reload_conf()")


async def migrate(servers: Servers) -> None:
    """Gives the servers' own database the schema; it then serves as template."""
    await asyncio.to_thread(upgrade, servers.database_url(OWNER))


def url_of(servers: Servers, name: str, role: str = OWNER) -> str:
    """The address of another database of the same server."""
    return servers.database_url(role).replace(f"/{DATABASE}?", f"/{name}?")


@asynccontextmanager
async def administration(servers: Servers) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """A connection to none of the databases that tests use."""
    connection = await asyncpg.connect(url_of(servers, "postgres"))
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def copy_of(servers: Servers, template: str, name: str) -> AsyncIterator[str]:
    """A database made from a template, dropped at the end; yields its name."""
    async with administration(servers) as connection:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield name
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
