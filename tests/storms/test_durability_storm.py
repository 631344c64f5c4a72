"""Whatever is killed, and when: what a client was told has happened is in the database."""

import asyncio
import random
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx2
import psutil
import pytest

from libs.domain.db import Database
from libs.domain.invariants import violations
from libs.guardrails import Principal, Role
from services.cli import processes
from services.cli.embedded import LOGIN, OWNER, Servers
from tests.clinic import Clinic
from tests.population import populate
from tests.processes import until
from tests.running import client_of, token_of
from tests.servers import configure, migrate, prepared_servers
from tests.storms import apis
from tests.storms.apis import Api, Sabotage

APIS: Final = 2
CLIENTS: Final = 16
TALK: Final = ("patient", "doctor", "patient", "doctor", "patient")
BOOKINGS: Final = 4
PER_SESSION: Final = len(TALK) + BOOKINGS + 1
"""How many requests there are for each session: messages, bookings, and its end."""

DONE: Final = {"bookings": ("appointments", "reason"), "messages": ("messages", "body"), "ends": ("sessions", "status")}
"""The table in which a request has left a row, and the column that tells that it is that of the request."""


@dataclass(frozen=True)
class Scale:
    """How many requests are acknowledged while how often one of the APIs, and PostgreSQL, is killed."""

    requests: int
    api_kills: int
    database_kills: int


LONG: Final = Scale(requests=20_000, api_kills=40, database_kills=20)
SHORT: Final = Scale(requests=1_000, api_kills=3, database_kills=2)
BRIEF: Final = Scale(requests=200, api_kills=1, database_kills=1)


@dataclass(frozen=True)
class Request:
    """What a client insists on. `mark` is what its row will have in the column of `DONE`."""

    kind: str
    caller: Principal
    path: str
    body: dict[str, Any]
    mark: str


def requests_of(number: int, session: Any, now: datetime) -> Iterator[Request]:
    """All that happens in one session and beside it, in order."""
    parties = {
        role: Principal(session[f"{role}_id"], session["tenant_id"], Role(role)) for role in ("patient", "doctor")
    }
    context = f"text_session:{session['id']}"
    for said, role in enumerate(TALK):
        words = f"{number}-{said}"
        message = {"client_message_id": words, "body": words}
        yield Request("messages", parties[role], f"/chat/{context}/messages", message, words)
    for booked in range(BOOKINGS):
        reason = f"{number}-{booked}"
        wanted = {
            "doctor_id": session["doctor_id"],
            "modality": "text",
            "starts_at": (now + timedelta(days=1 + booked)).isoformat(),
            "reason": reason,
        }
        yield Request("bookings", parties["patient"], "/appointments", wanted, reason)
    yield Request("ends", parties["doctor"], f"/sessions/{context}/end", {}, "ended")


