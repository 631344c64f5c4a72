"""Sessions that a patient starts without an appointment."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from libs.domain.db import Database
from libs.guardrails import Principal
from tests.api.expect import DAY, faults, found, moment, problem
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.running import Api
from tests.sockets import following


async def post(api: Api, patient: Principal, doctor: Principal, modality: str = "text", **more: Any) -> Any:
    headers = more.pop("headers", {})
    wanted = {"doctor_id": doctor.user_id, "modality": modality} | more
    return await api.as_(patient).post("/sessions", json=wanted, headers=headers)


async def started(api: Api, patient: Principal, doctor: Principal, modality: str = "text", **more: Any) -> Any:
    return found(await post(api, patient, doctor, modality, **more), 201)


@pytest.mark.parametrize(
    ("modality", "kind", "status"),
    [("text", "text", "waiting"), ("voice", "call", "connecting"), ("video", "call", "connecting")],
)
async def test_a_patient_starts_a_session_and_both_parties_are_told(
    api: Api, clinic: Clinic, modality: str, kind: str, status: str
) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    session = await started(api, patient, doctor, modality, reason="a cough")
    assert session["context"] == f"{kind}_session:{session['id']}"
    assert moment(session["created_at"])
    known: dict[str, Any] = {
        "kind": kind,
        "modality": modality,
        "status": status,
        "source": "DIRECT",
        "appointment_id": None,
    }
    known |= {"patient_id": patient.user_id, "doctor_id": doctor.user_id, "units_charged": 0}
    assert session.items() >= known.items()
    for caller in (patient, doctor, clinic.operator):
        assert found(await api.as_(caller).get(f"/sessions/{session['context']}")) == session
    assert await clinic.fetchval("SELECT reason FROM sessions") == "a cough"

    await clinic.dispatch()
    for party in (patient, doctor):
        [told] = found(await api.as_(party).get("/notifications"))["items"]
        assert (told["kind"], told["appointment_id"]) == ("session_started", None)
        assert told["session_context"] == session["context"]


async def test_its_conversation_is_that_of_both(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    session = await started(api, patient, doctor)
    chat = f"/chat/{session['context']}/messages"
    async with following(api, doctor, session["context"]) as socket:
        found(await api.as_(patient).post(chat, json={"client_message_id": "1", "body": "Are you free?"}), 201)
        assert (await socket.next("message"))["message"]["seq"] == 1
    found(await api.as_(doctor).post(chat, json={"client_message_id": "2", "body": "I am."}), 201)
    assert found(await api.as_(patient).get(f"/sessions/{session['context']}"))["status"] == "active"
    ended = found(await api.as_(patient).post(f"/sessions/{session['context']}/end"))
    assert (ended["billing"]["units_charged"], ended["session"]["status"]) == (1, "ended")


@pytest.mark.parametrize(("modality", "status"), [("text", "expired"), ("voice", "missed")])
async def test_a_session_that_the_doctor_does_not_take_up_is_over_after_a_day(
    api: Api, clinic: Clinic, clock: Clock, modality: str, status: str
) -> None:
    session = await started(api, await clinic.patient(), await clinic.doctor(), modality)
    await clock.advance(DAY - MINUTE)
    assert await clinic.settle() == []
    await clock.advance(MINUTE)
    assert [settled.status for settled in await clinic.settle()] == [status]
    shown = found(await api.as_(clinic.operator).get(f"/sessions/{session['context']}"))
    assert (shown["status"], shown["end_reason"], shown["units_charged"]) == (status, "deadline", 0)


async def test_only_an_active_doctor_of_the_clinic_can_be_turned_to(
    api: Api, clinic: Clinic, database: Database
) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    patient = await clinic.patient()
    for nobody in (
        await elsewhere.doctor(),
        await clinic.doctor(active=False),
        await clinic.patient(),
        clinic.operator,
        Principal(2**63 - 1, clinic.tenant_id, patient.role),
    ):
        assert faults(await post(api, patient, nobody)) == ["/doctor_id"]
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == 0


async def test_a_session_needs_a_modality_we_know_and_bounded_text(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    assert faults(await post(api, patient, doctor, "telepathy")) == ["/modality"]
    assert faults(await post(api, patient, doctor, reason="x" * 501)) == ["/reason"]


async def test_a_session_needs_units_of_its_modality_in_a_subscription_that_runs(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    doctor = await clinic.doctor()
    for patient in (await clinic.patient(units=None), await clinic.patient(units=0)):
        problem(await post(api, patient, doctor), 402, "NO_SESSIONS_REMAINING")
    only_text = await clinic.patient(units=0)
    await clinic.fetch(
        """
        INSERT INTO subscriptions (tenant_id, patient_id, plan, starts_at, ends_at, text_sessions_remaining,
                                   voice_calls_remaining, video_calls_remaining)
        SELECT tenant_id, patient_id, plan, starts_at, ends_at, 1, 0, 0 FROM subscriptions WHERE patient_id = $1
        """,
        only_text.user_id,
    )
    problem(await post(api, only_text, doctor, "voice"), 402, "NO_SESSIONS_REMAINING")
    await clock.advance(31 * DAY)
    problem(await post(api, only_text, doctor), 402, "NO_SESSIONS_REMAINING")
    await clock.advance(-31 * DAY)
    await started(api, only_text, doctor)


async def test_whoever_is_in_a_live_session_is_not_free_until_it_ends(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    session = await started(api, patient, doctor)
    problem(await post(api, patient, await clinic.doctor()), 409, "SESSION_CONFLICT")
    problem(await post(api, await clinic.patient(), doctor, "voice"), 409, "SESSION_CONFLICT")
    assert await clinic.fetchval("SELECT count(*) FROM outbox_events") == 1
    await api.as_(doctor).post(f"/sessions/{session['context']}/end")
    await started(api, await clinic.patient(), doctor)
    await started(api, patient, await clinic.doctor())


@pytest.mark.parametrize(
    ("starts_in", "status", "free"),
    [
        (11 * MINUTE, "CONFIRMED", True),
        (10 * MINUTE, "CONFIRMED", False),
        (timedelta(0), "CONFIRMED", False),
        (-20 * MINUTE, "CONFIRMED", False),
        (5 * MINUTE, "PENDING", True),
        (5 * MINUTE, "CANCELLED", True),
    ],
)
async def test_a_doctor_starts_nothing_in_the_ten_minutes_before_an_appointment(
    api: Api, clinic: Clinic, starts_in: timedelta, status: str, free: bool
) -> None:
    doctor = await clinic.doctor()
    await clinic.appointment(await clinic.doctor(), starts_in=5 * MINUTE)
    await clinic.appointment(doctor, starts_in=starts_in, status=status)
    response = await post(api, await clinic.patient(), doctor)
    if free:
        found(response, 201)
    else:
        assert "appointment" in problem(response, 409, "SESSION_CONFLICT")["detail"]


async def test_the_appointment_that_follows_a_direct_session_begins_once_that_ends(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    doctor = await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, starts_in=15 * MINUTE)
    session = await started(api, await clinic.patient(), doctor)
    await clock.advance(15 * MINUTE)
    assert (await clinic.convert())[appointment_id].result == "failed"
    await api.as_(doctor).post(f"/sessions/{session['context']}/end")
    assert (await clinic.convert())[appointment_id].result == "created"


async def test_started_again_with_its_key_it_is_the_same_session(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    key = {"Idempotency-Key": "one"}
    session = await started(api, patient, doctor, headers=key)
    again = await post(api, patient, doctor, headers=key)
    assert (found(again, 201), again.headers["Idempotent-Replayed"]) == (session, "true")
    other = await post(api, patient, doctor, "voice", headers=key)
    problem(other, 422, "IDEMPOTENCY_KEY_REUSED")
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == 1


@pytest.mark.parametrize("shared", ["patient", "doctor", "both"])
async def test_of_twenty_starts_at_once_one_succeeds(api: Api, clinic: Clinic, shared: str) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    pairs = [
        (
            await clinic.patient() if shared == "doctor" else patient,
            await clinic.doctor() if shared == "patient" else doctor,
        )
        for _ in range(20)
    ]
    answers = await asyncio.gather(*(post(api, *pair) for pair in pairs))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"SESSION_CONFLICT"}
    for table in ("sessions", "conversations", "outbox_events"):
        assert await clinic.fetchval(f"SELECT count(*) FROM {table}") == 1
    assert await clinic.fetchval("SELECT count(*) FROM participants") == 2


async def test_a_start_that_races_with_the_conversion_leaves_one_live_session_of_a_doctor(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    doctors = [await clinic.doctor() for _ in range(10)]
    patients = [await clinic.patient() for _ in doctors]
    for doctor in doctors:
        await clinic.appointment(doctor, starts_in=11 * MINUTE)
    starts = [asyncio.create_task(post(api, *pair)) for pair in zip(patients, doctors, strict=True)]
    await clock.advance(12 * MINUTE)
    outcomes = await clinic.convert()
    answers = await asyncio.gather(*starts)
    assert {answer.status_code for answer in answers} <= {201, 409}
    created = sum(outcome.result == "created" for outcome in outcomes.values())
    assert sum(answer.status_code == 201 for answer in answers) + created == len(doctors)
    assert await clinic.fetchval("SELECT count(DISTINCT doctor_id) FROM sessions") == len(doctors)
