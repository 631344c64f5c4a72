"""The worker audits by itself, and says what it found."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from libs.domain.catalogue import CATALOGUE
from libs.domain.db import Database
from libs.domain.doorbell import Doorbell
from libs.domain.invariants import INVARIANTS, LOCK_KEY
from libs.domain.runtime import Runtime
from libs.observability.registry import Metrics
from libs.observability.testing import capture_logs
from services.worker.audit import Auditor
from services.worker.gauges import Gauges
from tests.clinic import Clinic
from tests.clock import Clock
from tests.conftest import Urls
from tests.processes import running_worker, until

Found = Callable[[], Awaitable[dict[str, float]]]
"""The violations that a worker's gauges tell, by the name of the invariant."""

TIMES: Final = {"interval": 300.0, "patience": 60.0}


@pytest.fixture
def auditor(clinic: Clinic) -> Auditor:
    return Auditor(clinic.database, clinic.metrics, **TIMES)


@pytest.fixture
async def found(runtime: Runtime, doorbell: Doorbell, clinic: Clinic) -> Found:
    gauges = Gauges(runtime, doorbell, "tests", lambda: True)

    async def measured() -> dict[str, float]:
        await gauges.measure()
        samples = {each.name: clinic.metrics.sample("audit_violations", invariant=each.name) for each in INVARIANTS}
        return {name: number for name, number in samples.items() if number}

    return measured


async def test_violations_are_counted_and_logged_until_they_are_mended(
    clinic: Clinic, owner: "asyncpg.Connection[Any]", auditor: Auditor, found: Found
) -> None:
    session = await clinic.session()
    await owner.execute("UPDATE conversations SET last_seq = 7")
    with capture_logs() as logs:
        assert await auditor.audit()
        (line,) = logs.lines()
    assert await found() == {"messages_numbered": 1}
    conversation_id = await clinic.fetchval("SELECT id FROM conversations WHERE session_id = $1", session.ref.id)
    assert (line["event"], line["level"]) == ("audit_violation", "error")
    assert (line["invariant"], line["violations"]) == ("messages_numbered", 1)
    assert line["examples"] == [f"conversation:{conversation_id}"]

    await owner.execute("UPDATE conversations SET last_seq = 0")
    assert await auditor.audit()
    assert await found() == {}
    at = clinic.metrics.sample("audit_last_run_timestamp_seconds")
    assert at == pytest.approx((await clinic.fetchval("SELECT clock()")).timestamp(), abs=60)


async def test_only_one_worker_audits_at_a_time(
    clinic: Clinic, owner: "asyncpg.Connection[Any]", auditor: Auditor
) -> None:
    async with owner.transaction():
        await owner.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY)
        assert not await auditor.audit()
    assert await clinic.fetchval("SELECT count(*) FROM audits") == 0
    assert await auditor.audit()


async def test_one_worker_audits_in_each_slot_and_all_tell_what_it_found(
    clinic: Clinic, owner: "asyncpg.Connection[Any]", clock: Clock, auditor: Auditor, found: Found
) -> None:
    await clinic.session()
    await owner.execute("UPDATE conversations SET last_seq = 7")
    other = Auditor(clinic.database, Metrics(CATALOGUE, version="test", service="other"), **TIMES)
    await other.slot()
    audited_at = await clinic.fetchval("SELECT checked_at FROM audits")
    await auditor.slot()
    assert await found() == {"messages_numbered": 1}, "Whoever did not audit in this slot tells it as well."
    assert clinic.metrics.sample("audit_last_run_timestamp_seconds") == audited_at.timestamp()

    await owner.execute("UPDATE conversations SET last_seq = 0")
    await clock.advance(timedelta(minutes=5))
    await other.slot()
    assert await clinic.fetchval("SELECT count(*) FROM audits WHERE checked_at > $1", audited_at) == 1
    assert await clinic.fetchval("SELECT count(*) FROM audits") == 1, "Only the last one is kept."
    assert await found() == {}


async def test_it_goes_on_after_an_audit_that_fails(clinic: Clinic, urls: Urls) -> None:
    nowhere = Database(urls.app.replace("test_", "absent_"), application="tests")
    auditor = Auditor(nowhere, clinic.metrics, interval=0.01, patience=60)
    with capture_logs() as logs:

        async def failed_twice() -> bool:
            return len(logs.lines("audit_failed")) >= 2

        running = asyncio.create_task(auditor.run())
        await until(failed_twice)
        running.cancel()


async def test_the_worker_audits_at_its_interval_or_not_at_all(
    clinic: Clinic, owner: "asyncpg.Connection[Any]", urls: Urls, tmp_path: Path
) -> None:
    await clinic.session()
    await owner.execute("UPDATE conversations SET last_seq = 7")

    async with (
        running_worker(urls.app, urls.redis, tmp_path / "one.jsonl", SESSIONGATE_AUDIT_INTERVAL_SECONDS="1") as one,
        running_worker(urls.app, urls.redis, tmp_path / "no.jsonl", SESSIONGATE_AUDIT_INTERVAL_SECONDS="0") as no,
    ):

        async def audited_twice() -> bool:
            return len(one.lines("audit_violation")) >= 2

        assert await one.sample("audit_violations", invariant="unit_paid_once") == 0, "It is there from the start."
        await until(audited_twice)
        assert not no.lines("audit_violation")
        assert [await each.sample("audit_interval_seconds") for each in (one, no)] == [1, 0]
