"""Real servers for all tests: PostgreSQL and Redis per run, a database of its own per test."""

import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import asyncpg
import pytest

from libs.domain.db import Database
from libs.observability.testing import OtlpReceiver
from services.cli.embedded import DATABASE, LOGIN, OWNER, Servers
from tests.clinic import Clinic
from tests.clock import CLOCK_OF_TESTS, Clock
from tests.running import Api, running_api
from tests.servers import copy_of, migrate, running_servers, url_of

_numbers = count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storm",
        choices=("short", "full"),
        default="short",
        help="How long the storms rage, and all other tests that may take long.",
    )


@pytest.fixture(scope="session")
async def servers() -> AsyncIterator[Servers]:
    async with running_servers(durable=False) as running:
        yield running


@pytest.fixture(scope="session")
async def migrated(servers: Servers) -> str:
    """The name of a database with the whole schema and no rows, whose clock tests can move."""
    await migrate(servers)
    connection = await asyncpg.connect(servers.database_url(OWNER))
    await connection.execute(CLOCK_OF_TESTS)
    await connection.close()
    return DATABASE


@dataclass(frozen=True)
class Urls:
    """One test's database, as the services and as the owner of the schema reach it; and Redis."""

    app: str
    owner: str
    redis: str


@pytest.fixture
async def urls(servers: Servers, migrated: str) -> AsyncIterator[Urls]:
    async with copy_of(servers, migrated, f"test_{next(_numbers)}") as name:
        yield Urls(url_of(servers, name, LOGIN), url_of(servers, name), servers.redis_url)


@pytest.fixture
async def database(urls: Urls) -> AsyncIterator[Database]:
    opened = Database(urls.app, application="tests", pool_size=10)
    yield opened
    await opened.close()


@pytest.fixture
async def owner(urls: Urls) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """A connection that may do anything, to look behind the scenes and to break things."""
    connection = await asyncpg.connect(urls.owner)
    yield connection
    await connection.close()


@pytest.fixture
def clock(owner: "asyncpg.Connection[Any]") -> Clock:
    return Clock(owner)


@pytest.fixture
async def clinic(database: Database) -> Clinic:
    return await Clinic.open(database)


@pytest.fixture
def collector() -> Iterator[OtlpReceiver]:
    """A collector of traces; whoever is to export to it is told by the test."""
    with OtlpReceiver() as running:
        yield running


MakeApi = Callable[..., Coroutine[Any, Any, Api]]


@pytest.fixture
async def make_api(urls: Urls) -> AsyncIterator[MakeApi]:
    """Starts API servers: `await make_api(ENFORCE_SESSION_GATED_CHAT=True, pool_size=3)`."""
    async with AsyncExitStack() as stack:

        async def make(**settings: Any) -> Api:
            return await stack.enter_async_context(running_api(urls.app, urls.redis, **settings))

        yield make


@pytest.fixture
async def api(make_api: MakeApi) -> Api:
    """An API server with the flags of the last phase of the rollout."""
    return await make_api(
        ENFORCE_SESSION_GATED_CHAT=True, ENFORCE_SESSION_GATED_BILLING=True, DISABLE_LEGACY_APPOINTMENT_TRIGGERS=True
    )


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests say what they need; the developer's environment and `.env` must not leak in."""
    for name in list(os.environ):
        if name.startswith(("SESSIONGATE_", "OTEL_", "ENFORCE_", "DISABLE_LEGACY_", "ALLOW_LEGACY_")):
            monkeypatch.delenv(name)
