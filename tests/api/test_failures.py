"""What the API answers while PostgreSQL or Redis is away, hangs, or is busy with somebody else."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import pytest
from httpx2 import Response

from tests.api.calls import Owner, calls_of, rows
from tests.api.expect import DAY, found, problem
from tests.clinic import Clinic
from tests.conftest import MakeApi, Urls
from tests.processes import until
from tests.running import Api, running_api

NO_REDIS = "redis://127.0.0.1:1"


def overloaded(response: Response) -> bool:
    """Whether it is a complete 503 that says when to come back and nothing about the inside."""
    body = problem(response, 503, "OVERLOADED")
    assert body["retry_after"] == int(response.headers["retry-after"]) == 1
    assert set(body) == {"type", "title", "status", "detail", "instance", "code", "correlation_id", "retry_after"}
    return True


class Wire:
    """A wire to PostgreSQL that is cut, hangs, or is whole."""

    def __init__(self, socket: str) -> None:
        self.state: Literal["whole", "cut", "hanging"] = "whole"
        self.stays_open = False
        self._socket = socket
        self._ends: list[asyncio.StreamWriter] = []

    def cut(self) -> None:
        self.state = "cut"
        while self._ends:
            self._ends.pop().transport.abort()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.append(writer)
        if self.state == "cut":
            self.cut()
        elif self.state == "whole":
            inner_reader, inner_writer = await asyncio.open_unix_connection(self._socket)
            self._ends.append(inner_writer)
            await asyncio.gather(self._carry(reader, inner_writer), self._carry(inner_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                if self.state == "whole":
                    writer.write(data)
        except ConnectionError:
            pass
        if not self.stays_open:
            writer.transport.abort()


@asynccontextmanager
async def wire_to(database_url: str) -> AsyncIterator[tuple[Wire, str]]:
    """A wire, and the address of the database at its end."""
    address = urlsplit(database_url)
    [folder] = parse_qs(address.query)["host"]
    wire = Wire(f"{folder}/.s.PGSQL.5432")
    server = await asyncio.start_server(wire.connect, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield wire, f"postgresql://{address.username}@127.0.0.1:{port}{address.path}"
    wire.cut()
    server.close()


async def test_every_route_says_when_to_come_back_during_an_outage_and_works_right_after(
    clinic: Clinic, owner: Owner, urls: Urls
) -> None:
    async with wire_to(urls.app) as (wire, address), running_api(address, urls.redis) as api:
        calls = await calls_of(api, clinic)
        assert found(await api.anonymous.get("/readyz"))["checks"]["database"] == "ok"
        before = await rows(owner)

        wire.cut()
        for call in calls:
            assert overloaded(await call.send(api))
        assert found(await api.anonymous.get("/readyz"), 503)["status"] == "failed"
        assert found(await api.anonymous.get("/healthz")) == {"status": "ok"}
        assert await rows(owner) == before

        wire.state = "whole"
        for call in calls:
            assert (await call.send(api)).is_success, call


async def test_a_database_that_does_not_answer_is_not_waited_for(
    clinic: Clinic, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.domain.db.CONNECT_TIMEOUT", 0.1)
    async with wire_to(urls.app) as (wire, address), running_api(address, urls.redis) as api:
        wire.state = "hanging"
        began = time.monotonic()
        assert overloaded(await api.as_(clinic.operator).get("/me"))
        assert found(await api.anonymous.get("/readyz"), 503)["checks"]["database"] == "failed"
        assert time.monotonic() - began < 2


async def test_readiness_does_not_wait_for_a_database_that_has_frozen(
    clinic: Clinic, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.api.public.DATABASE_SECONDS", 0.2)
    async with wire_to(urls.app) as (wire, address), running_api(address, urls.redis) as api:
        found(await api.anonymous.get("/readyz"))
        wire.state = "hanging"
        for _ in range(2):
            began = time.monotonic()
            assert found(await api.anonymous.get("/readyz"), 503)["checks"]["database"] == "failed"
            assert time.monotonic() - began < 1.5
        wire.cut()
        wire.state = "whole"

        async def ready() -> bool:
            return (await api.anonymous.get("/readyz")).is_success

        await until(ready)


async def test_stopping_does_not_wait_for_a_database_that_has_frozen(
    clinic: Clinic, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.domain.db.CLOSE_TIMEOUT", 0.2)
    async with wire_to(urls.app) as (wire, address):
        async with running_api(address, urls.redis) as api:
            client = api.as_(clinic.operator)
            for response in await asyncio.gather(*(client.get("/me") for _ in range(5))):
                found(response)
            wire.state = "hanging"
            began = time.monotonic()
        assert time.monotonic() - began < 2


OURS = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sessiongate-api'"


async def end_connections(owner: Owner) -> None:
    """Ends those that there are; there may be others at once, for the log."""
    ended = [row["pid"] for row in await owner.fetch(f"SELECT pid, pg_terminate_backend(pid) {OURS}")]

    async def gone() -> bool:
        return bool(await owner.fetchval("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = ANY ($1)", ended))

    await until(gone)


async def test_connections_that_the_server_ends_are_replaced(api: Api, clinic: Clinic, owner: Owner) -> None:
    client = api.as_(clinic.operator)
    found(await client.get("/me"))
    assert await owner.fetchval(f"SELECT count(*) {OURS}") >= 2
    await end_connections(owner)
    for path in ("/me", "/doctors", "/admin/conversions"):
        found(await client.get(path))


async def test_a_connection_of_which_the_server_has_taken_leave_is_no_fault_of_ours(
    clinic: Clinic, owner: Owner, urls: Urls
) -> None:
    async with wire_to(urls.app) as (wire, address), running_api(address, urls.redis, pool_size=1) as api:
        client = api.as_(clinic.operator)
        found(await client.get("/me"))
        wire.stays_open = True
        await end_connections(owner)
        assert overloaded(await client.get("/me"))
        found(await client.get("/me"))


async def test_a_request_whose_connection_ends_stores_nothing_and_may_be_repeated(
    api: Api, clinic: Clinic, owner: Owner
) -> None:
    appointment_id = await clinic.appointment(starts_in=DAY, status="PENDING")
    client = api.as_(clinic.operator)
    before = await rows(owner)
    async with owner.transaction():
        await owner.execute("SELECT FROM appointments FOR UPDATE")
        request = asyncio.create_task(client.post(f"/appointments/{appointment_id}/confirm"))

        async def killed() -> bool:
            return bool(await clinic.fetch(f"SELECT pg_terminate_backend(pid) {OURS} AND wait_event_type = 'Lock'"))

        await until(killed)
        assert overloaded(await request)
    assert await rows(owner) == before
    assert found(await client.post(f"/appointments/{appointment_id}/confirm"))["status"] == "CONFIRMED"


@asynccontextmanager
async def limited(owner: Owner, setting: str) -> AsyncIterator[None]:
    """Ends what the API's connections wait for sooner than in production, so that tests need not wait."""
    database = await owner.fetchval("SELECT current_database()")
    await owner.execute(f"ALTER ROLE sessiongate_app IN DATABASE {database} SET {setting} = '100ms'")
    yield
    await owner.execute(f"ALTER ROLE sessiongate_app IN DATABASE {database} RESET {setting}")


