"""Messages that come at the same time are stored together, and none of them is another one's trouble."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from libs.domain.chat import group_commit
from libs.domain.chat.group_commit import GROUP_LIMIT, LANES
from libs.domain.chat.send_statement import STORE
from libs.domain.chat.sending import NewMessage
from libs.domain.db import is_transient
from libs.guardrails import Claim, Principal
from libs.guardrails.operations import SendMessage
from libs.observability.context import bind, new_correlation_id
from tests.api.expect import found, problem
from tests.clinic import Clinic, LiveSession
from tests.conftest import Urls
from tests.processes import until
from tests.running import Api

MANY = 20

# Without the locks by which the statements of both would notice each other sooner.
STORED_ELSEWHERE = """
    INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body)
    SELECT c.tenant_id, c.id, 1000, s.patient_id, '1', 'text', 'Hello'
    FROM conversations c JOIN sessions s ON s.id = c.session_id WHERE s.id = $1
"""


async def write(api: Api, live: LiveSession, body: str = "Hello", message_id: str = "1") -> Any:
    new = {"client_message_id": message_id, "body": body}
    return await api.as_(live.patient).post(f"/chat/{live.context}/messages", json=new)


async def calls(clinic: Clinic, number: int = MANY) -> Sequence[LiveSession]:
    """Calls that ring: whatever is said in them changes nothing else."""
    return [await clinic.session("voice") for _ in range(number)]


async def transactions(clinic: Clinic) -> int:
    """How many it took to store all messages."""
    return int(await clinic.fetchval("SELECT count(DISTINCT xmin::text) FROM messages"))


@asynccontextmanager
async def at_work_on(urls: Urls, table: str, where: str) -> AsyncIterator[None]:
    """While somebody else has locked rows."""
    connection: asyncpg.Connection[Any] = await asyncpg.connect(urls.owner)
    try:
        async with connection.transaction():
            await connection.execute(f"SELECT FROM {table} WHERE {where} FOR UPDATE")
            yield
    finally:
        await connection.close()


async def test_messages_that_come_at_once_share_their_transactions(api: Api, clinic: Clinic) -> None:
    sessions = await calls(clinic)
    answers = await asyncio.gather(*(write(api, live) for live in sessions))
    assert [found(answer, 201)["seq"] for answer in answers] == [1] * MANY
    assert await transactions(clinic) < MANY
    for live, answer in zip(sessions, answers, strict=True):
        assert found(await api.as_(live.doctor).get(f"/chat/{live.context}/messages"))["items"] == [answer.json()]


async def send(api: Api, live: LiveSession, body: str, message_id: str, sender: Principal | None = None) -> int:
    """Without HTTP, which would refuse some bodies itself; answers the message's number."""
    claim = Claim(SendMessage, sender or live.patient, live.ref)
    with bind(correlation_id=new_correlation_id(), tenant_id=live.patient.tenant_id):
        sent = await api.runtime.chat.send(claim, NewMessage(message_id, body))
    return sent.message.seq


async def test_a_group_takes_one_message_of_each_session_in_the_order_of_their_coming(api: Api, clinic: Clinic) -> None:
    sessions = await calls(clinic, 2)
    sending = [send(api, live, "Hello", str(n)) for n in range(MANY) for live in sessions]
    assert sorted(await asyncio.gather(*sending)) == sorted([*range(1, MANY + 1)] * 2)
    order = "SELECT array_agg(client_message_id::int ORDER BY seq) FROM messages GROUP BY conversation_id"
    assert [row[0] for row in await clinic.fetch(order)] == [[*range(MANY)]] * 2
    assert await transactions(clinic) >= MANY


async def test_a_group_is_bounded(api: Api, clinic: Clinic) -> None:
    sessions = await calls(clinic, GROUP_LIMIT + 1)
    assert {*await asyncio.gather(*(send(api, live, "Hello", "1") for live in sessions))} == {1}
    assert await transactions(clinic) == 2


async def test_the_senders_of_a_session_take_turns(api: Api, clinic: Clinic) -> None:
    [live] = await calls(clinic, 1)
    many = [send(api, live, "Hello", str(number)) for number in range(MANY)]
    one = send(api, live, "Please stop.", "doctor", live.doctor)
    *_, seq = await asyncio.gather(*many, one)
    assert seq == 2


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ("sessions", "id = {0.ref.id}"),
        ("participants", "user_id = {0.patient.user_id}"),
        ("conversations", "session_id = {0.ref.id}"),
    ],
)
async def test_only_the_message_that_somebody_is_in_the_way_of_waits(
    api: Api, clinic: Clinic, urls: Urls, table: str, where: str
) -> None:
    sessions = await calls(clinic, 5)
    blocked, *others = sessions
    async with at_work_on(urls, table, where.format(blocked)):
        waiting = asyncio.create_task(write(api, blocked))
        for number in range(LANES + 1):
            answers = await asyncio.gather(*(write(api, live, message_id=str(number)) for live in others))
            assert [answer.status_code for answer in answers] == [201] * len(others)
        assert not waiting.done()
    assert found(await waiting, 201)["seq"] == 1


