"""Replies, reactions, read marks and typing, by session context and by appointment id."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from httpx2 import Response

from libs.guardrails import Principal
from tests.api.expect import faults, found, moment, problem
from tests.clinic import Clinic, LiveSession, RecordingBell
from tests.conftest import MakeApi
from tests.running import Api

THUMB, HEART = "%F0%9F%91%8D", "%E2%9D%A4%EF%B8%8F"


async def reply(api: Api, caller: Principal, live: LiveSession, message_id: int, text: str) -> Response:
    new = {"client_message_id": text, "body": text}
    return await api.as_(caller).post(f"/chat/{live.context}/messages/{message_id}/replies", json=new)


async def react(api: Api, caller: Principal, live: LiveSession, message_id: int, emoji: str = THUMB) -> Response:
    return await api.as_(caller).put(f"/chat/{live.context}/messages/{message_id}/reactions/{emoji}")


async def unreact(api: Api, caller: Principal, live: LiveSession, message_id: int, emoji: str = THUMB) -> Response:
    return await api.as_(caller).delete(f"/chat/{live.context}/messages/{message_id}/reactions/{emoji}")


async def history(api: Api, live: LiveSession) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = found(await api.as_(live.patient).get(f"/chat/{live.context}/messages"))["items"]
    return items


async def test_a_reply_shows_what_it_answers(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    asked = await clinic.message(live, "How long, " * 20)
    answer = found(await reply(api, live.doctor, live, asked, "A week"), 201)
    assert (answer["seq"], answer["sender"]["id"], answer["kind"]) == (2, live.doctor.user_id, "text")
    assert answer["reply_to"] == {"id": asked, "seq": 1, "excerpt": ("How long, " * 20)[:100]}
    assert moment(answer["sent_at"])
    assert (await history(api, live))[-1] == answer
    # The doctor's first message activates, be it a reply.
    assert await clinic.fetchval("SELECT status FROM sessions") == "active"
    assert found(await reply(api, live.doctor, live, asked, "A week"), 200) == answer


async def test_a_repeated_reply_is_another_message_unless_it_answers_the_same(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    first, second = await clinic.message(live), await clinic.message(live)
    found(await reply(api, live.doctor, live, first, "yes"), 201)
    problem(await reply(api, live.doctor, live, second, "yes"), 409, "IDEMPOTENCY_CONFLICT")
    plain = {"client_message_id": "yes", "body": "yes"}
    problem(await api.as_(live.doctor).post(f"/chat/{live.context}/messages", json=plain), 409, "IDEMPOTENCY_CONFLICT")
    assert len(await history(api, live)) == 3


async def test_only_messages_of_the_same_conversation_can_be_answered_or_marked(api: Api, clinic: Clinic) -> None:
    live, other = await clinic.session(), await clinic.session()
    elsewhere = await clinic.message(other)
    for message_id in (elsewhere, 987_654_321):
        problem(await reply(api, live.patient, live, message_id, "yes"), 404, "MESSAGE_NOT_FOUND")
        problem(await react(api, live.patient, live, message_id), 404, "MESSAGE_NOT_FOUND")
        problem(await unreact(api, live.patient, live, message_id), 404, "MESSAGE_NOT_FOUND")
    assert await history(api, live) == []
    assert await clinic.fetchval("SELECT count(*) FROM reactions") == 0


async def test_reactions_are_one_of_each_emoji_from_each_person(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    message_id = await clinic.message(live)
    for caller, emoji in ((live.doctor, THUMB), (live.patient, HEART), (live.patient, THUMB), (live.doctor, THUMB)):
        assert (await react(api, caller, live, message_id, emoji)).status_code == 204
    thumb = {"emoji": "👍", "user_ids": [live.doctor.user_id, live.patient.user_id]}
    heart = {"emoji": "❤️", "user_ids": [live.patient.user_id]}
    assert (await history(api, live))[0]["reactions"] == [thumb, heart]
    for _ in range(2):
        assert (await unreact(api, live.doctor, live, message_id)).status_code == 204
    # Nobody takes back what is another's.
    assert (await unreact(api, live.doctor, live, message_id, HEART)).status_code == 204
    thumb["user_ids"] = [live.patient.user_id]
    assert (await history(api, live))[0]["reactions"] == [heart, thumb]
    # Only what changed was numbered.
    assert await clinic.fetchval("SELECT revision FROM conversations") == 4


async def test_reactions_at_once_are_each_counted_once(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    message_id = await clinic.message(live)
    answers = await asyncio.gather(
        *(react(api, caller, live, message_id) for caller in (live.patient, live.doctor) for _ in range(10))
    )
    assert {answer.status_code for answer in answers} == {204}
    assert await clinic.fetchval("SELECT count(*) FROM reactions WHERE present") == 2
    assert await clinic.fetchval("SELECT revision FROM conversations") == 2


async def test_a_person_has_a_limited_number_of_reactions_to_a_message(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    message_id = await clinic.message(live)
    for number in range(20):
        assert (await react(api, live.patient, live, message_id, f"e{number}")).status_code == 204
    assert faults(await react(api, live.patient, live, message_id, "one more")) == ["/emoji"]
    assert (await react(api, live.patient, live, message_id, "e0")).status_code == 204
    assert (await react(api, live.doctor, live, message_id, "one more")).status_code == 204
    assert (await unreact(api, live.patient, live, message_id, "e0")).status_code == 204
    assert (await react(api, live.patient, live, message_id, "one more")).status_code == 204


async def test_the_read_mark_never_goes_back_and_never_beyond_the_last_message(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    for _ in range(3):
        await clinic.message(live)

    async def mark(caller: Principal, seq: int) -> int:
        answer = found(await api.as_(caller).put(f"/chat/{live.context}/read", json={"seq": seq}))
        return int(answer["last_read_seq"])

    assert [await mark(live.doctor, seq) for seq in (2, 1, 0, 3, 99, 2)] == [2, 2, 2, 3, 3, 3]
    assert await mark(live.patient, 1) == 1
    await clinic.message(live)
    found(await api.as_(live.patient).post(f"/sessions/{live.context}/end"))
    assert await mark(live.patient, 4) == 4
    marks = await clinic.fetch("SELECT user_id, last_read_seq FROM participants ORDER BY last_read_seq")
    assert [tuple(row) for row in marks] == [(live.doctor.user_id, 3), (live.patient.user_id, 4)]


async def test_typing_is_told_and_not_stored(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    bell = RecordingBell()
    object.__setattr__(api.runtime, "bell", bell)
    for method in ("PUT", "DELETE"):
        answer = await api.as_(live.doctor).request(method, f"/chat/{live.context}/typing")
        assert answer.status_code == 204
    conversation_id = await clinic.fetchval("SELECT id FROM conversations")
    doctor = live.doctor.user_id
    assert bell.typists == [(conversation_id, doctor, True), (conversation_id, doctor, False)]


async def test_whoever_watches_is_woken_by_every_change_and_by_nothing_else(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    message_id = await clinic.message(live)
    conversation_id = await clinic.fetchval("SELECT id FROM conversations")
    bell = RecordingBell()
    object.__setattr__(api.runtime, "bell", bell)
    mark = {"seq": 1}
    patient = api.as_(live.patient)
    calls: list[tuple[int, Callable[[], Coroutine[Any, Any, Response]]]] = [
        (1, lambda: react(api, live.patient, live, message_id)),
        (0, lambda: react(api, live.patient, live, message_id)),
        (1, lambda: unreact(api, live.patient, live, message_id)),
        (1, lambda: patient.put(f"/chat/{live.context}/read", json=mark)),
        (0, lambda: patient.put(f"/chat/{live.context}/read", json=mark)),
        (0, lambda: patient.get(f"/chat/{live.context}/messages")),
        (1, lambda: patient.post(f"/sessions/{live.context}/end")),
        (0, lambda: patient.post(f"/sessions/{live.context}/end")),
    ]
    for changes, call in calls:
        bell.conversations.clear()
        assert (await call()).status_code < 300
        assert bell.conversations == [conversation_id] * changes


@pytest.mark.parametrize("converted_later", [True, False])
async def test_by_appointment_id_all_operations_act_on_the_conversation_that_the_session_adopts(
    make_api: MakeApi, clinic: Clinic, converted_later: bool
) -> None:
    api = await make_api(ALLOW_LEGACY_APPOINTMENT_CHAT=True)
    doctor, patient = await clinic.doctor(), await clinic.patient()
    appointment_id = await clinic.appointment(doctor, patient)
    if not converted_later:
        await clinic.convert()
    at = f"/chat/{appointment_id}"
    # Before anybody has written there is nothing to mark, and no harm in trying.
    assert found(await api.as_(doctor).put(f"{at}/read", json={"seq": 7})) == {"last_read_seq": 0}
    assert (await api.as_(doctor).put(f"{at}/typing")).status_code == 204
    problem(await api.as_(doctor).put(f"{at}/messages/1/reactions/{THUMB}"), 404, "MESSAGE_NOT_FOUND")
    asked = found(await api.as_(patient).post(f"{at}/messages", json={"client_message_id": "1", "body": "Hello?"}), 201)
    found(
        await api.as_(doctor).post(
            f"{at}/messages/{asked['id']}/replies", json={"client_message_id": "2", "body": "Yes"}
        ),
        201,
    )
    assert (await api.as_(doctor).put(f"{at}/messages/{asked['id']}/reactions/{THUMB}")).status_code == 204
    assert found(await api.as_(doctor).put(f"{at}/read", json={"seq": 1})) == {"last_read_seq": 1}
    await clinic.convert()
    session_id = await clinic.fetchval("SELECT session_id FROM appointments WHERE id = $1", appointment_id)
    items = found(await api.as_(patient).get(f"/chat/text_session:{session_id}/messages"))["items"]
    assert [(item["seq"], item["body"]) for item in items] == [(1, "Hello?"), (2, "Yes")]
    assert items[0]["reactions"] == [{"emoji": "👍", "user_ids": [doctor.user_id]}]
    assert items[1]["reply_to"]["id"] == asked["id"]
    assert await clinic.fetchval("SELECT count(*) FROM conversations") == 1
