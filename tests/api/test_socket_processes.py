"""A conversation whose parties are served by two processes, with Redis between them or without."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from libs.domain.news import CHANNEL
from services.api.realtime import rooms
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.processes import until
from tests.redis_server import RedisServer
from tests.running import Api, running_api
from tests.sockets import Socket, following


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    server = RedisServer(tmp_path)
    await server.start()
    yield server
    await server.kill()


@pytest.fixture
async def apis(urls: Urls, redis: RedisServer) -> AsyncIterator[tuple[Api, Api]]:
    """Two of them, which hear each other's news."""
    async with running_api(urls.app, redis.url) as one, running_api(urls.app, redis.url) as other:
        await both_listen(redis)
        yield one, other


async def both_listen(redis: RedisServer) -> None:
    async def counted() -> bool:
        return await redis.listeners(CHANNEL) == 2

    await until(counted)


@asynccontextmanager
async def conversation(apis: tuple[Api, Api], clinic: Clinic) -> AsyncIterator[tuple[Socket, Socket]]:
    """The patient's socket on one API and the doctor's on the other."""
    session = await clinic.session()
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(following(apis[0], session.patient, session.context)),
            await stack.enter_async_context(following(apis[1], session.doctor, session.context)),
        )


async def tell(patient: Socket, doctor: Socket, number: int) -> float:
    """Sends a message from the one to the other; how many seconds it took."""
    began = time.monotonic()
    await patient.send(type="message", client_message_id=str(number), body="Hello")
    assert (await doctor.next("message"))["message"]["client_message_id"] == str(number)
    return time.monotonic() - began


async def test_news_travels_from_one_process_to_the_other(
    apis: tuple[Api, Api], clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "POLL_SECONDS", 3600.0)
    async with conversation(apis, clinic) as (patient, doctor):
        for number in range(20):
            await tell(patient, doctor, number)
        await patient.send(type="typing", on=True)
        assert (await doctor.next("typing"))["on"] is True
        await doctor.send(type="read", seq=20)
        assert (await patient.next("read"))["seq"] == 20


async def test_a_redis_that_dies_delays_and_loses_nothing(
    apis: tuple[Api, Api], clinic: Clinic, redis: RedisServer
) -> None:
    async with conversation(apis, clinic) as (patient, doctor):
        await tell(patient, doctor, 1)
        await redis.kill()
        for number in (2, 3):
            assert await tell(patient, doctor, number) < 2 * rooms.POLL_SECONDS
        assert apis[0].runtime.metrics.sample("doorbell_failures_total") > 0
        await redis.start()
        await both_listen(redis)
        await tell(patient, doctor, 4)
        assert min([await tell(patient, doctor, number) for number in range(5, 10)]) < rooms.POLL_SECONDS / 4
        assert [frame["message"]["seq"] for frame in doctor.of("message")] == list(range(1, 10))


async def test_a_redis_that_is_frozen_holds_up_nobody(
    apis: tuple[Api, Api], clinic: Clinic, redis: RedisServer
) -> None:
    async with conversation(apis, clinic) as (patient, doctor):
        redis.freeze()
        began = time.monotonic()
        for number in range(20):
            await patient.send(type="message", client_message_id=str(number), body="Hello")
            await patient.next("ack")
        assert time.monotonic() - began < rooms.POLL_SECONDS
        while len(doctor.of("message")) < 20:
            await doctor.next("message")
        redis.thaw()
        await tell(patient, doctor, 20)
        assert [frame["message"]["seq"] for frame in doctor.of("message")] == list(range(1, 22))
