"""What other processes are told, and how often."""

import asyncio

from redis.asyncio import Redis

from libs.domain.doorbell import NEWS_SECONDS, Doorbell
from libs.domain.news import CHANNEL, tell
from tests.clinic import Clinic
from tests.conftest import Urls


class Heard:
    """Who watches conversations elsewhere."""

    def __init__(self) -> None:
        self.conversations: set[int] = set()

    def changed(self, conversation_id: int) -> None:
        self.conversations.add(conversation_id)

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        raise AssertionError("Nobody writes.")


async def test_news_that_come_in_quick_succession_are_told_together(clinic: Clinic, urls: Urls) -> None:
    doorbell, redis, heard = Doorbell(urls.redis, clinic.metrics), Redis.from_url(urls.redis), Heard()
    number, messages = 200, 0
    async with redis.pubsub() as channel, asyncio.timeout(10):
        await channel.subscribe(CHANNEL)
        began = asyncio.get_running_loop().time()
        for conversation_id in range(number):
            doorbell.changed(conversation_id)
            await asyncio.sleep(0.001)
        took = asyncio.get_running_loop().time() - began
        while len(heard.conversations) < number:
            message = await channel.get_message(ignore_subscribe_messages=True, timeout=1)
            if message is not None:
                messages += 1
                tell(heard, message["data"], but="somebody else")
    assert heard.conversations == {*range(number)}
    assert messages <= took / NEWS_SECONDS + 2
    await doorbell.close()
    await redis.aclose()
