"""Calls, from the first ring to the last sign of life, on a clock that moves."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from libs.domain.jobs import ConvertDue
from libs.guardrails import Principal
from services.api.realtime import rooms
from tests.api.expect import found, moment, problem
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import Api
from tests.sockets import following

SECOND = timedelta(seconds=1)


async def step(api: Api, caller: Principal, call: LiveSession, verb: str) -> Any:
    return found(await api.as_(caller).post(f"/sessions/{call.context}/{verb}"))


async def refused(api: Api, caller: Principal, call: LiveSession, verb: str, code: str) -> str:
    detail: str = problem(await api.as_(caller).post(f"/sessions/{call.context}/{verb}"), 409, code)["detail"]
    return detail


async def shown(api: Api, call: LiveSession) -> Any:
    return found(await api.as_(call.patient).get(f"/sessions/{call.context}"))


async def answered(api: Api, clinic: Clinic, modality: str = "voice", **options: Any) -> LiveSession:
    call = await clinic.session(modality, **options)
    await step(api, call.patient, call, "ring")
    await step(api, call.doctor, call, "answer")
    return call


async def connected(api: Api, clinic: Clinic, modality: str = "voice", **options: Any) -> LiveSession:
    call = await answered(api, clinic, modality, **options)
    await step(api, call.doctor, call, "connected")
    return call


async def ended(clinic: Clinic, call: LiveSession) -> tuple[str, str, int, str]:
    """How the call ended: status, reason, units, and what became of the appointment."""
    row = await clinic.fetchrow(
        "SELECT s.status, s.end_reason, s.units_charged, a.status AS appointment"
        " FROM sessions s JOIN appointments a ON a.id = s.appointment_id WHERE s.id = $1",
        call.ref.id,
    )
    return tuple(row)


# Ringing


@pytest.mark.parametrize("modality", ["voice", "video"])
async def test_a_ring_gives_the_other_party_ninety_seconds(api: Api, clinic: Clinic, modality: str) -> None:
    call = await clinic.session(modality)
    assert (await shown(api, call))["response_deadline"] is None
    before = await clinic.fetchval("SELECT clock()")
    ringing = await step(api, call.patient, call, "ring")
    after = await clinic.fetchval("SELECT clock()")
    assert ringing["status"] == "connecting"
    assert before <= moment(ringing["response_deadline"]) - 90 * SECOND <= after


async def test_how_long_a_call_rings_is_a_setting(make_api: MakeApi, clinic: Clinic, clock: Clock) -> None:
    api = await make_api(call_ring_timeout_seconds=20)
    call = await clinic.session("voice")
    await step(api, call.patient, call, "ring")
    await clock.advance(20 * SECOND)
    assert [settled.session_id for settled in await clinic.settle()] == [call.ref.id]


async def test_ringing_again_gives_no_more_time_whoever_does(api: Api, clinic: Clinic, clock: Clock) -> None:
    call = await clinic.session("voice")
    first = await step(api, call.patient, call, "ring")
    await clock.advance(60 * SECOND)
    for caller in (call.patient, call.doctor):
        assert await step(api, caller, call, "ring") == first
    # It is still the patient's ring, which the doctor may answer.
    await refused(api, call.patient, call, "answer", "INVALID_TRANSITION")
    await step(api, call.doctor, call, "answer")


async def test_ringing_an_active_call_changes_nothing(api: Api, clinic: Clinic) -> None:
    call = await answered(api, clinic)
    before = await shown(api, call)
    assert await step(api, call.patient, call, "ring") == await shown(api, call) == before


async def test_a_call_that_nobody_answers_is_missed_at_exactly_its_deadline(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    call = await clinic.session("voice")
    deadline = moment((await step(api, call.doctor, call, "ring"))["response_deadline"])
    present = await clinic.fetchval("SELECT clock()")
    await clock.advance(deadline - present - 20 * SECOND)
    assert await clinic.settle() == []

    await clock.advance(20 * SECOND)
    assert [settled.session_id for settled in await clinic.settle()] == [call.ref.id]
    assert await ended(clinic, call) == ("missed", "deadline", 0, "NO_SHOW")
    await clinic.dispatch()
    told = await clinic.fetch("SELECT user_id FROM notifications WHERE kind = 'session_ended'")
    assert {row["user_id"] for row in told} == {call.patient.user_id, call.doctor.user_id}


@pytest.mark.parametrize("verb", ["ring", "answer", "connected", "decline"])
async def test_whoever_comes_too_late_is_refused_and_finds_the_call_missed(
    api: Api, clinic: Clinic, clock: Clock, verb: str
) -> None:
    call = await clinic.session("voice")
    await step(api, call.patient, call, "ring")
    await clock.advance(90 * SECOND)
    await refused(api, call.doctor, call, verb, "SESSION_NOT_ACTIVE")
    assert await ended(clinic, call) == ("missed", "deadline", 0, "NO_SHOW")


async def test_a_call_that_nobody_joins_is_missed_when_its_time_is_over(api: Api, clinic: Clinic, clock: Clock) -> None:
    call = await clinic.session("voice", starts_in=timedelta(0), lasts=30 * MINUTE)
    await clock.advance(29 * MINUTE)
    await step(api, call.patient, call, "ring")
    await clock.advance(MINUTE)
    await refused(api, call.doctor, call, "answer", "SESSION_NOT_ACTIVE")
    assert await ended(clinic, call) == ("missed", "deadline", 0, "NO_SHOW")


# Answering


async def test_the_other_party_answers_and_both_may_say_so_again(api: Api, clinic: Clinic) -> None:
    call = await clinic.session("voice")
    await step(api, call.doctor, call, "ring")
    active = await step(api, call.patient, call, "answer")
    assert active["status"] == "active"
    assert moment(active["activated_at"])
    assert (active["connected_at"], active["remaining_seconds"]) == (None, None)
    for caller in (call.patient, call.doctor):
        assert await step(api, caller, call, "answer") == active


async def test_one_party_alone_cannot_start_a_call(api: Api, clinic: Clinic) -> None:
    call = await clinic.session("voice")
    unrung = await refused(api, call.doctor, call, "answer", "INVALID_TRANSITION")
    assert "connecting" in unrung
    assert "active" in unrung
    await step(api, call.doctor, call, "ring")
    await refused(api, call.doctor, call, "answer", "INVALID_TRANSITION")
    for caller in (call.patient, call.doctor):
        assert "connecting" in await refused(api, caller, call, "connected", "INVALID_TRANSITION")
    assert (await shown(api, call))["status"] == "connecting"


# Being connected


async def test_the_first_sign_of_being_connected_starts_the_allowance_and_no_later_one_does(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    call = await answered(api, clinic, patient=await clinic.patient(units=3))
    first = await step(api, call.patient, call, "connected")
    assert moment(first["connected_at"]) >= moment(first["activated_at"])
    assert first["remaining_seconds"] == 30 * 60
    await clock.advance(MINUTE)
    again = await step(api, call.doctor, call, "connected")
    assert again["connected_at"] == first["connected_at"]
    assert 28 * 60 < again["remaining_seconds"] <= 29 * 60


async def test_of_twenty_first_signs_at_once_one_counts(api: Api, clinic: Clinic) -> None:
    call = await answered(api, clinic)
    signs = await asyncio.gather(*(step(api, caller, call, "connected") for caller in [call.patient, call.doctor] * 10))
    assert len({sign["connected_at"] for sign in signs}) == 1
    assert signs[0]["connected_at"] == (await shown(api, call))["connected_at"]


async def test_whoever_says_so_keeps_the_call_alive_and_whoever_does_not_ends_it(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    call = await connected(api, clinic)
    for caller in (call.patient, call.doctor, call.patient, call.doctor, call.patient):
        await clock.advance(110 * SECOND)
        assert [settled for settled in await clinic.settle() if settled.end_reason] == []
        await step(api, caller, call, "connected")
    # More than 9 minutes are over.
    await clock.advance(122 * SECOND)
    assert [settled.session_id for settled in await clinic.settle()] == [call.ref.id]
    assert await ended(clinic, call) == ("ended", "inactivity", 1, "COMPLETED")


async def test_a_sign_that_comes_too_late_does_not_revive_the_call(api: Api, clinic: Clinic, clock: Clock) -> None:
    call = await connected(api, clinic)
    await clock.advance(122 * SECOND)
    await refused(api, call.patient, call, "connected", "SESSION_NOT_ACTIVE")
    assert await ended(clinic, call) == ("ended", "inactivity", 0, "COMPLETED")


async def test_nothing_but_being_connected_keeps_a_call_alive(api: Api, clinic: Clinic, clock: Clock) -> None:
    call = await connected(api, clinic)
    await clock.advance(MINUTE)
    await step(api, call.patient, call, "ring")
    await step(api, call.patient, call, "answer")
    await shown(api, call)
    await api.as_(call.patient).post(
        f"/chat/{call.context}/messages", json={"client_message_id": "1", "body": "Can you hear me?"}
    )
    await api.runtime.activity.flush()
    await clock.advance(62 * SECOND)
    await clinic.settle()
    assert await ended(clinic, call) == ("ended", "inactivity", 0, "COMPLETED")


async def test_how_long_a_call_lasts_without_a_sign_is_a_setting(
    make_api: MakeApi, clinic: Clinic, clock: Clock
) -> None:
    api = await make_api(call_inactivity_seconds=600)
    call = await connected(api, clinic)
    await clock.advance(580 * SECOND)
    await clinic.settle()
    assert (await shown(api, call))["status"] == "active"
    await clock.advance(22 * SECOND)
    await clinic.settle()
    assert (await shown(api, call))["status"] == "ended"


async def test_a_call_that_was_answered_and_never_connected_ends_free(api: Api, clinic: Clinic, clock: Clock) -> None:
    call = await answered(api, clinic)
    await clock.advance(122 * SECOND)
    await clinic.settle()
    assert await ended(clinic, call) == ("ended", "inactivity", 0, "COMPLETED")
    hung_up = await answered(api, clinic)
    await clock.advance(MINUTE)
    assert (await step(api, hung_up.doctor, hung_up, "end"))["billing"]["units_charged"] == 0


async def test_until_it_is_connected_an_answered_call_ends_with_its_time(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    call = await clinic.session("voice", starts_in=timedelta(0), lasts=30 * MINUTE)
    await clock.advance(29 * MINUTE)
    await step(api, call.patient, call, "ring")
    await step(api, call.doctor, call, "answer")
    # Answered in the last minute, there are two to connect.
    await clock.advance(MINUTE)
    assert [settled.end_reason for settled in await clinic.settle()] == [None]
    await clock.advance(MINUTE)
    await refused(api, call.doctor, call, "connected", "SESSION_NOT_ACTIVE")
    assert await ended(clinic, call) == ("ended", "never_connected", 0, "COMPLETED")


async def test_a_spent_allowance_ends_the_call_without_another_unit(api: Api, clinic: Clinic, clock: Clock) -> None:
    call = await connected(api, clinic, patient=await clinic.patient(units=2))
    for _ in range(19):
        await clock.advance(MINUTE)
        await step(api, call.patient, call, "connected")
        await clinic.settle()
    await clock.advance(MINUTE)
    await refused(api, call.patient, call, "connected", "SESSION_NOT_ACTIVE")
    assert await ended(clinic, call) == ("ended", "allowance_spent", 2, "COMPLETED")
    assert await clinic.fetchval("SELECT min(voice_calls_remaining) FROM subscriptions") == 0


async def test_a_call_without_anything_left_to_pay_it_ends_as_soon_as_it_is_connected(api: Api, clinic: Clinic) -> None:
    call = await answered(api, clinic, patient=await clinic.patient(units=1))
    await clinic.fetch("UPDATE subscriptions SET ends_at = clock() WHERE patient_id = $1", call.patient.user_id)
    assert (await step(api, call.patient, call, "connected"))["remaining_seconds"] == 0
    await clinic.settle()
    assert await ended(clinic, call) == ("ended", "allowance_spent", 0, "COMPLETED")


# Declining


@pytest.mark.parametrize("who", ["patient", "doctor"])
@pytest.mark.parametrize("rung", [True, False])
async def test_either_party_declines_a_call_that_is_not_answered_and_is_free(
    api: Api, clinic: Clinic, who: str, rung: bool
) -> None:
    call = await clinic.session("voice")
    if rung:
        await step(api, call.patient, call, "ring")
    caller = call.patient if who == "patient" else call.doctor
    declined = await step(api, caller, call, "decline")
    assert (declined["status"], declined["end_reason"], declined["units_charged"]) == (
        "declined",
        f"declined_by_{who}",
        0,
    )
    for again in (call.patient, call.doctor):
        assert await step(api, again, call, "decline") == declined
    assert await ended(clinic, call) == ("declined", f"declined_by_{who}", 0, "NO_SHOW")
    assert await clinic.fetchval("SELECT count(*) FROM outbox_events WHERE name = 'session_ended'") == 1


async def test_an_answered_call_is_ended_and_not_declined(api: Api, clinic: Clinic) -> None:
    call = await answered(api, clinic)
    await refused(api, call.patient, call, "decline", "SESSION_NOT_ACTIVE")
    assert (await shown(api, call))["status"] == "active"


async def test_of_an_answer_and_a_decline_at_once_one_wins(api: Api, clinic: Clinic) -> None:
    for _ in range(10):
        call = await clinic.session("voice")
        await step(api, call.patient, call, "ring")
        answer, decline = await asyncio.gather(
            *(api.as_(call.doctor).post(f"/sessions/{call.context}/{verb}") for verb in ("answer", "decline"))
        )
        assert sorted([answer.status_code, decline.status_code]) == [200, 409]
        status = (await shown(api, call))["status"]
        assert status == ("active" if answer.status_code == 200 else "declined")
        await api.as_(call.doctor).post(f"/sessions/{call.context}/end")


@pytest.mark.parametrize("verb", ["ring", "answer", "connected", "decline"])
async def test_what_concerns_calls_is_unknown_to_text_sessions_and_over_with_the_call(
    api: Api, clinic: Clinic, verb: str
) -> None:
    text = await clinic.session()
    for identifier in (text.context, str(text.appointment_id), f"text_session_{text.ref.id}"):
        response = await api.as_(text.patient).post(f"/sessions/{identifier}/{verb}")
        problem(response, 400, "SESSION_CONTEXT_INVALID")
    call = await clinic.session("voice")
    await step(api, call.patient, call, "end")
    await refused(api, call.patient, call, verb, "SESSION_NOT_ACTIVE")


# Being told


async def test_the_other_party_sees_each_step_at_once(
    make_api: MakeApi, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "POLL_SECONDS", 60.0)  # or each would be seen then, told or not
    api = await make_api()
    call = await clinic.session("video")
    async with following(api, call.doctor, call.context) as socket:
        told = []
        for caller, verb in ((call.patient, "ring"), (call.doctor, "answer"), (call.patient, "connected")):
            await step(api, caller, call, verb)
            told.append((await socket.next("session"))["session"])
        assert [session["status"] for session in told] == ["connecting", "active", "active"]
        assert [session["response_deadline"] is None for session in told] == [False, False, False]
        assert [session["connected_at"] is None for session in told] == [True, True, False]
        await step(api, call.doctor, call, "connected")  # is no news
        await step(api, call.patient, call, "end")
        assert (await socket.next("session"))["session"]["status"] == "ended"
        assert await socket.close_code() == 4409


async def test_whoever_follows_a_call_sees_it_declined(api: Api, clinic: Clinic) -> None:
    call = await clinic.session("voice")
    async with following(api, call.patient, call.context) as socket:
        await step(api, call.doctor, call, "decline")
        assert (await socket.next("session"))["session"]["status"] == "declined"
        assert await socket.close_code() == 4409


async def test_an_answer_and_the_first_connection_wake_the_worker(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    rung: list[Any] = []
    monkeypatch.setattr(api.runtime.bell, "ring", rung.append)
    call = await clinic.session("voice")
    for caller, verb, wakes in (
        (call.patient, "ring", []),
        (call.doctor, "answer", [ConvertDue()]),
        (call.doctor, "connected", [ConvertDue()]),
        (call.patient, "connected", []),
    ):
        await step(api, caller, call, verb)
        assert rung == wakes, verb
        rung.clear()
