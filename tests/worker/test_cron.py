"""Each job runs once in every slot, however many workers there are."""

import asyncio
from collections import Counter
from datetime import timedelta

import pytest

from libs.observability.testing import capture_logs
from services.worker.cron import Cron
from tests.api.calls import Owner
from tests.clinic import Clinic
from tests.clock import Clock
from tests.processes import until

MINUTE = timedelta(minutes=1)


class Jobs:
    """Counts how often each was done; one of them fails."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()

    async def good(self) -> None:
        self.done["good"] += 1

    async def bad(self) -> None:
        self.done["bad"] += 1
        raise RuntimeError("not today")

    def cron(self, clinic: Clinic) -> Cron:
        return Cron(clinic.database, {"bad": self.bad, "good": self.good})


async def to_the_middle_of_a_slot(clinic: Clinic, clock: Clock) -> None:
    into = await clinic.fetchval("SELECT clock() - date_bin('1 minute', clock(), 'epoch')")
    await clock.advance(MINUTE / 2 - into)


async def test_each_job_is_done_once_in_a_slot_by_one_of_the_workers(clinic: Clinic, clock: Clock) -> None:
    await to_the_middle_of_a_slot(clinic, clock)
    jobs = Jobs()
    workers = [jobs.cron(clinic) for _ in range(5)]
    with capture_logs() as logs:
        for slots in (1, 2, 3):
            for _ in range(2):
                sleeps = await asyncio.gather(*(worker.slot() for worker in workers))
                assert all(20 < sleep <= 30 for sleep in sleeps)
            assert jobs.done == {"good": slots, "bad": slots}
            await clock.advance(MINUTE)
        assert [line["task"] for line in logs.lines("cron_failed")] == ["bad"] * 3


async def test_slots_in_which_nobody_was_there_are_not_made_up_for(clinic: Clinic, clock: Clock) -> None:
    jobs = Jobs()
    with capture_logs():
        await jobs.cron(clinic).slot()
        await clock.advance(60 * MINUTE)
        await jobs.cron(clinic).slot()
        assert jobs.done["good"] == 2
        await clock.advance(timedelta(days=2))
        await jobs.cron(clinic).slot()
    assert await clinic.fetchval("SELECT count(*) FROM cron_runs") == 2, "The others are forgotten."


async def test_it_outlives_what_it_cannot_do_and_ends_when_it_is_told_to(
    clinic: Clinic, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.cron.RETRY_SECONDS", 0.01)
    await owner.execute("ALTER TABLE cron_runs RENAME TO gone")
    jobs = Jobs()
    cron = jobs.cron(clinic)
    with capture_logs() as logs:
        running = asyncio.create_task(cron.run())

        async def has_failed() -> bool:
            return len(logs.lines("cron_failed")) > 1

        async def is_done() -> bool:
            return jobs.done["good"] == 1

        await until(has_failed)
        await owner.execute("ALTER TABLE gone RENAME TO cron_runs")
        await until(is_done)
        cron.stop()
        async with asyncio.timeout(5):
            await running
