from typing import Any

import pytest

from libs.domain.db import Database
from libs.guardrails import Principal, Role
from tests.api.expect import DAY, ahead, book, found, moment, problem
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.running import Api

FIELDS = {
    "id",
    "patient_id",
    "doctor_id",
    "modality",
    "status",
    "starts_at",
    "ends_at",
    "duration_minutes",
    "reason",
    "session_id",
    "session_context",
    "created_at",
    "updated_at",
}
CHANGES = ("confirm", "cancel", "reschedule", "reschedule/accept", "reschedule/reject", "presence")

# Who may do what, of those who take part.
ALLOWED = {
    "confirm": {Role.DOCTOR, Role.OPERATOR},
    "cancel": {Role.PATIENT, Role.DOCTOR, Role.OPERATOR},
    "reschedule": {Role.DOCTOR, Role.OPERATOR},
    "reschedule/accept": {Role.PATIENT},
    "reschedule/reject": {Role.PATIENT},
    "presence": {Role.PATIENT, Role.DOCTOR},
}
READY = {"confirm": "PENDING", "reschedule/accept": "RESCHEDULE_PROPOSED", "reschedule/reject": "RESCHEDULE_PROPOSED"}


async def change(api: Api, caller: Principal, appointment_id: int, what: str, starts_at: str) -> Any:
    body = {"starts_at": starts_at} if what == "reschedule" else None
    return await api.as_(caller).post(f"/appointments/{appointment_id}/{what}", json=body)


async def proposed(clinic: Clinic, **appointment: Any) -> int:
    """An appointment for which another time has been proposed."""
    appointment_id = await clinic.appointment(status="RESCHEDULE_PROPOSED", starts_in=DAY, **appointment)
    await clinic.fetch(
        "UPDATE appointments SET proposed_starts_at = clock() + interval '2 days' WHERE id = $1", appointment_id
    )
    return appointment_id


async def in_status(clinic: Clinic, status: str, **parties: Any) -> int:
    match status:
        case "RESCHEDULE_PROPOSED":
            return await proposed(clinic, **parties)
        case "IN_PROGRESS":
            return (await clinic.session(**parties)).appointment_id
        case _:
            return await clinic.appointment(starts_in=DAY, status=status, **parties)


@pytest.mark.parametrize("what", CHANGES)
async def test_a_change_is_for_the_right_role_and_invisible_to_strangers(
    api: Api, clinic: Clinic, database: Database, what: str
) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    starts_at = await ahead(clinic, 3 * DAY)
    strangers = [
        await clinic.patient(),
        await clinic.doctor(),
        await elsewhere.patient(),
        await elsewhere.doctor(),
        elsewhere.operator,
    ]
    for role in (Role.PATIENT, Role.DOCTOR, Role.OPERATOR):
        patient, doctor = await clinic.patient(), await clinic.doctor()
        caller = {Role.PATIENT: patient, Role.DOCTOR: doctor, Role.OPERATOR: clinic.operator}[role]
        appointment_id = await in_status(clinic, READY.get(what, "CONFIRMED"), patient=patient, doctor=doctor)
        before = await clinic.fetchrow("SELECT * FROM appointments WHERE id = $1", appointment_id)
        for stranger in strangers:
            refused = await change(api, stranger, appointment_id, what, starts_at)
            problem(refused, 404, "APPOINTMENT_NOT_FOUND")
        response = await change(api, caller, appointment_id, what, starts_at)
        if role in ALLOWED[what]:
            assert response.status_code == (204 if what == "presence" else 200), response.text
            assert what == "presence" or set(response.json()) == FIELDS
        else:
            problem(response, 403, "ROLE_NOT_ALLOWED")
            assert await clinic.fetchrow("SELECT * FROM appointments WHERE id = $1", appointment_id) == before
    service = await clinic.person(Role.SERVICE)
    problem(await change(api, service, appointment_id, what, starts_at), 403, "ROLE_NOT_ALLOWED")
    problem(await change(api, clinic.operator, 2**63 - 1, what, starts_at), 404, "APPOINTMENT_NOT_FOUND")