async def test_a_lock_held_by_another_is_waited_for_and_then_given_up(
    make_api: MakeApi, clinic: Clinic, owner: Owner
) -> None:
    async with limited(owner, "lock_timeout"):
        api = await make_api()
        calls = await calls_of(api, clinic)
        found(await api.as_(clinic.operator).get("/me"))
        before = await rows(owner)
        async with owner.transaction():
            await owner.execute("LOCK TABLE users, appointments, sessions IN ACCESS EXCLUSIVE MODE")
            for call in calls:
                assert overloaded(await call.send(api))
        assert await rows(owner) == before
        for call in calls:
            assert (await call.send(api)).is_success, call


async def test_a_statement_that_takes_too_long_is_given_up(make_api: MakeApi, clinic: Clinic, owner: Owner) -> None:
    appointment_id = await clinic.appointment(starts_in=DAY, status="PENDING")
    await owner.execute(
        """
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(5); RETURN NEW; END';
        CREATE TRIGGER dawdle BEFORE UPDATE ON appointments FOR EACH ROW EXECUTE FUNCTION dawdle();
        """
    )
    async with limited(owner, "statement_timeout"):
        api = await make_api()
        before = await rows(owner)
        assert overloaded(await api.as_(clinic.operator).post(f"/appointments/{appointment_id}/confirm"))
        assert await rows(owner) == before


async def test_who_finds_no_free_connection_is_told_to_come_back(
    make_api: MakeApi, clinic: Clinic, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.domain.db.POOL_TIMEOUT", 0.1)
    api = await make_api(pool_size=1)
    appointment_id = await clinic.appointment(starts_in=DAY, status="PENDING")
    client = api.as_(clinic.operator)
    async with owner.transaction():
        await owner.execute("SELECT FROM appointments FOR UPDATE")
        waiting = asyncio.create_task(client.post(f"/appointments/{appointment_id}/confirm"))

        async def holds_the_connection() -> bool:
            return bool(await clinic.fetch(f"SELECT {OURS} AND wait_event_type = 'Lock'"))

        await until(holds_the_connection)
        assert overloaded(await client.get("/doctors"))
    assert found(await waiting)["status"] == "CONFIRMED"
    found(await client.get("/doctors"))


@asynccontextmanager
async def silent_redis() -> AsyncIterator[str]:
    """The address of a Redis that takes connections and never says a word."""

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_without_redis_everything_works_and_the_missed_rings_are_counted(clinic: Clinic, urls: Urls) -> None:
    async with silent_redis() as silent:
        for redis_url in (NO_REDIS, silent):
            async with running_api(urls.app, redis_url) as api:
                calls = await calls_of(api, clinic)
                began = time.monotonic()
                for call in calls:
                    assert (await call.send(api)).is_success, call
                assert time.monotonic() - began < 3, "Nobody waits for the bell."

                async def counted(api: Api = api) -> bool:
                    return api.runtime.metrics.sample("doorbell_failures_total") >= 8

                await until(counted)
                assert found(await api.anonymous.get("/readyz"))["checks"]["redis"] == "degraded"
