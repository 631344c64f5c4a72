"""Who may do what with whose things: every operation × everybody, each cell with its expected answer.

A thing is what the path names, or the body: an appointment, a session, a user. Its patient and its doctor take
part in it; everybody else of the tenant is another, and everybody of another tenant is foreign.
"""

from dataclasses import replace
from typing import Any, Final, get_args

import jwt
import pytest
from fastapi.routing import iter_route_contexts
from httpx2 import Response

from libs.guardrails import Principal, Role
from services.api.realtime.frames import ClientFrame
from services.api.realtime.rooms import Rooms
from tests.api.calls import Call, Owner, calls_of, rows
from tests.api.expect import problem
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.running import SECRET, Api, token_of
from tests.sockets import following, opened

# `own` is a list of what the caller takes part in, and of nothing else. The call to be answered is one by the doctor.
EXPECTED: Final = """
                      takes part                another                  of another tenant
                      patient  doctor operator  patient  doctor service  patient  doctor operator service
get_me                    200     200      200      200     200     403      200     200      200     403
list_doctors              own     own      own      own     own     403      own     own      own     403
list_notifications        own     own      own      own     own     403      own     own      own     403

book_appointment          201     403      201      422     403     403      422     403      422     403
list_appointments         own     own      own      own     own     403      own     own      own     403
get_appointment           200     200      200      404     404     403      404     404      404     403
confirm_appointment       403     200      200      404     404     403      404     404      404     403
cancel_appointment        200     200      200      404     404     403      404     404      404     403
propose_new_time          403     200      200      404     404     403      404     404      404     403
accept_new_time           200     403      403      404     404     403      404     404      404     403
reject_new_time           200     403      403      404     404     403      404     404      404     403
report_presence           204     204      403      404     404     403      404     404      404     403
poll_session              200     200      200      404     404     403      404     404      404     403

list_sessions             own     own      own      own     own     403      own     own      own     403
get_session               200     200      200      404     404     404      404     404      404     404
start_session             201     403      403      201     403     403      422     403      403     403
ring_call                 200     200      403      404     404     404      404     404      404     404
answer_call               200     409      403      404     404     404      404     404      404     404
connect_call              200     200      403      404     404     404      404     404      404     404
decline_call              200     200      403      404     404     404      404     404      404     404
end_session               200     200      200      404     404     404      404     404      404     404

deduct_interval           200     200      200      404     404     404      404     404      404     404
end_session_by_appointment 200    200      200      404     404     404      404     404      404     404
process_payment           200     200      200      404     404     404      404     404      404     404
process_deduction         200     200      200      404     404     404      404     404      404     404
get_session_billing       200     200      200      404     404     404      404     404      404     404
get_balance               200     200      403      200     200     403      200     200      403     403
create_refund             403     403      201      403     403     403      403     403      404     403

send_message              201     201      403      404     404     404      404     404      404     404
get_messages              200     200      200      404     404     404      404     404      404     404
reply_to_message          201     201      403      404     404     404      404     404      404     404
add_reaction              204     204      403      404     404     404      404     404      404     404
remove_reaction           204     204      403      404     404     404      404     404      404     404
start_typing              204     204      403      404     404     404      404     404      404     404
stop_typing               204     204      403      404     404     404      404     404      404     404
mark_as_read              200     200      403      404     404     404      404     404      404     404

create_socket_ticket      201     201      403      404     404     403      404     404      403     403
follow_conversation       101     101      403      404     404     404      404     404      404     404

create_user               403     403      201      403     403     403      403     403      201     403
change_user               403     403      200      403     403     403      403     403      404     403
create_subscription       403     403      201      403     403     403      403     403      422     403
get_conversions           403     403      200      403     403     403      403     403      200     403
list_flags                403     403      200      403     403     403      403     403      200     403
set_flag                  403     403      200      403     403     403      403     403      200     403
get_rollout               403     403      200      403     403     403      403     403      200     403
list_decisions            403     403      200      403     403     403      403     403      200     403
list_audit_log            403     403      200      403     403     403      403     403      200     403
list_alerts               403     403      200      403     403     403      403     403      200     403
list_chat_alerts          403     403      200      403     403     403      403     403      200     403
list_dead_deliveries      403     403      200      403     403     403      403     403      200     403
replay_dead_delivery      403     403      204      403     403     403      403     403      404     403

register_webhook          403     403      201      403     403     403      403     403      201     403
list_webhooks             403     403      200      403     403     403      403     403      200     403
get_webhook               403     403      200      403     403     403      403     403      404     403
change_webhook            403     403      200      403     403     403      403     403      404     403
rotate_webhook_secret     403     403      200      403     403     403      403     403      404     403
list_webhook_deliveries   403     403      200      403     403     403      403     403      404     403
redeliver_to_webhook      403     403      200      403     403     403      403     403      404     403
test_webhook              403     403      201      403     403     403      403     403      404     403
remove_webhook            403     403      204      403     403     403      403     403      404     403
"""
EVERYBODY: Final = (
    *("patient", "doctor", "operator"),
    *("another patient", "another doctor", "service"),
    *("foreign patient", "foreign doctor", "foreign operator", "foreign service"),
)


