"""The doorbell: arq and pub/sub over Redis, used to shorten latency and for nothing else.

Every fact is in PostgreSQL, where the worker looks for due rows and sockets look for news by themselves, so a
ring that fails is counted and forgotten. Jobs are JSON and carry ids only.
"""

import asyncio
import math
from collections.abc import Awaitable, Coroutine
from typing import Any, Final
from uuid import uuid4

import orjson
from arq.connections import ArqRedis
from arq.constants import default_queue_name
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, get_current_span, use_span
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from libs.domain.jobs import Job
from libs.domain.news import CHANNEL, News, Watcher
from libs.observability.context import carrier
from libs.observability.registry import Metrics
from libs.observability.tracing import span

RING_TIMEOUT = 0.5
"""Seconds a ring may take; nobody waits for it, but a frozen Redis must not pile up tasks."""

NEWS_SECONDS: Final = 0.01
"""How long news wait for others after some were told: whoever is told of each alone has little time for anything
else."""


def encode(job: Job) -> dict[str, Any]:
    """The keyword arguments of the arq job: its ids, and the carrier that continues the trace."""
    return {"payload": job.payload(), "carrier": carrier()}


def serialise(job: dict[str, Any]) -> bytes:
    return orjson.dumps(job)


def deserialise(data: bytes) -> dict[str, Any]:
    loaded: dict[str, Any] = orjson.loads(data)
    return loaded


class Doorbell:
    """Rings in the background, after the commit; see `libs.domain.transaction.Bell`.

    `near`, who watches conversations in this process, is told at once; those in others, by one message for all that
    happened since the one before, signed with `name`.
    """

    near: Watcher | None = None

    def __init__(self, url: str, metrics: Metrics) -> None:
        pool: ConnectionPool = ConnectionPool.from_url(
            url,
            socket_timeout=RING_TIMEOUT,
            socket_connect_timeout=RING_TIMEOUT,
            max_connections=20,
            retry=Retry(NoBackoff(), 1),
        )
        self._redis = ArqRedis(pool, job_serializer=serialise, job_deserializer=deserialise)
        self._failures = metrics.counter("doorbell_failures_total")
        self._ringing: set[asyncio.Task[None]] = set()
        self.name = uuid4().hex
        self._news = News()
        self._cause: Span = INVALID_SPAN
        self._publishing = False

    def ring(self, job: Job) -> None:
        self._later(self._enqueue(job))

    async def _enqueue(self, job: Job) -> None:
        with span(f"arq.enqueue {job.name}", kind=SpanKind.PRODUCER):
            await self._call(self._redis.enqueue_job(job.name, **encode(job)))

    def changed(self, conversation_id: int) -> None:
        if self.near:
            self.near.changed(conversation_id)
        self._publish()
        self._news.changed(conversation_id)

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        if self.near:
            self.near.typing(conversation_id, user_id, on=on)
        self._publish()
        self._news.typing(conversation_id, user_id, on=on)

    def _publish(self) -> None:
        """Has the news told that are about to be added. Where several requests' are told together, the trace of the
        first shows it."""
        if not self._news:
            self._cause = get_current_span()
        if not self._publishing:
            self._publishing = True
            self._later(self._publish_all())

    async def _publish_all(self) -> None:
        while self._news:
            news, self._news = self._news, News()
            with use_span(self._cause), span("redis.publish", kind=SpanKind.CLIENT):
                await self._call(self._redis.publish(CHANNEL, news.encode(self.name)))
            await asyncio.sleep(NEWS_SECONDS)
        self._publishing = False

    def _later(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._ringing.add(task)
        task.add_done_callback(self._ringing.discard)

    async def _call(self, call: Awaitable[Any]) -> None:
        try:
            async with asyncio.timeout(RING_TIMEOUT):
                await call
        except (RedisError, OSError, TimeoutError):
            self._failures.inc()

    async def waiting(self) -> float:
        """How many jobs nobody has taken yet; NaN while Redis does not say."""
        try:
            async with asyncio.timeout(RING_TIMEOUT):
                return float(await self._redis.zcard(default_queue_name))
        except (RedisError, OSError, TimeoutError):
            return math.nan

    async def is_reachable(self) -> bool:
        try:
            async with asyncio.timeout(RING_TIMEOUT):
                return bool(await self._redis.ping())
        except (RedisError, OSError, TimeoutError):
            return False

    async def close(self) -> None:
        if self._ringing:
            await asyncio.wait(self._ringing, timeout=RING_TIMEOUT)
        await self._redis.aclose()
