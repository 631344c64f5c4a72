import asyncio
from datetime import timedelta
from typing import Any

from libs.domain.db import Database
from libs.guardrails import Role
from tests.api.expect import DAY, ahead, book, faults, found, moment, problem
from tests.clinic import MINUTE, Clinic
from tests.running import Api


async def test_a_patient_books_a_pending_appointment(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    starts_at = await ahead(clinic, DAY)

    booked = await book(api, clinic, patient, doctor, starts_at=starts_at, modality="video", reason="a cough")

    created_at = moment(booked.pop("created_at"))
    assert moment(booked.pop("updated_at")) == created_at
    assert moment(booked["starts_at"]).isoformat() == starts_at
    assert moment(booked["ends_at"]) - moment(booked["starts_at"]) == 30 * MINUTE
    assert booked == {
        "id": booked["id"],
        "patient_id": patient.user_id,
        "doctor_id": doctor.user_id,
        "modality": "video",
        "status": "PENDING",
        "starts_at": booked["starts_at"],
        "ends_at": booked["ends_at"],
        "duration_minutes": 30,
        "reason": "a cough",
        "session_id": None,
        "session_context": None,
    }
    stored = await clinic.fetchrow("SELECT status, tenant_id FROM appointments WHERE id = $1", booked["id"])
    assert tuple(stored) == ("PENDING", clinic.tenant_id)


async def test_an_operator_books_for_a_patient_and_must_say_for_whom(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": await ahead(clinic, DAY)}
    operator = api.as_(clinic.operator)

    assert faults(await operator.post("/appointments", json=new)) == ["/patient_id"]
    booked = found(await operator.post("/appointments", json=new | {"patient_id": patient.user_id}), 201)
    assert booked["patient_id"] == patient.user_id


async def test_a_patient_books_for_oneself_only(api: Api, clinic: Clinic) -> None:
    patient, other, doctor = await clinic.patient(), await clinic.patient(), await clinic.doctor()
    new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": await ahead(clinic, DAY)}

    refused = await api.as_(patient).post("/appointments", json=new | {"patient_id": other.user_id})
    assert faults(refused) == ["/patient_id"]
    assert await clinic.fetchval("SELECT count(*) FROM appointments") == 0
    found(await api.as_(patient).post("/appointments", json=new | {"patient_id": patient.user_id}), 201)


async def test_neither_doctors_nor_services_book(api: Api, clinic: Clinic) -> None:
    patient, doctor, service = await clinic.patient(), await clinic.doctor(), await clinic.person(Role.SERVICE)
    new = {"doctor_id": doctor.user_id, "patient_id": patient.user_id, "modality": "text"}
    starts_at = await ahead(clinic, DAY)
    for caller in (doctor, service):
        response = await api.as_(caller).post("/appointments", json=new | {"starts_at": starts_at})
        problem(response, 403, "ROLE_NOT_ALLOWED")


async def test_whoever_cannot_be_booked_is_pointed_at(api: Api, clinic: Clinic, database: Database) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new: dict[str, Any] = {"doctor_id": doctor.user_id, "patient_id": patient.user_id, "modality": "text"}
    new["starts_at"] = await ahead(clinic, DAY)

    nobody = [
        2**63 - 1,
        clinic.operator.user_id,
        (await elsewhere.doctor()).user_id,
        (await elsewhere.patient()).user_id,
        (await clinic.doctor(active=False)).user_id,
        (await clinic.patient(active=False)).user_id,
    ]
    operator = api.as_(clinic.operator)
    for user_id in [*nobody, patient.user_id]:
        assert faults(await operator.post("/appointments", json=new | {"doctor_id": user_id})) == ["/doctor_id"]
    for user_id in [*nobody, doctor.user_id]:
        assert faults(await operator.post("/appointments", json=new | {"patient_id": user_id})) == ["/patient_id"]


async def test_an_appointment_starts_in_the_future_and_within_366_days(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = {"doctor_id": doctor.user_id, "modality": "text"}
    present = await clinic.fetchval("SELECT clock()")
    refused: list[Any] = [
        present.isoformat(),
        (present - MINUTE).isoformat(),
        (present + 366 * DAY + MINUTE).isoformat(),
        (present + DAY).replace(tzinfo=None).isoformat(),
        (present + DAY).date().isoformat(),
        str(int((present + DAY).timestamp())),
        int((present + DAY).timestamp()),
        "9999-12-31T23:59:59-12:00",
        "0001-01-01T00:00:00+12:00",
        "tomorrow",
        "",
        None,
    ]
    for starts_at in refused:
        response = await api.as_(patient).post("/appointments", json=new | {"starts_at": starts_at})
        assert faults(response) == ["/starts_at"], starts_at
    for by in (timedelta(seconds=1), 365 * DAY, 366 * DAY - MINUTE - MINUTE * 60):
        await book(api, clinic, patient, await clinic.doctor(), by)


async def test_a_time_with_another_offset_is_stored_as_the_same_moment(api: Api, clinic: Clinic) -> None:
    booked = await book(
        api, clinic, await clinic.patient(), await clinic.doctor(), 300 * DAY, starts_at=await _in_blantyre(clinic)
    )
    assert moment(booked["starts_at"]).hour == 7


async def _in_blantyre(clinic: Clinic) -> str:
    day = (await clinic.fetchval("SELECT clock()") + 2 * DAY).date()
    return f"{day}T09:00:00+02:00"


async def test_an_appointment_lasts_between_5_and_480_minutes(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": await ahead(clinic, DAY)}
    for duration in (4, 481, 0, -30, 30.5, "30", True, None):
        response = await api.as_(patient).post("/appointments", json=new | {"duration_minutes": duration})
        assert faults(response) == ["/duration_minutes"], duration
    for minutes in (5, 480):
        booked = await book(api, clinic, patient, await clinic.doctor(), duration_minutes=minutes)
        assert booked["duration_minutes"] == minutes
        assert moment(booked["ends_at"]) - moment(booked["starts_at"]) == minutes * MINUTE


async def test_a_client_sets_nothing_that_is_not_its_to_set(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": await ahead(clinic, DAY)}
    for field in ("status", "session_id", "price", "tenant_id", "ends_at", "kind"):
        assert faults(await api.as_(patient).post("/appointments", json=new | {field: 1})) == [""]


async def test_appointments_of_a_doctor_may_touch_but_not_overlap(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    noon = (await clinic.fetchval("SELECT clock()") + DAY).replace(microsecond=0)
    new = {"doctor_id": doctor.user_id, "modality": "text", "duration_minutes": 30}
    client = api.as_(patient)

    async def at(minutes: int, **changed: Any) -> Any:
        starts_at = (noon + minutes * MINUTE).isoformat()
        return await client.post("/appointments", json=new | {"starts_at": starts_at} | changed)

    found(await at(0), 201)
    for minutes in (-29, -1, 0, 1, 29):
        problem(await at(minutes), 409, "SLOT_TAKEN")
    found(await at(-30), 201)
    found(await at(30), 201)
    found(await at(0, doctor_id=(await clinic.doctor()).user_id), 201)
    assert api.runtime.metrics.sample("scheduling_book_conflict_total") == 5


async def test_of_thirty_who_want_a_doctor_at_once_one_gets_the_slot(api: Api, clinic: Clinic) -> None:
    doctor = await clinic.doctor()
    patients = [await clinic.patient() for _ in range(30)]
    noon = await clinic.fetchval("SELECT clock()") + DAY

    async def try_to_book(number: int) -> Any:
        # Every two of these overlap: they last 60 minutes and start within 30.
        starts_at = (noon + number * MINUTE).isoformat()
        new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": starts_at, "duration_minutes": 60}
        return await api.as_(patients[number]).post("/appointments", json=new)

    answers = await asyncio.gather(*(try_to_book(number) for number in range(30)))

    booked = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    assert len(booked) == 1
    for answer in answers:
        if answer.status_code != 201:
            problem(answer, 409, "SLOT_TAKEN")
    busy = await clinic.fetch("SELECT appointment_id FROM busy_intervals WHERE doctor_id = $1", doctor.user_id)
    assert [row["appointment_id"] for row in busy] == booked
    assert await clinic.fetchval("SELECT count(*) FROM appointments") == 1
