"""What ends by itself: sessions nobody took up in time, and requests nobody confirmed in time."""

from datetime import timedelta

from libs.domain.appointments.expiry import expire_pending
from libs.domain.transaction import transaction
from tests.clinic import ACTIVATE, MINUTE, Clinic
from tests.clock import Clock


async def expire(clinic: Clinic) -> list[int]:
    async with transaction(clinic.database, clinic.bell) as tx:
        await expire_pending(tx)
    return [settled.session_id for settled in await clinic.settle() if settled.end_reason]


async def statuses(clinic: Clinic, session_id: int) -> tuple[str, str]:
    row = await clinic.fetchrow(
        "SELECT s.status, a.status AS appointment FROM sessions s JOIN appointments a ON a.id = s.appointment_id"
        " WHERE s.id = $1",
        session_id,
    )
    return row["status"], row["appointment"]


async def test_a_text_session_that_nobody_took_up_expires_at_the_end_of_its_time(clinic: Clinic, clock: Clock) -> None:
    session = await clinic.session(lasts=30 * MINUTE)
    await clock.advance(29 * MINUTE)
    assert await expire(clinic) == []

    await clock.advance(MINUTE)
    assert await expire(clinic) == [session.ref.id]
    assert await statuses(clinic, session.ref.id) == ("expired", "NO_SHOW")


async def test_a_call_that_nobody_joined_is_missed(clinic: Clinic, clock: Clock) -> None:
    session = await clinic.session("voice")
    await clock.advance(31 * MINUTE)

    await expire(clinic)

    assert await statuses(clinic, session.ref.id) == ("missed", "NO_SHOW")


async def test_at_exactly_the_deadline_it_is_over(clinic: Clinic, clock: Clock) -> None:
    session = await clinic.session()
    await clinic.fetchval(
        "UPDATE sessions SET response_deadline = clock() + interval '1 minute' WHERE id = $1", session.ref.id
    )
    await clock.advance(timedelta(minutes=1))

    assert await expire(clinic) == [session.ref.id]


async def test_an_active_session_does_not_expire(clinic: Clinic, clock: Clock) -> None:
    session = await clinic.session()
    await clinic.fetchval(
        f"{ACTIVATE} WHERE id = $1",
        session.ref.id,
    )
    await clock.advance(99 * MINUTE)

    assert await expire(clinic) == []


async def test_expiry_costs_nothing_and_tells_both(clinic: Clinic, clock: Clock) -> None:
    session = await clinic.session()
    await clock.advance(31 * MINUTE)
    await expire(clinic)
    await clinic.dispatch()

    assert await clinic.fetchval("SELECT units_charged FROM sessions WHERE id = $1", session.ref.id) == 0
    assert await clinic.fetchval("SELECT min(text_sessions_remaining) FROM subscriptions") == 10
    told = await clinic.fetch("SELECT user_id FROM notifications WHERE kind = 'session_ended' ORDER BY user_id")
    assert [row["user_id"] for row in told] == sorted([session.patient.user_id, session.doctor.user_id])


async def test_expiry_frees_the_doctor_for_the_next_appointment_at_once(clinic: Clinic, clock: Clock) -> None:
    doctor = await clinic.doctor()
    await clinic.session(doctor=doctor, starts_in=timedelta(0), lasts=30 * MINUTE)
    following = await clinic.appointment(doctor, starts_in=25 * MINUTE)
    await clock.advance(29 * MINUTE)
    assert (await clinic.convert())[following].result == "failed"

    await clock.advance(MINUTE)
    await expire(clinic)

    assert (await clinic.convert())[following].result == "created"


async def test_a_request_that_nobody_confirmed_expires_when_it_is_due(clinic: Clinic, clock: Clock) -> None:
    doctor = await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, starts_in=MINUTE, status="PENDING")
    await clock.advance(MINUTE)

    await expire(clinic)

    assert await clinic.fetchval("SELECT status FROM appointments WHERE id = $1", appointment_id) == "EXPIRED"
    assert not await clinic.fetchval("SELECT bool_or(active) FROM busy_intervals")
    await clinic.dispatch()
    assert await clinic.fetchval("SELECT count(*) FROM notifications WHERE kind = 'appointment_expired'") == 2
