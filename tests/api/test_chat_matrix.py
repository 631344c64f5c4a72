"""Who may chat with which identifier: every identifier × flag × state of the session, over HTTP."""

from datetime import timedelta
from typing import Any, Final

import pytest

from libs.guardrails import Principal
from tests.api.expect import DAY, found, problem, strangers
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import Api

SESSION_STATES: Final = ("waiting", "active", "ended", "expired")
LIVE: Final = ("waiting", "active")
WITHOUT_SESSION: Final = ("PENDING", "CONFIRMED", "RESCHEDULE_PROPOSED", "CANCELLED", "EXPIRED", "COMPLETED", "NO_SHOW")


async def send(api: Api, caller: Principal, identifier: object, text: str = "Hello") -> Any:
    message = {"client_message_id": f"{identifier} {text}", "body": text}
    return await api.as_(caller).post(f"/chat/{identifier}/messages", json=message)


async def read(api: Api, caller: Principal, identifier: object) -> Any:
    return await api.as_(caller).get(f"/chat/{identifier}/messages")


async def session_in(api: Api, clinic: Clinic, clock: Clock, state: str) -> LiveSession:
    """A session that came into `state` the way sessions do."""
    live = await clinic.session()
    if state == "active":
        found(await send(api, live.doctor, live.context, "Good morning"), 201)
    elif state == "ended":
        found(await api.as_(live.doctor).post(f"/sessions/{live.context}/end"))
    elif state == "expired":
        await clock.advance(timedelta(days=1))
    return live


@pytest.mark.parametrize("enforced", [True, False])
@pytest.mark.parametrize("state", SESSION_STATES)
async def test_chat_with_a_session(make_api: MakeApi, clinic: Clinic, clock: Clock, enforced: bool, state: str) -> None:
    api = await make_api(ENFORCE_SESSION_GATED_CHAT=enforced)
    live = await session_in(api, clinic, clock, state)
    sample = api.runtime.metrics.sample
    patient, context, appointment_id = live.patient, live.context, live.appointment_id

    for identifier in (context, f"text_session_{live.ref.id}"):
        if state in LIVE:
            found(await send(api, patient, identifier), 201)
        else:
            problem(await send(api, patient, identifier), 409, "SESSION_NOT_ACTIVE")
        found(await read(api, patient, identifier))
    assert sample("legacy_identifier_total") == 2

    requested = {name: sample("chat_requests_total", operation=name) for name in ("send_message", "get_messages")}
    by_appointment = {
        "send_message": await send(api, patient, appointment_id, "By appointment"),
        "get_messages": await read(api, patient, appointment_id),
    }
    for operation, response in by_appointment.items():
        assert sample("chat_requests_total", operation=operation) == requested[operation] + 1
        blocked = sample("chat_blocked_session_context_required_total", operation=operation)
        warned = sample(
            "guard_verdicts_total", operation=operation, verdict="warned", reason="SESSION_CONTEXT_REQUIRED"
        )
        if enforced:
            body = problem(response, 400, "SESSION_CONTEXT_REQUIRED")
            assert (body["appointment_id"], body["session_id"]) == (appointment_id, live.ref.id)
            assert body["session_context"] == context
            href = f"/api/v1/appointments/{appointment_id}/session"
            assert body["next_action"] == {"method": "GET", "href": href}
            assert (blocked, warned) == (1, 0)
        elif operation == "send_message" and state not in LIVE:
            problem(response, 409, "SESSION_NOT_ACTIVE")
            assert (blocked, warned) == (0, 0)
        else:
            found(response, 201 if operation == "send_message" else 200)
            assert (blocked, warned) == (0, 1)

    bodies = [item["body"] for item in found(await read(api, patient, context))["items"]]
    assert ("By appointment" in bodies) == (not enforced and state in LIVE)


