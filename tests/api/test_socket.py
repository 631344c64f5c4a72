"""A conversation over sockets: what happens is told to all who follow it, once and in order."""

from pathlib import Path
from typing import Any

import pytest

from services.api.realtime import rooms, socket
from tests.api.expect import found
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.log_lines import lines_of
from tests.processes import until
from tests.running import Api
from tests.sockets import Socket, following, opened


def message(number: int, body: str = "Hello") -> dict[str, Any]:
    return {"client_message_id": f"client {number}", "body": body}


def seqs(frames: list[dict[str, Any]]) -> list[int]:
    return [frame["message"]["seq"] for frame in frames if frame["type"] == "message"]


async def test_a_message_is_acknowledged_to_its_sender_and_told_to_every_socket(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with (
        following(api, session.patient, session.context) as patient,
        following(api, session.patient, session.context) as phone,
        following(api, session.doctor, session.context) as doctor,
    ):
        await patient.send(type="message", **message(1))
        ack = await patient.next("ack")
        told = [await each.next("message") for each in (patient, phone, doctor)]

    assert ack["client_message_id"] == "client 1"
    assert [frame["message"] for frame in told] == [ack["message"]] * 3
    assert ack["message"]["seq"] == 1
    assert ack["message"]["sender"] == {"id": session.patient.user_id, "role": "patient"}


async def test_what_is_sent_over_http_reaches_sockets_and_the_other_way_round(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    patient_http, chat = api.as_(session.patient), f"/chat/{session.context}/messages"
    async with following(api, session.doctor, session.context) as doctor:
        sent = found(await patient_http.post(chat, json=message(1)), 201)
        assert (await doctor.next("message"))["message"] == sent
        await doctor.send(type="reply", **message(2), message_id=sent["id"])
        reply = (await doctor.next("ack"))["message"]
    assert reply["reply_to"] == {"id": sent["id"], "seq": 1, "excerpt": "Hello"}
    assert found(await patient_http.get(chat))["items"] == [sent, reply]


async def test_a_message_sent_twice_is_stored_once_and_acknowledged_twice(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        for _ in range(2):
            await patient.send(type="message", **message(1))
        acks = [await patient.next("ack") for _ in range(2)]
        await patient.send(type="message", **message(2))
        await patient.next("ack")
        while patient.seen[-1]["type"] != "message" or patient.seen[-1]["message"]["seq"] < 2:
            await patient.receive()
    assert acks[0] == acks[1]
    assert seqs(patient.seen) == [1, 2]


async def test_the_welcome_shows_the_session_and_where_the_conversation_stands(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    first = await clinic.message(session)
    await clinic.message(session)
    doctor_http = api.as_(session.doctor)
    await doctor_http.put(f"/chat/{session.context}/messages/{first}/reactions/+")
    shown = found(await doctor_http.get(f"/sessions/{session.context}"))
    async with opened(api, session.patient, session.context) as patient:
        welcome = await patient.receive()
    assert welcome == {"type": "welcome", "session": shown, "last_seq": 2, "revision": 1}


async def test_a_client_that_says_what_it_has_gets_the_rest_and_then_what_is_new(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    for _ in range(250):
        await clinic.message(session)
    async with opened(api, session.patient, session.context) as patient:
        await patient.send(type="hello", after_seq=7)
        backlog = await patient.until_caught_up()
        assert seqs(backlog) == list(range(8, 251))
        await api.as_(session.doctor).post(f"/chat/{session.context}/messages", json=message(1))
        assert (await patient.next("message"))["message"]["seq"] == 251
    assert api.runtime.metrics.sample("chat_reconnections_total") == 1


async def test_a_client_that_missed_too_much_is_told_of_the_gap(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "REPLAY_LIMIT", 10)
    session = await clinic.session()
    for _ in range(25):
        await clinic.message(session)
    async with opened(api, session.patient, session.context) as patient:
        await patient.send(type="hello", after_seq=3)
        _, gap, *backlog = await patient.until_caught_up()
    assert gap == {"type": "gap", "from_seq": 4, "to_seq": 15}
    assert seqs(backlog) == list(range(16, 26))
    async with opened(api, session.patient, session.context) as patient:
        await patient.send(type="hello", after_seq=15)
        frames = await patient.until_caught_up()
    assert [frame["type"] for frame in frames] == ["welcome"] + ["message"] * 10


@pytest.mark.parametrize("first", [{"type": "hello"}, {"type": "ping"}, None])
async def test_a_client_that_says_nothing_of_what_it_has_gets_what_is_new(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(socket, "HELLO_SECONDS", 0.2 if first is None else 60)
    session = await clinic.session()
    await clinic.message(session)
    async with opened(api, session.patient, session.context) as patient:
        await patient.receive()
        await clinic.message(session)
        if first:
            await patient.send(**first)
        await patient.next("caught_up")
        await api.as_(session.doctor).post(f"/chat/{session.context}/messages", json=message(1))
        while seqs(patient.seen)[-1:] != [3]:
            await patient.receive()
    assert seqs(patient.seen) == [2, 3]
    assert len(patient.of("pong")) == (first == {"type": "ping"})


async def test_what_the_welcome_counted_is_not_told_again(
    make_api: MakeApi, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "POLL_SECONDS", 3600.0)
    api = await make_api()
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        await clinic.message(session)  # No news of it: the room does not know yet when the doctor enters.
        async with following(api, session.doctor, session.context) as doctor:
            assert (await patient.next("message"))["message"]["seq"] == 1
            await doctor.send(type="message", **message(1))
            while seqs(doctor.seen)[-1:] != [2]:
                await doctor.receive()
            assert seqs(doctor.seen) == [2]


async def test_a_client_ahead_of_the_conversation_gets_what_is_new(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context, after_seq=2**63 - 1, after_revision=99) as patient:
        await patient.send(type="message", **message(1))
        assert (await patient.next("message"))["message"]["seq"] == 1


async def test_reactions_are_told_live_and_to_whoever_was_away(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    message_id = await clinic.message(session)

    def reaction(on: bool, emoji: str = "👍") -> dict[str, Any]:
        return {"type": "reaction", "message_id": message_id, "emoji": emoji, "on": on}

    async with following(api, session.patient, session.context) as patient:
        async with following(api, session.doctor, session.context) as doctor:
            await doctor.send(**reaction(True))
            told = [await each.next("reaction") for each in (patient, doctor)]
            assert told == [reaction(True) | {"user_id": session.doctor.user_id, "revision": 1}] * 2
        await patient.send(**reaction(True, "x"))
        await patient.send(**reaction(False, "x"))
        while (await patient.next("reaction"))["revision"] < 3:
            pass
        await api.as_(session.doctor).delete(f"/chat/{session.context}/messages/{message_id}/reactions/👍")
        await patient.next("reaction")
    async with opened(api, session.doctor, session.context) as doctor:
        await doctor.send(type="hello", after_seq=1, after_revision=1)
        welcome, *missed = await doctor.until_caught_up()
    assert welcome["revision"] == 4
    # Only how they stand now is told, not what became of them in between.
    assert missed == [
        reaction(False, "x") | {"user_id": session.patient.user_id, "revision": 3},
        reaction(False) | {"user_id": session.doctor.user_id, "revision": 4},
    ]


async def test_typing_is_shown_to_others_and_ends_by_itself(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await clinic.session()

    def typing(on: bool) -> dict[str, Any]:
        return {"type": "typing", "user_id": session.patient.user_id, "on": on}

    async with (
        following(api, session.patient, session.context) as patient,
        following(api, session.doctor, session.context) as doctor,
    ):
        await patient.send(type="typing", on=True)
        assert await doctor.receive() == typing(True)
        async with following(api, session.doctor, session.context) as late:
            assert late.of("typing") == [typing(True)]
        await patient.send(type="typing", on=False)
        assert await doctor.receive() == typing(False)
        monkeypatch.setattr(rooms, "TYPING_SECONDS", 0.1)
        await api.as_(session.patient).put(f"/chat/{session.context}/typing")
        assert [await doctor.receive() for _ in range(2)] == [typing(True), typing(False)]
        await patient.send(type="ping")
        assert await patient.receive() == {"type": "pong"}


async def test_how_far_everyone_has_read_is_told_live_and_at_the_beginning(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    for _ in range(3):
        await clinic.message(session)
    mark = {"type": "read", "user_id": session.doctor.user_id, "seq": 2}
    async with (
        following(api, session.patient, session.context) as patient,
        following(api, session.doctor, session.context) as doctor,
    ):
        await doctor.send(type="read", seq=2)
        assert await patient.next("read") == await doctor.next("read") == mark
        await doctor.send(type="read", seq=1)  # It never goes back.
        await doctor.send(type="read", seq=3)
        assert await patient.next("read") == mark | {"seq": 3}
    async with opened(api, session.patient, session.context) as patient:
        await patient.send(type="hello")
        assert (await patient.until_caught_up())[1:] == [mark | {"seq": 3}]


async def test_a_session_that_changes_is_shown(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        await patient.send(type="message", **message(1))
        waiting = (await patient.next("session"))["session"]
        await api.as_(session.doctor).post(f"/chat/{session.context}/messages", json=message(2))
        active = (await patient.next("session"))["session"]
    assert (waiting["status"], active["status"]) == ("waiting", "active")
    assert waiting["response_deadline"] is not None
    assert active == found(await api.as_(session.patient).get(f"/sessions/{session.context}"))


async def test_the_end_of_the_session_is_shown_after_its_last_message_and_closes_every_socket(
    api: Api, clinic: Clinic
) -> None:
    session = await clinic.session()
    async with (
        following(api, session.patient, session.context) as patient,
        following(api, session.doctor, session.context) as doctor,
        opened(api, session.doctor, session.context) as behind,
    ):
        await patient.send(type="message", **message(1))
        await patient.next("ack")
        await api.as_(session.doctor).post(f"/sessions/{session.context}/end")
        await behind.send(type="hello", after_seq=0)
        for each in (patient, doctor, behind):
            assert await each.close_code() == 4409
            assert seqs(each.seen) == [1]
            assert each.seen[-1]["session"]["status"] == "ended"


async def test_a_frame_that_finds_the_session_over_is_refused_and_closes_the_socket(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        await clock.advance(60 * MINUTE)  # No worker runs that would notice.
        await patient.send(type="message", **message(1))
        refused = await patient.next("refused")
        assert await patient.close_code() == 4409
    assert (refused["code"], refused["client_message_id"]) == ("SESSION_NOT_ACTIVE", "client 1")
    assert patient.seen[-1]["session"]["status"] == "expired"


async def test_what_no_news_is_spread_of_is_found_all_the_same(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        await clinic.message(session)
        assert (await patient.next("message"))["message"]["seq"] == 1
        await clinic.fetch("UPDATE participants SET last_read_seq = 1")
        await patient.next("read")


async def legacy(clinic: Clinic, make_api: MakeApi, **flags: Any) -> tuple[Api, int, Any, Any]:
    api = await make_api(ALLOW_LEGACY_APPOINTMENT_CHAT=True, **flags)
    patient, doctor = await clinic.patient(), await clinic.doctor()
    return api, await clinic.appointment(doctor, patient, starts_in=MINUTE), patient, doctor


async def test_an_appointment_without_a_session_is_followed_where_the_flag_allows_it(
    make_api: MakeApi, clinic: Clinic, clock: Clock
) -> None:
    api, appointment_id, patient, doctor = await legacy(clinic, make_api)
    async with following(api, patient, appointment_id) as a, following(api, doctor, appointment_id) as b:
        assert a.seen[0]["session"] is None
        await a.send(type="message", **message(1))
        assert (await b.next("message"))["message"]["body"] == "Hello"
        await clock.advance(2 * MINUTE)
        await clinic.convert()
        shown = (await b.next("session"))["session"]
        assert shown["appointment_id"] == appointment_id
        # It is the same conversation.
        async with following(api, doctor, shown["context"]) as c:
            await a.send(type="message", **message(2))
            assert (await c.next("message"))["message"]["seq"] == 2


async def test_a_socket_by_appointment_id_is_sent_to_the_session_once_that_is_enforced(
    make_api: MakeApi, clinic: Clinic, clock: Clock
) -> None:
    api, appointment_id, patient, _ = await legacy(clinic, make_api, ENFORCE_SESSION_GATED_CHAT=True)
    async with following(api, patient, appointment_id) as socket:
        await clock.advance(2 * MINUTE)
        await clinic.convert()
        await socket.send(type="message", **message(1))
        refused = await socket.next("refused")
        assert refused["code"] == "SESSION_CONTEXT_REQUIRED"
        assert refused["session_context"].startswith("text_session:")
        await still_open(socket)


async def still_open(socket: Socket) -> None:
    await socket.send(type="ping")
    await socket.next("pong")


async def test_an_appointment_that_is_cancelled_closes_its_sockets_at_the_next_frame(
    make_api: MakeApi, clinic: Clinic
) -> None:
    api, appointment_id, patient, _ = await legacy(clinic, make_api)
    async with following(api, patient, appointment_id) as socket:
        found(await api.as_(patient).post(f"/appointments/{appointment_id}/cancel"))
        await socket.send(type="message", **message(1))
        assert (await socket.next("refused"))["code"] == "SESSION_NOT_ACTIVE"
        assert await socket.close_code() == 4409


async def test_each_frame_is_a_line_of_work_of_its_own_that_its_socket_caused(
    make_api: MakeApi, clinic: Clinic, tmp_path: Path
) -> None:
    log = tmp_path / "api.jsonl"
    api = await make_api(log_file=log)
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        assert patient.connection.response is not None
        of_the_socket = patient.connection.response.headers["X-Correlation-ID"]
        for number in range(2):
            await patient.send(type="message", **message(number))
            await patient.next("ack")

    async def closed() -> list[dict[str, Any]]:
        written = lines_of(log)
        return written if any(line["event"] == "chat_connection_closed" for line in written) else []

    lines = [line for line in await until(closed) if line.get("connection_id") == of_the_socket]
    stored = [line for line in lines if line["event"] == "chat_message_stored"]
    assert {line["causation_id"] for line in stored} == {of_the_socket}
    assert len({of_the_socket, *(line["correlation_id"] for line in stored)}) == 3
    around = {line["event"]: line["correlation_id"] for line in lines if line["component"] == "realtime"}
    assert around == dict.fromkeys(("chat_connection_opened", "chat_connection_closed"), of_the_socket)
