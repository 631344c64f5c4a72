"""The two legacy commands: what they close, what they start early, and what they leave alone."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from libs.domain.conversion.runs import Run
from libs.domain.conversion.statement import LOCK_KEY
from libs.domain.jobs import DispatchOutbox
from libs.domain.legacy.triggers import TriggerRun, Triggers
from libs.guardrails import FixedFlags, Flag, Flags, Override, Rollout, Target
from libs.observability.testing import capture_logs
from tests.api.calls import Owner
from tests.api.legacy import PAID, UNPAID, ledger_of
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock

OVER: dict[str, Any] = {"starts_in": -40 * MINUTE}
SOON: dict[str, Any] = {"starts_in": 4 * MINUTE}


async def turned_up(clinic: Clinic, appointment_id: int, *parties: str) -> None:
    for party in parties:
        await clinic.fetch(f"UPDATE appointments SET {party}_present_at = clock() WHERE id = $1", appointment_id)


async def status_of(clinic: Clinic, appointment_id: int) -> str:
    status: str = await clinic.fetchval("SELECT status FROM appointments WHERE id = $1", appointment_id)
    return status


@pytest.mark.parametrize(
    ("present", "status", "ledger", "earned"),
    [
        (("patient", "doctor"), "COMPLETED", [(1, PAID)], 350_000),
        (("doctor",), "NO_SHOW", [(1, UNPAID)], 0),
        (("patient",), "CANCELLED", [], 0),
        ((), "CANCELLED", [], 0),
    ],
)
async def test_what_is_over_is_closed_by_who_turned_up(
    clinic: Clinic, present: tuple[str, ...], status: str, ledger: list[Any], earned: int
) -> None:
    appointment_id = await clinic.appointment(**OVER)
    await turned_up(clinic, appointment_id, *present)

    for processed in (1, 0):
        run = await clinic.triggers().process_appointment_sessions()
        assert (run.processed, run.skipped) == (processed, 0)

    assert await status_of(clinic, appointment_id) == status
    assert await ledger_of(clinic, appointment_id) == ledger
    assert await clinic.fetchval("SELECT coalesce(sum(balance), 0) FROM wallets") == earned
    assert await clinic.fetchval("SELECT text_sessions_remaining FROM subscriptions") == 10 - len(ledger)
    assert clinic.metrics.sample("billing_units_charged_total", modality="text") == len(ledger)
    assert await clinic.convert() == {}
    await clinic.dispatch()
    told = {row["kind"] for row in await clinic.fetch("SELECT kind FROM notifications")}
    assert told == ({"appointment_cancelled"} if status == "CANCELLED" else set())
    assert await clinic.fetchval("SELECT count(*) FROM busy_intervals WHERE active") == 0


async def test_only_what_conversion_never_tried_is_closed(clinic: Clinic) -> None:
    tried = await clinic.appointment(patient=await clinic.patient(units=None), **OVER)
    assert (await clinic.convert())[tried].result == "failed"
    started = (await clinic.session(**OVER)).appointment_id
    others = [
        await clinic.appointment(starts_in=-20 * MINUTE),
        *[
            await clinic.appointment(status=status, **OVER)
            for status in ("RESCHEDULE_PROPOSED", "EXPIRED", "COMPLETED")
        ],
    ]
    before = [await status_of(clinic, each) for each in (tried, started, *others)]

    run = await clinic.triggers().process_appointment_sessions()

    assert (run.processed, run.skipped) == (0, 0)
    assert [await status_of(clinic, each) for each in (tried, started, *others)] == before
    assert await clinic.fetchval("SELECT count(*) FROM ledger_transactions") == 0


async def test_what_somebody_holds_or_has_just_changed_is_skipped(clinic: Clinic, owner: Owner) -> None:
    held, free = await clinic.appointment(**OVER), await clinic.appointment(**OVER)
    async with owner.transaction():
        await owner.execute("SELECT FROM appointments WHERE id = $1 FOR NO KEY UPDATE", held)
        run = await clinic.triggers().process_appointment_sessions()
    assert (run.processed, run.skipped) == (1, 1)
    assert [await status_of(clinic, each) for each in (held, free)] == ["CONFIRMED", "CANCELLED"]


async def test_what_the_database_refuses_holds_up_nothing_else(clinic: Clinic, owner: Owner) -> None:
    poison, sound = await clinic.appointment(**OVER), await clinic.appointment(**OVER)
    await owner.execute(
        f"ALTER TABLE appointments ADD CONSTRAINT poison CHECK (id <> {poison} OR status = 'CONFIRMED') NOT VALID"
    )
    with capture_logs() as logs:
        run = await clinic.triggers().process_appointment_sessions()
        failures = [(line["appointment_id"], line["exception_type"]) for line in logs.lines("legacy_trigger_failed")]
        assert failures == [(poison, "IntegrityError")]
    assert (run.processed, run.skipped) == (1, 1)
    assert [await status_of(clinic, each) for each in (poison, sound)] == ["CONFIRMED", "CANCELLED"]


@pytest.mark.parametrize(
    ("command", "appointment"),
    [(Triggers.process_appointment_sessions, OVER), (Triggers.activate_booked_appointments, SOON)],
)
async def test_a_run_that_breaks_off_tells_what_it_has_done(
    clinic: Clinic, owner: Owner, command: Callable[[Triggers], Awaitable[TriggerRun]], appointment: Any
) -> None:
    await clinic.appointment(**appointment)
    unlucky = await clinic.appointment(**appointment)
    await owner.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE EXCEPTION 'deadlock' USING ERRCODE = 'deadlock_detected';
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON appointments FOR EACH ROW
            WHEN (NEW.id = {unlucky}) EXECUTE FUNCTION refuse();
        """
    )
    triggers = Triggers(
        clinic.database, clinic.bell, FixedFlags(Flags()), clinic.metrics, clinic.converter(batch_limit=1)
    )
    with capture_logs() as logs:
        with pytest.raises(Exception, match="deadlock"):
            await command(triggers)
        (told,) = logs.lines("legacy_trigger_run")
        failed = logs.lines("legacy_trigger_failed")
    assert (told["processed"], told["skipped"]) == (1, 0)
    name = told["command_name"]
    assert clinic.metrics.sample("legacy_trigger_executions_total", command_name=name) == 1
    assert [line["appointment_id"] for line in failed] == ([unlucky] if appointment is OVER else [])
    assert DispatchOutbox() in clinic.bell.rung


