"""What clients that are broken, slow, hostile or unlucky can do to a socket, and to those of others: little."""

import asyncio
import socket as sockets
from contextlib import suppress
from typing import Any

import orjson
import pytest
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import ConnectionClosed

from libs.domain.chat import messages
from services.api.realtime import wire
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.processes import until
from tests.running import Api
from tests.sockets import Socket, following, opened

CANARY = "canary-5e1f"

MALFORMED: dict[str, str | bytes] = {
    "nothing": "",
    "no JSON": CANARY,
    "half of an object": '{"type": "ping"',
    "an array": f'["{CANARY}"]',
    "null": "null",
    "a number": "1e999",
    "NaN": '{"type": "read", "seq": NaN}',
    "without a type": f'{{"{CANARY}": 1}}',
    "an unknown type": f'{{"type": "{CANARY}"}}',
    "a type that is none": '{"type": {"type": "ping"}}',
    "an unknown field": f'{{"type": "ping", "{CANARY}": 1}}',
    "two types": '{"type": "ping", "type": 7}',
    "a text as a number": '{"type": "read", "seq": "1"}',
    "a fraction": '{"type": "read", "seq": 1.5}',
    "a negative number": '{"type": "read", "seq": -1}',
    "a number too large": f'{{"type": "read", "seq": {2**63}}}',
    "a number of 5,000 digits": f'{{"type": "read", "seq": {"9" * 5000}}}',
    "yes and no as a text": '{"type": "typing", "on": "true"}',
    "NUL": r'{"type": "message", "client_message_id": "1", "body": "\u0000"}',
    "half a surrogate pair": r'{"type": "message", "client_message_id": "1", "body": "\ud800"}',
    "an empty body": '{"type": "message", "client_message_id": "1", "body": ""}',
    "a body too long": orjson.dumps({"type": "message", "client_message_id": "1", "body": CANARY * 400}).decode(),
    "a kind that is none": f'{{"type": "message", "client_message_id": "1", "body": "x", "kind": "{CANARY}"}}',
    "an emoji that is none": '{"type": "reaction", "message_id": 1, "emoji": "", "on": true}',
    "a message of id 0": '{"type": "reaction", "message_id": 0, "emoji": "+", "on": true}',
    "10,000 objects deep": '{"type":' * 6000 + "1" + "}" * 6000,
    "10,000 arrays deep": "[" * 10_000 + "]" * 10_000,
    "binary": b'{"type": "ping"}',
    "binary nonsense": b"\xff\x00",
    "a second hello": '{"type": "hello", "after_seq": 0}',
}


async def still_open(socket: Socket) -> None:
    await socket.send(type="ping")
    await socket.next("pong")


