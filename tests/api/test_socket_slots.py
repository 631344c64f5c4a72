"""How many sockets a user has, whichever processes serve them and whatever becomes of those."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from libs.domain.db import Database
from services.api.realtime import slots
from services.cli.embedded import LOGIN, Servers
from tests.api.calls import Owner
from tests.clinic import Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi, Urls
from tests.processes import PATIENCE_SECONDS, ApiProcess, running_api_process, until
from tests.running import Api, running_api
from tests.servers import migrate, prepared_servers
from tests.sockets import following, opened

LIMIT = 5


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the processes within this one renew what they hold all the time."""
    monkeypatch.setattr(slots, "RENEWAL_SECONDS", 0.1)


@pytest.fixture
async def near(make_api: MakeApi, often: None) -> Api:
    """An API within this process."""
    return await make_api(sockets_per_user=LIMIT)


@pytest.fixture
async def far(urls: Urls, tmp_path: Path) -> AsyncIterator[ApiProcess]:
    """An API in a process of its own."""
    log = tmp_path / "far.jsonl"
    async with running_api_process(urls.app, urls.redis, log, SESSIONGATE_SOCKETS_PER_USER=str(LIMIT)) as running:
        yield running


async def gets_in(api: Api | ApiProcess, session: LiveSession) -> bool:
    """Whether the patient gets another socket, which is closed at once."""
    async with opened(api, session.patient, session.context) as socket:
        first = await socket.receive()
        if first["type"] == "refused":
            assert (await socket.close_code(), first["code"]) == (4429, "RATE_LIMITED")
            assert str(LIMIT) in first["detail"]
        return bool(first["type"] == "welcome")


async def held(clinic: Clinic) -> set[Any]:
    """The slots that are taken, each with the transaction that took it."""
    return set(await clinic.fetch("SELECT user_id, slot, socket_id, xmin::text FROM socket_slots"))


async def insert(owner: Owner, session: LiveSession, slot: int, process: UUID) -> None:
    """A slot of the patient's that no socket holds."""
    await owner.execute(
        "INSERT INTO socket_slots (user_id, slot, tenant_id, process_id, socket_id) VALUES ($1, $2, $3, $4, $5)",
        *(session.patient.user_id, slot, session.patient.tenant_id, process, uuid4()),
    )


async def has(clinic: Clinic, number: int, seconds: float = PATIENCE_SECONDS) -> None:
    async def so_many() -> bool:
        return len(await held(clinic)) == number

    await until(so_many, seconds)


async def renewed(clinic: Clinic, processes: int) -> None:
    """Returns once so many processes were seen twice: the second time they give up whoever was not."""
    for _ in range(2):
        now = await clinic.fetchval("SELECT clock()")

        async def seen(since: datetime = now) -> bool:
            counted = await clinic.fetchval("SELECT count(*) FROM api_processes WHERE seen_at > $1", since)
            return bool(counted == processes)

        await until(seen)


async def test_a_user_has_so_many_sockets_over_all_processes(near: Api, far: ApiProcess, clinic: Clinic) -> None:
    session = await clinic.session()
    async with AsyncExitStack() as stack:
        for number in range(LIMIT):
            api = far if number % 2 else near
            await stack.enter_async_context(following(api, session.patient, session.context))
        assert not await gets_in(near, session)
        assert not await gets_in(far, session)
        await stack.enter_async_context(following(far, session.doctor, session.context))
    await has(clinic, 0)


async def test_of_many_handshakes_at_once_as_many_succeed_as_there_are_slots(
    near: Api, far: ApiProcess, clinic: Clinic
) -> None:
    session = await clinic.session()
    async with AsyncExitStack() as stack:

        async def first_frame(api: Api | ApiProcess) -> str:
            socket = await stack.enter_async_context(opened(api, session.patient, session.context))
            return str((await socket.receive())["type"])

        answers = await asyncio.gather(*[first_frame(api) for api in (near, far) for _ in range(10)])
        assert answers.count("welcome") == LIMIT
        assert answers.count("refused") == 20 - LIMIT
        assert len(await held(clinic)) == LIMIT


async def test_whoever_is_overtaken_takes_the_next_slot(near: Api, clinic: Clinic, owner: Owner) -> None:
    session = await clinic.session()
    async with AsyncExitStack() as stack:
        async with owner.transaction():
            process = await owner.fetchval("INSERT INTO api_processes (id) VALUES (gen_random_uuid()) RETURNING id")
            await insert(owner, session, 1, process)
            socket = await stack.enter_async_context(opened(near, session.patient, session.context))

            async def waits() -> bool:
                blocked = "SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))"
                return bool(await clinic.fetchval(blocked, owner.get_server_pid()))

            await until(waits)
        assert (await socket.receive())["type"] == "welcome"
        assert {row["slot"] for row in await held(clinic)} == {1, 2}