async def test_what_would_start_early_waits_for_a_later_run_when_a_conversion_takes_long(
    clinic: Clinic, owner: Owner
) -> None:
    appointment_id = await clinic.appointment(**SOON)
    triggers = clinic.triggers()
    async with owner.transaction():
        await owner.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY)
        assert (await triggers.activate_booked_appointments()).processed == 0
    assert await status_of(clinic, appointment_id) == "CONFIRMED"
    assert (await triggers.activate_booked_appointments()).processed == 1


async def test_text_appointments_start_five_minutes_early_and_once(clinic: Clinic) -> None:
    early = await clinic.appointment(**SOON)
    others = [
        await clinic.appointment(starts_in=6 * MINUTE),
        await clinic.appointment(modality="video", **SOON),
        await clinic.appointment(status="PENDING", **SOON),
    ]
    runs = await asyncio.gather(*(clinic.triggers().activate_booked_appointments() for _ in range(3)))
    assert sum(run.processed for run in runs) == 1

    row = await clinic.fetchrow(
        "SELECT a.status, s.status AS session, s.source, c.id AS conversation, t.result"
        " FROM appointments a JOIN sessions s ON s.id = a.session_id JOIN conversations c ON c.session_id = s.id"
        " JOIN conversion_attempts t ON t.appointment_id = a.id AND t.session_id = s.id WHERE a.id = $1",
        early,
    )
    assert (row["status"], row["session"], row["source"], row["result"]) == (
        *("IN_PROGRESS", "waiting", "APPOINTMENT", "created"),
    )
    assert [await status_of(clinic, each) for each in others] == ["CONFIRMED", "CONFIRMED", "PENDING"]
    assert DispatchOutbox() in clinic.bell.rung
    assert await clinic.fetchval("SELECT count(*) FROM outbox_events WHERE name = 'session_started'") == 1
    assert [row["task"] for row in await clinic.fetch("SELECT task FROM conversion_runs")] == ["legacy"]
    assert clinic.metrics.sample("appointment_session_conversion_attempted_total", task="legacy") == 1


async def test_what_cannot_start_early_starts_all_the_same_when_it_is_due(clinic: Clinic, clock: Clock) -> None:
    busy = await clinic.session(lasts=3 * MINUTE)
    blocked = await clinic.appointment(busy.doctor, await clinic.patient(), **SOON)
    poor = await clinic.patient(units=None)
    unpaid = await clinic.appointment(patient=poor, **SOON)

    run = await clinic.triggers().activate_booked_appointments()

    assert (run.processed, run.skipped) == (0, 2)
    attempts = await clinic.fetch(
        "SELECT result, reason FROM conversion_attempts WHERE appointment_id <> $1", busy.appointment_id
    )
    assert {tuple(attempt) for attempt in attempts} == {("skipped", "not_due_yet")}
    await clinic.subscribe(poor)
    await clock.advance(4 * MINUTE)
    await clinic.settle()
    assert {each: outcome.result for each, outcome in (await clinic.convert()).items()} == {
        blocked: "created",
        unpaid: "created",
    }


