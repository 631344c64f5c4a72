"""Webhooks, from a worker process to a receiver: what arrives, how often, and in which order."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from libs.domain.outbox.append import append
from libs.domain.outbox.dispatch import LEASE_SECONDS, MAX_ATTEMPTS
from libs.domain.outbox.events import EventName
from libs.domain.sealing import FieldKeys
from libs.domain.transaction import transaction
from libs.domain.webhooks import endpoints
from libs.domain.webhooks.sending import LONGEST_ANSWER, TIMEOUT_SECONDS
from tests.api.expect import found
from tests.cli.conftest import sessiongate
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.conftest import Urls
from tests.processes import Worker, running_worker, until
from tests.receiver import Received, Receiver, receiving, register
from tests.running import Api

HERE = {"SESSIONGATE_WEBHOOK_ALLOW_NETWORKS": "127.0.0.0/8"}
LONGER_THAN_ANY_BACKOFF = timedelta(hours=1)


@pytest.fixture
async def worker(urls: Urls, tmp_path: Path) -> AsyncIterator[Worker]:
    async with running_worker(urls.app, urls.redis, tmp_path / "worker.jsonl", **HERE) as running:
        yield running


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


async def happen(clinic: Clinic, aggregate: str, number: int = 1, name: EventName = EventName.SESSION_ENDED) -> None:
    payload = {"patient_id": clinic.operator.user_id, "doctor_id": clinic.operator.user_id, "number": number}
    async with transaction(clinic.database, clinic.bell) as tx:
        await append(tx, name, tenant_id=clinic.tenant_id, aggregate=aggregate, payload=payload)


def number_at(receiver: Receiver, path: str, number: int) -> Callable[[], Awaitable[list[Received]]]:
    async def there() -> list[Received]:
        return receiver.at(path) if len(receiver.at(path)) >= number else []

    return there


async def deliveries(clinic: Clinic, endpoint_id: int) -> list[Any]:
    return await clinic.fetch(
        "SELECT * FROM outbox_deliveries WHERE consumer = $1 ORDER BY id", f"webhook:{endpoint_id}"
    )


def settled(clinic: Clinic, endpoint_id: int) -> Callable[[], Awaitable[list[Any]]]:
    """Once nothing waits for the endpoint."""

    async def look() -> list[Any]:
        rows = await deliveries(clinic, endpoint_id)
        return rows if rows and all(row["dispatched_at"] or row["dead_at"] for row in rows) else []

    return look


def failed(clinic: Clinic, endpoint_id: int, attempts: int) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        rows = await deliveries(clinic, endpoint_id)
        return any(row["attempts"] == attempts and row["lease_until"] is None for row in rows)

    return look


async def test_an_event_arrives_once_and_any_library_can_tell_that_it_is_ours(
    clinic: Clinic, worker: Worker, receiver: Receiver
) -> None:
    endpoint_id, secret = await register(clinic.database, clinic.operator, f"{receiver.url}/a?b=c")
    session = await clinic.session()

    (received,) = await until(number_at(receiver, "/a?b=c", 1))
    (row,) = await until(settled(clinic, endpoint_id))

    told = Webhook(secret).verify(received.body, received.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(received.body.replace(b"session_started", b"session_stopped"), received.headers)
    event = await clinic.fetchrow("SELECT * FROM outbox_events")
    assert received.event_id == str(event["event_id"])
    assert told["type"] == "session_started"
    assert datetime.fromisoformat(told["timestamp"]) == event["occurred_at"]
    assert told["data"] == event["payload"]
    assert told["data"]["session_context"] == session.context
    assert received.headers["host"] == receiver.url.removeprefix("http://")
    assert received.headers.keys() & {"traceparent", "tracestate", "baggage", "x-correlation-id"} == set()
    assert (row["attempts"], row["response_status"], row["last_error"]) == (1, 204, None)
    assert await worker.sample("webhook_deliveries_total", result="delivered") == 1
    assert await worker.sample("webhook_delivery_duration_seconds_count") == 1
    assert len(receiver.got) == 1
    assert secret not in worker.log.read_text()


async def test_an_endpoint_gets_what_its_tenant_asked_for_and_nothing_of_others(
    clinic: Clinic, worker: Worker, receiver: Receiver
) -> None:
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    both, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/both")
    await register(clinic.database, clinic.operator, f"{receiver.url}/started", "session_started")
    await register(clinic.database, elsewhere.operator, f"{receiver.url}/elsewhere")
    for name in (EventName.APPOINTMENT_CONFIRMED, EventName.SESSION_STARTED, EventName.SESSION_ENDED):
        await happen(clinic, "appointment:1", name=name)

    await until(number_at(receiver, "/both", 2))
    await until(settled(clinic, both))

    assert [received.told["type"] for received in receiver.at("/both")] == ["session_started", "session_ended"]
    assert [received.told["type"] for received in receiver.at("/started")] == ["session_started"]
    assert receiver.at("/elsewhere") == []


async def test_a_receiver_that_fails_gets_the_same_event_again(
    clinic: Clinic, worker: Worker, receiver: Receiver, clock: Clock
) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.answers["/"] = [500, 204]
    await happen(clinic, "appointment:1")
    await until(failed(clinic, endpoint_id, 1))
    await clock.advance(LONGER_THAN_ANY_BACKOFF)

    first, second = await until(number_at(receiver, "/", 2))
    (row,) = await until(settled(clinic, endpoint_id))

    assert (first.event_id, first.body) == (second.event_id, second.body)
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]
    assert (row["attempts"], row["response_status"], row["last_error"]) == (2, 204, "The receiver answered 500.")
    (line,) = worker.lines("outbox_failed")
    assert (line["level"], line["consumer"], line["dead"]) == ("warning", f"webhook:{endpoint_id}", False)


async def test_a_receiver_that_is_gone_is_told_nothing_more(clinic: Clinic, worker: Worker, receiver: Receiver) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.answers["/"] = [410]
    await happen(clinic, "appointment:1")

    (row,) = await until(settled(clinic, endpoint_id))
    await happen(clinic, "appointment:2")

    assert (row["attempts"], row["response_status"], row["dead_at"] is not None) == (1, 410, True)
    endpoint = await clinic.fetchrow("SELECT disabled_at, disabled_reason FROM webhook_endpoints")
    assert endpoint["disabled_at"] is not None
    assert endpoint["disabled_reason"] == "gone"
    entry = await clinic.fetchrow("SELECT * FROM audit_log WHERE action = 'webhook_disabled'")
    assert (entry["tenant_id"], entry["actor_id"]) == (clinic.tenant_id, None)
    assert (entry["subject"], entry["details"]) == (f"webhook:{endpoint_id}", {"reason": "gone"})

    async def logged() -> list[dict[str, Any]]:
        return worker.lines("webhook_disabled")

    assert len(await until(logged)) == 1
    assert len(await deliveries(clinic, endpoint_id)) == 1


async def test_what_waits_for_an_endpoint_that_is_disabled_is_given_up(
    clinic: Clinic, worker: Worker, receiver: Receiver, clock: Clock
) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.answers["/"] = [500]
    await happen(clinic, "appointment:1")
    await until(failed(clinic, endpoint_id, 1))
    async with transaction(clinic.database, clinic.bell) as tx:
        await endpoints.change(tx, clinic.operator, endpoint_id, enabled=False)
    await clock.advance(LONGER_THAN_ANY_BACKOFF)

    (row,) = await until(settled(clinic, endpoint_id))

    assert (row["attempts"], row["last_error"]) == (2, "The endpoint is disabled.")
    assert len(receiver.got) == 1


async def test_after_six_attempts_a_delivery_is_dead_until_it_is_replayed(
    clinic: Clinic, worker: Worker, receiver: Receiver, clock: Clock, urls: Urls, tmp_path: Path
) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.answers["/"] = [503] * MAX_ATTEMPTS + [200]
    await happen(clinic, "appointment:1")
    for attempt in range(1, MAX_ATTEMPTS):
        await until(failed(clinic, endpoint_id, attempt))
        await clock.advance(LONGER_THAN_ANY_BACKOFF)
    (dead,) = await until(settled(clinic, endpoint_id))
    assert (dead["attempts"], dead["dead_at"] is not None) == (MAX_ATTEMPTS, True)

    env = {"SESSIONGATE_DATABASE_URL": urls.app}
    said = await asyncio.to_thread(sessiongate, tmp_path, "outbox", "replay", str(dead["id"]), env=env)

    assert (said.returncode, said.stderr) == (0, "")
    requests = await until(number_at(receiver, "/", MAX_ATTEMPTS + 1))
    assert len({received.event_id for received in requests}) == 1
    (row,) = await until(settled(clinic, endpoint_id))
    assert (row["attempts"], row["dead_at"]) == (1, None)


async def test_an_operator_has_an_event_delivered_again(
    api: Api, clinic: Clinic, worker: Worker, receiver: Receiver
) -> None:
    endpoint_id, secret = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    await happen(clinic, "appointment:1")
    (row,) = await until(settled(clinic, endpoint_id))

    path = f"/admin/webhooks/{endpoint_id}/deliveries/{row['id']}/redeliver"
    again = found(await api.as_(clinic.operator).post(path))

    assert (again["status"], again["attempts"], again["delivered_at"]) == ("pending", 0, None)
    first, second = await until(number_at(receiver, "/", 2))
    assert first.event_id == second.event_id == again["event_id"]
    assert Webhook(secret).verify(second.body, second.headers)["type"] == "session_ended"


async def test_a_ping_reaches_the_endpoint_that_is_tried_and_nobody_else(
    api: Api, clinic: Clinic, worker: Worker, receiver: Receiver
) -> None:
    tried, secret = await register(clinic.database, clinic.operator, f"{receiver.url}/tried")
    await register(clinic.database, clinic.operator, f"{receiver.url}/other")

    found(await api.as_(clinic.operator).post(f"/admin/webhooks/{tried}/test"), 201)

    (received,) = await until(number_at(receiver, "/tried", 1))
    assert Webhook(secret).verify(received.body, received.headers)["type"] == "ping"
    await until(settled(clinic, tried))
    assert receiver.at("/other") == []
    assert await clinic.fetchval("SELECT count(*) FROM notifications") == 0


async def test_for_a_day_the_old_secret_signs_as_well(
    clinic: Clinic, worker: Worker, receiver: Receiver, clock: Clock
) -> None:
    endpoint_id, old = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    async with transaction(clinic.database, clinic.bell) as tx:
        new, until_when = await endpoints.rotate_secret(tx, clinic.operator, FieldKeys({}), endpoint_id)
    assert until_when - await clinic.fetchval("SELECT clock()") > timedelta(hours=23)

    await happen(clinic, "appointment:1")
    (received,) = await until(number_at(receiver, "/", 1))
    for secret in (old, new):
        Webhook(secret).verify(received.body, received.headers)
    assert len(received.headers["webhook-signature"].split()) == 2

    await clock.advance(timedelta(hours=24))
    await happen(clinic, "appointment:2")
    _, later = await until(number_at(receiver, "/", 2))
    assert len(later.headers["webhook-signature"].split()) == 1


async def test_events_of_one_appointment_arrive_in_order_and_others_do_not_wait_for_them(
    clinic: Clinic, worker: Worker, receiver: Receiver, clock: Clock
) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.answers["/"] = [500, 204]
    await happen(clinic, "appointment:1", 1)
    await until(failed(clinic, endpoint_id, 1))
    await clinic.fetch("UPDATE outbox_deliveries SET available_at = clock() + interval '1 minute' WHERE attempts = 1")
    for number in (2, 3):
        await happen(clinic, "appointment:1", number)
    await happen(clinic, "appointment:2", 4)
    await until(number_at(receiver, "/", 2))
    await clock.advance(MINUTE)

    await until(settled(clinic, endpoint_id))

    assert [received.told["data"]["number"] for received in receiver.got] == [1, 4, 1, 2, 3]


async def test_an_endpoint_that_hangs_holds_up_nobody(clinic: Clinic, worker: Worker, receiver: Receiver) -> None:
    hanging, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/hangs")
    well, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/well")
    receiver.hanging.add("/hangs")
    for number in range(20):
        await happen(clinic, f"appointment:{number}", number)
    await until(number_at(receiver, "/hangs", 4))

    began = time.monotonic()
    await happen(clinic, "appointment:99", 99)
    await until(number_at(receiver, "/well", 21))
    assert time.monotonic() - began < 2

    async def notified() -> bool:
        told: int = await clinic.fetchval("SELECT count(DISTINCT event_id) FROM notifications")
        return told == 21

    await until(notified)
    assert time.monotonic() - began < 2
    await until(settled(clinic, well))
    await until(failed(clinic, hanging, 1))
    assert len([row for row in await deliveries(clinic, hanging) if row["attempts"]]) <= 8, "A few at once."
    assert await worker.sample("webhook_deliveries_total", result="timeout") > 0


async def test_a_worker_that_dies_before_it_has_noted_a_delivery_is_followed_by_one_that_repeats_it(
    clinic: Clinic, urls: Urls, receiver: Receiver, clock: Clock, tmp_path: Path
) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.hanging.add("/")
    async with running_worker(urls.app, urls.redis, tmp_path / "one.jsonl", **HERE) as dying:
        await happen(clinic, "appointment:1")
        (first,) = await until(number_at(receiver, "/", 1))
        await dying.kill()
    receiver.hanging.clear()
    await clock.advance(timedelta(seconds=LEASE_SECONDS))
    async with running_worker(urls.app, urls.redis, tmp_path / "two.jsonl", **HERE):
        _, second = await until(number_at(receiver, "/", 2))
        (row,) = await until(settled(clinic, endpoint_id))

    assert (first.event_id, first.body) == (second.event_id, second.body)
    assert (row["attempts"], row["dispatched_at"] is not None) == (2, True)


async def test_a_worker_that_is_stopped_finishes_the_deliveries_it_has_begun(
    clinic: Clinic, worker: Worker, receiver: Receiver
) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.hanging.add("/")
    await happen(clinic, "appointment:1")
    await until(number_at(receiver, "/", 1))
    assert await worker.stop() == 0
    (row,) = await deliveries(clinic, endpoint_id)
    assert (row["attempts"], row["lease_until"]) == (1, None)


async def test_a_redirect_is_not_followed(clinic: Clinic, worker: Worker, receiver: Receiver) -> None:
    async with receiving() as elsewhere:
        endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
        receiver.answers["/"] = [307]
        receiver.headers["Location"] = f"{elsewhere.url}/"
        await happen(clinic, "appointment:1")
        await until(failed(clinic, endpoint_id, 1))
        assert elsewhere.connections == 0
    (row,) = await deliveries(clinic, endpoint_id)
    assert (row["response_status"], row["last_error"]) == (307, "The receiver answered 307.")


async def test_what_a_receiver_wants_to_be_remembered_is_forgotten(
    clinic: Clinic, worker: Worker, receiver: Receiver
) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.headers["Set-Cookie"] = "who=me"
    for number in (1, 2):
        await happen(clinic, f"appointment:{number}")
        await until(number_at(receiver, "/", number))
        await until(settled(clinic, endpoint_id))
    assert not any("cookie" in received.headers for received in receiver.got)
    assert receiver.connections == 2, "One for each: another tenant's receiver may be at the same address."


async def test_an_endless_answer_is_not_read_to_its_end(clinic: Clinic, worker: Worker, receiver: Receiver) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"{receiver.url}/")
    receiver.answers["/"] = [200]
    receiver.headers["Content-Length"] = str(10**9)
    receiver.body = b"x" * LONGEST_ANSWER
    await happen(clinic, "appointment:1")
    (row,) = await until(settled(clinic, endpoint_id), seconds=TIMEOUT_SECONDS - 1)
    assert (row["response_status"], row["dispatched_at"] is not None) == (200, True)


async def test_without_leave_nothing_is_sent_to_this_machine(
    clinic: Clinic, urls: Urls, receiver: Receiver, tmp_path: Path
) -> None:
    port = receiver.url.rpartition(":")[2]
    registered = [
        await register(clinic.database, clinic.operator, url)
        for url in (f"{receiver.url}/", f"https://localhost:{port}/", f"https://[::ffff:127.0.0.1]:{port}/")
    ]
    settings = {"SESSIONGATE_WEBHOOK_PORTS": port}
    async with running_worker(urls.app, urls.redis, tmp_path / "worker.jsonl", **settings) as worker:
        await happen(clinic, "appointment:1")
        for endpoint_id, _ in registered:
            await until(failed(clinic, endpoint_id, 1))
        assert await worker.sample("webhook_deliveries_total", result="forbidden") >= len(registered)
    assert receiver.connections == 0


def test_a_lease_outlasts_two_attempts() -> None:
    assert 2 * TIMEOUT_SECONDS < LEASE_SECONDS