@pytest.mark.parametrize("politely", [True, False])
async def test_a_socket_that_is_closed_frees_its_slot(
    near: Api, far: ApiProcess, clinic: Clinic, politely: bool
) -> None:
    session = await clinic.session()
    async with AsyncExitStack() as stack:
        for _ in range(LIMIT - 1):
            await stack.enter_async_context(following(near, session.patient, session.context))
        async with following(far, session.patient, session.context) as last:
            assert not await gets_in(near, session)
            if not politely:
                last.connection.transport.abort()
        await has(clinic, LIMIT - 1, seconds=5)  # Before the next renewal over there could do it.
        assert await gets_in(near, session)


async def test_a_process_that_ends_frees_its_slots_at_once(far: ApiProcess, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(far, session.patient, session.context):
        assert len(await held(clinic)) == 1
        assert await clinic.fetchval("SELECT count(*) FROM api_processes") == 1
        assert await far.stop() == 0
        assert await held(clinic) == set()
        assert await clinic.fetchval("SELECT count(*) FROM api_processes") == 0


async def test_a_process_that_is_killed_frees_its_slots_once_the_others_give_it_up(
    near: Api, far: ApiProcess, clinic: Clinic, clock: Clock
) -> None:
    session = await clinic.session()
    async with AsyncExitStack() as stack:
        for _ in range(LIMIT):
            await stack.enter_async_context(following(far, session.patient, session.context))
        await far.stop(signal.SIGKILL)
        await clock.advance(slots.PATIENCE / 2)
        await renewed(clinic, 1)
        assert not await gets_in(near, session)
        await clock.advance(slots.PATIENCE / 2)
        await has(clinic, 0)
        assert await gets_in(near, session)


async def test_a_process_that_was_given_up_and_comes_back_holds_its_slots_again(
    near: Api, far: ApiProcess, clinic: Clinic, clock: Clock
) -> None:
    session = await clinic.session()
    async with AsyncExitStack() as stack:
        sockets = [
            await stack.enter_async_context(following(far, session.patient, session.context)) for _ in range(LIMIT)
        ]
        far.process.send_signal(signal.SIGSTOP)
        try:
            await clock.advance(slots.PATIENCE)
            await has(clinic, 0)
            await stack.enter_async_context(following(near, session.patient, session.context))
        finally:
            far.process.send_signal(signal.SIGCONT)
        assert not await gets_in(far, session)
        assert not await gets_in(near, session)
        assert len(await held(clinic)) == LIMIT
        for socket in sockets:
            await socket.send(type="ping")
            await socket.next("pong")
    await has(clinic, 0)


async def test_what_is_in_the_table_becomes_what_is_open(near: Api, clinic: Clinic, owner: Owner) -> None:
    session = await clinic.session()
    async with (
        following(near, session.patient, session.context),
        following(near, session.doctor, session.context),
    ):
        before = {row["socket_id"] for row in await held(clinic)}
        await owner.execute("DELETE FROM api_processes")
        await has(clinic, 2)
        assert {row["socket_id"] for row in await held(clinic)} == before
        before = await held(clinic)
        await insert(owner, session, LIMIT, await owner.fetchval("SELECT id FROM api_processes"))
        await has(clinic, 2)
        assert await held(clinic) == before


async def test_while_the_database_is_away_nobody_is_given_up(
    make_api: MakeApi, often: None, clinic: Clinic, clock: Clock
) -> None:
    apis = [await make_api(), await make_api()]
    session = await clinic.session()
    async with (
        following(apis[0], session.patient, session.context),
        following(apis[1], session.patient, session.context),
    ):
        before = await held(clinic)
        assert len(before) == 2
        await clock.advance(100 * slots.PATIENCE)
        await renewed(clinic, 2)
        assert await held(clinic) == before


async def test_a_database_that_restarts_loses_nothing(
    servers: Servers, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "RETRY_SECONDS", 0.1)
    with prepared_servers() as restarting:
        url = restarting.database_url(LOGIN)
        async with AsyncExitStack() as stack:
            async with restarting.postgres():
                await migrate(restarting)
                database = Database(url, application="tests")
                stack.push_async_callback(database.close)
                clinic = await Clinic.open(database)
                session = await clinic.session()
                apis = [
                    await stack.enter_async_context(running_api(url, servers.redis_url, sockets_per_user=LIMIT))
                    for _ in range(2)
                ]
                sockets = [
                    await stack.enter_async_context(following(apis[number % 2], session.patient, session.context))
                    for number in range(LIMIT)
                ]
                before = await held(clinic)
            await sockets[0].connection.close()
            async with restarting.postgres():
                await has(clinic, LIMIT - 1)
                assert await held(clinic) < before
                async with following(apis[0], session.patient, session.context):
                    assert not await gets_in(apis[1], session)
                await stack.aclose()
