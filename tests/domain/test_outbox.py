"""The outbox delivers at least once and in order, and gives up only after saying so."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from libs.domain.outbox.append import append
from libs.domain.outbox.dispatch import LEASE_SECONDS, MAX_ATTEMPTS, Dispatcher, Event
from libs.domain.outbox.events import Consumer, EventName, Lane
from libs.domain.transaction import transaction
from libs.observability.context import bind
from libs.observability.testing import capture_logs
from tests.clinic import Clinic
from tests.clock import Clock


class Recording:
    """A consumer that remembers what it got, and refuses the aggregates it is told to refuse."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.refuses: set[int] = set()

    async def deliver(self, events: Sequence[Event]) -> None:
        numbers = [event.payload["number"] for event in events]
        if refused := self.refuses.intersection(numbers):
            raise ValueError(f"cannot take {refused}, call +49 151 23456789")
        self.got += numbers


@pytest.fixture
def consumer() -> Recording:
    return Recording()


@pytest.fixture
def dispatcher(clinic: Clinic, consumer: Recording) -> Dispatcher:
    return Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: consumer}, clinic.metrics)


async def put(clinic: Clinic, number: int, aggregate: str, name: EventName = EventName.APPOINTMENT_CONFIRMED) -> None:
    async with transaction(clinic.database, clinic.bell) as tx:
        await append(tx, name, tenant_id=clinic.tenant_id, aggregate=aggregate, payload={"number": number})


async def test_events_reach_their_consumer_in_order(
    clinic: Clinic, dispatcher: Dispatcher, consumer: Recording
) -> None:
    for number in range(5):
        await put(clinic, number, "appointment:1")

    while await dispatcher.dispatch(Lane.NORMAL):
        pass

    assert consumer.got == [0, 1, 2, 3, 4]


async def test_an_event_that_was_rolled_back_is_never_seen(
    clinic: Clinic, dispatcher: Dispatcher, consumer: Recording
) -> None:
    async def change_ones_mind() -> None:
        async with transaction(clinic.database, clinic.bell) as tx:
            await append(tx, EventName.SESSION_ENDED, tenant_id=clinic.tenant_id, aggregate="x", payload={"number": 1})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await change_ones_mind()

    assert await dispatcher.dispatch(Lane.URGENT) == 0
    assert clinic.bell.rung == [], "Nobody is woken for rows that were rolled back."
    assert consumer.got == []


async def test_one_that_spoils_a_batch_is_found_and_the_others_arrive(
    clinic: Clinic, dispatcher: Dispatcher, consumer: Recording
) -> None:
    consumer.refuses = {2}
    for number in range(4):
        await put(clinic, number, f"appointment:{number}")

    await dispatcher.dispatch(Lane.NORMAL)

    assert consumer.got == [0, 1, 3]
    row = await clinic.fetchrow("SELECT attempts, last_error FROM outbox_deliveries WHERE dispatched_at IS NULL")
    assert row["attempts"] == 1
    assert "cannot take" in row["last_error"]
    assert "23456789" not in row["last_error"]
    assert clinic.metrics.sample("outbox_dispatch_failures_total", event_name="appointment_confirmed") == 1


async def test_a_later_event_waits_for_an_earlier_one_of_its_aggregate(
    clinic: Clinic, dispatcher: Dispatcher, consumer: Recording, clock: Clock
) -> None:
    consumer.refuses = {1}
    await put(clinic, 1, "appointment:1")
    await dispatcher.dispatch(Lane.NORMAL)
    await put(clinic, 2, "appointment:1", EventName.SESSION_ENDED)

    assert await dispatcher.dispatch(Lane.URGENT) == 0

    consumer.refuses = set()
    await clock.advance(timedelta(minutes=10))
    await dispatcher.dispatch(Lane.NORMAL)
    await dispatcher.dispatch(Lane.URGENT)
    assert consumer.got == [1, 2]


async def test_urgent_events_do_not_wait_for_others(
    clinic: Clinic, dispatcher: Dispatcher, consumer: Recording
) -> None:
    await put(clinic, 1, "appointment:1")
    await put(clinic, 2, "appointment:2", EventName.SESSION_STARTED)

    await dispatcher.dispatch(Lane.URGENT)

    assert consumer.got == [2]