_LINES: Final = [line.split() for line in EXPECTED.splitlines()[3:] if line]
ANSWERS: Final = {name: dict(zip(EVERYBODY, answers, strict=True)) for name, *answers in _LINES}
"""The same, by operation and caller."""

REFUSALS: Final = {"403", "404", "422"}

_CALLER: Final = "(VALUES ($1::bigint, $2::bigint, $3::text)) AS caller (tenant, me, role)"
_TAKES_PART: Final = "tenant_id = caller.tenant AND (caller.role = 'operator' OR caller.me IN (patient_id, doctor_id))"
OWN: Final = {
    "list_doctors": f"SELECT id FROM users, {_CALLER} WHERE tenant_id = caller.tenant AND users.role = 'doctor'",
    "list_notifications": f"SELECT id FROM notifications, {_CALLER} WHERE user_id = caller.me",
    "list_appointments": f"SELECT id FROM appointments, {_CALLER} WHERE {_TAKES_PART}",
    "list_sessions": f"SELECT id FROM sessions, {_CALLER} WHERE {_TAKES_PART}",
}
"""What a list shows to a caller."""


def not_found(names: dict[str, Any]) -> str:
    """What tells somebody without a right that there is nothing, by what the request names."""
    if names.keys() & {"user_id", "webhook_id", "delivery_id"}:
        return "NOT_FOUND"
    return "SESSION_NOT_FOUND" if ":" in names.get("context", "") else "APPOINTMENT_NOT_FOUND"


async def bystanders(clinic: Clinic) -> dict[str, Principal]:
    """Everybody who is neither the patient nor the doctor of anything."""
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    return {
        "operator": clinic.operator,
        "another patient": await clinic.patient(),
        "another doctor": await clinic.doctor(),
        "service": await clinic.person(Role.SERVICE),
        "foreign patient": await elsewhere.patient(),
        "foreign doctor": await elsewhere.doctor(),
        "foreign operator": elsewhere.operator,
        "foreign service": await elsewhere.person(Role.SERVICE),
    }


async def parties(clinic: Clinic, call: Call) -> dict[str, Principal]:
    """The patient and the doctor of the thing; of nothing in particular, whoever asks for it and some other party."""
    appointment_id = named(call).get("appointment_id")
    kind, _, session_id = named(call).get("context", "").rpartition(":")
    if not kind:
        appointment_id, session_id = session_id or appointment_id, ""
    ids = await clinic.fetchrow(
        """
        SELECT patient_id, doctor_id FROM appointments
        WHERE id = coalesce($1, (SELECT appointment_id FROM sessions WHERE id = $2), (SELECT min(id) FROM appointments))
        """,
        int(appointment_id) if appointment_id else None,
        int(session_id) if session_id else None,
    )
    return {
        role.value: call.caller
        if call.caller.role is role
        else Principal(call.body.get(f"{role}_id", ids[f"{role}_id"]), clinic.tenant_id, role)
        for role in (Role.PATIENT, Role.DOCTOR)
    }


