"""Every refusal and every fault leaves as the same problem document (RFC 9457)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import asyncpg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs.domain.db import driver_error, is_transient
from libs.domain.telemetry import logger, module_of
from libs.guardrails import Kind, Reason, Refused
from libs.observability.context import correlation_id
from libs.observability.registry import Metrics
from libs.observability.tracing import record_error
from services.api import security

_log: Final = logger("errors")

STATUS: Final[dict[Kind, int]] = {
    Kind.UNAUTHENTICATED: 401,
    Kind.BAD_REQUEST: 400,
    Kind.INVALID: 422,
    Kind.PAYMENT_REQUIRED: 402,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.METHOD_NOT_ALLOWED: 405,
    Kind.CONFLICT: 409,
    Kind.TIMEOUT: 408,
    Kind.TOO_LARGE: 413,
    Kind.RATE_LIMITED: 429,
    Kind.OVERLOADED: 503,
    Kind.INTERNAL: 500,
}

_BY_STATUS: Final = {
    404: Reason.NOT_FOUND,
    405: Reason.METHOD_NOT_ALLOWED,
    408: Reason.REQUEST_TIMEOUT,
    413: Reason.PAYLOAD_TOO_LARGE,
    503: Reason.OVERLOADED,
}

# The closed set of `errors_total{type}`.
_ERROR_TYPE: Final = {
    Kind.UNAUTHENTICATED: "authentication",
    Kind.FORBIDDEN: "authorization",
    Kind.INVALID: "validation",
    Kind.BAD_REQUEST: "validation",
    Kind.OVERLOADED: "timeout",
    Kind.INTERNAL: "system",
}

OVERLOAD_RETRY_AFTER: Final = 1
MEDIA_TYPE: Final = "application/problem+json"


def problem(refused: Refused, request: HTTPConnection, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer of a refusal. `headers` win over those that belong to the reason."""
    reason, facts = refused.reason, refused.facts
    own = {}
    if "retry_after" in facts:
        own["Retry-After"] = str(facts["retry_after"])
    if reason is Reason.UNAUTHENTICATED:
        own["WWW-Authenticate"] = "Bearer"
    body = document(refused, request)
    return JSONResponse(body, body["status"], own | dict(headers or {}), media_type=MEDIA_TYPE)


def document(refused: Refused, request: HTTPConnection) -> dict[str, Any]:
    """The problem document of a refusal; it holds facts of ours and never the client's own input."""
    reason, facts = refused.reason, dict(refused.facts)
    body: dict[str, Any] = {
        "type": f"/problems/{reason.code}",
        "title": reason.title,
        "status": refused.status or STATUS[reason.kind],
        "detail": refused.detail or reason.help,
        # As it was asked for: still percent-encoded, and whatever the Host header says.
        "instance": request.scope["raw_path"].decode("latin-1"),
        "code": reason.code,
        "correlation_id": correlation_id(),
        **facts,
    }
    if reason.next_action:
        method, address = reason.next_action
        body["next_action"] = {"method": method, "href": address.format_map(facts)}
    return body


def refusal(error: Exception) -> Refused:
    """How whatever was raised is answered. What is no refusal is logged, and told of by the span of the request."""
    if isinstance(error, Refused):
        return error
    record_error(error)
    if is_transient(error):
        _log.warning("database_unavailable", exception_type=type(driver_error(error)).__name__)
        return Refused(Reason.OVERLOADED, retry_after=OVERLOAD_RETRY_AFTER)
    _log.error("unhandled_error", exc_info=error, error_code=Reason.INTERNAL_ERROR.code)
    return Refused(Reason.INTERNAL_ERROR)


def validation_errors(faults: Iterable[Any]) -> Refused:
    """Points at each of pydantic's faults without repeating what was sent, neither values nor unknown names. The
    first part of a location says what was at fault, such as `body`."""
    errors = []
    for fault in faults:
        if fault["type"] == "json_invalid":
            return unreadable_json(fault["loc"][0])
        unknown_field = fault["type"] == "extra_forbidden"
        where = fault["loc"][:-1] if unknown_field else fault["loc"]
        detail = "Has a field that is not known here." if unknown_field else _detail(fault)
        pointer = "".join(f"/{part}" for part in where[1:])
        error = {"pointer": pointer, "in": where[0], "detail": detail}
        if error not in errors:  # what a guard reads as well as the route is judged twice
            errors.append(error)
    return Refused(Reason.VALIDATION_FAILED, errors=errors)


def unreadable_json(where: str = "body") -> Refused:
    errors = [{"pointer": "", "in": where, "detail": f"The {where} is not readable as JSON."}]
    return Refused(Reason.VALIDATION_FAILED, status=400, errors=errors)


_QUOTES_INPUT: Final = {"value_error", "assertion_error", "union_tag_invalid"}


def _detail(fault: Any) -> str:
    """Pydantic's own sentence, unless it might quote the input."""
    if fault["type"] in _QUOTES_INPUT or "input" in str(fault.get("ctx", {})):
        return "The value is not accepted here."
    return str(fault["msg"])


def install(app: FastAPI, metrics: Metrics) -> None:
    """Registers the handlers; whatever is raised below ends in one of them."""

    def answer(request: Request, refused: Refused, headers: Mapping[str, str] | None = None) -> JSONResponse:
        kind = refused.reason.kind
        if error_type := _ERROR_TYPE.get(kind):
            metrics.counter("errors_total", _module(request), error_type).inc()
        security.notice(refused, request, metrics)
        return problem(refused, request, headers)

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(request, validation_errors(error.errors()))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:
            return answer(request, unreadable_json())
        reason = _BY_STATUS.get(error.status_code, Reason.INTERNAL_ERROR)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(app, request.scope["endpoint"])
        return answer(request, Refused(reason, status=error.status_code), headers)

    async def on_any(request: Request, error: Exception) -> JSONResponse:
        return answer(request, refusal(error))

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for raised in (
        Refused,
        DBAPIError,
        PoolTimeout,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
        asyncio.TimeoutError,
    ):
        app.add_exception_handler(raised, on_any)
    app.add_middleware(FaultBarrier, answer=on_any)


def _module(request: HTTPConnection) -> str:
    """Whose route it was, by the room that declares it."""
    package, _, room = getattr(request.scope.get("endpoint"), "__module__", "").rpartition(".")[0].rpartition(".")
    return module_of(room if package == "services.api" else "")


def _allowed(app: FastAPI, endpoint: Any) -> str:
    """All methods of an address; the framework names those of the first of its routes alone."""
    routes = list(iter_route_contexts(app.routes))
    path = next(route.path for route in routes if route.endpoint is endpoint)
    return ", ".join(sorted(method for route in routes if route.path == path for method in route.methods or ()))


class FaultBarrier:
    """Answers what no handler knows, inside of all other middleware. The framework's own place for that
    is outside of it, where the correlation id is gone."""

    def __init__(self, app: ASGIApp, answer: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noticed(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception as error:
            response = await self._answer(Request(scope), error)
            if started:
                raise
            await response(scope, receive, send)