async def test_after_the_last_attempt_a_delivery_is_dead_and_says_so(
    clinic: Clinic, dispatcher: Dispatcher, consumer: Recording, clock: Clock
) -> None:
    consumer.refuses = {1}
    await put(clinic, 1, "session:1", EventName.SESSION_STARTED)
    with capture_logs() as logs:
        for _ in range(MAX_ATTEMPTS):
            assert await dispatcher.dispatch(Lane.URGENT) == 1
            await clock.advance(timedelta(minutes=10))
        failures = logs.lines("outbox_failed")

    assert [line["dead"] for line in failures] == [False] * (MAX_ATTEMPTS - 1) + [True]
    assert {line["failure_reason"] for line in failures} == {"notification_failed"}
    assert await dispatcher.dispatch(Lane.URGENT) == 0
    assert await clinic.fetchval("SELECT dead_at IS NOT NULL FROM outbox_deliveries")
    assert clinic.metrics.sample("appointment_session_notification_failed_total") == MAX_ATTEMPTS


async def test_a_notification_that_fails_never_fails_the_conversion(clinic: Clinic, consumer: Recording) -> None:
    session = await clinic.session()

    class Broken:
        async def deliver(self, events: Sequence[Event]) -> None:
            raise ConnectionError("nobody there")

    await Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: Broken()}, clinic.metrics).dispatch(Lane.URGENT)

    row = await clinic.fetchrow("SELECT status FROM sessions WHERE id = $1", session.ref.id)
    assert row["status"] == "waiting"
    assert sum(sample for sample in [clinic.metrics.sample("appointment_session_notification_failed_total")]) == 1
    failed = [
        clinic.metrics.sample("appointment_session_conversion_failed_total", reason=reason)
        for reason in ("unknown_error", "db_update_failed")
    ]
    assert failed == [0, 0]


async def test_a_dispatcher_that_died_is_followed_by_another_after_its_lease(
    clinic: Clinic, dispatcher: Dispatcher, consumer: Recording, clock: Clock
) -> None:
    died = asyncio.Event()

    class Dying:
        async def deliver(self, events: Sequence[Event]) -> None:
            died.set()
            await asyncio.Event().wait()

    await put(clinic, 1, "appointment:1")
    dying = asyncio.create_task(
        Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: Dying()}, clinic.metrics).dispatch(Lane.NORMAL)
    )
    await died.wait()
    dying.cancel()

    assert await dispatcher.dispatch(Lane.NORMAL) == 0, "The lease still holds."
    await clock.advance(timedelta(seconds=LEASE_SECONDS))
    assert await dispatcher.dispatch(Lane.NORMAL) == 1
    assert consumer.got == [1]


async def test_a_dispatcher_that_hung_cannot_finish_what_another_has_taken_over(
    clinic: Clinic, consumer: Recording, clock: Clock
) -> None:
    hung, go_on = asyncio.Event(), asyncio.Event()

    class Hanging:
        async def deliver(self, events: Sequence[Event]) -> None:
            hung.set()
            await go_on.wait()

    await put(clinic, 1, "appointment:1")
    hanging = asyncio.create_task(
        Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: Hanging()}, clinic.metrics).dispatch(Lane.NORMAL)
    )
    await hung.wait()
    await clock.advance(timedelta(seconds=LEASE_SECONDS))
    consumer.refuses = {1}
    await Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: consumer}, clinic.metrics).dispatch(Lane.NORMAL)
    go_on.set()
    await hanging

    row = await clinic.fetchrow("SELECT attempts, dispatched_at FROM outbox_deliveries")
    assert tuple(row) == (2, None)


async def test_dispatchers_beside_each_other_deliver_each_event_once(clinic: Clinic, consumer: Recording) -> None:
    for number in range(40):
        await put(clinic, number, f"appointment:{number}")
    dispatchers = [Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: consumer}, clinic.metrics) for _ in range(5)]

    await asyncio.gather(*(dispatcher.dispatch(Lane.NORMAL) for dispatcher in dispatchers))

    assert sorted(consumer.got) == list(range(40))


