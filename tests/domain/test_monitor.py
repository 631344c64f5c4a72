"""The monitor reads everything from rows, so that every process gives the same answer."""

from datetime import timedelta

from libs.domain.conversion import monitor
from libs.domain.conversion.monitor import Report, Sample, Thresholds
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock


async def report(clinic: Clinic, tenant_id: int | None = None) -> Report:
    return await monitor.report(clinic.database, Thresholds(), tenant_id)


async def due(clinic: Clinic, number: int) -> None:
    doctor, patient = await clinic.doctor(), await clinic.patient()
    for _ in range(number):
        await clinic.appointment(doctor, patient)


async def pass_with_samples(clinic: Clinic, clock: Clock, minutes: int) -> None:
    """Lets time pass while a worker takes its samples."""
    for _ in range(minutes * 4):
        await monitor.sample(clinic.database)
        await clock.advance(timedelta(seconds=monitor.SAMPLE_SECONDS))


async def test_an_idle_clinic_is_well(clinic: Clinic) -> None:
    told = await report(clinic)

    assert told.level == "ok"
    assert told.fields() == {
        "appointments_due_count": 0,
        "appointment_sessions_created_total": 0,
        "appointment_session_conversion_failed_total": 0,
        "created_last_minute": 0,
        "failed_last_minute": 0,
        "oldest_due_seconds": 0.0,
        "needs_attention": 0,
        "backlog_alert": {"level": "ok", "count": 0},
        "error_rate_alert": {"level": "ok", "rate": 0.0, "attempted": 0, "failed": 0},
        "creation_alert": {"level": "ok"},
    }


async def test_counts_come_from_attempts_and_forget_the_last_minute(clinic: Clinic, clock: Clock) -> None:
    await clinic.session()
    await clinic.appointment(modality="hologram")
    await clinic.convert()

    told = await report(clinic)
    assert (told.appointment_sessions_created_total, told.created_last_minute) == (1, 1)
    assert (told.appointment_session_conversion_failed_total, told.failed_last_minute) == (1, 1)
    assert told.appointments_due_count == 1, "What waits for its next attempt is still due."

    await clock.advance(2 * MINUTE)
    told = await report(clinic)
    assert (told.appointment_sessions_created_total, told.created_last_minute) == (1, 0)


async def test_the_age_of_the_oldest_due_appointment_is_told(clinic: Clinic) -> None:
    await clinic.appointment(starts_in=-3 * MINUTE)

    assert 179 < (await report(clinic)).oldest_due_seconds < 190


async def test_a_backlog_alerts_only_once_it_has_lasted(clinic: Clinic, clock: Clock) -> None:
    await due(clinic, 11)
    assert (await report(clinic)).backlog_alert.level == "ok", "It has not lasted."

    await pass_with_samples(clinic, clock, 6)
    told = await report(clinic)
    assert (told.backlog_alert.level, told.backlog_alert.count) == ("warning", 11)

    await due(clinic, 40)
    assert (await report(clinic)).backlog_alert.level == "warning", "The higher one has not lasted."

    await pass_with_samples(clinic, clock, 6)
    assert (await report(clinic)).backlog_alert.level == "critical"


async def test_a_backlog_that_dipped_does_not_alert(clinic: Clinic, clock: Clock) -> None:
    await due(clinic, 11)
    await pass_with_samples(clinic, clock, 3)
    moved = await clinic.fetch("UPDATE appointments SET status = 'CANCELLED' RETURNING id")
    assert len(moved) == 11
    await monitor.sample(clinic.database)
    await clock.advance(MINUTE)
    await due(clinic, 20)
    await pass_with_samples(clinic, clock, 3)

    assert (await report(clinic)).backlog_alert.level == "ok"


async def test_without_a_worker_the_age_of_the_backlog_speaks(clinic: Clinic, clock: Clock) -> None:
    await due(clinic, 11)
    await clock.advance(6 * MINUTE)

    assert (await report(clinic)).backlog_alert.level == "warning"


