"""The pulse finds due work in PostgreSQL, in time and in the right order, whatever Redis does."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from libs.domain.conversion.report import Reporter
from libs.domain.doorbell import Doorbell
from libs.domain.jobs import ConvertDue, DispatchOutbox
from libs.domain.outbox import dead
from libs.domain.outbox.append import address
from libs.domain.outbox.events import Consumer, EventName, Lane
from libs.domain.runtime import Runtime
from libs.domain.transaction import transaction
from libs.observability.testing import capture_logs
from services.worker.gauges import Gauges
from services.worker.pulse import LONGEST_SLEEP, Pulse
from tests.clinic import ACTIVATE, MINUTE, Clinic
from tests.clock import Clock
from tests.processes import until


@pytest.fixture
def pulse(clinic: Clinic, runtime: Runtime) -> Pulse:
    return Pulse(runtime, clinic.converter(), Reporter(clinic.metrics))


@asynccontextmanager
async def beating(pulse: Pulse) -> AsyncIterator[None]:
    task = asyncio.create_task(pulse.run())
    try:
        yield
    finally:
        pulse.stop()
        await task


async def is_converted(clinic: Clinic, appointment_id: int) -> bool:
    return bool(await clinic.fetchval("SELECT session_id FROM appointments WHERE id = $1", appointment_id))


async def test_a_beat_converts_what_is_due_and_wakes_the_outbox(clinic: Clinic, pulse: Pulse) -> None:
    appointment_id = await clinic.appointment()

    await pulse.beat()

    assert await is_converted(clinic, appointment_id)
    assert DispatchOutbox() in clinic.bell.rung


async def test_it_sleeps_until_the_next_due_moment_and_at_most_a_second(clinic: Clinic, pulse: Pulse) -> None:
    assert await pulse.beat() == LONGEST_SLEEP

    await clinic.appointment(starts_in=timedelta(milliseconds=400))
    assert 0.1 < await pulse.beat() <= 0.4


async def test_the_next_attempt_and_deadlines_are_due_moments_too(clinic: Clinic, pulse: Pulse) -> None:
    session = await clinic.session()
    await clinic.fetchval(
        "UPDATE sessions SET response_deadline = clock() + interval '300 ms' WHERE id = $1", session.ref.id
    )
    assert 0.05 < await pulse.beat() <= 0.3

    await clinic.fetchval(
        f"{ACTIVATE} WHERE id = $1",
        session.ref.id,
    )
    await clinic.appointment(starts_in=timedelta(milliseconds=200), status="PENDING")
    assert 0.05 < await pulse.beat() <= 0.2


async def test_a_session_exists_a_moment_after_its_appointment_is_due(clinic: Clinic, pulse: Pulse) -> None:
    async with beating(pulse):
        appointment_id = await clinic.appointment(starts_in=timedelta(milliseconds=700))
        await until(lambda: is_converted(clinic, appointment_id))

    late = await clinic.fetchval(
        "SELECT s.created_at - a.starts_at FROM sessions s JOIN appointments a ON a.id = s.appointment_id"
    )
    assert timedelta(0) <= late < timedelta(seconds=1.5)


async def test_back_to_back_appointments_of_a_doctor_follow_each_other_at_once(
    clinic: Clinic, pulse: Pulse, clock: Clock
) -> None:
    doctor = await clinic.doctor()
    first = await clinic.session(doctor=doctor, starts_in=timedelta(0), lasts=30 * MINUTE)
    following = await clinic.appointment(doctor, starts_in=30 * MINUTE)
    await clock.advance(30 * MINUTE)

    await pulse.beat()

    row = await clinic.fetchrow("SELECT status FROM sessions WHERE id = $1", first.ref.id)
    assert row["status"] == "expired"
    assert await is_converted(clinic, following)
    assert await clinic.fetchval(
        "SELECT b.created_at - a.ended_at < interval '1 second' FROM sessions a, sessions b"
        " WHERE a.id = $1 AND b.appointment_id = $2",
        first.ref.id,
        following,
    )


async def test_it_wakes_from_its_sleep_when_rung(clinic: Clinic, pulse: Pulse) -> None:
    first = await clinic.appointment()
    async with beating(pulse):
        await until(lambda: is_converted(clinic, first))
        await asyncio.sleep(LONGEST_SLEEP / 10)  # it sleeps by now, and has seen nothing else
        second = await clinic.appointment()
        loop = asyncio.get_running_loop()
        asked = loop.time()
        pulse.wake()
        await until(lambda: is_converted(clinic, second))
        assert loop.time() - asked < LONGEST_SLEEP / 2


async def test_it_knows_whether_it_is_well_and_whether_it_is_stuck(
    clinic: Clinic, pulse: Pulse, owner: "asyncpg.Connection[Any]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.pulse.WELL_SECONDS", 0.3)
    monkeypatch.setattr("services.worker.pulse.STUCK_SECONDS", 2.5)
    monkeypatch.setattr("services.worker.pulse.LONGEST_SLEEP", 0.1)

    async def is_ill() -> bool:
        return not pulse.is_well

    async with beating(pulse):
        assert pulse.is_well
        with capture_logs():
            await owner.execute("ALTER TABLE sessions RENAME TO gone")
            await until(is_ill)
            assert not pulse.is_stuck, "It fails, but it beats."
            await owner.execute("ALTER TABLE gone RENAME TO sessions")

        async def is_well() -> bool:
            return pulse.is_well

        await until(is_well)
    await asyncio.sleep(2.6)
    assert pulse.is_stuck


async def test_a_worker_whose_pulse_is_not_well_does_not_say_that_it_lives(
    clinic: Clinic, runtime: Runtime, doorbell: Doorbell
) -> None:
    async def gauge(name: str, is_well: Callable[[], bool]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await Gauges(runtime, doorbell, name, is_well).run()

    await gauge("ill", lambda: False)
    await gauge("sound", lambda: True)
    assert [row["name"] for row in await clinic.fetch("SELECT name FROM workers")] == ["sound"]


async def test_what_cannot_be_measured_is_no_number_and_hinders_nothing_else(
    clinic: Clinic, runtime: Runtime, doorbell: Doorbell, owner: "asyncpg.Connection[Any]"
) -> None:
    gauges = Gauges(runtime, doorbell, "tests", lambda: True)
    await gauges.measure()
    assert clinic.metrics.sample("outbox_dead") == 0
    measured_at = clinic.metrics.sample("gauges_last_run_timestamp_seconds")
    assert measured_at == pytest.approx(time.time(), abs=60)
    await owner.execute(
        "INSERT INTO idempotency_keys (user_id, operation, key, tenant_id, fingerprint, status, body, created_at)"
        " SELECT id, 'book', 'old', tenant_id, '', 200, '', clock() - interval '30 days' FROM users LIMIT 1"
    )
    await owner.execute("ALTER TABLE conversion_samples RENAME TO gone")
    try:
        with capture_logs() as logs:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.9):
                    await gauges.run()
            assert [line["task"] for line in logs.lines("gauges_failed")] == ["measure"]
    finally:
        await owner.execute("ALTER TABLE gone RENAME TO conversion_samples")
    assert math.isnan(clinic.metrics.sample("outbox_dead"))
    assert math.isnan(clinic.metrics.sample("appointments_due_count"))
    assert clinic.metrics.sample("gauges_last_run_timestamp_seconds") == measured_at
    assert await clinic.fetchval("SELECT count(*) FROM idempotency_keys") == 0


async def test_jobs_that_nobody_takes_are_measured(clinic: Clinic, runtime: Runtime, doorbell: Doorbell) -> None:
    async def waiting() -> float:
        await Gauges(runtime, doorbell, "tests", lambda: True).measure()
        return clinic.metrics.sample("worker_queue_depth", queue="arq")

    before = await waiting()
    doorbell.ring(ConvertDue())

    async def arrived() -> bool:
        return await waiting() == before + 1

    await until(arrived)


async def test_without_redis_nobody_knows_how_many_jobs_wait(clinic: Clinic, runtime: Runtime) -> None:
    away = Doorbell("redis://127.0.0.1:1", clinic.metrics)
    await Gauges(runtime, away, "tests", lambda: True).measure()
    assert math.isnan(clinic.metrics.sample("worker_queue_depth", queue="arq"))
    await away.close()


async def test_the_outbox_is_measured_by_what_this_program_owes_and_not_by_receivers(
    clinic: Clinic, runtime: Runtime, doorbell: Doorbell, clock: Clock
) -> None:
    async def measured() -> tuple[float, float]:
        await Gauges(runtime, doorbell, "tests", lambda: True).measure()
        gauges = [clinic.metrics.sample(name) for name in ("outbox_dispatch_lag_seconds", "outbox_dead")]
        return round(gauges[0]), gauges[1]

    async def put(consumer: str, lane: Lane) -> None:
        async with transaction(clinic.database, clinic.bell) as tx:
            name = EventName.SESSION_ENDED
            await address(tx, consumer, lane, name, tenant_id=clinic.tenant_id, aggregate="session:1", payload={})

    await put("webhook:7", Lane.WEBHOOKS)
    await put("webhook:8", Lane.WEBHOOKS)
    await clinic.fetch("UPDATE outbox_deliveries SET dead_at = clock() WHERE consumer = 'webhook:7'")
    await clock.advance(MINUTE)
    assert await measured() == (0, 0)

    await put(Consumer.NOTIFICATIONS, Lane.NORMAL)
    await clock.advance(MINUTE)
    assert await measured() == (60, 0)
    await clinic.fetch("UPDATE outbox_deliveries SET dead_at = clock() WHERE lane = 'normal'")
    await clock.advance(timedelta(days=3))
    assert await measured() == (0, 1)

    async with transaction(clinic.database, clinic.bell) as tx:
        assert len(await dead.replay(tx, clinic.tenant_id, None, consumer=Consumer.NOTIFICATIONS)) == 1
    await clock.advance(timedelta(seconds=5))
    assert await measured() == (5, 0)
    await clinic.fetch("UPDATE outbox_deliveries SET attempts = 1, available_at = clock() + interval '4 seconds'")
    assert await measured() == (0, 0), "It waits because it failed, not for a worker."


async def test_a_beat_that_fails_is_logged_and_the_next_one_comes(clinic: Clinic, pulse: Pulse, owner: Any) -> None:
    appointment_id = await clinic.appointment()
    await owner.execute("ALTER TABLE sessions RENAME TO gone")
    with capture_logs() as logs:
        async with beating(pulse):

            async def has_failed() -> bool:
                return bool(logs.lines("pulse_beat_failed"))

            await until(has_failed)
            await owner.execute("ALTER TABLE gone RENAME TO sessions")
            await until(lambda: is_converted(clinic, appointment_id))


async def test_runs_that_did_something_are_told_and_empty_ones_are_folded(clinic: Clinic, pulse: Pulse) -> None:
    await clinic.appointment()
    with capture_logs() as logs:
        for _ in range(5):
            await pulse.beat()
        runs = logs.lines("appointment_auto_start_run")

    assert [(run["due_count"], run["attempted_count"], run["created_count"]) for run in runs] == [(1, 1, 1)]
    assert runs[0].keys() >= {"run_id", "skipped_count", "failed_count", "runtime_ms", "source"}


async def test_runs_that_found_nothing_are_told_once_a_minute(pulse: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as logs:
        await pulse.beat()
        assert logs.lines("appointment_auto_start_run") == []
        monkeypatch.setattr("services.worker.pulse.time.monotonic", lambda: 10**9)
        await pulse.beat()
        await pulse.beat()
        assert [run["attempted_count"] for run in logs.lines("appointment_auto_start_run")] == [0]


async def test_the_end_of_a_run_is_told_even_when_it_found_nothing(clinic: Clinic, pulse: Pulse) -> None:
    await pulse.beat()

    assert clinic.metrics.sample("appointment_conversion_last_run_timestamp_seconds", task="auto_start") > 0


async def test_what_cannot_be_expired_holds_up_neither_conversion_nor_other_sessions(
    clinic: Clinic, pulse: Pulse, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    poison, sound = await clinic.session(), await clinic.session()
    await clock.advance(31 * MINUTE)
    await owner.execute(f"ALTER TABLE sessions ADD CONSTRAINT poison CHECK (id <> {poison.ref.id}) NOT VALID")
    appointment_id = await clinic.appointment()

    with capture_logs() as logs:
        assert await pulse.beat() == LONGEST_SLEEP, "It must not fail again at once."
        failed = [(line["exception_type"], line["session_id"]) for line in logs.lines("settlement_failed")]
        assert failed == [("IntegrityError", None), ("IntegrityError", poison.ref.id)], "Together, and by itself."

    assert await is_converted(clinic, appointment_id)
    status = "SELECT status FROM sessions WHERE id = $1"
    assert await clinic.fetchval(status, sound.ref.id) == "expired"
    assert await clinic.fetchval(status, poison.ref.id) == "waiting"


async def test_an_appointment_that_another_transaction_holds_delays_only_its_own_expiry(
    clinic: Clinic, pulse: Pulse, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    held, sound = await clinic.session(), await clinic.session()
    await clock.advance(31 * MINUTE)
    async with owner.transaction():
        await owner.execute("SELECT FROM appointments WHERE id = $1 FOR UPDATE", held.appointment_id)
        await pulse.beat()
        assert await clinic.fetchval("SELECT status FROM sessions WHERE id = $1", sound.ref.id) == "expired"
    await pulse.beat()
    assert await clinic.fetchval("SELECT status FROM sessions WHERE id = $1", held.ref.id) == "expired"