async def test_the_log_line_of_a_delivery_continues_the_request_that_caused_it(
    clinic: Clinic, dispatcher: Dispatcher
) -> None:
    with bind(correlation_id="7e6b8e70-5a87-4b2c-a2fb-56ab5ad33b4c"):
        await put(clinic, 1, "appointment:1")
    with capture_logs() as logs:
        await dispatcher.dispatch(Lane.NORMAL)
        (line,) = logs.lines("outbox_dispatched")

    assert line["correlation_id"] == "7e6b8e70-5a87-4b2c-a2fb-56ab5ad33b4c"
    assert (line["event_name"], line["attempts"]) == ("appointment_confirmed", 1)


async def test_an_event_of_another_version_holds_up_no_other_and_is_given_up(
    clinic: Clinic, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    session = await clinic.session()
    await owner.execute(
        """
        WITH event AS (
            INSERT INTO outbox_events (tenant_id, name, aggregate, payload)
            SELECT tenant_id, 'event_of_the_future', 'appointment:0', '{}' FROM outbox_events LIMIT 1 RETURNING id
        )
        INSERT INTO outbox_deliveries (event_id, consumer, lane, aggregate, available_at)
        SELECT id, 'notifications', 'urgent', 'appointment:0', clock() - interval '1 hour' FROM event
        """
    )
    for _ in range(MAX_ATTEMPTS):
        await clinic.dispatch()
        await clock.advance(timedelta(minutes=10))
    told = await clinic.fetchval("SELECT count(*) FROM notifications WHERE session_id = $1", session.ref.id)
    assert told == 2
    row = await clinic.fetchrow("SELECT attempts, dead_at FROM outbox_deliveries WHERE aggregate = 'appointment:0'")
    assert row["attempts"] == MAX_ATTEMPTS
    assert row["dead_at"] is not None


async def test_a_delivery_that_nobody_survives_is_given_up(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    await clinic.session()
    await owner.execute(
        f"UPDATE outbox_deliveries SET attempts = {MAX_ATTEMPTS}, lease_until = clock() - interval '1 second'"
    )
    await clinic.dispatch()
    assert await clinic.fetchval("SELECT bool_and(dead_at IS NOT NULL) FROM outbox_deliveries")
    assert await clinic.fetchval("SELECT count(*) FROM notifications") == 0


async def test_what_happens_at_once_to_many_is_delivered_to_everyone_in_order(
    clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    clinics = [clinic, *[await Clinic.open(clinic.database, name) for name in ("Second", "Third")]]
    for _ in range(12):
        for each in clinics:
            await each.appointment()
    await clinic.convert()
    await owner.execute(
        """
        UPDATE sessions SET status = 'active', activated_at = clock() - interval '20 minutes', allowance_units = 1,
            expires_at = clock() - interval '10 minutes', tick_at = clock()
        """
    )
    await owner.execute("INSERT INTO tenants (name) SELECT 'Other' FROM generate_series(1, 300)")
    await owner.execute(
        """
        INSERT INTO webhook_endpoints (tenant_id, url, events)
        SELECT tenant.id, 'https://example.org/' || number, $2
        FROM tenants tenant, generate_series(1, CASE WHEN tenant.id = ANY ($1) THEN 10 ELSE 1 END) number
        """,
        [each.tenant_id for each in clinics],
        [name.value for name in (EventName.SESSION_CHARGED, EventName.SESSION_ENDED)],
    )
    await owner.execute("ANALYZE")

    assert len(await clinic.settle()) == 36

    rows = await clinic.fetch(
        """
        SELECT array_agg(event_id ORDER BY id) AS delivered, array_agg(event_id ORDER BY event_id) AS happened
        FROM outbox_deliveries WHERE lane = 'webhooks' GROUP BY consumer, aggregate
        """
    )
    assert [len(row["happened"]) for row in rows] == [2] * 360
    assert [row["delivered"] for row in rows] == [row["happened"] for row in rows]
