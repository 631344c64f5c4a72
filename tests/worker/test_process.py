"""The worker as a process: what it does by itself, and how it ends."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest
from arq import ArqRedis
from arq.constants import default_queue_name
from redis.asyncio import ConnectionPool

from libs.domain.conversion.report import Reporter
from libs.domain.conversion.runs import Converter
from libs.domain.doorbell import deserialise, encode, serialise
from libs.domain.jobs import ConvertDue
from services.worker.main import run_until_signalled
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.processes import Worker, running_worker, start_worker, until

NOWHERE = "unix:///nowhere/redis.sock"


@pytest.fixture
async def worker(urls: Urls, tmp_path: Path) -> AsyncIterator[Worker]:
    async with running_worker(urls.app, urls.redis, tmp_path / "worker.jsonl") as running:
        yield running


async def sessions(clinic: Clinic) -> int:
    return int(await clinic.fetchval("SELECT count(*) FROM sessions"))


async def test_an_appointment_becomes_a_session_and_both_are_told(clinic: Clinic, worker: Worker) -> None:
    await clinic.appointment(starts_in=timedelta(milliseconds=300))

    async def told() -> bool:
        return bool(await clinic.fetchval("SELECT count(*) = 2 FROM notifications WHERE kind = 'session_started'"))

    await until(told)
    assert await worker.sample("appointment_sessions_created_total", modality="text") == 1
    assert await worker.sample("outbox_dispatch_attempts_total", event_name="session_started") == 1


async def test_the_legacy_commands_are_run_by_the_clock(clinic: Clinic, urls: Urls, tmp_path: Path) -> None:
    await clinic.appointment(starts_in=timedelta(minutes=4))
    settings = (urls.app, urls.redis, tmp_path / "worker.jsonl")
    commands = ("process_appointment_sessions", "activate_booked_appointments")
    async with running_worker(*settings, DISABLE_LEGACY_APPOINTMENT_TRIGGERS="true") as worker:

        async def said() -> bool:
            lines = worker.lines("legacy_triggers_disabled")
            return [line["message"] for line in lines] == ["Legacy appointment triggers disabled"] * 2

        await until(said)
        for command in commands:
            assert await worker.sample("legacy_trigger_executions_total", command_name=command) == 0
    assert await sessions(clinic) == 0
    await clinic.fetch("DELETE FROM cron_runs")  # or the next worker waits for the next minute
    async with running_worker(*settings) as worker:
        await until(lambda: sessions(clinic))

        async def counted() -> bool:
            name = "legacy_trigger_executions_total"
            return all([await worker.sample(name, command_name=command) for command in commands])

        await until(counted)


async def test_without_redis_conversion_goes_on(clinic: Clinic, urls: Urls, tmp_path: Path) -> None:
    async with running_worker(urls.app, NOWHERE, tmp_path / "worker.jsonl") as worker:
        await clinic.appointment(starts_in=timedelta(milliseconds=300))

        await until(lambda: sessions(clinic))

        late = await clinic.fetchval(
            "SELECT s.created_at - a.starts_at FROM sessions s JOIN appointments a ON a.id = s.appointment_id"
        )
        assert late < timedelta(seconds=1.5)
        assert worker.process.returncode is None

        async def lost() -> bool:
            return bool(worker.lines("doorbell_lost"))

        await until(lost)


async def test_the_doorbell_is_answered_and_measured(clinic: Clinic, urls: Urls, tmp_path: Path) -> None:
    redis = ArqRedis(ConnectionPool.from_url(urls.redis), job_serializer=serialise, job_deserializer=deserialise)
    await redis.delete(default_queue_name)  # what other tests have rung for
    async with running_worker(urls.app, urls.redis, tmp_path / "worker.jsonl") as worker:
        await redis.enqueue_job(ConvertDue.name, **encode(ConvertDue()))
        await redis.aclose()

        async def finished() -> bool:
            return any(line["result"] == "ok" for line in worker.lines("job_finished"))

        await until(finished)
        assert await worker.sample("job_duration_seconds_count", task="convert_due", result="ok") == 1


async def test_it_is_on_the_list_of_workers_until_it_stops(clinic: Clinic, worker: Worker) -> None:
    async def listed() -> int:
        return int(await clinic.fetchval("SELECT count(*) FROM workers"))

    await until(listed)
    assert await worker.stop() == 0
    assert await listed() == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_it_stops_at_once_and_says_so(worker: Worker, signum: signal.Signals) -> None:
    began = time.monotonic()

    worker.process.send_signal(signum)

    assert await worker.process.wait() == 0
    assert time.monotonic() - began < 5
    assert worker.lines("worker_stopped")


async def test_its_metrics_say_how_the_database_is(clinic: Clinic, worker: Worker) -> None:
    parked = await clinic.appointment()
    await clinic.fetchval("UPDATE appointments SET parked_at = clock() WHERE id = $1", parked)
    assert await worker.sample("db_connections_max", pool="worker") == 20
    assert await worker.sample("outbox_dead") == 0
    assert await worker.sample("feature_flag_enabled", flag="ENFORCE_SESSION_GATED_CHAT") == 0


async def test_runs_at_the_command_line_are_counted_once_by_one_worker(
    clinic: Clinic, urls: Urls, tmp_path: Path
) -> None:
    await clinic.appointment()
    await clinic.appointment(modality="hologram")
    of_the_command = Converter(clinic.database, Reporter(None).batch, worker="command line", counts=False)
    await of_the_command.recover(lookback=None, limit=10)
    async with (
        running_worker(urls.app, urls.redis, tmp_path / "one.jsonl") as one,
        running_worker(urls.app, urls.redis, tmp_path / "two.jsonl") as two,
    ):

        async def counted() -> bool:
            return bool(await clinic.fetchval("SELECT bool_and(counted) FROM conversion_runs"))

        await until(counted)

        async def total(name: str, **labels: str) -> float:
            return sum([await worker.sample(name, **labels) for worker in (one, two)])

        async def seen() -> bool:
            return await total("appointment_session_conversion_attempted_total", task="recovery") == 2

        await until(seen)
        assert await total("appointment_sessions_created_total", modality="text") == 1
        assert await total("appointment_session_conversion_failed_total", reason="invalid_appointment_state") == 1


async def test_metrics_need_permission_and_health_does_not(urls: Urls, tmp_path: Path) -> None:
    async with running_worker(
        urls.app,
        urls.redis,
        tmp_path / "worker.jsonl",
        SESSIONGATE_METRICS_ALLOW="10.0.0.0/8",
        SESSIONGATE_METRICS_BASIC_AUTH="prometheus:a good password",
    ) as worker:
        address = f"http://127.0.0.1:{worker.lines('worker_started')[-1]['metrics_port']}"
        async with httpx2.AsyncClient(base_url=address) as client:
            assert (await client.get("/metrics")).status_code == 401
            assert (await client.get("/metrics", auth=("prometheus", "wrong"))).status_code == 401
            assert (await client.get("/metrics", auth=("prometheus", "a good password"))).status_code == 200
            assert (await client.get("/healthz")).json() == {"status": "ok"}


async def test_a_used_port_is_one_sentence(urls: Urls, tmp_path: Path) -> None:
    async with running_worker(urls.app, urls.redis, tmp_path / "one.jsonl") as one:
        port = str(one.lines("worker_started")[-1]["metrics_port"])
        two = await start_worker(
            *(urls.app, urls.redis, tmp_path / "two.jsonl"),
            {"SESSIONGATE_WORKER_METRICS_PORT": port},
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await two.process.communicate()

    assert two.process.returncode == 1
    sentence = errors.decode().strip()
    assert sentence.startswith("The worker cannot start: ")
    assert "\n" not in sentence


async def test_a_database_that_is_not_there_yet_is_waited_for(servers: object, urls: Urls, tmp_path: Path) -> None:
    worker = await start_worker(urls.app.replace("test_", "absent_"), urls.redis, tmp_path / "worker.jsonl")
    try:

        async def complains() -> bool:
            return bool(worker.lines("pulse_beat_failed"))

        await until(complains)
        assert worker.process.returncode is None
        assert await worker.stop() == 0
    finally:
        await worker.kill()


class Obedient:
    """A loop that ends when told."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        await self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()


async def test_a_loop_that_loses_cancellations_does_not_keep_the_worker_from_ending() -> None:
    lost = 0

    async def stubborn() -> None:
        nonlocal lost
        while lost < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
        await asyncio.sleep(60)

    loop = asyncio.get_running_loop()
    loop.call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(5):
        await run_until_signalled(finishing=[Obedient()], abandoned=[stubborn()])
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(signum)
    assert lost == 2


async def test_a_worker_forgets_old_decisions(clinic: Clinic, urls: Urls, tmp_path: Path) -> None:
    await clinic.fetch(
        """
        INSERT INTO decisions (tenant_id, at, operation, identifier, user_id, role, client, verdict, flags)
        SELECT $1, clock() - days * interval '1 day', 'join', '12', 1, 'patient', 'okhttp', 'refused', '{}'
        FROM unnest(ARRAY[1, 29, 31, 400]) AS days
        """,
        clinic.tenant_id,
    )
    async with running_worker(urls.app, urls.redis, tmp_path / "worker.jsonl"):

        async def forgotten() -> bool:
            number: int = await clinic.fetchval("SELECT count(*) FROM decisions")
            return number == 2

        await until(forgotten)
