"""Who gets a socket, and how everyone else is told why not."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import jwt
import orjson
import pytest
from websockets.exceptions import InvalidStatus

from tests.api.calls import Owner
from tests.api.expect import found, problem
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import SECRET, Api, token_of
from tests.sockets import PROTOCOL, address, following, opened

PAGE = "https://app.example.org"


async def denied(api: Api, context: object, caller: Any = None, **options: Any) -> tuple[int, dict[str, Any]]:
    """Status and problem of a handshake that is answered without a socket."""
    with pytest.raises(InvalidStatus) as raised:
        async with opened(api, caller, context, **options):
            pass
    response = raised.value.response
    assert response.headers["Content-Type"] == "application/problem+json"
    body = orjson.loads(response.body or b"")
    assert body["status"] == response.status_code
    assert body["correlation_id"] == response.headers["X-Correlation-ID"]
    return response.status_code, body


async def ticket(api: Api, session: LiveSession, context: object = None) -> str:
    issued = found(
        await api.as_(session.patient).post("/socket-tickets", json={"context": str(context or session.context)}), 201
    )
    return f"ticket.{issued['ticket']}"


async def test_only_the_protocol_is_named_in_return(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    offered = ("chat", await ticket(api, session), PROTOCOL)
    async with opened(api, None, session.context, subprotocols=offered) as socket:
        assert socket.connection.subprotocol == PROTOCOL
        assert socket.connection.response is not None
        assert socket.connection.response.headers.get_all("Sec-WebSocket-Protocol") == [PROTOCOL]
        assert "Sec-WebSocket-Extensions" not in socket.connection.response.headers


@pytest.mark.parametrize("offered", [(), ("sessiongate.v2",), ("SESSIONGATE.V1",)])
async def test_a_client_that_does_not_speak_the_protocol_is_denied(
    api: Api, clinic: Clinic, offered: Sequence[str]
) -> None:
    session = await clinic.session()
    status, body = await denied(api, session.context, session.patient, subprotocols=tuple(offered))
    assert (status, body["code"]) == (400, "VALIDATION_FAILED")
    assert api.runtime.metrics.sample("chat_connection_failures_total", reason="upgrade") == 1


async def test_a_stranger_gets_no_socket(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    for context in (session.context, session.appointment_id, "nonsense", "direct_session_1", "text_session:0"):
        status, body = await denied(api, context)
        assert (status, body["code"]) == (401, "UNAUTHENTICATED")
    await clinic.fetch("UPDATE users SET active = false WHERE id = $1", session.patient.user_id)
    assert (await denied(api, session.context, session.patient))[0] == 401
    assert api.runtime.metrics.sample("chat_connection_failures_total", reason="auth") == 6


async def test_a_token_in_the_address_is_none(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    for query in (f"token={token_of(session.patient)}", f"ticket={await ticket(api, session)}"):
        status, _ = await denied(api, session.context, url=f"{address(api, session.context)}?{query}")
        assert status == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [(None, 101), (PAGE, 101), ("https://evil.example", 403), (f"{PAGE}.evil.example", 403), ("null", 403), ("", 403)],
)
async def test_only_pages_of_allowed_origins_open_sockets(
    make_api: MakeApi, clinic: Clinic, origin: str | None, status: int
) -> None:
    api = await make_api(allowed_origins=f"https://other.example.org, {PAGE}")
    session = await clinic.session()
    headers = {} if origin is None else {"Origin": origin}
    if status == 101:
        async with opened(api, session.patient, session.context, headers=headers) as socket:
            assert (await socket.receive())["type"] == "welcome"
    else:
        assert (await denied(api, session.context, session.patient, headers=headers))[1]["code"] == "ORIGIN_NOT_ALLOWED"


async def test_no_page_opens_sockets_unless_its_origin_is_listed(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    assert (await denied(api, session.context, session.patient, headers={"Origin": api.url}))[0] == 403


# Tickets


async def test_a_ticket_opens_one_socket(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    offered = (PROTOCOL, await ticket(api, session))
    async with opened(api, None, session.context, subprotocols=offered) as socket:
        assert (await socket.receive())["type"] == "welcome"
        await socket.send(type="message", client_message_id="1", body="Hello")
        assert (await socket.next("ack"))["message"]["sender"]["id"] == session.patient.user_id
    assert (await denied(api, session.context, subprotocols=offered))[0] == 401


async def test_of_many_that_use_a_ticket_at_once_one_gets_a_socket(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    offered = (PROTOCOL, await ticket(api, session))

    async def attempt() -> bool:
        try:
            async with opened(api, None, session.context, subprotocols=offered) as socket:
                return bool((await socket.receive())["type"] == "welcome")
        except InvalidStatus:
            return False

    assert sum(await asyncio.gather(*[attempt() for _ in range(8)])) == 1


async def test_a_ticket_is_good_for_its_context_alone_and_then_gone(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    other = await clinic.session()
    offered = (PROTOCOL, await ticket(api, session))
    assert (await denied(api, other.context, subprotocols=offered))[0] == 401
    assert (await denied(api, session.context, subprotocols=offered))[0] == 401


async def test_the_old_spelling_of_a_context_is_the_same_context(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    offered = (PROTOCOL, await ticket(api, session, f"text_session_{session.ref.id}"))
    async with opened(api, None, session.context, subprotocols=offered) as socket:
        assert (await socket.receive())["type"] == "welcome"


async def test_a_ticket_is_good_for_half_a_minute(api: Api, clinic: Clinic, clock: Clock) -> None:
    session = await clinic.session()
    offered = [(PROTOCOL, await ticket(api, session)) for _ in range(2)]
    await clock.advance(MINUTE / 3)
    async with opened(api, None, session.context, subprotocols=offered[0]):
        pass
    await clock.advance(MINUTE / 6)
    assert (await denied(api, session.context, subprotocols=offered[1]))[0] == 401


async def test_tickets_are_stored_as_hashes_and_do_not_pile_up(api: Api, clinic: Clinic, clock: Clock) -> None:
    session = await clinic.session()
    values = [(await ticket(api, session)).removeprefix("ticket.") for _ in range(3)]
    stored = str(await clinic.fetch("SELECT t::text FROM socket_tickets t"))
    assert not [value for value in values if value in stored]
    await clock.advance(MINUTE)
    await ticket(api, session)
    assert await clinic.fetchval("SELECT count(*) FROM socket_tickets") == 1


async def test_a_ticket_does_not_outlive_the_token_it_was_issued_for(api: Api, clinic: Clinic, owner: Owner) -> None:
    session = await clinic.session()
    offered = (PROTOCOL, await ticket(api, session))
    await owner.execute("UPDATE socket_tickets SET token_expires_at = clock() + interval '0.3 seconds'")
    async with opened(api, None, session.context, subprotocols=offered) as socket:
        assert await socket.close_code() == 4401


async def test_an_answer_with_a_ticket_is_not_kept_for_repetition(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    headers = {"Idempotency-Key": "a"}
    wanted = {"context": session.context}
    answers = [
        found(await api.as_(session.patient).post("/socket-tickets", json=wanted, headers=headers), 201)
        for _ in range(2)
    ]
    assert answers[0]["ticket"] != answers[1]["ticket"]
    assert await clinic.fetchval("SELECT count(*) FROM idempotency_keys") == 0


async def test_tickets_are_for_parties_and_readable_contexts(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    wanted = {"context": session.context}
    problem(await api.as_(clinic.operator).post("/socket-tickets", json=wanted), 403, "ROLE_NOT_ALLOWED")
    patient = api.as_(session.patient)
    problem(await patient.post("/socket-tickets", json={"context": "nonsense"}), 400, "SESSION_CONTEXT_INVALID")
    problem(await patient.post("/socket-tickets", json={}), 422, "VALIDATION_FAILED")


async def test_no_ticket_is_issued_for_what_its_holder_may_not_follow(api: Api, clinic: Clinic) -> None:
    session, other = await clinic.session(), await clinic.session()
    early = await clinic.appointment(patient=session.patient, starts_in=MINUTE)
    patient = api.as_(session.patient)
    for context, status, code in (
        (other.context, 404, "SESSION_NOT_FOUND"),
        (other.appointment_id, 404, "APPOINTMENT_NOT_FOUND"),
        (session.appointment_id, 400, "SESSION_CONTEXT_REQUIRED"),
        (early, 403, "SESSION_NOT_READY"),
    ):
        problem(await patient.post("/socket-tickets", json={"context": str(context)}), status, code)
    await patient.post(f"/sessions/{session.context}/end")
    problem(await patient.post("/socket-tickets", json={"context": session.context}), 409, "SESSION_NOT_ACTIVE")
    assert await clinic.fetchval("SELECT count(*) FROM socket_tickets") == 0


# Contexts


async def closed(api: Api, caller: Any, context: object) -> tuple[int | None, str]:
    """How a socket is closed that is opened with good credentials, and why."""
    async with opened(api, caller, context) as socket:
        code = await socket.close_code()
        [refused] = socket.seen
        assert refused["type"] == "refused"
        assert refused["correlation_id"] == socket.connection.response.headers["X-Correlation-ID"]  # type: ignore[union-attr]
        return code, refused["code"]


async def test_a_refusal_of_the_context_is_the_only_frame_and_says_with_its_code_what_it_is_about(
    api: Api, clinic: Clinic
) -> None:
    session, other = await clinic.session(), await clinic.session()
    early = await clinic.appointment(patient=session.patient, starts_in=MINUTE)
    patient = session.patient
    assert await closed(api, patient, "nonsense") == (4400, "SESSION_CONTEXT_INVALID")
    assert await closed(api, patient, session.appointment_id) == (4400, "SESSION_CONTEXT_REQUIRED")
    assert await closed(api, clinic.operator, session.context) == (4403, "ROLE_NOT_ALLOWED")
    assert await closed(api, patient, "text_session:987654") == (4404, "SESSION_NOT_FOUND")
    assert await closed(api, patient, f"call_session:{session.ref.id}") == (4404, "SESSION_NOT_FOUND")
    assert await closed(api, patient, other.context) == (4404, "SESSION_NOT_FOUND")
    assert await closed(api, patient, early) == (4409, "SESSION_NOT_READY")
    await api.as_(patient).post(f"/sessions/{session.context}/end")
    assert await closed(api, patient, session.context) == (4409, "SESSION_NOT_ACTIVE")
    failures = [
        api.runtime.metrics.sample("chat_connection_failures_total", reason=reason)
        for reason in ("auth", "upgrade", "timeout", "protocol", "other")
    ]
    assert failures == [0] * 5


async def test_a_session_of_another_tenant_does_not_exist(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    foreign = await Clinic.open(clinic.database, "Elsewhere")
    assert await closed(api, await foreign.patient(), session.context) == (4404, "SESSION_NOT_FOUND")


async def test_a_user_has_so_many_sockets_and_no_more(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(sockets_per_user=2)
    session = await clinic.session()
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(following(api, session.patient, session.context))
        assert await closed(api, session.patient, session.context) == (4429, "RATE_LIMITED")
        await stack.enter_async_context(following(api, session.doctor, session.context))
        assert api.runtime.metrics.sample("chat_connections_active") == 3
        assert api.runtime.metrics.sample("chat_active_users") == 2
    async with following(api, session.patient, session.context):
        assert api.runtime.metrics.sample("chat_connections_active") == 1
    assert api.runtime.metrics.sample("chat_connections_opened_total") == 4


async def test_a_database_that_is_away_denies_sockets_for_a_moment(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(pool_size=1)
    session = await clinic.session()
    async with api.runtime.database.autocommit():
        status, body = await denied(api, session.context, session.patient)
    assert (status, body["code"]) == (503, "OVERLOADED")
    assert api.runtime.metrics.sample("chat_connection_failures_total", reason="other") == 1


async def test_a_socket_ends_with_its_token(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    claims = jwt.decode(token_of(session.patient), options={"verify_signature": False})
    # A token is accepted for a minute after its end.
    short = jwt.encode(claims | {"exp": time.time() - 59}, SECRET)
    headers = {"Authorization": f"Bearer {short}"}
    async with opened(api, None, session.context, headers=headers) as socket:
        assert await socket.close_code() == 4401
        assert socket.seen[0]["type"] == "welcome"
