import asyncio
from typing import Any

from libs.guardrails import Principal
from tests.api.expect import DAY, ahead, book, faults, found, moment, problem
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.running import Api


async def confirmed(api: Api, clinic: Clinic, patient: Principal, doctor: Principal, by: Any = DAY) -> dict[str, Any]:
    booked = await book(api, clinic, patient, doctor, by)
    answer: dict[str, Any] = found(await api.as_(doctor).post(f"/appointments/{booked['id']}/confirm"))
    return answer


async def propose(api: Api, doctor: Principal, appointment: dict[str, Any], starts_at: str) -> Any:
    return await api.as_(doctor).post(f"/appointments/{appointment['id']}/reschedule", json={"starts_at": starts_at})


async def answer(api: Api, patient: Principal, appointment: dict[str, Any], word: str) -> Any:
    return await api.as_(patient).post(f"/appointments/{appointment['id']}/reschedule/{word}")


async def is_free(api: Api, patient: Principal, doctor: Principal, starts_at: str) -> bool:
    """Tries to book that time for good."""
    new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": starts_at}
    response = await api.as_(patient).post("/appointments", json=new)
    if response.status_code == 409:
        problem(response, 409, "SLOT_TAKEN")
    return bool(response.status_code == 201)


async def test_accepting_exchanges_the_old_slot_for_the_new_one(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    old = await confirmed(api, clinic, patient, doctor)
    later = await ahead(clinic, 2 * DAY)

    pending = found(await propose(api, doctor, old, later))
    assert (pending["status"], pending["starts_at"]) == ("RESCHEDULE_PROPOSED", old["starts_at"])
    assert not await is_free(api, patient, doctor, old["starts_at"])

    moved = found(await answer(api, patient, old, "accept"))
    assert moved["status"] == "CONFIRMED"
    assert moment(moved["starts_at"]).isoformat() == later
    assert moved["duration_minutes"] == old["duration_minutes"]
    assert not await is_free(api, patient, doctor, later)
    assert await is_free(api, patient, doctor, old["starts_at"])


async def test_rejecting_keeps_the_old_slot(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    old = await confirmed(api, clinic, patient, doctor)
    later = await ahead(clinic, 2 * DAY)
    found(await propose(api, doctor, old, later))

    kept = found(await answer(api, patient, old, "reject"))
    assert (kept["status"], kept["starts_at"]) == ("CONFIRMED", old["starts_at"])
    assert not await is_free(api, patient, doctor, old["starts_at"])
    assert await is_free(api, patient, doctor, later)


async def test_a_time_taken_since_it_was_proposed_is_refused_and_nothing_moves(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    old = await confirmed(api, clinic, patient, doctor)
    later = await ahead(clinic, 2 * DAY)
    found(await propose(api, doctor, old, later))
    assert await is_free(api, await clinic.patient(), doctor, later)

    problem(await answer(api, patient, old, "accept"), 409, "SLOT_TAKEN")
    after = found(await api.as_(patient).get(f"/appointments/{old['id']}"))
    assert (after["status"], after["starts_at"]) == ("RESCHEDULE_PROPOSED", old["starts_at"])
    assert not await is_free(api, patient, doctor, old["starts_at"])
    assert await clinic.fetchval("SELECT count(*) FROM outbox_events WHERE name = 'reschedule_accepted'") == 0


async def test_an_appointment_may_move_into_a_time_that_overlaps_its_own(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    old = await confirmed(api, clinic, patient, doctor)
    found(await propose(api, doctor, old, await ahead(clinic, DAY + 10 * MINUTE)))
    found(await answer(api, patient, old, "accept"))
    assert await clinic.fetchval("SELECT count(*) FROM busy_intervals WHERE active") == 1


async def test_of_two_appointments_that_move_to_one_time_at_once_one_gets_it(api: Api, clinic: Clinic) -> None:
    doctor = await clinic.doctor()
    patients = [await clinic.patient() for _ in range(8)]
    later = await ahead(clinic, 20 * DAY)
    appointments = []
    for number, patient in enumerate(patients, 1):
        appointment = await confirmed(api, clinic, patient, doctor, number * DAY)
        found(await propose(api, doctor, appointment, later))
        appointments.append(appointment)

    pairs = zip(patients, appointments, strict=True)
    answers = await asyncio.gather(*(answer(api, patient, which, "accept") for patient, which in pairs))

    assert sorted(response.status_code for response in answers) == [200, *[409] * 7]
    assert await clinic.fetchval("SELECT count(*) FROM busy_intervals WHERE active") == 8


async def test_a_proposed_time_obeys_the_rules_of_booking(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment = await confirmed(api, clinic, patient, doctor)
    past, too_far = await ahead(clinic, -MINUTE), await ahead(clinic, 367 * DAY)
    for starts_at in (past, too_far, too_far[:19], "1900000000"):
        assert faults(await propose(api, doctor, appointment, starts_at)) == ["/starts_at"]
    assert await clinic.fetchval("SELECT status FROM appointments") == "CONFIRMED"


async def test_a_proposal_cannot_be_accepted_once_its_time_has_passed(api: Api, clinic: Clinic, clock: Clock) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment = await confirmed(api, clinic, patient, doctor, 2 * DAY)
    found(await propose(api, doctor, appointment, await ahead(clinic, DAY)))
    await clock.advance(DAY)

    problem(await answer(api, patient, appointment, "accept"), 409, "INVALID_TRANSITION")
    assert found(await answer(api, patient, appointment, "reject"))["status"] == "CONFIRMED"
