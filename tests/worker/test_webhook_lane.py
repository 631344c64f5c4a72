"""Which webhooks are served when more have something to get than can be served at once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from libs.domain.outbox.dispatch import WEBHOOK_BATCH, Dispatcher, Event
from libs.domain.outbox.events import Consumer
from services.worker.outbox import LONGEST_SLEEP, WEBHOOKS_AT_ONCE, WebhookLane
from tests.clinic import Clinic
from tests.processes import until


class Receivers:
    """They take what they are sent, after a while; `well` answers at once, and `before_it` is what others had got."""

    def __init__(self) -> None:
        self.got: Counter[str] = Counter()
        self.before_it: Counter[str] | None = None

    async def deliver(self, events: Sequence[Event]) -> None:
        (event,) = events
        if event.consumer == "webhook:0":
            self.before_it = self.got.copy()
        else:
            await asyncio.sleep(0.1)
            self.got[event.consumer] += 1


class Counting(Dispatcher):
    looks = 0

    async def waiting_webhooks(self) -> list[str]:
        self.looks += 1
        return await super().waiting_webhooks()


async def happen(clinic: Clinic, first: int, last: int, events: int, aggregate: str = "session:") -> None:
    """So many events of different sessions for each of the webhooks `first` to `last`."""
    await clinic.fetch(
        """
        WITH event AS (
            INSERT INTO outbox_events (tenant_id, name, aggregate, payload, trace_context)
            SELECT $1, 'session_ended', $5 || number, '{}', '{}' FROM generate_series(1, $4::int) number
            RETURNING id, aggregate
        )
        INSERT INTO outbox_deliveries (event_id, consumer, lane, aggregate)
        SELECT event.id, 'webhook:' || webhook, 'webhooks', event.aggregate
        FROM event, generate_series($2::int, $3::int) webhook
        """,
        *(clinic.tenant_id, first, last, events, aggregate),
    )


@asynccontextmanager
async def running(lane: WebhookLane) -> AsyncIterator[None]:
    task = asyncio.create_task(lane.run())
    try:
        yield
    finally:
        lane.stop()
        await task


async def test_slow_receivers_with_much_to_get_do_not_keep_others_waiting(clinic: Clinic) -> None:
    receivers = Receivers()
    await happen(clinic, 1, WEBHOOKS_AT_ONCE + 5, events=10 * WEBHOOK_BATCH)
    async with running(WebhookLane(Dispatcher(clinic.database, {Consumer.WEBHOOK: receivers}, clinic.metrics))):

        async def all_are_taken() -> bool:
            return len(receivers.got) >= WEBHOOKS_AT_ONCE / 2

        await until(all_are_taken)
        await happen(clinic, 0, 0, events=1)

        async def served() -> bool:
            return receivers.before_it is not None

        await until(served)
    assert receivers.before_it is not None
    assert max(receivers.before_it.values()) <= 5 * WEBHOOK_BATCH, "Far from all."


async def test_a_slot_that_is_free_again_is_given_away_at_once(clinic: Clinic) -> None:
    receivers = Receivers()
    await happen(clinic, 1, 3 * WEBHOOKS_AT_ONCE, events=1)
    dispatcher = Counting(clinic.database, {Consumer.WEBHOOK: receivers}, clinic.metrics)
    async with running(WebhookLane(dispatcher)):

        async def some_are_served() -> bool:
            return len(receivers.got) > WEBHOOKS_AT_ONCE

        began = asyncio.get_running_loop().time()
        await until(some_are_served)
        assert dispatcher.looks > 1 + (asyncio.get_running_loop().time() - began) / LONGEST_SLEEP


async def test_what_waits_behind_an_earlier_event_is_not_looked_at_again_and_again(clinic: Clinic) -> None:
    for _ in range(2):
        await happen(clinic, 1, 3, events=1)
    await clinic.fetch(
        """
        UPDATE outbox_deliveries d SET available_at = clock() + interval '1 hour'
        WHERE NOT EXISTS (SELECT FROM outbox_deliveries e WHERE e.consumer = d.consumer AND e.id < d.id)
        """
    )
    dispatcher = Counting(clinic.database, {Consumer.WEBHOOK: Receivers()}, clinic.metrics)
    async with running(WebhookLane(dispatcher)):
        await asyncio.sleep(1.5 * LONGEST_SLEEP)
    assert 1 <= dispatcher.looks <= 3
