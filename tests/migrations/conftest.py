from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import count

import asyncpg
import pytest

from services.cli.embedded import DATABASE, OWNER, Servers

_numbers = count(1)


MakeDatabase = Callable[[], Coroutine[None, None, str]]


@pytest.fixture
async def make_empty(servers: Servers) -> AsyncIterator[MakeDatabase]:
    """Makes databases that hold nothing at all; the answer is the owner's URL."""
    made: list[str] = []
    administration = await asyncpg.connect(_url(servers, "postgres"))

    async def make() -> str:
        made.append(f"empty_{next(_numbers)}")
        await administration.execute(f"CREATE DATABASE {made[-1]} TEMPLATE template0")
        return _url(servers, made[-1])

    yield make
    for name in made:
        await administration.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await administration.close()


@pytest.fixture
async def empty(make_empty: MakeDatabase) -> str:
    return await make_empty()


def _url(servers: Servers, database: str) -> str:
    return servers.database_url(OWNER).replace(f"/{DATABASE}?", f"/{database}?")
