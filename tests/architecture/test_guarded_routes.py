"""A route that nothing guards fails when its module is imported, not when somebody finds it."""

from typing import Annotated

import pytest
from fastapi import Depends
from starlette.websockets import WebSocket

from libs.guardrails import Claim, Permission, Principal, SessionContext
from libs.guardrails.operations import GetMessages, Join, SendMessage
from services.api.chat.routes import router as chat
from services.api.guards import (
    Can,
    Claimed,
    GuardedRoute,
    Tx,
    UnguardedRouteError,
    acting,
    guarded_router,
    guarded_websocket,
)
from services.api.identity import Token

Somebody = Annotated[Principal, acting(Permission.SEE_ONESELF)]


async def nothing() -> None: ...


async def only_a_transaction(tx: Tx) -> None: ...


async def only_a_path(context: str) -> None: ...


async def only_a_principal_from_the_query(user_id: int, role: str) -> None: ...


async def acts(caller: Somebody) -> None: ...


async def reads(context: Can[GetMessages]) -> None: ...


async def sends(claim: Claimed[SendMessage]) -> None: ...


async def joins(websocket: WebSocket, claim: Claim[Join], token: Token) -> None: ...


async def acts_and_reads(caller: Somebody, context: Can[GetMessages]) -> None: ...


async def asked_by_a_dependency(_: Annotated[None, Depends(acts)]) -> None: ...


async def asked_by_a_dependency_as_well(caller: Somebody, _: Annotated[None, Depends(reads)]) -> None: ...


@pytest.mark.parametrize("method", ["get", "post", "put", "patch", "delete"])
@pytest.mark.parametrize("sessions_only", [False, True])
def test_a_route_without_a_guard_cannot_be_declared(method: str, sessions_only: bool) -> None:
    router = guarded_router("/room", tag="room", sessions_only=sessions_only)
    for endpoint in (nothing, only_a_transaction, only_a_path, only_a_principal_from_the_query):
        with pytest.raises(UnguardedRouteError, match=endpoint.__name__):
            getattr(router, method)("/{context}")(endpoint)
    assert router.routes == []


@pytest.mark.parametrize("declare", ["websocket", "websocket_route"])
@pytest.mark.parametrize("sessions_only", [False, True])
def test_a_socket_is_declared_in_one_way(declare: str, sessions_only: bool) -> None:
    router = guarded_router("/chat/{context}", tag="chat", sessions_only=sessions_only)
    with pytest.raises(UnguardedRouteError, match=r"nothing \(/socket\) is not declared by guarded_websocket"):
        getattr(router, declare)("/socket")(nothing)
    for add in (router.add_api_websocket_route, router.add_websocket_route):
        with pytest.raises(UnguardedRouteError):
            add("/socket", nothing)
    assert router.routes == []
    guarded_websocket(router, "/socket", Join)(joins)
    assert len(router.routes) == 1


def test_an_acting_caller_does_not_open_a_room_of_sessions() -> None:
    router = guarded_router("/chat", tag="chat", sessions_only=True)
    with pytest.raises(UnguardedRouteError, match=r"takes no Can\[\.\.\.\] or Claimed"):
        router.get("/{context}")(acts)


@pytest.mark.parametrize("endpoint", [reads, sends, acts_and_reads])
def test_a_session_guard_opens_a_room_of_sessions(endpoint: object) -> None:
    router = guarded_router("/chat/{context}", tag="chat", sessions_only=True)
    router.get("/messages")(endpoint)  # type: ignore[type-var]
    assert len(router.routes) == 1


@pytest.mark.parametrize("endpoint", [asked_by_a_dependency, asked_by_a_dependency_as_well])
def test_a_guard_that_would_not_be_opened_is_none(endpoint: object) -> None:
    router = guarded_router("/room/{context}", tag="room")
    with pytest.raises(UnguardedRouteError, match="a guard that nothing opens"):
        router.get("/things")(endpoint)  # type: ignore[type-var]
    with pytest.raises(UnguardedRouteError, match="a guard that nothing opens"):
        router.get("/things", dependencies=[acting(Permission.SEE_ONESELF)])(acts)
    assert router.routes == []


@pytest.mark.parametrize("endpoint", [acts, reads, sends])
def test_any_guard_opens_any_other_room(endpoint: object) -> None:
    router = guarded_router("/room/{context}", tag="room")
    router.get("/things")(endpoint)  # type: ignore[type-var]
    assert len(router.routes) == 1


def test_sending_goes_the_short_way() -> None:
    # Whatever else the route asked for would send each message the long way, and nothing but the speed would tell.
    assert [route.name for route in chat.routes if isinstance(route, GuardedRoute) and route.is_short] == [
        "send_message"
    ]


def test_to_the_type_checker_the_guards_are_what_the_domain_asks_for() -> None:
    import typing

    wanted = typing.get_type_hints(reads, include_extras=True)["context"].__origin__
    assert wanted == SessionContext[GetMessages]
    assert typing.get_type_hints(sends, include_extras=True)["claim"].__origin__ == Claim[SendMessage]
