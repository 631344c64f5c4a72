"""The guard nets of the API: what a route may ask for, and why none can forget to ask.

A route says in its signature what it needs:

    context: Can[GetMessages]           a sealed SessionContext, its facts locked in the request's transaction
    context: Annotated[SessionContext[EndSession], can(EndSession, appointment)]
                                        the same of what `appointment`, a dependency, finds in the request
    claim: Claimed[SendMessage]         the claim alone, for operations whose own statement decides
    caller: Annotated[Principal, acting(Permission.BOOK_APPOINTMENTS)]
    tx: Tx                              the request's transaction, committed before the response is sent

A POST that creates or charges something takes an `Idempotency-Key` by itself; chat messages have
`client_message_id` for that. One that asks for no body takes none but an empty object.

`GuardedRoute` raises at import when a route asks for none of the first four. It authenticates before
the body is read, and opens contexts after the whole request is validated, so that refusals come in the
promised order: token, size, syntax, identifier, schema, existence, role, flags, state.
"""

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar, cast

import asyncpg
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from libs.domain.db import is_conflict
from libs.domain.runtime import Runtime
from libs.domain.transaction import Transaction
from libs.guardrails import (
    AppointmentRef,
    Claim,
    Family,
    Operation,
    Permission,
    Principal,
    Reason,
    Refused,
    SessionContext,
    SessionRef,
    addresses,
    parse_context,
)
from libs.observability.context import note
from services.api import idempotency
from services.api.direct import Handler, directly, takes_claim_and_body
from services.api.errors import refusal
from services.api.idempotency import IdempotencyKey
from services.api.identity import Identity, Token
from services.api.realtime.handshake import PROTOCOL, Handshake
from services.api.schemas import Empty

Op = TypeVar("Op", bound=Operation)


@dataclass(frozen=True, slots=True)
class Net:
    """Marks a dependency as a guard. `session` when it guards a session; `complete` when the operation's
    own statement also checks that the caller is still active; `charges` when the operation may cost something."""

    session: bool
    complete: bool = False
    charges: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """A guard that is opened once the whole request has turned out to be valid."""

    open: Callable[[], Awaitable[Any]]


def runtime_of(request: HTTPConnection) -> Runtime:
    return cast(Runtime, request.app.state.runtime)


async def _transaction(request: Request) -> AsyncIterator[Transaction]:
    async with runtime_of(request).begin() as tx:
        yield tx


# With any other scope FastAPI would commit after the response, and a failed commit would answer 200.
Tx = Annotated[Transaction, Depends(_transaction, scope="function")]


async def _claim_key(request: Request, tx: Tx, idempotency_key: IdempotencyKey = None) -> None:
    if idempotency_key is not None:
        await idempotency.claim(request, tx, idempotency_key)


async def _no_body(body: Empty | None = None) -> None:
    """Has the body of a route that wants none read and refused like any other, instead of ignored."""


ContextPath = Annotated[
    str,
    Path(
        description="`text_session:{id}` or `call_session:{id}`; under `/chat` also an appointment id.",
        examples=["text_session:7"],
    ),
]


Subject: TypeAlias = SessionRef | AppointmentRef


def _claim(request: HTTPConnection, operation: type[Op], subject: Subject) -> Claim[Op]:
    if not addresses(operation, subject):
        raise Refused(Reason.SESSION_CONTEXT_INVALID)
    return Claim(operation, request.state.principal, subject)


def can(operation: type[Operation], named: Callable[..., Awaitable[Subject]]) -> Any:
    """The dependency of a route whose request does not name its session as `{context}`: `named`, itself a
    dependency, finds out what it names. The route gets a `SessionContext`, as from `Can`."""

    async def context_of(request: Request, subject: Annotated[Subject, Depends(named)], tx: Tx) -> Pending:
        claim = _claim(request, operation, subject)
        return Pending(functools.partial(runtime_of(request).door.open, tx, claim))

    charges = operation.family is Family.BILLING and not operation.reads
    context_of.net = Net(session=True, charges=charges)  # type: ignore[attr-defined]
    return Depends(context_of)


async def _in_path(context: ContextPath) -> Subject:
    return parse_context(context)


if TYPE_CHECKING:
    Can: TypeAlias = SessionContext
    Claimed: TypeAlias = Claim
