"""What every HTTP request says about itself: a correlation id, a duration, one log line."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from opentelemetry import trace

from libs.observability.context import CORRELATION_ID, accept_correlation_id, bind, client_family
from libs.observability.logging import get_logger
from libs.observability.registry import Metrics
from libs.observability.tracing import exemplar, served

_log: Final = get_logger("http", "infra")

HEADER: Final = b"x-correlation-id"
SLOW_SECONDS: Final = 1.0

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What the headers of an answer are sent with: of a request, of a socket, and of a socket that is denied.
_BEGINNINGS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})

UNMATCHED: Final = "unmatched"
"""The route of a request that none serves."""

_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})

_TRACE: Final = frozenset({b"traceparent", b"tracestate"})
# Whose trace and whose line of work a request belongs to.
_ORIGIN: Final = _TRACE | {b"baggage", HEADER}


class RequestTracing:
    """Pure ASGI middleware around an instrumented application: the trace of each request.

    Paths in `untraced`, such as those of probes, have no spans, and neither have sockets, which last for hours. What
    begins with one of the `foreign` prefixes is called by other systems, with whose traces and correlation ids ours
    have nothing to do.
    """

    def __init__(self, app: App, *, untraced: frozenset[str] = frozenset(), foreign: tuple[str, ...] = ()) -> None:
        self._app = app
        self._untraced = untraced
        self._foreign = foreign

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path.startswith(self._foreign):
            scope["headers"] = [header for header in scope["headers"] if header[0] not in _ORIGIN]
        headers = {
            name.decode(): value.decode("latin-1") for name, value in reversed(scope["headers"]) if name in _TRACE
        }
        recorded = scope["type"] == "http" and path not in self._untraced
        with served(scope.get("method", "GET"), headers, recorded=recorded):
            await self._app(scope, receive, send)


class HttpTelemetry:
    """Pure ASGI middleware. `route_of` answers the template of the route that served a scope, such as
    `/appointments/{id}`, or `unmatched`: paths themselves are never labels.

    `quiet` are templates whose requests are measured but neither counted as answers nor logged, such as those of
    probes.
    """

    def __init__(
        self, app: App, *, metrics: Metrics, route_of: Callable[[Scope], str], quiet: frozenset[str] = frozenset()
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._route_of = route_of
        self._quiet = quiet
        self._in_flight = metrics.gauge("http_requests_in_flight")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))  # of one that is repeated, the first counts
        correlation_id = accept_correlation_id(headers.get(HEADER, b"").decode("latin-1"))
        client = client_family(headers.get(b"user-agent", b"").decode("latin-1"))
        trace.get_current_span().set_attribute(CORRELATION_ID, correlation_id)
        with bind(correlation_id=correlation_id, client=client):

            async def named(message: Message) -> None:
                if message["type"] in _BEGINNINGS:
                    message["headers"] = [*message.get("headers", ()), (HEADER, correlation_id.encode())]
                await send(message)

            if scope["type"] == "http":
                await self._serve(scope, receive, named)
            else:
                await self._app(scope, receive, named)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        self._in_flight.inc()
        try:
            await self._app(scope, receive, answered)
        finally:
            self._in_flight.dec()
            self._tell(scope, status, time.perf_counter() - began)

    def _tell(self, scope: Scope, status: int, took: float) -> None:
        route, method = self._route_of(scope), scope["method"]
        label = method if method in _METHODS else "OTHER"
        _describe(route, label, status)
        duration = self._metrics.histogram("http_request_duration_seconds", route, label, str(status))
        duration.observe(took, exemplar())
        if route not in self._quiet:
            self._metrics.counter("http_responses_total", f"{status // 100}xx").inc()
        if route in self._quiet and status < 500:
            return
        latency_ms = round(took * 1000, 2)
        _log.info("http_request", method=label, route=route, status=status, latency_ms=latency_ms)
        if took > SLOW_SECONDS:
            _log.warning("slow_operation", route=route, latency_ms=latency_ms)


def _describe(route: str, method: str, status: int) -> None:
    """Says on the span of the request what is known at its end; instrumentation has done so by itself."""
    current = trace.get_current_span()
    if not current.is_recording():
        return
    current.set_attributes({"http.request.method": method, "http.response.status_code": status})
    current.update_name(method)
    if route != UNMATCHED:
        current.set_attribute("http.route", route)
        current.update_name(f"{method} {route}")
    if status >= 500:
        current.set_status(trace.StatusCode.ERROR)