async def test_a_malformed_frame_is_refused_without_an_echo_and_the_socket_stays(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        for what, frame in MALFORMED.items():
            await patient.connection.send(frame)
            refused = await patient.receive()
            assert (refused["type"], refused["code"]) == ("refused", "VALIDATION_FAILED"), what
            assert refused["errors"], what
            assert CANARY not in str(refused), what
            assert "9" * 9 not in str(refused), what
        await still_open(patient)
    assert api.runtime.metrics.sample("chat_message_errors_total", reason="validation") == len(MALFORMED)


async def test_a_malformed_hello_is_refused_and_the_client_gets_what_is_new(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with opened(api, session.patient, session.context) as patient:
        await patient.send(type="hello", after_seq=-1)
        await patient.until_caught_up()
        assert (await patient.receive())["code"] == "VALIDATION_FAILED"
        await still_open(patient)


@pytest.mark.parametrize("length", [65_537, 10_000_000])
async def test_a_frame_that_is_too_long_closes_the_socket(api: Api, clinic: Clinic, length: int) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        with suppress(ConnectionClosed):  # before all of it is sent
            await patient.connection.send("x" * length)
        assert await patient.close_code() == 1009
    await until(lambda: counted(api, "chat_connection_failures_total", reason="protocol"))


async def test_the_longest_frame_is_read(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        await patient.connection.send('{"type": "ping"}'.ljust(65_536))
        assert (await patient.receive())["type"] == "pong"


async def test_text_that_is_not_utf8_closes_the_socket(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        await patient.connection.send(b"\xff\xfe", text=True)
        assert await patient.close_code() == 1007


async def counted(api: Api, name: str, **labels: str) -> float:
    return api.runtime.metrics.sample(name, **labels)


async def test_every_frame_passes_the_guard(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    message_id = await clinic.message(session)
    sends: dict[str, list[dict[str, Any]]] = {
        "send_message": [{"type": "message", "client_message_id": "1", "body": "x"}],
        "reply_to_message": [{"type": "reply", "client_message_id": "2", "body": "x", "message_id": message_id}],
        "add_reaction": [{"type": "reaction", "message_id": message_id, "emoji": "+", "on": True}],
        "remove_reaction": [{"type": "reaction", "message_id": message_id, "emoji": "+", "on": False}],
        "start_typing": [{"type": "typing", "on": True}],
        "stop_typing": [{"type": "typing", "on": False}],
        "mark_as_read": [{"type": "read", "seq": 1}],
    }
    async with following(api, session.patient, session.context) as patient:
        for operation, frames in sends.items():
            for frame in frames:
                await patient.send(**frame)
            await still_open(patient)
            assert await counted(api, "chat_requests_total", operation=operation) == 1
        assert await counted(api, "chat_requests_total", operation="join") == 1
        assert patient.of("refused") == []


async def test_a_refusal_names_the_message_it_is_about(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    other = await clinic.session()
    foreign = await clinic.message(other)
    async with following(api, session.patient, session.context) as patient:
        await patient.send(type="reply", client_message_id="1", body="x", message_id=foreign)
        refused = await patient.receive()
        assert (refused["code"], refused["client_message_id"]) == ("MESSAGE_NOT_FOUND", "1")
        await patient.send(type="message", client_message_id="2", body="x")
        await patient.send(type="message", client_message_id="2", body="y")
        refused = await patient.next("refused")
        assert (refused["code"], refused["client_message_id"]) == ("IDEMPOTENCY_CONFLICT", "2")
        await patient.send(type="reaction", message_id=foreign, emoji="+", on=True)
        assert (await patient.next("refused"))["code"] == "MESSAGE_NOT_FOUND"
        await still_open(patient)


async def test_http_and_sockets_share_one_pace(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(chat_messages_per_minute=2)
    session = await clinic.session()
    await api.as_(session.patient).post(
        f"/chat/{session.context}/messages", json={"client_message_id": "0", "body": "x"}
    )
    async with following(api, session.patient, session.context) as patient:
        for number in (1, 2):
            await patient.send(type="message", client_message_id=str(number), body="x")
        refused = await patient.next("refused")
        assert (refused["code"], refused["client_message_id"]) == ("RATE_LIMITED", "2")
        assert refused["retry_after"] > 0
        await still_open(patient)
    assert await counted(api, "chat_message_errors_total", reason="rate_limited") == 1


async def test_a_user_who_is_deactivated_is_signed_out_at_the_next_frame(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    for frame in (
        {"type": "message", "client_message_id": "1", "body": "x"},
        {"type": "typing", "on": True},
        {"type": "read", "seq": 0},
    ):
        async with following(api, session.patient, session.context) as patient:
            await clinic.fetch("UPDATE users SET active = false WHERE id = $1", session.patient.user_id)
            await patient.send(**frame)
            assert await patient.close_code() == 4401
            assert [each["code"] for each in patient.of("refused")] in ([], ["UNAUTHENTICATED"])
        await clinic.fetch("UPDATE users SET active = true WHERE id = $1", session.patient.user_id)
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 0


async def test_what_a_client_sends_before_it_leaves_is_stored(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        for number in range(10):
            await patient.send(type="message", client_message_id=str(number), body="x")

    async def stored() -> bool:
        return bool(await clinic.fetchval("SELECT count(*) FROM messages") == 10)

    await until(stored)


async def test_what_is_sent_after_the_end_is_not_looked_at(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        await clinic.fetch("UPDATE users SET active = false WHERE id = $1", session.patient.user_id)
        for number in range(10):
            await patient.send(type="message", client_message_id=str(number), body="x")
        assert await patient.close_code() == 4401

    async def closed() -> bool:
        return await counted(api, "chat_connections_active") == 0

    await until(closed)
    assert await counted(api, "chat_message_errors_total", reason="blocked") <= 1


async def test_a_user_who_is_deactivated_is_signed_out_without_a_frame(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    async with (
        following(api, session.doctor, session.context) as doctor,
        following(api, session.patient, session.context) as patient,
        opened(api, session.patient, session.context) as silent,
    ):
        await clinic.fetch("UPDATE users SET active = false WHERE id = $1", session.patient.user_id)
        assert await patient.close_code() == 4401
        assert await silent.close_code() == 4401
        await still_open(doctor)


async def test_a_database_that_is_away_refuses_frames_for_a_moment(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(pool_size=1)
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        async with api.runtime.database.autocommit():
            await patient.send(type="message", client_message_id="1", body="x")
            refused = await patient.next("refused")
        assert (refused["code"], refused["client_message_id"]) == ("OVERLOADED", "1")
        await patient.send(type="message", client_message_id="1", body="x")
        await patient.next("ack")


async def test_a_fault_of_ours_refuses_the_frame_and_the_socket_stays(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        with monkeypatch.context() as broken:
            broken.setattr(type(api.runtime.chat), "send", None)
            await patient.send(type="message", client_message_id="1", body=CANARY)
            refused = await patient.receive()
        assert refused["code"] == "INTERNAL_ERROR"
        assert CANARY not in str(refused)
        await still_open(patient)
    assert await counted(api, "chat_message_errors_total", reason="system") == 1


async def test_rooms_that_cannot_be_looked_after_are_so_as_soon_as_they_can(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        with monkeypatch.context() as broken:
            broken.setattr(messages, "following", None)
            await patient.send(type="message", client_message_id="1", body="x")
            await patient.next("ack")
            await asyncio.sleep(0.1)
        assert (await patient.next("message"))["message"]["seq"] == 1


async def test_a_room_that_cannot_be_read_holds_up_no_other(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = await clinic.session(), await clinic.session()
    unreadable = await clinic.fetchval("SELECT id FROM conversations WHERE session_id = $1", broken.ref.id)
    read = messages.following

    async def following_or_not(connection: Any, bodies: Any, known: Any, limit: int) -> Any:
        if unreadable in known:
            raise ValueError("no key")
        return await read(connection, bodies, known, limit)

    async with (
        following(api, broken.patient, broken.context) as one,
        following(api, whole.patient, whole.context) as other,
    ):
        monkeypatch.setattr(messages, "following", following_or_not)
        for session in (broken, whole):
            await clinic.message(session)  # Found by the same look.
        assert (await other.next("message"))["message"]["seq"] == 1
        monkeypatch.undo()
        assert (await one.next("message"))["message"]["seq"] == 1


async def test_rooms_without_news_are_looked_after_however_much_there_is_of_others(api: Api, clinic: Clinic) -> None:
    busy, quiet = await clinic.session(), await clinic.session()
    noisy = await clinic.fetchval("SELECT id FROM conversations WHERE session_id = $1", busy.ref.id)

    async def spread_news() -> None:
        while True:
            api.app.state.rooms.changed(noisy)
            await asyncio.sleep(0)

    async with following(api, busy.patient, busy.context), following(api, quiet.patient, quiet.context) as patient:
        noise = asyncio.create_task(spread_news())
        await clinic.message(quiet)
        assert (await patient.next("message"))["message"]["seq"] == 1
        noise.cancel()


# Readers


def with_small_buffers(api: Api) -> sockets.socket:
    client = sockets.socket()
    client.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    host, port = api.url.removeprefix("http://").split(":")
    client.connect((host, int(port)))
    client.setblocking(False)
    return client


async def test_a_client_that_does_not_read_is_closed_and_others_go_on(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(chat_messages_per_minute=1_000_000)
    session = await clinic.session()
    body = "x" * 4000
    async with (
        following(api, session.doctor, session.context) as doctor,
        opened(api, session.patient, session.context, sock=with_small_buffers(api)) as slow,
    ):
        await slow.send(type="hello")
        await slow.until_caught_up()
        slow.connection.transport.pause_reading()
        sent = 0
        while await counted(api, "chat_connections_active") == 2:
            sent += 1
            assert sent < 3000
            await doctor.send(type="message", client_message_id=str(sent), body=body)
            assert (await doctor.next("message"))["message"]["seq"] == sent
        assert sent > wire.QUEUE_LIMIT
        slow.connection.transport.resume_reading()
        assert await slow.close_code() == 1013
        got = [frame["message"]["seq"] for frame in slow.of("message")]
        assert got == list(range(1, len(got) + 1))
    async with opened(api, session.patient, session.context) as again:
        await again.send(type="hello", after_seq=len(got))
        await again.until_caught_up()
        assert [frame["message"]["seq"] for frame in again.of("message")] == list(range(len(got) + 1, sent + 1))
    assert await counted(api, "chat_message_errors_total", reason="delivery") == 1


async def test_a_client_that_does_not_read_its_backlog_holds_up_nobody(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api()
    session = await clinic.session()
    for _ in range(900):
        await clinic.message(session, "x" * 4000)
    async with opened(api, session.patient, session.context, sock=with_small_buffers(api)) as slow:
        slow.connection.transport.pause_reading()
        await slow.send(type="hello", after_seq=0)
        async with following(api, session.doctor, session.context) as doctor:
            await doctor.send(type="message", client_message_id="1", body="x")
            await doctor.next("message")
        slow.connection.transport.resume_reading()
        await slow.until_caught_up()
        assert [frame["message"]["seq"] for frame in slow.of("message")] == list(range(1, 902))


async def test_a_client_that_takes_no_leave_is_cut_off(
    api: Api, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "LEAVE_SECONDS", 0.2)
    session = await clinic.session()
    async with following(api, session.patient, session.context) as patient:
        patient.connection.transport.pause_reading()
        await api.as_(session.doctor).post(f"/sessions/{session.context}/end")
        connections = api.server.server_state.connections
        await until(lambda: none_of(connections))


async def none_of(connections: set[Any]) -> bool:
    return not any(isinstance(each, WebSocketsSansIOProtocol) for each in connections)


async def test_a_client_that_does_not_answer_pings_is_cut_off(
    make_api: MakeApi, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.api.main.PING_SECONDS", 0.3)
    api = await make_api()
    session = await clinic.session()
    async with (
        following(api, session.doctor, session.context) as doctor,
        following(api, session.patient, session.context) as patient,
    ):
        patient.connection.transport.pause_reading()
        await until(lambda: counted(api, "chat_connection_failures_total", reason="timeout"))
        await still_open(doctor)


async def test_a_restart_closes_sockets_with_a_code_that_says_so(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api()
    session = await clinic.session()
    async with (
        following(api, session.patient, session.context) as patient,
        following(api, session.doctor, session.context) as silent,
        opened(api, session.doctor, session.context) as waiting,
    ):
        silent.connection.transport.pause_reading()
        api.server.should_exit = True
        assert await patient.close_code() == 1012
        assert await waiting.close_code() == 1012
        async with asyncio.timeout(10):
            await until(lambda: none_of(api.server.server_state.connections))