@pytest.mark.parametrize("allowed", [True, False])
async def test_chat_by_an_appointment_that_has_no_session(make_api: MakeApi, clinic: Clinic, allowed: bool) -> None:
    api = await make_api(ENFORCE_SESSION_GATED_CHAT=True, ALLOW_LEGACY_APPOINTMENT_CHAT=allowed)
    sample = api.runtime.metrics.sample
    patient = await clinic.patient()
    for status in (*WITHOUT_SESSION, "parked"):
        stored = "CONFIRMED" if status == "parked" else status
        appointment_id = await clinic.appointment(patient=patient, status=stored, starts_in=10 * MINUTE)
        if status == "parked":
            await clinic.fetch("UPDATE appointments SET parked_at = clock() WHERE id = $1", appointment_id)
        for expected, response in (
            (201, await send(api, patient, appointment_id)),
            (200, await read(api, patient, appointment_id)),
        ):
            if status in ("CANCELLED", "EXPIRED", "COMPLETED", "NO_SHOW"):
                problem(response, 409, "SESSION_NOT_ACTIVE")
            elif allowed and stored == "CONFIRMED":
                found(response, expected)
            else:
                body = problem(response, 403, "SESSION_NOT_READY")
                assert body["appointment_id"] == appointment_id
                wait = body["retry_after"]
                assert wait == 3600 if status == "parked" else 590 < wait <= 600
                href = f"/api/v1/appointments/{appointment_id}/session"
                assert body["next_action"] == {"method": "GET", "href": href}
    warned = sample("guard_verdicts_total", operation="send_message", verdict="warned", reason="SESSION_NOT_READY")
    assert warned == (2 if allowed else 0)
    assert await clinic.fetchval("SELECT count(*) FROM messages") == (2 if allowed else 0)
    # Chat alone starts nothing live.
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == 0


async def test_who_waits_for_a_due_appointment_asks_again_after_a_second(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=-10 * MINUTE)
    assert problem(await send(api, patient, appointment_id), 403, "SESSION_NOT_READY")["retry_after"] == 1


async def test_what_was_said_before_the_session_is_part_of_it(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(ALLOW_LEGACY_APPOINTMENT_CHAT=True)
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, patient)
    found(await send(api, patient, appointment_id, "one"), 201)
    found(await send(api, doctor, appointment_id, "two"), 201)
    await clinic.convert()
    context = found(await api.as_(patient).get(f"/appointments/{appointment_id}/session"))["session_context"]
    assert found(await send(api, patient, context, "three"), 201)["seq"] == 3
    assert found(await send(api, doctor, appointment_id, "four"), 201)["seq"] == 4
    items = found(await read(api, doctor, context))["items"]
    assert [(item["seq"], item["body"]) for item in items] == [(1, "one"), (2, "two"), (3, "three"), (4, "four")]


async def test_chat_is_hidden_from_strangers_and_closed_to_operators(api: Api, clinic: Clinic) -> None:
    live, outsiders = await clinic.session(), await strangers(clinic)
    for identifier, code in ((live.context, "SESSION_NOT_FOUND"), (live.appointment_id, "APPOINTMENT_NOT_FOUND")):
        for stranger in outsiders:
            problem(await send(api, stranger, identifier), 404, code)
            problem(await read(api, stranger, identifier), 404, code)
        problem(await send(api, clinic.operator, identifier), 403, "ROLE_NOT_ALLOWED")
    problem(await send(api, live.patient, f"text_session:{2**63 - 1}"), 404, "SESSION_NOT_FOUND")
    problem(await send(api, live.patient, 2**63 - 1), 404, "APPOINTMENT_NOT_FOUND")
    problem(await send(api, live.patient, f"call_session:{live.ref.id}"), 404, "SESSION_NOT_FOUND")
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 0


async def test_refusals_come_in_the_promised_order(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    patient, stranger = api.as_(live.patient), api.as_(await clinic.patient())
    json = {"content-type": "application/json"}
    sound = f"/chat/{live.context}/messages"

    # Token, size, syntax, identifier, schema, taking part, role, flags: each with everything after it wrong too.
    anonymous = await api.anonymous.post("/api/v1/chat/nonsense/messages", content=b"x" * 70_000, headers=json)
    problem(anonymous, 401, "UNAUTHENTICATED")
    problem(
        await patient.post("/chat/nonsense/messages", content=b"x" * 70_000, headers=json), 413, "PAYLOAD_TOO_LARGE"
    )
    problem(await patient.post("/chat/nonsense/messages", content=b"x", headers=json), 400, "VALIDATION_FAILED")
    problem(await patient.post("/chat/nonsense/messages", json={}), 400, "SESSION_CONTEXT_INVALID")
    problem(await stranger.post(sound, json={}), 422, "VALIDATION_FAILED")
    problem(await send(api, clinic.operator, live.appointment_id), 403, "ROLE_NOT_ALLOWED")
    found(await patient.post(f"/sessions/{live.context}/end"))
    problem(await send(api, live.patient, live.appointment_id), 400, "SESSION_CONTEXT_REQUIRED")
    problem(await send(api, live.patient, live.context), 409, "SESSION_NOT_ACTIVE")


async def test_an_appointment_far_ahead_is_not_ready_either(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=30 * DAY)
    wait = problem(await read(api, patient, appointment_id), 403, "SESSION_NOT_READY")["retry_after"]
    assert wait == pytest.approx(30 * 86400, abs=10)
