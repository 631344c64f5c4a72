"""News of conversations on their way from process to process, over Redis pub/sub.

They say where to look, never what is there: what a conversation holds is in PostgreSQL, and who watches one looks
there now and then without being told. Lost news are late news.
"""

import asyncio
import random
import time
from contextlib import aclosing
from typing import Final, Protocol

import orjson
from redis.asyncio import Redis

from libs.domain.telemetry import logger

_log: Final = logger("doorbell")

CHANNEL: Final = "sessiongate:conversations"

CONNECT_SECONDS: Final = 1.0
LONGEST_PAUSE: Final = 2.0
"""Between two attempts to reach a Redis that is away, in seconds."""
SILENCE_SECONDS: Final = 10.0
"""After so much silence Redis is asked whether it is there; after twice as much it is left for a new connection."""


class Watcher(Protocol):
    """Whoever wants to know of conversations at once; see `libs.domain.transaction.Bell`."""

    def changed(self, conversation_id: int) -> None: ...

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None: ...


class News:
    """Gathers what one message will say."""

    def __init__(self) -> None:
        self._changed: dict[int, None] = {}
        self._typing: dict[tuple[int, int], bool] = {}

    def __bool__(self) -> bool:
        return bool(self._changed or self._typing)

    def changed(self, conversation_id: int) -> None:
        self._changed[conversation_id] = None

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        self._typing[conversation_id, user_id] = on

    def encode(self, sender: str) -> bytes:
        typing = [(*who, on) for who, on in self._typing.items()]
        return orjson.dumps({"from": sender, "changed": list(self._changed), "typing": typing})


def tell(watcher: Watcher, message: bytes, *, but: str) -> None:
    """Tells what a message says, unless it is from `but`."""
    news = orjson.loads(message)
    if news["from"] == but:
        return
    for conversation_id in news["changed"]:
        watcher.changed(conversation_id)
    for conversation_id, user_id, on in news["typing"]:
        watcher.typing(conversation_id, user_id, on=on)


async def listen(url: str, watcher: Watcher, *, but: str) -> None:
    """Tells `watcher` the news of everyone but one until cancelled, whatever becomes of Redis meanwhile."""
    async with Redis.from_url(url, socket_connect_timeout=CONNECT_SECONDS) as redis:
        while True:
            try:
                await _listen(redis, watcher, but)
            except Exception as error:
                _log.warning("doorbell_lost", exception_type=type(error).__name__)
            await asyncio.sleep(random.uniform(0, LONGEST_PAUSE))  # noqa: S311 not for secrecy


async def _listen(redis: Redis, watcher: Watcher, but: str) -> None:
    async with aclosing(redis.pubsub()) as subscription:
        await subscription.subscribe(CHANNEL)
        heard = time.monotonic()
        while time.monotonic() - heard < 2 * SILENCE_SECONDS:
            message = await subscription.get_message(timeout=SILENCE_SECONDS)
            if message is None:
                await subscription.ping()
                continue
            heard = time.monotonic()
            if message["type"] == "message":
                tell(watcher, message["data"], but=but)
    raise TimeoutError
