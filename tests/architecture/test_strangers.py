"""What the API answers to somebody without a token: 401 everywhere, but for the list in `public.py`."""

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import jwt
import orjson
import pytest
from fastapi.routing import APIWebSocketRoute, iter_route_contexts
from websockets.exceptions import InvalidStatus

from libs.guardrails import Principal, Reason, Role
from services.api.guards import GuardedRoute
from services.api.main import ROOMS
from services.api.public import PUBLIC
from tests.clinic import Clinic
from tests.running import SECRET, Api, token_of
from tests.sockets import PROTOCOL, opened

VALUES = {"context": "text_session:1", "code": "NOT_FOUND"}
BODIES: dict[str, dict[str, Any]] = {
    "no body": {},
    "an empty object": {"json": {}},
    "broken JSON": {"content": b'{"doctor_id": ', "headers": {"Content-Type": "application/json"}},
    "no JSON at all": {"content": b"\xff\x00", "headers": {"Content-Type": "application/json"}},
    "a form": {"data": {"doctor_id": "1"}},
    "100 kB": {"content": b" " * 100_000, "headers": {"Content-Type": "application/json"}},
}


def filled(template: str) -> str:
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda match: VALUES.get(match[1], "1"), template)


def every_address(api: Api) -> Iterator[tuple[str, str]]:
    """Method and path template of everything that is routed, in the schema or not; sockets apart."""
    for route in iter_route_contexts(api.app.routes):
        assert route.path is not None
        for method in route.methods or ():
            yield method, route.path


def every_socket(api: Api) -> list[str]:
    return [route.path for route in iter_route_contexts(api.app.routes) if route.path and not route.methods]


def assert_unauthenticated(response: httpx2.Response) -> None:
    assert response.status_code == 401, f"{response.request.method} {response.url}: {response.text}"
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["WWW-Authenticate"] == "Bearer"
    problem = response.json()
    assert problem["code"] == Reason.UNAUTHENTICATED.code
    assert problem["status"] == 401
    assert problem["correlation_id"]


async def test_strangers_are_answered_by_the_public_list_alone(api: Api) -> None:
    answered = set()
    for method, path in every_address(api):
        response = await api.anonymous.request(method, filled(path))
        if response.status_code != 401:
            answered.add(path)
    assert answered == PUBLIC


@pytest.mark.parametrize("offered", [(), (PROTOCOL,), (PROTOCOL, "ticket."), (PROTOCOL, "ticket.nonsense")])
async def test_strangers_get_no_socket_whatever_they_offer(api: Api, offered: tuple[str, ...]) -> None:
    sockets = every_socket(api)
    assert sockets == ["/api/v1/chat/{context}/socket"]
    for template in sockets:
        for context in ("text_session:1", "1", "direct_session_1", "nonsense", "text_session:0", "９"):
            url = api.url.replace("http", "ws", 1) + template.format(context=quote(context))
            with pytest.raises(InvalidStatus) as denied:
                async with opened(api, None, context, url=url, subprotocols=offered):
                    pass
            response = denied.value.response
            assert response.status_code == 401
            assert response.headers["Content-Type"] == "application/problem+json"
            assert orjson.loads(response.body or b"")["code"] == Reason.UNAUTHENTICATED.code


async def test_the_schema_names_every_guarded_address(api: Api) -> None:
    schema = (await api.anonymous.get("/openapi.json")).json()
    described = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    assert described == {(method, path) for method, path in every_address(api) if not is_not_for_clients(path)}


def is_not_for_clients(path: str) -> bool:
    return path.startswith(("/docs", "/openapi.json", "/internal/"))


@pytest.mark.parametrize("body", BODIES)
async def test_strangers_get_401_before_their_body_is_looked_at(api: Api, body: str) -> None:
    schema = (await api.anonymous.get("/openapi.json")).json()
    addresses = [
        (method, path) for path, methods in schema["paths"].items() if path not in PUBLIC for method in methods
    ]
    assert len(addresses) > 15
    for method, path in addresses:
        assert_unauthenticated(await api.anonymous.request(method.upper(), filled(path), **BODIES[body]))


async def test_strangers_get_401_although_their_body_never_arrives(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /api/v1/appointments HTTP/1.1\r\nHost: test\r\n"
        b"Content-Type: application/json\r\nContent-Length: 60000\r\n\r\n"
    )
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()