async def test_the_error_rate_warns_and_becomes_critical(clinic: Clinic, clock: Clock) -> None:
    for _ in range(60):
        await clinic.appointment()
    await clinic.convert()
    broken = [await clinic.appointment(modality="hologram") for _ in range(4)]
    await clinic.convert()
    told = await report(clinic)
    assert (told.error_rate_alert.level, told.error_rate_alert.failed) == ("ok", 4), "One appointment can do that."

    broken.append(await clinic.appointment(modality="hologram"))
    await clinic.convert()
    told = await report(clinic)
    assert (told.error_rate_alert.level, told.error_rate_alert.failed) == ("warning", 5)
    assert told.error_rate_alert.rate == round(5 / 65, 4)

    for _ in range(5):
        await clinic.appointment(modality="hologram")
    await clinic.convert()
    assert (await report(clinic)).error_rate_alert.level == "critical"

    await clinic.fetchval("UPDATE appointments SET status = 'CANCELLED' WHERE id >= $1", broken[0])
    await clock.advance(11 * MINUTE)
    assert (await report(clinic)).error_rate_alert.level == "ok"


async def test_whoever_waits_for_a_busy_doctor_is_no_error(clinic: Clinic, clock: Clock) -> None:
    await due(clinic, 2)
    for _ in range(8):
        await clinic.convert()
        await clock.advance(timedelta(seconds=10))

    told = await report(clinic)
    assert (told.error_rate_alert.failed, told.error_rate_alert.level) == (8, "ok")


async def test_what_is_due_and_not_tried_is_critical(clinic: Clinic, clock: Clock) -> None:
    await clinic.appointment()
    await clock.advance(3 * MINUTE)
    assert (await report(clinic)).creation_alert.level == "ok", "It has not lasted."
    await clock.advance(3 * MINUTE)
    assert (await report(clinic)).creation_alert.level == "critical"

    await clinic.convert()
    assert (await report(clinic)).creation_alert.level == "ok"


async def test_what_waits_for_its_next_attempt_is_neither_overdue_nor_critical(clinic: Clinic, clock: Clock) -> None:
    await clinic.appointment(modality="hologram")
    await clinic.fetch("UPDATE appointments SET next_attempt_at = clock() + interval '1 hour'")
    await clock.advance(30 * MINUTE)
    assert (await report(clinic)).creation_alert.level == "ok"
    assert await monitor.sample(clinic.database) == Sample(due=1, overdue=0, needs_attention=0)

    await clock.advance(31 * MINUTE)
    assert await monitor.sample(clinic.database) == Sample(due=1, overdue=1, needs_attention=0)


async def test_parked_appointments_need_attention(clinic: Clinic) -> None:
    appointment_id = await clinic.appointment()
    await clinic.fetchval("UPDATE appointments SET parked_at = clock() WHERE id = $1", appointment_id)

    told = await report(clinic)

    assert (told.needs_attention, told.appointments_due_count) == (1, 0)
    assert await monitor.sample(clinic.database) == Sample(due=0, overdue=0, needs_attention=1)


async def test_a_tenant_sees_its_own_and_the_command_line_sees_all(clinic: Clinic) -> None:
    other = await Clinic.open(clinic.database, "Another clinic")
    await due(clinic, 2)
    await due(other, 3)

    assert (await report(clinic, clinic.tenant_id)).appointments_due_count == 2
    assert (await report(clinic, other.tenant_id)).appointments_due_count == 3
    assert (await report(clinic)).appointments_due_count == 5


async def test_samples_of_one_slot_are_written_once(clinic: Clinic) -> None:
    await monitor.sample(clinic.database)
    await monitor.sample(clinic.database)

    assert await clinic.fetchval("SELECT count(*) FROM conversion_samples") in (1, 2), "Two if a slot ended between."
    assert await clinic.fetchval("SELECT count(DISTINCT slot) = count(*) FROM conversion_samples")