@pytest.mark.parametrize(
    ("what", "becomes", "possible"),
    [
        ("confirm", "CONFIRMED", {"PENDING"}),
        ("cancel", "CANCELLED", {"PENDING", "CONFIRMED", "RESCHEDULE_PROPOSED"}),
        ("reschedule", "RESCHEDULE_PROPOSED", {"CONFIRMED"}),
        ("reschedule/accept", "CONFIRMED", {"RESCHEDULE_PROPOSED"}),
        ("reschedule/reject", "CONFIRMED", {"RESCHEDULE_PROPOSED"}),
    ],
)
async def test_a_change_is_possible_in_some_states_and_a_conflict_in_all_others(
    api: Api, clinic: Clinic, what: str, becomes: str, possible: set[str]
) -> None:
    starts_at = await ahead(clinic, 3 * DAY)
    for status in (
        "PENDING",
        "CONFIRMED",
        "CANCELLED",
        "EXPIRED",
        "RESCHEDULE_PROPOSED",
        "IN_PROGRESS",
        "COMPLETED",
        "NO_SHOW",
    ):
        patient, doctor = await clinic.patient(), await clinic.doctor()
        caller = patient if Role.PATIENT in ALLOWED[what] else doctor
        appointment_id = await in_status(clinic, status, patient=patient, doctor=doctor)
        response = await change(api, caller, appointment_id, what, starts_at)
        if status in possible:
            assert found(response)["status"] == becomes
        else:
            body = problem(response, 409, "INVALID_TRANSITION")
            assert status in body["detail"], body
            assert becomes in body["detail"], body
        after = await clinic.fetchval("SELECT status FROM appointments WHERE id = $1", appointment_id)
        assert after == (becomes if status in possible else status)


