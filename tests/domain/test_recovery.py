"""Recovery says what it would do and writes nothing; told to do it, it is the same conversion."""

from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from libs.domain.conversion.runs import Outcome
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock

HOUR = 60 * MINUTE
DAY = 24 * HOUR


async def contents(owner: "asyncpg.Connection[Any]") -> dict[str, str]:
    """A fingerprint of every table."""
    names = await owner.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return {
        name: await owner.fetchval(f"SELECT md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), '')) FROM {name} t")
        for (name,) in names
    }


async def park(clinic: Clinic, appointment_id: int) -> None:
    await clinic.fetchval(
        "UPDATE appointments SET conversion_failures = 10, parked_at = clock(),"
        " next_attempt_at = clock() + interval '1 hour' WHERE id = $1",
        appointment_id,
    )


async def test_a_dry_run_writes_nothing_and_moves_no_metric(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    await clinic.appointment()
    await clinic.appointment(modality="hologram")
    before = await contents(owner)

    foreseen = await clinic.converter().foresee(lookback=DAY, limit=100)

    assert len(foreseen) == 2
    assert await contents(owner) == before
    assert clinic.metrics.sample("appointment_sessions_created_total", modality="text") == 0
    assert clinic.metrics.sample("appointment_session_conversion_attempted_total", task="recovery") == 0


async def test_what_was_foreseen_is_what_then_happens(clinic: Clinic) -> None:
    doctor = await clinic.doctor()
    await clinic.session(doctor=await clinic.doctor(), patient=(busy := await clinic.patient()))
    for options in (
        {},
        {"modality": "hologram"},
        {"lasts": -MINUTE},
        {"patient": await clinic.patient(units=None)},
        {"patient": await clinic.patient(units=0)},
        {"patient": busy},
        {"doctor": doctor, "starts_in": -9 * MINUTE},
        {"doctor": doctor, "starts_in": -8 * MINUTE},
        {"doctor": await clinic.doctor(active=False)},
    ):
        await clinic.appointment(**options)

    foreseen = await clinic.converter().foresee(lookback=DAY, limit=100)
    outcomes: list[Outcome] = []
    await clinic.converter(outcomes).recover(lookback=DAY, limit=100)

    def told(of: list[Outcome]) -> dict[int, tuple[str, str | None]]:
        return {outcome.appointment_id: (outcome.result, outcome.reason) for outcome in of}

    assert told(foreseen) == told(outcomes)
    assert [result for result, _ in told(outcomes).values()].count("created") == 2


async def test_executing_twice_makes_one_session(clinic: Clinic) -> None:
    appointment_id = await clinic.appointment()

    first = await clinic.converter().recover(lookback=DAY, limit=100)
    second = await clinic.converter().recover(lookback=DAY, limit=100)

    assert (first.created_count, second.attempted_count) == (1, 0)
    assert await clinic.fetchval("SELECT count(*) FROM sessions WHERE appointment_id = $1", appointment_id) == 1


async def test_an_appointment_with_a_session_is_untouched(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    await clinic.session()
    before = await contents(owner)

    run = await clinic.converter().recover(lookback=None, limit=100)

    assert run.attempted_count == 0
    assert await contents(owner) == before


async def test_parked_appointments_are_taken_up_again(clinic: Clinic) -> None:
    appointment_id = await clinic.appointment()
    await park(clinic, appointment_id)
    assert await clinic.convert() == {}

    assert (await clinic.converter().recover(lookback=DAY, limit=100)).created_count == 1

    row = await clinic.fetchrow("SELECT * FROM appointments WHERE id = $1", appointment_id)
    assert (row["status"], row["parked_at"], row["next_attempt_at"]) == ("IN_PROGRESS", None, None)


async def test_recovery_does_not_wait_for_the_next_attempt(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    patient = await clinic.patient(units=0)
    await clinic.appointment(patient=patient)
    await clinic.convert()
    await owner.execute("UPDATE subscriptions SET text_sessions_remaining = 5")

    assert (await clinic.converter().recover(lookback=DAY, limit=100)).created_count == 1


@pytest.mark.parametrize(("lookback", "found"), [(2 * HOUR, 1), (DAY, 2), (None, 3)])
async def test_lookback_bounds_how_long_ago_it_was_due(
    clinic: Clinic, clock: Clock, lookback: timedelta | None, found: int
) -> None:
    for ago in (HOUR, 23 * HOUR, 30 * DAY):
        await clinic.appointment(starts_in=-ago)

    assert len(await clinic.converter().foresee(lookback=lookback, limit=100)) == found


async def test_the_limit_takes_the_longest_waiting_first(clinic: Clinic) -> None:
    newer = await clinic.appointment(starts_in=-HOUR)
    older = await clinic.appointment(starts_in=-2 * HOUR)
    outcomes: list[Outcome] = []

    run = await clinic.converter(outcomes).recover(lookback=DAY, limit=1)

    assert (run.due_count, [outcome.appointment_id for outcome in outcomes]) == (1, [older])
    assert await clinic.fetchval("SELECT session_id FROM appointments WHERE id = $1", newer) is None


async def test_each_is_attempted_once_in_a_run_even_when_batches_are_small(clinic: Clinic) -> None:
    for _ in range(5):
        await clinic.appointment(modality="hologram")
    outcomes: list[Outcome] = []

    await clinic.converter(outcomes, batch_limit=2).recover(lookback=DAY, limit=100)

    assert len({outcome.appointment_id for outcome in outcomes}) == len(outcomes) == 5


async def test_a_recovered_run_is_counted_as_recovery(clinic: Clinic) -> None:
    await clinic.appointment()

    run = await clinic.converter().recover(lookback=DAY, limit=100)

    assert clinic.metrics.sample("appointment_session_conversion_attempted_total", task="recovery") == 1
    assert await clinic.fetchval("SELECT task FROM conversion_runs WHERE run_id = $1", run.run_id) == "recovery"