@dataclass
class Storm:
    """A PostgreSQL and some APIs that are killed under load, and what the clients were told meanwhile."""

    servers: Servers
    folder: Path
    scale: Scale
    sabotage: Sabotage | None = None
    apis: list[Api] = field(default_factory=list)
    acknowledged: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: {kind: [] for kind in DONE})
    refused: list[str] = field(default_factory=list)
    lost_connections: int = 0

    @property
    def done(self) -> int:
        return sum(map(len, self.acknowledged.values())) + len(self.refused)

    async def rage(self, **settings: str) -> dict[str, list[tuple[int, str]]]:
        """What was acknowledged and is lost."""
        async with AsyncExitStack() as stack:
            self.stack = stack
            await self._start_postgres()
            await stack.enter_async_context(self.servers.redis())
            await migrate(self.servers)
            await configure(self.servers, **settings)
            sessions = await self._populate()
            stack.push_async_callback(self._kill_apis)
            for _ in range(APIS):
                await self._start_api()
            waiting = iter(sessions)
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(self._insist(waiting))
                group.create_task(self._kill_an_api_now_and_then())
                group.create_task(self._kill_postgres_now_and_then())
            # At the very moment at which the last client was told.
            await self._kill_apis()
            await self._crash()
            async with connected(self.servers) as owner:
                lost = {kind: await self._lost(owner, kind) for kind in DONE}
                assert await violations(owner) == {}
        return {kind: rows for kind, rows in lost.items() if rows}

    async def _populate(self) -> list[list[Request]]:
        """As many live sessions as it takes, each with what is going to happen in it."""
        async with connected(self.servers) as owner:
            now = await owner.fetchval("SELECT clock()")
            await populate(owner, self.scale.requests // PER_SESSION, now - timedelta(minutes=1))
            await owner.execute("UPDATE appointments SET modality = 'text'")
            database = Database(self.servers.database_url(LOGIN), application="tests")
            clinic = await Clinic.open(database)
            await clinic.convert()
            await database.close()
            sessions = await owner.fetch("SELECT id, tenant_id, patient_id, doctor_id FROM sessions ORDER BY id")
            await owner.execute("CHECKPOINT")
        assert len(sessions) == self.scale.requests // PER_SESSION
        return [list(requests_of(number, session, now)) for number, session in enumerate(sessions)]

    async def _insist(self, waiting: Iterator[list[Request]]) -> None:
        """Makes one request after the other, again and again until it is answered."""
        async with client_of("http://127.0.0.1", timeout=10) as client:
            for session in waiting:
                for request in session:
                    while not await self._is_answered(client, request):
                        await asyncio.sleep(random.uniform(0, 0.1))

    async def _is_answered(self, client: httpx2.AsyncClient, request: Request) -> bool:
        url = f"http://127.0.0.1:{random.choice(self.apis).port}/api/v1{request.path}"
        headers = {"Authorization": f"Bearer {token_of(request.caller)}"}
        if request.kind == "bookings":
            headers["Idempotency-Key"] = request.mark
        try:
            response = await client.post(url, json=request.body or None, headers=headers)
        except httpx2.TransportError:
            self.lost_connections += 1
            return False
        body = response.json()
        if response.is_success:
            row = body["session"] if request.kind == "ends" else body
            self.acknowledged[request.kind].append((row["id"], request.mark))
        elif body["code"] in ("OVERLOADED", "IDEMPOTENCY_IN_FLIGHT"):
            return False
        else:
            self.refused.append(response.text)
        return True

    async def _kill_an_api_now_and_then(self) -> None:
        async for _ in self._moments(self.scale.api_kills):
            victim = random.choice(self.apis)
            await victim.kill()
            self.apis.remove(victim)
            await self._start_api()

    async def _kill_postgres_now_and_then(self) -> None:
        async for number in self._moments(self.scale.database_kills):
            if number % 2:
                (await until(self._serving_backends))[0].kill()
            else:
                await self._crash()

    async def _moments(self, number: int) -> AsyncIterator[int]:
        """So many moments of the load, evenly spread over it."""
        for passed in range(number):
            while self.done < self.scale.requests * (passed + random.uniform(0.2, 0.8)) / number:
                await asyncio.sleep(0.01)
            yield passed

    async def _start_api(self) -> None:
        log = self.folder / f"api-{random.getrandbits(64)}.jsonl"
        api = apis.start(self.servers.database_url(LOGIN), self.servers.redis_url, log, self.sabotage)
        self.apis.append(api)
        await until(api.answers)

    async def _kill_apis(self) -> None:
        for api in self.apis:
            await api.kill()

    async def _start_postgres(self) -> None:
        self.postgres: Process = await self.stack.enter_async_context(self.servers.postgres())

    async def _crash(self) -> None:
        """Kills PostgreSQL with all its backends, and starts it again."""
        server = psutil.Process(self.postgres.pid)
        backends = server.children(recursive=True)
        processes.kill(server)
        await self.postgres.wait()
        await asyncio.to_thread(psutil.wait_procs, backends)
        await self._start_postgres()

    async def _serving_backends(self) -> list[psutil.Process]:
        """Those that serve an API. When one is killed, PostgreSQL ends all of them by itself and recovers."""
        serving = []
        for backend in psutil.Process(self.postgres.pid).children():
            with suppress(psutil.NoSuchProcess):
                if LOGIN in "".join(backend.cmdline()):
                    serving.append(backend)
        return serving

    async def _lost(self, owner: "asyncpg.Connection[Any]", kind: str) -> list[tuple[int, str]]:
        table, column = DONE[kind]
        ids, marks = zip(*self.acknowledged[kind], strict=True)
        rows = await owner.fetch(
            f"SELECT * FROM unnest($1::bigint[], $2::text[]) EXCEPT SELECT id, {column} FROM {table}", ids, marks
        )
        return [tuple(row) for row in rows]


@asynccontextmanager
async def connected(servers: Servers) -> AsyncIterator["asyncpg.Connection[Any]"]:
    connection = await asyncpg.connect(servers.database_url(OWNER))
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with prepared_servers() as prepared:
        yield prepared


@pytest.mark.timeout(1800)
async def test_what_was_acknowledged_is_there(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> None:
    scale = LONG if request.config.getoption("--storm") == "full" else SHORT
    storm = Storm(servers, tmp_path, scale)
    assert await storm.rage() == {}
    assert storm.refused == []
    assert sum(map(len, storm.acknowledged.values())) == scale.requests
    print(f"{scale}, {storm.lost_connections} connections lost")
    assert storm.lost_connections > 0


async def test_the_storm_finds_a_database_that_acknowledges_what_it_has_not_written(
    servers: Servers, tmp_path: Path
) -> None:
    lost = await Storm(servers, tmp_path, BRIEF).rage(synchronous_commit="off", wal_writer_delay="10s")
    assert lost != {}


async def test_the_storm_finds_an_api_that_answers_before_it_commits(servers: Servers, tmp_path: Path) -> None:
    # The kill must meet an answer that is not committed yet.
    for _ in range(3):
        if await Storm(servers, tmp_path, BRIEF, apis.answer_before_commit).rage():
            return
    raise AssertionError("The storm found nothing.")
