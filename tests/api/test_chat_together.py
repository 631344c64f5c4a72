"""Messages that come at the same time are stored together, and none of them is another one's trouble."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from libs.domain.chat.group_commit import GROUP_LIMIT, LANES
from libs.domain.chat.send_statement import STORE
from libs.domain.chat.sending import NewMessage
from libs.guardrails import Claim
from libs.guardrails.operations import SendMessage
from libs.observability.context import bind, new_correlation_id
from tests.api.expect import found
from tests.clinic import Clinic, LiveSession
from tests.conftest import Urls
from tests.processes import until
from tests.running import Api

MANY = 20


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


async def send(api: Api, live: LiveSession, body: str, message_id: str) -> int:
    """Without HTTP, which would refuse some bodies itself; answers the message's number."""
    claim = Claim(SendMessage, live.patient, live.ref)
    with bind(correlation_id=new_correlation_id(), tenant_id=live.patient.tenant_id):
        sent = await api.runtime.chat.send(claim, NewMessage(message_id, body))
    return sent.message.seq


async def test_a_group_is_bounded_and_takes_one_message_of_each_session(api: Api, clinic: Clinic) -> None:
    sessions = await calls(clinic, 2)
    number = GROUP_LIMIT // 2
    sending = [send(api, live, "Hello", str(n)) for n in range(number) for live in sessions]
    assert sorted(await asyncio.gather(*sending)) == sorted([*range(1, number + 1)] * 2)
    order = "SELECT array_agg(client_message_id::int ORDER BY seq) FROM messages GROUP BY conversation_id"
    assert [row[0] for row in await clinic.fetch(order)] == [[*range(number)]] * 2
    assert await transactions(clinic) >= number


@pytest.mark.parametrize(
    ("table", "where"), [("sessions", "id = {0.ref.id}"), ("participants", "user_id = {0.patient.user_id}")]
)
async def test_only_the_message_that_somebody_is_in_the_way_of_waits(
    api: Api, clinic: Clinic, urls: Urls, table: str, where: str
) -> None:
    sessions = await calls(clinic, 5)
    blocked, *others = sessions
    async with at_work_on(urls, table, where.format(blocked)):
        waiting = asyncio.create_task(write(api, blocked))
        for _ in range(LANES + 1):
            answers = await asyncio.gather(*(write(api, live, message_id=str(_)) for live in others))
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


async def test_a_message_whose_sender_has_gone_before_its_turn_is_not_stored(
    api: Api, clinic: Clinic, urls: Urls
) -> None:
    first, gone, last = await calls(clinic, 3)
    # Nobody passes until the lanes are free.
    async with at_work_on(urls, "conversations", "true"):
        busy = [asyncio.create_task(send(api, first, "Hello", "1"))]
        await asyncio.sleep(0.05)
        busy.append(asyncio.create_task(send(api, last, "Hello", "1")))
        await asyncio.sleep(0.05)
        leaving = asyncio.create_task(send(api, gone, "Hello", "1"))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.wait([leaving])
    assert await asyncio.gather(*busy) == [1, 1]
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 2
    assert await send(api, gone, "Hello", "2") == 1


async def test_a_lost_connection_fails_those_it_carried_and_nobody_after_them(
    api: Api, clinic: Clinic, urls: Urls
) -> None:
    sessions = await calls(clinic, 3)

    async def is_waiting() -> bool:
        return bool(await clinic.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))

    async with at_work_on(urls, "conversations", "true"):
        carried = [asyncio.create_task(write(api, live)) for live in sessions]
        await until(is_waiting)
        await clinic.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    answers = await asyncio.gather(*carried)
    assert {answer.status_code for answer in answers} == {503}
    assert [found(await write(api, live), 201)["seq"] for live in sessions] == [1, 1, 1]


async def test_groups_of_all_sizes_share_one_plan(api: Api, clinic: Clinic) -> None:
    sessions = await calls(clinic, 5)
    for number in range(10):
        await asyncio.gather(*(send(api, live, "Hello", str(number)) for live in sessions[: number % 5 + 1]))
    async with api.runtime.database.autocommit() as connection:
        counted = "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1"
        plans = await connection.fetch(counted, STORE)
    assert [tuple(row) for row in plans] == [(5, 5)]  # PostgreSQL makes up its mind after five.