@pytest.mark.parametrize("shared", ["doctor", "patient"])
@pytest.mark.parametrize("earlier", [-MINUTE, 3 * MINUTE])
async def test_nobody_is_taken_away_from_an_appointment_that_comes_first(
    clinic: Clinic, clock: Clock, shared: str, earlier: timedelta
) -> None:
    party: dict[str, Any] = {shared: await (clinic.doctor() if shared == "doctor" else clinic.patient())}
    first = await clinic.appointment(**party, modality="voice", starts_in=earlier, lasts=5 * MINUTE)
    later = await clinic.appointment(**party, **SOON)
    other = await clinic.appointment(**SOON)

    assert (await clinic.triggers().activate_booked_appointments()).processed == 1

    assert [await status_of(clinic, each) for each in (first, later, other)] == [
        *("CONFIRMED", "CONFIRMED", "IN_PROGRESS"),
    ]
    await clock.advance(3 * MINUTE)
    assert (await clinic.convert())[first].result == "created"


@pytest.mark.parametrize(
    ("first", "parked"),
    [
        ({"starts_in": -40 * MINUTE}, False),
        ({"starts_in": MINUTE, "status": "CANCELLED"}, False),
        ({"starts_in": MINUTE}, True),
    ],
)
async def test_what_is_over_or_never_starts_holds_nobody_up(
    clinic: Clinic, first: dict[str, Any], parked: bool
) -> None:
    doctor = await clinic.doctor()
    before = await clinic.appointment(doctor, lasts=2 * MINUTE, **first)
    if parked:
        await clinic.fetch("UPDATE appointments SET parked_at = clock() WHERE id = $1", before)
    later = await clinic.appointment(doctor, **SOON)

    await clinic.triggers().activate_booked_appointments()

    assert await status_of(clinic, later) == "IN_PROGRESS"


async def test_more_than_a_batch_is_gone_through_once(clinic: Clinic) -> None:
    for _ in range(3):
        await clinic.appointment(patient=await clinic.patient(units=None), **SOON)
    for _ in range(2):
        await clinic.appointment(**SOON)
    async with asyncio.timeout(10):
        await clinic.converter(batch_limit=2).activate_early(run := Run("legacy"), except_tenants=[])
    assert (run.created_count, run.skipped_count) == (2, 3)


async def test_the_flag_is_each_tenants_own(clinic: Clinic) -> None:
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    flag = Flag.DISABLE_LEGACY_APPOINTMENT_TRIGGERS
    flags = Rollout.of(Flags(), [Override(flag, clinic.tenant_id, Target(default=True))])
    ours = [await clinic.appointment(**OVER), await clinic.appointment(**SOON)]
    theirs = [await elsewhere.appointment(**OVER), await elsewhere.appointment(**SOON)]
    triggers = clinic.triggers(flags)
    with capture_logs() as logs:
        for _ in range(2):
            await triggers.process_appointment_sessions()
            await triggers.activate_booked_appointments()
        told = logs.lines("legacy_triggers_disabled")
        runs = logs.lines("legacy_trigger_run")
    assert [await status_of(clinic, each) for each in ours] == ["CONFIRMED", "CONFIRMED"]
    assert [await status_of(clinic, each) for each in theirs] == ["CANCELLED", "IN_PROGRESS"]
    assert [(line["disabled_tenants"], line["tenants"]) for line in told] == [(1, 2), (1, 2)], "Said once for each."
    assert [(line["processed"], line["disabled_tenants"]) for line in runs] == [(1, 1), (1, 1), (0, 1), (0, 1)]


async def test_that_they_are_disabled_is_said_again_when_it_has_changed(clinic: Clinic) -> None:
    class Switched:
        flags = Flags(disable_legacy_appointment_triggers=True)

        def for_tenant(self, tenant_id: int) -> Flags:
            return self.flags

    switched = Switched()
    triggers = clinic.triggers(switched)
    with capture_logs() as logs:
        for on, said in ((True, 1), (True, 1), (False, 1), (True, 2)):
            switched.flags = Flags(disable_legacy_appointment_triggers=on)
            run = await triggers.process_appointment_sessions()
            assert run.disabled == on
            assert len(logs.lines("legacy_triggers_disabled")) == said
    name = "legacy_trigger_executions_total"
    assert clinic.metrics.sample(name, command_name="process_appointment_sessions") == 1


async def test_at_once_with_conversion_an_appointment_has_one_outcome(clinic: Clinic) -> None:
    ids = [await clinic.appointment(**OVER) for _ in range(20)]
    for each in ids:
        await turned_up(clinic, each, "patient", "doctor")
    await asyncio.gather(
        *(clinic.triggers().process_appointment_sessions() for _ in range(3)), clinic.convert(), clinic.convert()
    )
    for each in ids:
        row = await clinic.fetchrow(
            "SELECT status, session_id IS NULL AS unconverted FROM appointments WHERE id = $1", each
        )
        closed = row["status"] == "COMPLETED"
        assert row["unconverted"] == closed
        assert await ledger_of(clinic, each) == ([(1, PAID)] if closed else [])
