from datetime import timedelta
from typing import Any

import pytest

from libs.guardrails import Principal
from tests.api.expect import faults, found, moment, problem
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import Api


async def say(api: Api, caller: Principal, live: LiveSession, text: str, **message: Any) -> Any:
    new = {"client_message_id": text, "body": text} | message
    return await api.as_(caller).post(f"/chat/{live.context}/messages", json=new)


async def test_a_message_is_numbered_and_shown_in_full(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    message = {"body": "<b>Grüß Gott</b> 🩺", "kind": "image", "media_url": "https://media.example/1.jpg"}
    first = found(await say(api, live.patient, live, "a", **message), 201)
    assert moment(first["sent_at"])
    assert first == message | {
        "id": first["id"],
        "seq": 1,
        "client_message_id": "a",
        "sender": {"id": live.patient.user_id, "role": "patient"},
        "reply_to": None,
        "reactions": [],
        "sent_at": first["sent_at"],
    }
    second = found(await say(api, live.doctor, live, "b"), 201)
    assert (second["seq"], second["sender"]["role"], second["kind"], second["media_url"]) == (2, "doctor", "text", None)
    assert found(await api.as_(live.doctor).get(f"/chat/{live.context}/messages"))["items"] == [first, second]
    sample = api.runtime.metrics.sample
    assert sample("chat_messages_total", direction="received") == 2
    assert sample("chat_message_processing_duration_seconds_count", direction="received") == 2


# Whole bodies, whose quotes, names and ends some readers take and others do not.
ODD_BODIES = (
    b'{"client_message_id": "a", "body": "b", "body": "c"}',
    b'{"client_message_id": "a", "body": "\\u00e9\\ud83d\\ude00\\/"}',
    '{"client_message_id": "a", "body": "é", "kind": "voice"}'.encode("utf-16"),
    b'\xef\xbb\xbf{"client_message_id": "a", "body": "b"}',
    b' \n\t{"client_message_id": "a", "body": "b"}\r ',
    b'{"client_message_id": "a", "body": "b", "media_url": null}',
    b'{"client_message_id": "a", "body": "b",}',
    b'{"client_message_id": "a", "body": "\xff"}',
    b'{"client_message_id": "a", "body": "\t"}',
    b'{"client_message_id": "a", "body": "\\ud83d"}',
    b'{"client_message_id": "a", "body": "\\u0000"}',
    b'{"client_message_id": "a", "body": NaN}',
    b'{"client_message_id": 1, "body": "b"}',
    b'{"client_message_id": "a", "body": "b", "more": ' + b"9" * 5000 + b"}",
    b'{"client_message_id": "a", "body": "b", "more": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'["client_message_id", "body"]',
    b"null",
    b"",
)


@pytest.mark.parametrize("body", ODD_BODIES)
async def test_a_body_means_the_same_whichever_way_it_is_read(api: Api, clinic: Clinic, body: bytes) -> None:
    own = {"id", "seq", "sender", "sent_at", "instance", "correlation_id"}
    answers = []
    for media_type in ("application/json", "application/json; charset=utf-8"):  # the short way, and the framework's
        live = await clinic.session()
        answer = await api.as_(live.patient).post(
            f"/chat/{live.context}/messages", content=body, headers={"Content-Type": media_type}
        )
        told = {name: value for name, value in answer.json().items() if name not in own}
        answers.append((answer.status_code, answer.headers["content-type"], sorted(answer.headers), told))
    assert answers[0] == answers[1]


async def test_sending_again_answers_the_stored_message(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    first = found(await say(api, live.patient, live, "hello"), 201)
    assert found(await say(api, live.patient, live, "hello"), 200) == first
    sample = api.runtime.metrics.sample
    assert (sample("chat_message_retries_total"), sample("chat_messages_total", direction="received")) == (1, 1)


async def test_an_id_used_for_another_message_is_a_conflict(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    found(await say(api, live.patient, live, "hello"), 201)
    others: list[tuple[Principal, dict[str, str]]] = [
        (live.patient, {"body": "Hello"}),
        (live.patient, {"body": "hello "}),
        (live.patient, {"kind": "voice"}),
        (live.patient, {"media_url": "https://media.example/1.jpg"}),
        (live.doctor, {}),
    ]
    for caller, changed in others:
        problem(await say(api, caller, live, "hello", **changed), 409, "IDEMPOTENCY_CONFLICT")
    # A conflict has no effect: the doctor's did not activate the session either.
    row = await clinic.fetchrow("SELECT last_seq, (SELECT status FROM sessions) FROM conversations")
    assert tuple(row) == (1, "waiting")
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 1


async def test_equal_texts_under_different_ids_and_equal_ids_elsewhere_are_messages_of_their_own(
    api: Api, clinic: Clinic
) -> None:
    one, two = await clinic.session(), await clinic.session()
    for live, message_id in ((one, "1"), (one, "2"), (two, "1")):
        found(await say(api, live.patient, live, "hello", client_message_id=message_id), 201)
    counts = await clinic.fetch("SELECT last_seq FROM conversations ORDER BY id")
    assert [row["last_seq"] for row in counts] == [2, 1]


async def test_what_a_message_may_hold_is_bounded(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    refused: list[tuple[str, Any]] = [
        ("/client_message_id", ""),
        ("/client_message_id", "x" * 201),
        ("/client_message_id", "a\x00b"),
        ("/body", ""),
        ("/body", "x" * 4001),
        ("/body", "a\x00b"),
        ("/body", 7),
        ("/kind", "video"),
        ("/media_url", "javascript:alert(1)"),
        ("/media_url", "https://media.example/" + "x" * 2048),
    ]
    for pointer, value in refused:
        assert faults(await say(api, live.patient, live, "hello", **{pointer[1:]: value})) == [pointer], value
    longest = found(await say(api, live.patient, live, "x" * 4000, client_message_id="y" * 200), 201)
    assert len(longest["body"]) == 4000


async def test_the_patients_first_message_starts_the_doctors_clock_once(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await clinic.session()

    async def session() -> Any:
        return found(await api.as_(live.patient).get(f"/sessions/{live.context}"))

    first = found(await say(api, live.patient, live, "one"), 201)
    waiting = await session()
    assert waiting["status"] == "waiting"
    assert moment(waiting["response_deadline"]) - moment(first["sent_at"]) == timedelta(seconds=300)
    await clock.advance(MINUTE)
    found(await say(api, live.patient, live, "two"), 201)
    assert await session() == waiting


async def test_the_doctors_first_message_activates_once(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await clinic.session()
    found(await say(api, live.patient, live, "one"), 201)
    await clock.advance(4 * MINUTE)
    answer = found(await say(api, live.doctor, live, "two"), 201)
    active = found(await api.as_(live.doctor).get(f"/sessions/{live.context}"))
    assert (active["status"], active["activated_at"]) == ("active", answer["sent_at"])
    # An answer stops the clock: the deadline that has passed since means nothing.
    await clock.advance(10 * MINUTE)
    found(await say(api, live.doctor, live, "three"), 201)
    found(await say(api, live.patient, live, "four"), 201)
    later = found(await api.as_(live.doctor).get(f"/sessions/{live.context}"))
    assert later == active | {"remaining_seconds": active["remaining_seconds"] - 600}


async def test_the_response_window_is_a_setting(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(text_session_response_window_seconds=60)
    live = await clinic.session()
    first = found(await say(api, live.patient, live, "one"), 201)
    shown = found(await api.as_(live.patient).get(f"/sessions/{live.context}"))
    assert moment(shown["response_deadline"]) - moment(first["sent_at"]) == MINUTE


@pytest.mark.parametrize("late", ["doctor", "patient"])
async def test_a_message_after_the_deadline_is_refused_and_the_expiry_is_stored(
    api: Api, clinic: Clinic, clock: Clock, late: str
) -> None:
    live = await clinic.session()
    found(await say(api, live.patient, live, "one"), 201)
    await clock.advance(5 * MINUTE)

    caller = live.doctor if late == "doctor" else live.patient
    problem(await say(api, caller, live, "too late"), 409, "SESSION_NOT_ACTIVE")

    session = await clinic.fetchrow("SELECT status, end_reason, ended_seq, activated_at, units_charged FROM sessions")
    assert tuple(session) == ("expired", "deadline", 1, None, 0)
    assert await clinic.fetchval("SELECT status FROM appointments") == "NO_SHOW"
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 1
    history = found(await api.as_(live.patient).get(f"/chat/{live.context}/messages"))
    assert [item["body"] for item in history["items"]] == ["one"]


async def test_a_late_message_by_appointment_id_is_refused_too(make_api: MakeApi, clinic: Clinic, clock: Clock) -> None:
    api = await make_api()
    live = await clinic.session()
    found(await say(api, live.patient, live, "one"), 201)
    await clock.advance(5 * MINUTE)
    late = {"client_message_id": "2", "body": "two"}
    response = await api.as_(live.doctor).post(f"/chat/{live.appointment_id}/messages", json=late)
    problem(response, 409, "SESSION_NOT_ACTIVE")
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 1


async def test_messages_in_a_call_need_no_answer(api: Api, clinic: Clinic) -> None:
    live = await clinic.session("voice")
    found(await say(api, live.patient, live, "Can you hear me?"), 201)
    found(await say(api, live.doctor, live, "I will ring."), 201)
    call = found(await api.as_(live.patient).get(f"/sessions/{live.context}"))
    assert (call["status"], call["response_deadline"], call["activated_at"]) == ("connecting", None, None)
