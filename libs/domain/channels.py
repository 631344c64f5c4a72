"""Messages from process to process, over Redis pub/sub. Who listens hears what is said meanwhile; the rest is lost."""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

from redis.asyncio import Redis

from libs.domain.telemetry import logger

_log: Final = logger("doorbell")

CONNECT_SECONDS: Final = 1.0
LONGEST_PAUSE: Final = 2.0
"""Between two attempts to reach a Redis that is away, in seconds."""
COMPLAINT_SECONDS: Final = 60.0
"""So often at most it is said that Redis is away."""
SILENCE_SECONDS: Final = 10.0
"""After so much silence Redis is asked whether it is there; after twice as much it is left for a new connection."""


class Channel:
    """One channel of the Redis at `url`, for as long as someone here listens."""

    def __init__(self, url: str, name: str) -> None:
        self._redis = Redis.from_url(url, socket_connect_timeout=CONNECT_SECONDS)
        self._name = name

    async def publish(self, message: bytes) -> None:
        """Raises whatever keeps Redis from taking it."""
        await self._redis.publish(self._name, message)

    async def listen(self, hear: Callable[[bytes], None]) -> None:
        """Calls `hear` with each message until cancelled, whatever becomes of Redis meanwhile."""
        async with self._redis:
            complained_at = float("-inf")
            while True:
                try:
                    await self._listen(hear)
                except Exception as error:
                    if time.monotonic() - complained_at >= COMPLAINT_SECONDS:
                        complained_at = time.monotonic()
                        _log.warning("doorbell_lost", channel=self._name, exception_type=type(error).__name__)
                await asyncio.sleep(random.uniform(0, LONGEST_PAUSE))  # noqa: S311 not for secrecy

    async def _listen(self, hear: Callable[[bytes], None]) -> None:
        async with aclosing(self._redis.pubsub()) as subscription:
            await subscription.subscribe(self._name)
            heard = time.monotonic()
            while time.monotonic() - heard < 2 * SILENCE_SECONDS:
                message = await subscription.get_message(timeout=SILENCE_SECONDS)
                if message is None:
                    await subscription.ping()
                    continue
                heard = time.monotonic()
                if message["type"] == "message":
                    hear(message["data"])
        raise TimeoutError