else:

    class Can:
        def __class_getitem__(cls, operation: type[Operation]) -> Any:
            return Annotated[SessionContext[operation], can(operation, _in_path)]

    class Claimed:
        def __class_getitem__(cls, operation: type[Operation]) -> Any:
            async def claim_of(request: Request, context: ContextPath) -> Claim:
                return _claim(request, operation, parse_context(context))

            claim_of.net = Net(session=True, complete=True)
            return Annotated[Claim[operation], Depends(claim_of)]


def acting(permission: Permission) -> Any:
    """The dependency of a route that concerns no session: the caller, if the role has the permission."""

    async def caller_of(request: Request) -> Pending:
        principal: Principal = request.state.principal

        async def permitted() -> Principal:
            if not principal.may(permission):
                raise Refused(Reason.ROLE_NOT_ALLOWED)
            return principal

        return Pending(permitted)

    caller_of.net = Net(session=False)  # type: ignore[attr-defined]
    return Depends(caller_of)


class UnguardedRouteError(TypeError):
    """A route was declared that nothing guards."""


class GuardedRoute(APIRoute):
    """A route that cannot be declared without a guard; see the module."""

    sessions_only = False
    replays = True

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        dependencies = list(options.pop("dependencies", None) or ())
        asked = get_dependant(path=path, call=endpoint)
        creates = options.get("status_code") == 201
        if (creates and self.replays) or any(net.charges for net in _nets(asked)):
            dependencies.append(Depends(_claim_key))
        if _BODIED.intersection(options.get("methods") or ()) and not asked.body_params:
            dependencies.append(Depends(_no_body))
        options["dependencies"] = dependencies
        super().__init__(path, _opening(endpoint), **options)
        nets = [net for dependency in asked.dependencies if (net := getattr(dependency.call, "net", None))]
        if len(nets) < len(list(_nets(self.dependant))):
            raise UnguardedRouteError(
                f"{endpoint.__qualname__} ({path}) has a guard that nothing opens: only one among"
                " the parameters of the endpoint itself is."
            )
        if not nets or (self.sessions_only and not any(net.session for net in nets)):
            wanted = "Can[...] or Claimed[...]" if self.sessions_only else "Can[...], Claimed[...] or acting(...)"
            raise UnguardedRouteError(f"{endpoint.__qualname__} ({path}) takes no {wanted}.")

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = _committing(super().get_route_handler())
        statement_decides = any(net.complete for net in _nets(self.dependant))
        if self.is_short:
            handle = directly(self, handle)

        async def guarded(request: Request) -> Response:
            identity: Identity = request.app.state.identity
            token = await identity.authenticate(request)
            principal = _know(request, token)
            if not statement_decides:
                await _require_active(request, identity, principal)
            try:
                return await _retried(handle, request)
            except idempotency.Replayed as replayed:
                return replayed.response
            except (RequestValidationError, HTTPException, Refused) as error:
                if statement_decides and _came_before_the_statement(error):
                    await _require_active(request, identity, principal)
                if isinstance(error, Refused):
                    await runtime_of(request).recorder.room()
                raise

        return guarded

    @property
    def is_short(self) -> bool:
        """Whether requests go the short way; see `services.api.direct`."""
        nets = [getattr(dependency.call, "net", None) for dependency in self.dependant.dependencies]
        return takes_claim_and_body(self.dependant) and all(net and net.complete for net in nets)


class UnrepeatableRoute(GuardedRoute):
    """A route that creates something and takes no idempotency key: its answers must not be stored."""

    replays = False


class SessionRoute(UnrepeatableRoute):
    """A route of a room in which everything live happens: only a session context opens it."""

    sessions_only = True


class GuardedRouter(APIRouter):
    """A router that knows no way to declare a socket but `guarded_websocket`."""

    def add_api_websocket_route(self, path: str, endpoint: Callable[..., Any], *_: Any, **__: Any) -> None:
        raise UnguardedRouteError(f"{endpoint.__qualname__} ({path}) is not declared by guarded_websocket.")

    add_websocket_route = add_api_websocket_route


BASE: Final = "/api/v1"