@pytest.mark.parametrize(
    "length", ["Content-Length: 200000000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\nfffffff\r\n"]
)
async def test_the_200_megabytes_of_a_stranger_are_not_read(api: Api, length: str) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST /api/v1/appointments HTTP/1.1\r\nHost: test\r\n{length}".encode())
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 200_000_000:
                writer.write(b" " * 100_000)
                await writer.drain()
                sent += 100_000
    writer.close()
    assert sent < 20_000_000, "No more than the buffers in between hold."


async def test_strangers_do_not_learn_which_identifiers_are_readable(api: Api) -> None:
    for context in ("text_session:1", "1", "direct_session_1", "nonsense", "text_session:0", "９"):
        assert_unauthenticated(await api.anonymous.get(f"/api/v1/chat/{context}/messages"))
        assert_unauthenticated(await api.anonymous.post(f"/api/v1/chat/{context}/messages", json={"body": 1}))
        assert_unauthenticated(await api.anonymous.get(f"/api/v1/sessions/{context}"))


def forgeries(principal: Principal) -> dict[str, str]:
    claims = jwt.decode(token_of(principal), options={"verify_signature": False})

    def signed(key: str = SECRET, **changes: Any) -> str:
        return "Bearer " + jwt.encode({k: v for k, v in {**claims, **changes}.items() if v is not None}, key)

    unsigned = jwt.encode(claims, "", algorithm="none")
    return {
        "another key": signed("another secret of tests, long enough as well"),
        "expired": signed(exp=1),
        "without an end": signed(exp=None),
        "another audience": signed(aud="elsewhere"),
        "another issuer": signed(iss="elsewhere"),
        "unsigned": f"Bearer {unsigned}",
        "another role": signed(role="operator"),
        "an unknown role": signed(role="king"),
        "another tenant": signed(tenant=principal.tenant_id + 1),
        "an unknown user": signed(sub="987654"),
        "a user who is no id": signed(sub="9" * 40),
        "a tenant that is no id": signed(tenant=True),
        "another scheme": "Basic " + token_of(principal),
        "no scheme": token_of(principal),
        "nothing": "Bearer",
        "nonsense": "Bearer nonsense",
    }


FORGERIES = tuple(forgeries(Principal(1, 1, Role.PATIENT)))


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_token_that_is_not_ours_opens_nothing(api: Api, clinic: Clinic, forgery: str) -> None:
    session = await clinic.session()
    headers = {"Authorization": forgeries(session.patient)[forgery]}
    message = {"client_message_id": "1", "body": "Hello"}
    assert_unauthenticated(await api.anonymous.get("/api/v1/me", headers=headers))
    chat = f"/api/v1/chat/{session.context}/messages"
    assert_unauthenticated(await api.anonymous.get(chat, headers=headers))
    assert_unauthenticated(await api.anonymous.post(chat, headers=headers, json=message))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("identifier", ["context", "nonsense", "direct_session_1", "1"])
async def test_a_user_who_is_no_longer_active_is_a_stranger(
    api: Api, clinic: Clinic, identifier: str, body: str
) -> None:
    session = await clinic.session()
    await clinic.fetch("UPDATE users SET active = false WHERE id = $1", session.patient.user_id)
    context = session.context if identifier == "context" else identifier
    client = api.as_(session.patient)
    assert_unauthenticated(await client.post(f"/chat/{context}/messages", **BODIES[body]))
    assert_unauthenticated(await client.get(f"/chat/{context}/messages"))
    assert_unauthenticated(await client.post(f"/sessions/{context}/end", **BODIES[body]))
    assert_unauthenticated(await client.get("/me"))


def test_every_room_is_made_of_guarded_routes() -> None:
    routes: list[Any] = [route for room in ROOMS for route in room.routes]
    assert routes
    unguarded = [route for route in routes if not isinstance(route, GuardedRoute)]
    assert [route for route in unguarded if not isinstance(route, APIWebSocketRoute)] == []
    # Whatever it wraps, this is what the routes of sockets call.
    assert {route.endpoint.__qualname__ for route in unguarded} == {
        "guarded_websocket.<locals>.declare.<locals>.guarded"
    }
