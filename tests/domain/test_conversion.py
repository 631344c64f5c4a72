"""Due appointments become sessions exactly once, and those that cannot are told apart by reason."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest

from libs.domain.appointments import appointments
from libs.domain.conversion import statement
from libs.domain.conversion.runs import ConverterBusy, Outcome
from libs.domain.jobs import ConvertDue, Job
from libs.domain.people import set_active
from libs.domain.transaction import transaction
from libs.guardrails import Principal
from libs.observability.testing import capture_logs
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock

HOUR = 60 * MINUTE


async def appointment_row(clinic: Clinic, appointment_id: int) -> Any:
    return await clinic.fetchrow("SELECT *, clock() AS now FROM appointments WHERE id = $1", appointment_id)


@pytest.mark.parametrize(
    ("modality", "kind", "status"),
    [("text", "text", "waiting"), ("voice", "call", "connecting"), ("video", "call", "connecting")],
)
async def test_a_due_appointment_becomes_a_session_of_its_modality(
    clinic: Clinic, modality: str, kind: str, status: str
) -> None:
    doctor, patient = await clinic.doctor(), await clinic.patient()
    appointment_id = await clinic.appointment(doctor, patient, modality=modality)

    outcome = (await clinic.convert())[appointment_id]

    assert (outcome.result, outcome.attempt, outcome.reason) == ("created", 1, None)
    session = await clinic.fetchrow("SELECT * FROM sessions WHERE appointment_id = $1", appointment_id)
    assert (session["kind"], session["modality"], session["status"]) == (kind, modality, status)
    assert (session["patient_id"], session["doctor_id"]) == (patient.user_id, doctor.user_id)
    assert session["source"] == "APPOINTMENT"
    assert session["response_deadline"] is None
    appointment = await appointment_row(clinic, appointment_id)
    assert (appointment["status"], appointment["session_id"]) == ("IN_PROGRESS", session["id"])
    members = await clinic.fetch(
        "SELECT p.user_id, p.role FROM participants p JOIN conversations c ON c.id = p.conversation_id"
        " WHERE c.session_id = $1 ORDER BY p.role",
        session["id"],
    )
    assert [tuple(member) for member in members] == [(doctor.user_id, "doctor"), (patient.user_id, "patient")]


async def test_nothing_is_converted_before_it_is_due(clinic: Clinic, clock: Clock) -> None:
    appointment_id = await clinic.appointment(starts_in=MINUTE)

    assert await clinic.convert() == {}

    await clock.advance(MINUTE)
    assert (await clinic.convert())[appointment_id].result == "created"


@pytest.mark.parametrize("status", ["PENDING", "CANCELLED", "EXPIRED", "RESCHEDULE_PROPOSED", "COMPLETED", "NO_SHOW"])
async def test_only_confirmed_appointments_are_due(clinic: Clinic, status: str) -> None:
    await clinic.appointment(status=status)

    assert await clinic.convert() == {}


async def test_another_kind_of_appointment_never_gets_a_session(clinic: Clinic) -> None:
    appointment_id = await clinic.appointment()
    await clinic.fetchval("UPDATE appointments SET kind = 'treatment' WHERE id = $1", appointment_id)

    assert await clinic.convert() == {}


async def test_both_parties_are_notified_once_however_often_the_event_is_delivered(
    clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    session = await clinic.session()
    await clinic.dispatch()
    await owner.execute("UPDATE outbox_deliveries SET dispatched_at = NULL, lease_until = NULL")
    await clinic.dispatch()

    notified = await clinic.fetch("SELECT user_id, kind, session_id FROM notifications ORDER BY user_id")

    everybody = sorted([session.patient.user_id, session.doctor.user_id])
    assert [tuple(row) for row in notified] == [(user, "session_started", session.ref.id) for user in everybody]


Owner: TypeAlias = "asyncpg.Connection[Any]"
BreakIt: TypeAlias = Callable[[Clinic, Owner, Principal, Principal], Awaitable[dict[str, Any]]]


async def unknown_modality(clinic: Clinic, owner: Owner, doctor: Principal, patient: Principal) -> dict[str, Any]:
    return {"modality": "hologram"}


async def ends_before_start(clinic: Clinic, owner: Owner, doctor: Principal, patient: Principal) -> dict[str, Any]:
    return {"lasts": -MINUTE}


def inactive(party: str) -> BreakIt:
    async def deactivate(clinic: Clinic, owner: Owner, doctor: Principal, patient: Principal) -> dict[str, Any]:
        user = doctor if party == "doctor" else patient
        await clinic.fetchval("UPDATE users SET active = false WHERE id = $1", user.user_id)
        return {}

    return deactivate


def subscription(change: str) -> BreakIt:
    async def change_it(clinic: Clinic, owner: Owner, doctor: Principal, patient: Principal) -> dict[str, Any]:
        await owner.execute(f"UPDATE subscriptions SET {change} WHERE patient_id = $1", patient.user_id)
        return {}

    return change_it


async def in_another_session(clinic: Clinic, owner: Owner, doctor: Principal, patient: Principal) -> dict[str, Any]:
    await clinic.session(patient=patient)
    return {}


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (unknown_modality, "invalid_appointment_state"),
        (ends_before_start, "invalid_appointment_state"),
        (inactive("doctor"), "missing_doctor_or_patient"),
        (inactive("patient"), "missing_doctor_or_patient"),
        (subscription("ends_at = clock()"), "missing_doctor_or_patient"),
        (subscription("starts_at = clock() + interval '1 hour'"), "missing_doctor_or_patient"),
        (subscription("text_sessions_remaining = 0"), "createSession_validation_failed"),
        (in_another_session, "createSession_conflict_existing_session"),
    ],
)
async def test_a_failure_is_named_by_the_rule_that_failed(
    clinic: Clinic, owner: Owner, break_it: BreakIt, reason: str
) -> None:
    doctor, patient = await clinic.doctor(), await clinic.patient()
    broken = await clinic.appointment(doctor, patient, **await break_it(clinic, owner, doctor, patient))
    sound = await clinic.appointment()

    outcomes = await clinic.convert()

    assert (outcomes[broken].result, outcomes[broken].reason) == ("failed", reason)
    assert outcomes[sound].result == "created"
    appointment = await appointment_row(clinic, broken)
    assert (appointment["status"], appointment["session_id"]) == ("CONFIRMED", None)
    assert appointment["next_attempt_at"] > appointment["now"]
    attempt = await clinic.fetchrow("SELECT * FROM conversion_attempts WHERE appointment_id = $1", broken)
    assert (attempt["result"], attempt["reason"], attempt["attempt"]) == ("failed", reason, 1)
    assert attempt["error_message"]
    assert clinic.metrics.sample("appointment_session_conversion_failed_total", reason=reason) == 1
    assert clinic.metrics.sample("appointment_sessions_created_total", modality="text") >= 1


async def test_units_of_another_modality_do_not_help(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    patient = await clinic.patient()
    await owner.execute("UPDATE subscriptions SET voice_calls_remaining = 0 WHERE patient_id = $1", patient.user_id)
    appointment_id = await clinic.appointment(patient=patient, modality="voice")

    assert (await clinic.convert())[appointment_id].reason == "createSession_validation_failed"


async def test_failures_back_off_from_a_minute_to_an_hour_and_are_parked_after_ten(
    clinic: Clinic, clock: Clock
) -> None:
    appointment_id = await clinic.appointment(patient=await clinic.patient(units=None), lasts=8 * HOUR)
    waits = []
    for _ in range(10):
        outcome = (await clinic.convert())[appointment_id]
        row = await appointment_row(clinic, appointment_id)
        waits.append(round((row["next_attempt_at"] - row["now"]).total_seconds() / 60))
        assert await clinic.convert() == {}, "It must wait for its next attempt."
        await clock.advance(row["next_attempt_at"] - row["now"])

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert outcome.parked
    assert row["parked_at"] is not None
    await clock.advance(24 * HOUR)
    assert await clinic.convert() == {}, "A parked appointment waits for an operator."


async def test_a_busy_party_is_tried_again_every_ten_seconds_and_is_nobodys_fault(clinic: Clinic, clock: Clock) -> None:
    doctor = await clinic.doctor()
    await clinic.session(doctor=doctor, lasts=2 * HOUR)
    waiting = await clinic.appointment(doctor, starts_in=timedelta(0), lasts=HOUR)
    for _ in range(12):
        assert (await clinic.convert())[waiting].reason == "createSession_conflict_existing_session"
        row = await appointment_row(clinic, waiting)
        assert row["next_attempt_at"] - row["now"] == pytest.approx(timedelta(seconds=10), abs=timedelta(seconds=1))
        await clock.advance(timedelta(seconds=10))

    assert (row["conversion_failures"], row["conversion_attempts"], row["parked_at"]) == (0, 12, None)

    await clock.advance(HOUR)
    await clinic.convert()
    row = await appointment_row(clinic, waiting)
    assert row["conversion_failures"] == 1, "After the slot is over it counts."


async def test_of_two_appointments_due_at_once_the_earlier_one_gets_the_doctor(clinic: Clinic) -> None:
    doctor = await clinic.doctor()
    later = await clinic.appointment(doctor, starts_in=-2 * MINUTE)
    earlier = await clinic.appointment(doctor, starts_in=-3 * MINUTE)

    outcomes = await clinic.convert()

    assert outcomes[earlier].result == "created"
    assert outcomes[later].reason == "createSession_conflict_existing_session"


async def test_a_late_conversion_gets_its_full_time(clinic: Clinic) -> None:
    session = await clinic.session(starts_in=-25 * MINUTE, lasts=30 * MINUTE)

    row = await clinic.fetchrow("SELECT expires_at - created_at AS lasts FROM sessions WHERE id = $1", session.ref.id)

    assert row["lasts"] == 30 * MINUTE


async def test_a_new_subscription_lets_a_waiting_appointment_start_at_once(clinic: Clinic) -> None:
    patient = await clinic.patient(units=None)
    appointment_id = await clinic.appointment(patient=patient)
    assert (await clinic.convert())[appointment_id].result == "failed"

    await clinic.subscribe(patient)

    assert (await clinic.convert())[appointment_id].result == "created"


async def test_activating_a_user_lets_a_waiting_appointment_start_at_once(clinic: Clinic) -> None:
    doctor = await clinic.doctor(active=False)
    appointment_id = await clinic.appointment(doctor)
    assert (await clinic.convert())[appointment_id].result == "failed"

    async with transaction(clinic.database, clinic.bell) as tx:
        await set_active(tx, clinic.operator, doctor.user_id, active=True)

    assert (await clinic.convert())[appointment_id].result == "created"


async def test_a_conversation_begun_by_appointment_id_goes_on_in_the_session(clinic: Clinic) -> None:
    appointment_id = await clinic.appointment()
    conversation = await clinic.fetchval(
        "INSERT INTO conversations (tenant_id, appointment_id, last_seq) VALUES ($1, $2, 3) RETURNING id",
        clinic.tenant_id,
        appointment_id,
    )

    session_id = (await clinic.convert())[appointment_id].session_id

    row = await clinic.fetchrow("SELECT id, last_seq FROM conversations WHERE session_id = $1", session_id)
    assert tuple(row) == (conversation, 3)


@pytest.mark.parametrize(("meanwhile", "reason"), [("convert", "session_id_already_set"), ("cancel", "status_changed")])
async def test_what_changed_between_selection_and_lock_is_skipped(clinic: Clinic, meanwhile: str, reason: str) -> None:
    appointment_id = await clinic.appointment()
    if meanwhile == "convert":
        await clinic.convert()
    else:
        await clinic.fetchval("UPDATE appointments SET status = 'CANCELLED' WHERE id = $1", appointment_id)

    row = await clinic.fetchrow(statement.CONVERT_ONE, uuid4(), appointment_id)

    assert (row["result"], row["reason"]) == ("skipped", reason)
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == (1 if meanwhile == "convert" else 0)


async def test_converters_do_not_run_beside_each_other(clinic: Clinic) -> None:
    await clinic.appointment()
    async with clinic.database.autocommit() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", statement.LOCK_KEY)
        with pytest.raises(ConverterBusy):
            await clinic.converter().auto_start()


async def test_many_converters_at_once_make_one_session_per_appointment(clinic: Clinic) -> None:
    appointments = {await clinic.appointment() for _ in range(30)}
    outcomes: list[Outcome] = []

    await asyncio.gather(*(clinic.converter(outcomes, batch_limit=4).auto_start(wait=True) for _ in range(6)))

    created = [outcome.appointment_id for outcome in outcomes if outcome.result == "created"]
    assert sorted(created) == sorted(appointments)
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == 30


async def test_a_row_that_someone_else_holds_is_left_for_the_next_run(clinic: Clinic) -> None:
    held, free = await clinic.appointment(), await clinic.appointment()
    async with clinic.database.begin() as connection:
        await connection.exec_driver_sql(f"SELECT 1 FROM appointments WHERE id = {held} FOR UPDATE")
        assert set(await clinic.convert()) == {free}

    assert set(await clinic.convert()) == {held}


async def test_a_run_goes_through_as_many_batches_as_it_takes(clinic: Clinic) -> None:
    for _ in range(7):
        await clinic.appointment()
    outcomes: list[Outcome] = []

    run = await clinic.converter(outcomes, batch_limit=3).auto_start()

    assert (run.due_count, run.created_count, len(outcomes)) == (7, 7, 7)
    row = await clinic.fetchrow("SELECT * FROM conversion_runs WHERE run_id = $1", run.run_id)
    assert (row["due_count"], row["created_count"], row["failed_count"]) == (7, 7, 0)
    assert row["finished_at"] is not None


async def test_a_limit_bounds_the_run(clinic: Clinic) -> None:
    for _ in range(5):
        await clinic.appointment()

    run = await clinic.converter(batch_limit=2).auto_start(limit=3)

    assert (run.due_count, run.created_count) == (5, 3)


async def test_every_conversion_is_told_with_all_its_fields(clinic: Clinic) -> None:
    sound = await clinic.appointment()
    broken = await clinic.appointment(modality="hologram")
    with capture_logs() as logs:
        await clinic.convert()
        lines = {line["appointment_id"]: line for line in logs.lines("appointment_session_conversion")}

    created, failed = lines[sound], lines[broken]
    assert created["result"] == "created"
    assert created["session_id"] == await clinic.fetchval("SELECT session_id FROM appointments WHERE id = $1", sound)
    assert (created["failure_reason"], created["error_message"]) == (None, None)
    assert (failed["result"], failed["failure_reason"]) == ("failed", "invalid_appointment_state")
    assert failed["error_message"] == "The modality is none of text, voice, video."
    assert failed["level"] == "warning"
    for line in (created, failed):
        assert (line["source"], line["tenant_id"]) == ("APPOINTMENT", clinic.tenant_id)
        assert line["module"] == "scheduling"
        assert line["component"] == "conversion"
        assert line["job_run_id"]
        assert line["modality"] in ("text", "hologram")


async def test_attempts_count_created_and_failed_but_not_skipped(clinic: Clinic) -> None:
    await clinic.appointment()
    await clinic.appointment(modality="hologram")

    await clinic.convert()

    assert clinic.metrics.sample("appointment_session_conversion_attempted_total", task="auto_start") == 2
    assert clinic.metrics.sample("appointment_session_conversion_skipped_total") == 0


async def test_how_late_a_session_was_is_measured_from_when_it_could_begin(clinic: Clinic) -> None:
    await clinic.appointment(starts_in=-timedelta(seconds=40))
    tried_again = await clinic.appointment(starts_in=-10 * MINUTE)
    await clinic.fetch(
        "UPDATE appointments SET next_attempt_at = clock() - interval '2 seconds' WHERE id = $1", tried_again
    )
    await clinic.appointment(modality="hologram")

    await clinic.convert()

    def within(seconds: str) -> float:
        return clinic.metrics.sample("appointment_start_delay_seconds_bucket", le=seconds)

    assert [within(seconds) for seconds in ("1.0", "5.0", "30.0", "60.0")] == [0, 1, 1, 2]
    assert clinic.metrics.sample("appointment_start_delay_seconds_count") == 2, "What failed has not started."


async def test_a_broken_transaction_leaves_nothing_half_done(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    await owner.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON sessions DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    appointment_id = await clinic.appointment()

    with pytest.raises(asyncpg.RaiseError):
        await clinic.converter().auto_start()

    row = await appointment_row(clinic, appointment_id)
    assert (row["status"], row["session_id"], row["conversion_attempts"]) == ("CONFIRMED", None, 0)
    for table in ("sessions", "conversations", "conversion_attempts", "conversion_runs", "outbox_events"):
        assert await clinic.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_times_are_those_of_the_database(clinic: Clinic, clock: Clock) -> None:
    appointment_id = await clinic.appointment(starts_in=48 * HOUR)
    await clock.advance(48 * HOUR)

    await clinic.convert()

    created: datetime = await clinic.fetchval(
        "SELECT created_at FROM sessions WHERE appointment_id = $1", appointment_id
    )
    present = await clinic.fetchval("SELECT clock()")
    assert abs(created - present) < timedelta(seconds=5)


@pytest.mark.parametrize(("starts_in", "rung"), [(timedelta(seconds=1), [ConvertDue()]), (MINUTE, [])])
async def test_confirming_what_is_nearly_due_wakes_the_worker(
    clinic: Clinic, starts_in: timedelta, rung: list[Job]
) -> None:
    appointment_id = await clinic.appointment(starts_in=starts_in, status="PENDING")
    clinic.bell.rung.clear()
    async with transaction(clinic.database, clinic.bell) as tx:
        await appointments.confirm(tx, clinic.operator, appointment_id)
    assert [job for job in clinic.bell.rung if job == ConvertDue()] == rung