def named(call: Call) -> dict[str, Any]:
    """What the call names, in its path or in its body."""
    return call.values | call.body


async def every_call(api: Api, clinic: Clinic) -> list[Call]:
    """A good request for every operation; for those that take an appointment id in its place another one with it."""
    calls = await calls_of(api, clinic)
    sessions = await clinic.fetch("SELECT id, appointment_id FROM sessions")
    appointments = {f"text_session:{session['id']}": str(session["appointment_id"]) for session in sessions}
    chat = [call for call in calls if "/chat/{" in call.template or "/socket-tickets" in call.template]
    return [by_appointment(call, appointments[named(call)["context"]]) for call in chat] + calls


def by_appointment(call: Call, appointment_id: str) -> Call:
    values, body = dict(call.values), dict(call.body)
    for names in (values, body):
        if "context" in names:
            names["context"] = appointment_id
    if "client_message_id" in body:
        body["client_message_id"] += " by appointment"
    return replace(call, values=values, body=body)


def name_of(call: Call) -> str:
    return str(call.described["operationId"])


async def check(clinic: Clinic, call: Call, caller: Principal, answer: str, response: Response) -> None:
    """Compares an answer with the expected one."""
    said = f"{name_of(call)} {call.path()} by {caller}: {response.status_code} {response.text}"
    match answer:
        case "own":
            assert response.status_code == 200, said
            shown = {item["id"] for item in response.json()["items"]}
            his = await clinic.fetch(OWN[name_of(call)], caller.tenant_id, caller.user_id, caller.role.value)
            assert shown == {row["id"] for row in his}, said
        case "403":
            problem(response, 403, "ROLE_NOT_ALLOWED")
        case "404":
            problem(response, 404, not_found(named(call)))
        case "422":
            problem(response, 422, "VALIDATION_FAILED")
        case _:
            assert response.status_code == int(answer), said


@pytest.fixture
async def lenient_api(make_api: MakeApi) -> Api:
    """An API on which appointment ids go as far as session contexts do."""
    return await make_api(ALLOW_LEGACY_APPOINTMENT_CHAT=True)


def test_every_operation_and_every_socket_has_a_row(lenient_api: Api) -> None:
    described = {
        operation["operationId"]
        for path, methods in lenient_api.app.openapi()["paths"].items()
        if path.startswith("/api/")
        for operation in methods.values()
    }
    sockets = {route.name for route in iter_route_contexts(lenient_api.app.routes) if not route.methods}
    assert ANSWERS.keys() == described | sockets


async def test_whoever_has_no_right_is_refused_and_leaves_no_trace(
    lenient_api: Api, clinic: Clinic, owner: Owner
) -> None:
    calls, others = await every_call(lenient_api, clinic), await bystanders(clinic)
    before = await rows(owner)
    for call in calls:
        for who, caller in (others | await parties(clinic, call)).items():
            answer = ANSWERS[name_of(call)][who]
            if answer in REFUSALS:
                response = await call.send(lenient_api, caller=caller)
                await check(clinic, call, caller, answer, response)
    assert await rows(owner) == before


async def test_whoever_may_follow_a_conversation_is_welcome_and_nobody_else(
    lenient_api: Api, clinic: Clinic, owner: Owner
) -> None:
    live, others = await clinic.session(), await bystanders(clinic)
    everybody = others | {"patient": live.patient, "doctor": live.doctor}
    before = await rows(owner)
    for who, answer in ANSWERS["follow_conversation"].items():
        for context in (live.context, str(live.appointment_id)):
            async with opened(lenient_api, everybody[who], context) as socket:
                first = await socket.receive()
                if answer == "101":
                    assert first["type"] == "welcome"
                    continue
                code = "ROLE_NOT_ALLOWED" if answer == "403" else not_found({"context": context})
                assert (first["type"], first["code"], str(first["status"])) == ("refused", code, answer)
                assert await socket.close_code() == 4000 + int(answer)
    assert await rows(owner) == before


