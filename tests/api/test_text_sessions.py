"""Text sessions from the first message to the end, on a clock that moves."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from libs.guardrails import Principal, SessionKind, SessionRef, SessionStatus
from tests.api.expect import found, moment, problem
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi, Urls
from tests.processes import until
from tests.running import Api, running_api
from tests.sockets import following

SECOND = timedelta(seconds=1)


async def write(api: Api, caller: Principal, live: LiveSession, number: int = 1) -> Any:
    new = {"client_message_id": f"{caller.role} {number}", "body": "Hello"}
    return await api.as_(caller).post(f"/chat/{live.context}/messages", json=new)


async def active(api: Api, clinic: Clinic, **options: Any) -> LiveSession:
    live = await clinic.session(**options)
    found(await write(api, live.doctor, live), 201)
    return live


async def shown(api: Api, clinic: Clinic, live: LiveSession) -> Any:
    return found(await api.as_(clinic.operator).get(f"/sessions/{live.context}"))


async def ended(clinic: Clinic, live: LiveSession) -> tuple[str, str, int, str]:
    row = await clinic.fetchrow(
        "SELECT s.status, s.end_reason, s.units_charged, a.status AS appointment"
        " FROM sessions s JOIN appointments a ON a.id = s.appointment_id WHERE s.id = $1",
        live.ref.id,
    )
    return tuple(row)


# Waiting


async def test_the_doctor_has_five_minutes_from_the_first_message_of_the_patient(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await clinic.session()
    await clock.advance(10 * MINUTE)
    found(await write(api, live.patient, live), 201)
    deadline = (await shown(api, clinic, live))["response_deadline"]
    assert moment(deadline) > await clinic.fetchval("SELECT clock() + interval '4 minutes 59 seconds'")
    await clock.advance(4 * MINUTE)
    found(await write(api, live.patient, live, 2), 201)
    assert (await shown(api, clinic, live))["response_deadline"] == deadline
    assert await clinic.settle() == []
    found(await write(api, live.doctor, live), 201)
    assert (await shown(api, clinic, live))["status"] == "active"


async def test_a_doctor_who_comes_on_time_is_not_late_because_the_session_started_early(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, patient, starts_in=5 * MINUTE - SECOND)
    await clinic.triggers().activate_booked_appointments()
    session_id = await clinic.fetchval("SELECT session_id FROM appointments WHERE id = $1", appointment_id)
    live = LiveSession(SessionRef(SessionKind.TEXT, session_id), appointment_id, patient, doctor)
    found(await write(api, patient, live), 201)
    assert await clinic.fetchval(
        "SELECT s.response_deadline - a.starts_at FROM sessions s JOIN appointments a ON a.session_id = s.id"
    ) == timedelta(minutes=5)
    await clock.advance(5 * MINUTE)
    assert await clinic.settle() == []
    found(await write(api, doctor, live), 201)
    assert (await shown(api, clinic, live))["status"] == "active"


async def test_at_exactly_the_deadline_the_doctor_is_refused_and_the_session_expired(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await clinic.session()
    found(await write(api, live.patient, live), 201)
    await clock.advance(5 * MINUTE)
    problem(await write(api, live.doctor, live), 409, "SESSION_NOT_ACTIVE")
    assert await ended(clinic, live) == ("expired", "deadline", 0, "NO_SHOW")
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 1


# Being idle


async def test_a_session_in_which_nobody_does_anything_ends_after_a_quarter_of_an_hour(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await active(api, clinic)
    await clock.advance(14 * MINUTE)
    await clinic.settle()
    assert (await shown(api, clinic, live))["status"] == "active"
    await clock.advance(MINUTE + 2 * SECOND)  # what was done of late may not be written yet
    await clinic.settle()
    # The unit that was full is paid for, and none for the end.
    assert await ended(clinic, live) == ("ended", "inactivity", 1, "COMPLETED")
    await clinic.dispatch()
    told = await clinic.fetch("SELECT user_id FROM notifications WHERE kind = 'session_ended'")
    assert {row["user_id"] for row in told} == {live.patient.user_id, live.doctor.user_id}


async def test_a_message_that_comes_too_late_is_refused_and_finds_the_session_ended(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await active(api, clinic)
    await clock.advance(15 * MINUTE + 2 * SECOND)
    problem(await write(api, live.patient, live), 409, "SESSION_NOT_ACTIVE")
    assert await ended(clinic, live) == ("ended", "inactivity", 1, "COMPLETED")


async def test_how_long_a_session_may_be_idle_is_a_setting(make_api: MakeApi, clinic: Clinic, clock: Clock) -> None:
    api = await make_api(text_inactivity_seconds=60)
    live = await active(api, clinic)
    await clock.advance(30 * SECOND)
    found(await write(api, live.patient, live), 201)
    await api.runtime.activity.flush()
    await clock.advance(45 * SECOND)
    await clinic.settle()
    assert (await shown(api, clinic, live))["status"] == "active"
    await clock.advance(17 * SECOND)
    await clinic.settle()
    assert (await shown(api, clinic, live))["status"] == "ended"


REQUESTS = {
    "a message": ("POST", "messages", {"client_message_id": "1", "body": "Still there?"}),
    "typing": ("PUT", "typing", None),
    "reading": ("GET", "messages", None),
    "a mark": ("PUT", "read", {"seq": 1}),
}


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("who", ["patient", "doctor"])
async def test_whatever_a_party_does_keeps_the_session_alive(
    api: Api, clinic: Clinic, clock: Clock, what: str, who: str
) -> None:
    live = await active(api, clinic)
    method, path, body = REQUESTS[what]
    await clock.advance(14 * MINUTE)
    caller = live.patient if who == "patient" else live.doctor
    response = await api.as_(caller).request(method, f"/chat/{live.context}/{path}", json=body)
    assert response.status_code < 300
    # Within a second it is written by itself.
    await until(lambda: clinic.fetchval("SELECT idle_at > clock() + interval '14 minutes' FROM sessions"))
    await clock.advance(14 * MINUTE)
    await clinic.settle()
    assert (await shown(api, clinic, live))["status"] == "active"


async def test_a_frame_keeps_the_session_alive_and_a_ping_does_not(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await active(api, clinic)
    async with following(api, live.patient, live.context) as socket:
        await clock.advance(14 * MINUTE)
        await socket.send(type="read", seq=1)
        await socket.next("read")
        await api.runtime.activity.flush()
        await clock.advance(14 * MINUTE)
        await clinic.settle()
        assert (await shown(api, clinic, live))["status"] == "active"
        await socket.send(type="ping")
        await socket.next("pong")
        await api.runtime.activity.flush()
        await clock.advance(2 * MINUTE)
        await clinic.settle()
        assert (await socket.next("session"))["session"]["end_reason"] == "inactivity"
        assert await socket.close_code() == 4409


async def test_neither_strangers_nor_operators_nor_refusals_keep_a_session_alive(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await active(api, clinic)
    idle_at = await clinic.fetchval("SELECT idle_at FROM sessions")
    await clock.advance(14 * MINUTE)
    stranger = await clinic.patient()
    problem(await write(api, stranger, live), 404, "SESSION_NOT_FOUND")
    found(await api.as_(clinic.operator).get(f"/chat/{live.context}/messages"))
    by_appointment = f"/chat/{live.appointment_id}/messages"
    problem(await api.as_(live.patient).get(by_appointment), 400, "SESSION_CONTEXT_REQUIRED")
    await api.runtime.activity.flush()
    assert await clinic.fetchval("SELECT idle_at FROM sessions") == idle_at


async def test_what_is_read_after_a_session_was_forgotten_does_not_revive_it(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await active(api, clinic)
    await clock.advance(15 * MINUTE + 2 * SECOND)
    found(await api.as_(live.patient).get(f"/chat/{live.context}/messages"))
    await api.runtime.activity.flush()
    await clinic.settle()
    assert await ended(clinic, live) == ("ended", "inactivity", 1, "COMPLETED")


async def test_activity_in_a_session_that_somebody_holds_is_written_the_next_time(api: Api, clinic: Clinic) -> None:
    held, free = await active(api, clinic), await active(api, clinic)
    await clinic.fetch("UPDATE sessions SET idle_at = clock() + interval '1 minute'")
    for live in (held, free):
        found(await api.as_(live.patient).get(f"/sessions/{live.context}"))

    async def kept() -> set[int]:
        rows = await clinic.fetch("SELECT id FROM sessions WHERE idle_at > clock() + interval '14 minutes'")
        return {row["id"] for row in rows}

    async with clinic.database.autocommit() as connection, connection.transaction():
        await connection.execute("SELECT FROM sessions WHERE id = $1 FOR UPDATE", held.ref.id)
        await api.runtime.activity.flush()
        assert await kept() == {free.ref.id}
    await api.runtime.activity.flush()
    assert await kept() == {held.ref.id, free.ref.id}


async def test_what_was_done_last_is_written_before_the_process_ends(urls: Urls, clinic: Clinic) -> None:
    async with running_api(urls.app, urls.redis) as api:
        live = await active(api, clinic)
        await clinic.fetch("UPDATE sessions SET idle_at = clock() + interval '1 minute'")
        found(await api.as_(live.patient).get(f"/sessions/{live.context}"))
    assert await clinic.fetchval("SELECT idle_at > clock() + interval '14 minutes' FROM sessions")


# The end of the allowance


async def test_both_parties_are_warned_once_one_minute_before_the_allowance_is_spent(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await active(api, clinic, patient=await clinic.patient(units=1))
    await clinic.settle()
    await clock.advance(8 * MINUTE)
    await clinic.settle()
    await clinic.dispatch()
    warned = "SELECT user_id FROM notifications WHERE kind = 'session_ending_soon'"
    assert await clinic.fetch(warned) == []
    async with following(api, live.patient, live.context) as one, following(api, live.doctor, live.context) as other:
        await clock.advance(MINUTE)
        clinic.bell.conversations.clear()
        await clinic.settle()
        assert clinic.bell.conversations == [await clinic.fetchval("SELECT id FROM conversations")]
        for socket in (one, other):
            session = (await socket.next("session"))["session"]
            assert session["status"] == "active"
            assert 30 <= session["remaining_seconds"] <= 60
        found(await api.as_(live.doctor).post(f"/sessions/{live.context}/deductions"))
        await clinic.dispatch()
        told = [row["user_id"] for row in await clinic.fetch(warned)]
        assert sorted(told) == sorted([live.patient.user_id, live.doctor.user_id])
        [first, *_] = found(await api.as_(live.patient).get("/notifications"))["items"]
        assert (first["kind"], first["session_context"]) == ("session_ending_soon", live.context)

        await clock.advance(MINUTE)
        await clinic.settle()
        assert (await one.next("session"))["session"]["end_reason"] == "allowance_spent"
        assert [await socket.close_code() for socket in (one, other)] == [4409, 4409]
    assert await ended(clinic, live) == ("ended", "allowance_spent", 1, "COMPLETED")


async def test_a_message_after_the_allowance_is_spent_is_refused_and_finds_the_session_ended(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await active(api, clinic, patient=await clinic.patient(units=1))
    await clock.advance(10 * MINUTE)
    problem(await write(api, live.patient, live), 409, "SESSION_NOT_ACTIVE")
    assert await ended(clinic, live) == ("ended", "allowance_spent", 1, "COMPLETED")


# Following each other, and at once


async def test_back_to_back_appointments_of_a_doctor_follow_each_other_in_one_beat(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    doctor = await clinic.doctor()
    first = await clinic.session(doctor=doctor, starts_in=timedelta(0), lasts=15 * MINUTE)
    second = await clinic.appointment(doctor, starts_in=15 * MINUTE, lasts=15 * MINUTE)
    await clock.advance(15 * MINUTE)
    await clinic.settle()
    assert (await clinic.convert())[second].result == "created"
    assert await ended(clinic, first) == ("expired", "deadline", 0, "NO_SHOW")


async def test_an_end_and_ticks_at_once_charge_each_unit_once(api: Api, clinic: Clinic, clock: Clock) -> None:
    for _ in range(5):
        live = await active(api, clinic)
        await clock.advance(12 * MINUTE)
        ends, ticks = (
            [api.as_(caller).post(f"/sessions/{live.context}/end") for caller in (live.patient, live.doctor)],
            [clinic.settle() for _ in range(4)],
        )
        answers, _ = await asyncio.gather(asyncio.gather(*ends), asyncio.gather(*ticks))
        assert sorted(found(answer)["already_ended"] for answer in answers) == [False, True]
        assert await ended(clinic, live) == ("ended", (await shown(api, clinic, live))["end_reason"], 2, "COMPLETED")
        units = "SELECT array_agg(unit ORDER BY unit) FROM ledger_transactions WHERE session_id = $1"
        assert await clinic.fetchval(units, live.ref.id) == [1, 2]


async def test_an_end_in_the_middle_of_twenty_writers_counts_all_messages_before_it(
    make_api: MakeApi, clinic: Clinic
) -> None:
    api = await make_api(chat_messages_per_minute=1_000_000)
    live = await active(api, clinic)
    writing = [write(api, live.patient, live, number) for number in range(2, 22)]
    ending = api.as_(live.doctor).post(f"/sessions/{live.context}/end")
    *written, _ = await asyncio.gather(*writing[:10], ending, *writing[10:])
    numbers = [row["seq"] for row in await clinic.fetch("SELECT seq FROM messages ORDER BY seq")]
    stored = 1 + sum(answer.status_code == 201 for answer in written)
    assert numbers == list(range(1, len(numbers) + 1))
    assert await clinic.fetchval("SELECT ended_seq FROM sessions") == len(numbers)
    assert stored <= len(numbers)


async def test_of_an_answer_at_the_deadline_and_the_beat_one_wins(api: Api, clinic: Clinic, clock: Clock) -> None:
    for _ in range(5):
        live = await clinic.session()
        found(await write(api, live.patient, live), 201)
        await clock.advance(5 * MINUTE)
        answer, settled = await asyncio.gather(write(api, live.doctor, live), clinic.settle())
        problem(answer, 409, "SESSION_NOT_ACTIVE")
        assert await ended(clinic, live) == ("expired", "deadline", 0, "NO_SHOW")
        assert all(each.status is SessionStatus.EXPIRED for each in settled)
    assert await clinic.fetchval("SELECT count(*) FROM outbox_events WHERE name = 'session_ended'") == 5