async def test_confirming_and_cancelling_twice_is_a_conflict(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    path = f"/appointments/{(await book(api, clinic, patient, doctor))['id']}"
    assert found(await api.as_(doctor).post(f"{path}/confirm"))["status"] == "CONFIRMED"
    problem(await api.as_(doctor).post(f"{path}/confirm"), 409, "INVALID_TRANSITION")
    cancelled = found(await api.as_(patient).post(f"{path}/cancel", json={"reason": "better again"}))
    assert cancelled["status"] == "CANCELLED"
    problem(await api.as_(patient).post(f"{path}/cancel"), 409, "INVALID_TRANSITION")
    assert await clinic.fetchval("SELECT cancel_reason FROM appointments") == "better again"


async def test_what_is_due_can_no_longer_be_confirmed(api: Api, clinic: Clinic, clock: Clock) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    booked = await book(api, clinic, patient, doctor, 10 * MINUTE)
    await clock.advance(10 * MINUTE)

    refused = await api.as_(doctor).post(f"/appointments/{booked['id']}/confirm")
    assert "EXPIRED" in problem(refused, 409, "INVALID_TRANSITION")["detail"]
    assert await clinic.fetchval("SELECT status FROM appointments") == "PENDING"


async def test_cancelling_frees_the_slot(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    booked = await book(api, clinic, patient, doctor)
    wanted = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": booked["starts_at"]}
    problem(await api.as_(patient).post("/appointments", json=wanted), 409, "SLOT_TAKEN")

    found(await api.as_(patient).post(f"/appointments/{booked['id']}/cancel"))
    again = found(await api.as_(patient).post("/appointments", json=wanted), 201)
    busy = await clinic.fetch("SELECT appointment_id FROM busy_intervals WHERE active")
    assert [row["appointment_id"] for row in busy] == [again["id"]]


async def test_the_first_report_of_presence_counts(api: Api, clinic: Clinic, clock: Clock) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, patient)

    async def presence() -> Any:
        return await clinic.fetchrow("SELECT patient_present_at, doctor_present_at FROM appointments")

    response = await api.as_(patient).post(f"/appointments/{appointment_id}/presence")
    assert (response.status_code, response.content) == (204, b"")
    first, absent = await presence()
    assert first is not None
    assert absent is None
    await clock.advance(MINUTE)
    await api.as_(patient).post(f"/appointments/{appointment_id}/presence")
    await api.as_(doctor).post(f"/appointments/{appointment_id}/presence")
    again, doctor_present_at = await presence()
    assert again == first
    assert doctor_present_at - first >= MINUTE


async def test_participants_and_operators_see_an_appointment_and_nobody_else(
    api: Api, clinic: Clinic, database: Database
) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    patient, doctor = await clinic.patient(), await clinic.doctor()
    booked = await book(api, clinic, patient, doctor)
    paths = [f"/appointments/{booked['id']}", f"/appointments/{booked['id']}/session"]

    for caller in (patient, doctor, clinic.operator):
        assert found(await api.as_(caller).get(paths[0])) == booked
        assert found(await api.as_(caller).get(paths[1]))["appointment_id"] == booked["id"]
    strangers = [await clinic.patient(), await clinic.doctor(), elsewhere.operator, await elsewhere.doctor()]
    for path in paths:
        for stranger in strangers:
            problem(await api.as_(stranger).get(path), 404, "APPOINTMENT_NOT_FOUND")
        problem(await api.as_(await clinic.person(Role.SERVICE)).get(path), 403, "ROLE_NOT_ALLOWED")


async def test_everybody_lists_their_own_and_operators_those_of_the_tenant(
    api: Api, clinic: Clinic, database: Database
) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    await elsewhere.appointment(starts_in=DAY)
    patient, doctor = await clinic.patient(), await clinic.doctor()
    confirmed = await clinic.appointment(doctor, patient, starts_in=DAY)
    pending = await clinic.appointment(doctor, await clinic.patient(), starts_in=2 * DAY, status="PENDING")
    other = await clinic.appointment(starts_in=DAY)

    async def listed(caller: Principal, **query: str) -> list[int]:
        page = found(await api.as_(caller).get("/appointments", params=query))
        assert (page["has_more"], page["next_cursor"]) == (False, None)
        assert all(set(item) == FIELDS for item in page["items"])
        return [item["id"] for item in page["items"]]

    assert await listed(patient) == [confirmed]
    assert await listed(doctor) == [pending, confirmed]
    assert await listed(clinic.operator) == [other, pending, confirmed]
    assert await listed(doctor, status="PENDING") == [pending]
    assert await listed(doctor, status="NO_SHOW") == []
    assert await listed(await clinic.doctor()) == []
    problem(await api.as_(await clinic.person(Role.SERVICE)).get("/appointments"), 403, "ROLE_NOT_ALLOWED")


POLL_FIELDS = {
    "appointment_id",
    "status",
    "modality",
    "starts_at",
    "session_id",
    "session_context",
    "session_status",
    "response_deadline",
    "retry_after",
}


async def test_polling_says_how_long_to_wait_and_then_names_the_session(api: Api, clinic: Clinic, clock: Clock) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    booked = await book(api, clinic, patient, doctor, 10 * MINUTE)
    path = f"/appointments/{booked['id']}"

    async def poll() -> Any:
        polled = found(await api.as_(patient).get(f"{path}/session"))
        assert set(polled) == POLL_FIELDS
        assert moment(polled["starts_at"]) == moment(booked["starts_at"])
        return polled

    waiting = await poll()
    assert (waiting["status"], waiting["session_id"], waiting["session_context"]) == ("PENDING", None, None)
    assert (waiting["session_status"], waiting["response_deadline"]) == (None, None)
    assert 590 < waiting["retry_after"] <= 600
    found(await api.as_(doctor).post(f"{path}/confirm"))
    await clock.advance(10 * MINUTE)
    assert (await poll())["retry_after"] == 1

    await clinic.convert()
    started = await poll()
    session_id = started["session_id"]
    assert started["session_context"] == f"text_session:{session_id}"
    assert (started["status"], started["session_status"]) == ("IN_PROGRESS", "waiting")
    assert (started["retry_after"], started["response_deadline"]) == (None, None)
    shown = found(await api.as_(patient).get(path))
    assert (shown["session_id"], shown["session_context"]) == (session_id, f"text_session:{session_id}")

    message = {"client_message_id": "1", "body": "Good morning"}
    found(await api.as_(patient).post(f"/chat/text_session:{session_id}/messages", json=message), 201)
    assert moment((await poll())["response_deadline"])


async def test_polling_a_parked_appointment_waits_an_hour_and_a_cancelled_one_does_not_wait(
    api: Api, clinic: Clinic
) -> None:
    patient = await clinic.patient()
    parked = await clinic.appointment(patient=patient)
    cancelled = await clinic.appointment(patient=patient, status="CANCELLED")
    await clinic.fetch("UPDATE appointments SET parked_at = clock() WHERE id = $1", parked)

    async def retry_after(appointment_id: int) -> Any:
        return found(await api.as_(patient).get(f"/appointments/{appointment_id}/session"))["retry_after"]

    assert await retry_after(parked) == 3600
    assert await retry_after(cancelled) is None