# How a frame is refused once its sender, who follows the conversation, is not active any more; and once the session
# is over.
FRAMES: Final[dict[str, tuple[dict[str, Any], str | None, str | None]]] = {
    "hello": ({"after_seq": 0}, "VALIDATION_FAILED", "VALIDATION_FAILED"),  # said once, at the beginning
    "message": ({"client_message_id": "1", "body": "Hello"}, "UNAUTHENTICATED", "SESSION_NOT_ACTIVE"),
    "reply": ({"client_message_id": "1", "body": "Yes", "message_id": 1}, "UNAUTHENTICATED", "SESSION_NOT_ACTIVE"),
    "reaction": ({"message_id": 1, "emoji": "!", "on": True}, "UNAUTHENTICATED", "SESSION_NOT_ACTIVE"),
    "typing": ({"on": True}, "UNAUTHENTICATED", "SESSION_NOT_ACTIVE"),
    "read": ({"seq": 1}, "UNAUTHENTICATED", None),
    "ping": ({}, None, None),
}


def test_every_frame_has_a_row() -> None:
    assert FRAMES.keys() == {get_args(frame.model_fields["type"].annotation)[0] for frame in get_args(ClientFrame)}


DEACTIVATED: Final = "UPDATE users SET active = false WHERE id = $1"
OVER: Final = "UPDATE sessions SET status = 'ended', ended_at = clock(), ended_seq = 1 WHERE patient_id = $1"


@pytest.mark.parametrize("type_", FRAMES)
async def test_following_a_conversation_is_no_right_to_act_in_it_later(
    api: Api, clinic: Clinic, owner: Owner, monkeypatch: pytest.MonkeyPatch, type_: str
) -> None:
    async def looks_away(*_: object) -> None: ...

    monkeypatch.setattr(Rooms, "_look_after", looks_away)  # or the socket may be closed before the frame comes
    frame, *answers = FRAMES[type_]
    for change, answer in zip((DEACTIVATED, OVER), answers, strict=True):
        live = await clinic.session()
        await clinic.message(live)
        async with following(api, live.patient, live.context) as socket:
            await clinic.fetch(change, live.patient.user_id)
            before = await rows(owner)
            await socket.send(type=type_, **frame)
            await socket.send(type="ping")
            answered = await socket.next("refused", "pong")
        assert answered.get("code") == answer
        assert (await rows(owner) == before) == (answer is not None or type_ == "ping")


@pytest.mark.parametrize("who", EVERYBODY)
async def test_whoever_has_the_right_is_served(lenient_api: Api, clinic: Clinic, who: str) -> None:
    calls, others = await every_call(lenient_api, clinic), await bystanders(clinic)
    await clinic.dispatch()
    for call in calls:
        caller = (others | await parties(clinic, call))[who]
        answer = ANSWERS[name_of(call)][who]
        if answer not in REFUSALS:
            await check(clinic, call, caller, answer, await call.send(lenient_api, caller=caller))


async def test_whoever_is_no_longer_active_has_no_right_at_all(lenient_api: Api, clinic: Clinic, owner: Owner) -> None:
    calls, others = await every_call(lenient_api, clinic), await bystanders(clinic)
    await clinic.fetch("UPDATE users SET active = false")
    before = await rows(owner)
    for call in calls:
        for caller in (others | await parties(clinic, call)).values():
            problem(await call.send(lenient_api, caller=caller), 401, "UNAUTHENTICATED")
    assert await rows(owner) == before


async def test_nothing_is_done_for_a_token_that_has_expired_or_for_none(
    lenient_api: Api, clinic: Clinic, owner: Owner
) -> None:
    calls = await every_call(lenient_api, clinic)
    before = await rows(owner)
    for call in calls:
        claims = jwt.decode(token_of(call.caller), options={"verify_signature": False})
        expired = {"Authorization": "Bearer " + jwt.encode(claims | {"exp": claims["iat"] - 3600}, SECRET)}
        for headers in ({}, expired):
            response = await lenient_api.anonymous.request(
                call.method, call.path(), headers=headers, json=call.body or None
            )
            problem(response, 401, "UNAUTHENTICATED")
    assert await rows(owner) == before