async def test_a_message_that_cannot_be_stored_takes_no_other_with_it(api: Api, clinic: Clinic) -> None:
    bad, *good = await calls(clinic, 5)
    told = await asyncio.gather(
        send(api, bad, "\0", "1"), *(send(api, live, "Hello", "1") for live in good), return_exceptions=True
    )
    assert isinstance(told[0], asyncpg.CharacterNotInRepertoireError)
    assert told[1:] == [1] * len(good)
    assert await send(api, bad, "Hello", "2") == 1


@asynccontextmanager
async def no_lane_free(api: Api, clinic: Clinic, urls: Urls) -> AsyncIterator[list["asyncio.Task[int]"]]:
    """While all lanes wait for the database, with one message each."""
    connection: asyncpg.Connection[Any] = await asyncpg.connect(urls.owner)
    sessions = await calls(clinic, LANES)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE messages IN SHARE MODE")
            sending = []
            for number, live in enumerate(sessions, start=1):
                sending.append(asyncio.create_task(send(api, live, "Hello", "1")))
                await until(lambda: waiting_for_locks(clinic, number))  # noqa: B023 (at once)
            yield sending
    finally:
        await connection.close()


async def waiting_for_locks(clinic: Clinic, number: int) -> bool:
    counted = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return bool(await clinic.fetchval(counted) == number)


async def test_a_message_whose_sender_has_gone_before_its_turn_is_not_stored(
    api: Api, clinic: Clinic, urls: Urls
) -> None:
    [live] = await calls(clinic, 1)
    async with no_lane_free(api, clinic, urls) as carried:
        leaving = asyncio.create_task(send(api, live, "Hello", "1"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
    assert await asyncio.gather(*carried) == [1] * LANES
    assert await clinic.fetchval("SELECT count(*) FROM messages") == LANES
    assert await send(api, live, "Hello", "2") == 1


async def test_a_message_whose_turn_does_not_come_is_given_up_in_time(
    api: Api, clinic: Clinic, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "POOL_TIMEOUT", 0.1)
    [live] = await calls(clinic, 1)
    async with no_lane_free(api, clinic, urls) as carried:
        problem(await write(api, live), 503, "OVERLOADED")
    assert await asyncio.gather(*carried) == [1] * LANES
    assert await clinic.fetchval("SELECT count(*) FROM messages") == LANES
    assert found(await write(api, live), 201)["seq"] == 1


async def test_a_lost_connection_fails_those_it_carried_and_nobody_after_them(
    api: Api, clinic: Clinic, urls: Urls
) -> None:
    async with no_lane_free(api, clinic, urls) as carried:
        await clinic.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        told = await asyncio.gather(*carried, return_exceptions=True)
    assert [is_transient(error) for error in told if isinstance(error, Exception)] == [True] * LANES
    sessions = await calls(clinic, 3)
    assert [found(await write(api, live), 201)["seq"] for live in sessions] == [1, 1, 1]


async def test_a_repetition_that_another_process_stores_meanwhile_undoes_no_group(
    api: Api, clinic: Clinic, urls: Urls
) -> None:
    twice, *others = await calls(clinic, 5)
    connection: asyncpg.Connection[Any] = await asyncpg.connect(urls.owner)
    async with connection.transaction():
        # As the other process has it, which has not committed yet.
        await connection.execute(STORED_ELSEWHERE, twice.ref.id)
        sending = [asyncio.create_task(write(api, live)) for live in (twice, *others)]
        await until(lambda: waiting_for_locks(clinic, 1))
    answers = await asyncio.gather(*sending)
    await connection.close()
    assert [answer.status_code for answer in answers] == [200] + [201] * len(others)
    assert await transactions(clinic) == 2


async def test_groups_of_all_sizes_share_one_plan(api: Api, clinic: Clinic) -> None:
    sessions = await calls(clinic, 5)
    for number in range(10):
        await asyncio.gather(*(send(api, live, "Hello", str(number)) for live in sessions[: number % 5 + 1]))
    async with api.runtime.database.autocommit() as connection:
        counted = "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1"
        plans = await connection.fetch(counted, STORE)
    assert [tuple(row) for row in plans] == [(5, 5)]  # PostgreSQL makes up its mind after five.