def guarded_router(
    prefix: str, *, tag: str, base: str = BASE, sessions_only: bool = False, replays: bool = True
) -> GuardedRouter:
    """The only way to make a router outside of `public.py`. Without `replays`, or with `sessions_only`, what creates
    something takes no idempotency key; what charges always takes one."""
    route = SessionRoute if sessions_only else GuardedRoute if replays else UnrepeatableRoute
    return GuardedRouter(
        prefix=base + prefix, tags=[tag], route_class=route, generate_unique_id_function=attrgetter("name")
    )


SocketEndpoint: TypeAlias = Callable[[WebSocket, Claim[Op], Token], Awaitable[None]]


def guarded_websocket(
    router: GuardedRouter, path: str, operation: type[Op]
) -> Callable[[SocketEndpoint[Op]], SocketEndpoint[Op]]:
    """Declares a socket on a session. Its endpoint is called with a claim to `operation`, as `Claimed` would have
    it, once the caller is known and active and the handshake is done; the token says how long it may last. A
    refusal that the endpoint raises is the last frame of the socket."""

    def declare(endpoint: SocketEndpoint[Op]) -> SocketEndpoint[Op]:
        async def guarded(websocket: WebSocket) -> None:
            handshake: Handshake = websocket.app.state.handshake
            try:
                token = await handshake.admit(websocket)
                principal = _know(websocket, token)
                await _require_active(websocket, websocket.app.state.identity, principal)
            except Exception as error:
                await handshake.deny(websocket, refusal(error))
                return
            await websocket.accept(PROTOCOL)
            try:
                subject = parse_context(websocket.path_params["context"])
                await endpoint(websocket, _claim(websocket, operation, subject), token)
            except Exception as error:
                handshake.refuse(websocket, refusal(error))

        APIRouter.add_api_websocket_route(router, path, guarded, name=endpoint.__name__)
        return endpoint

    return declare


CONFLICT_RETRIES: Final = 3
CONFLICT_PAUSE_SECONDS: Final = 0.05


def _committing(handle: Handler) -> Handler:
    """The handler, but one whose transaction is committed before it answers."""

    async def committing(request: Request) -> Response:
        async with AsyncExitStack() as transaction:
            request.scope["fastapi_function_astack"] = transaction  # where the framework closes what `Tx` opened
            response = await handle(request)
            await idempotency.keep(request, response)
        return response

    return committing


async def _retried(handle: Handler, request: Request) -> Response:
    """The answer of `handle`. A deadlock or a serialisation failure has undone all of what it did, and the request is
    handled anew, a few times."""
    for retries_left in reversed(range(CONFLICT_RETRIES + 1)):
        try:
            return await handle(request)
        except (DBAPIError, asyncpg.PostgresError) as error:
            if not (retries_left and is_conflict(error)):
                raise
        await asyncio.sleep(random.uniform(0, CONFLICT_PAUSE_SECONDS))  # noqa: S311 not for secrecy
    raise AssertionError("unreachable")


_ACTIVE = "SELECT EXISTS (SELECT FROM users WHERE tenant_id = $1 AND id = $2 AND role = $3 AND active)"


def _know(request: HTTPConnection, token: Token) -> Principal:
    principal = token.principal
    request.state.token, request.state.principal = token, principal
    note(tenant_id=principal.tenant_id, user_id=principal.user_id)
    return principal


async def _require_active(request: HTTPConnection, identity: Identity, principal: Principal) -> None:
    async with runtime_of(request).database.autocommit() as connection:
        active = await connection.fetchval(_ACTIVE, principal.tenant_id, principal.user_id, principal.role.value)
    if not active:
        raise identity.refuse(request, "bad_credentials")


def _came_before_the_statement(error: Exception) -> bool:
    """Whether the request ended before the operation's statement could see if the caller is active."""
    return not isinstance(error, Refused) or error.reason is Reason.SESSION_CONTEXT_INVALID


def _opening(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The endpoint, called with its pending guards opened in the order of its parameters."""

    @functools.wraps(endpoint)
    async def opened(**values: Any) -> Any:
        for name, value in values.items():
            if isinstance(value, Pending):
                values[name] = await value.open()
        return await endpoint(**values)

    return opened


_BODIED: Final = {"POST", "PUT", "PATCH"}


def _nets(dependant: Dependant) -> Iterator[Net]:
    net = getattr(dependant.call, "net", None)
    if net is not None:
        yield net
    for dependency in dependant.dependencies:
        yield from _nets(dependency)
