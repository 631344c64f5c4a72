"""What every HTTP request says about itself: a correlation id, a duration, one log line."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from opentelemetry import trace

from libs.observability.context import CORRELATION_ID, accept_correlation_id, bind, client_family
from libs.observability.logging import get_logger
from libs.observability.registry import Metrics
from libs.observability.tracing import sampled_first, sampled_trace_id

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

_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class HeadSampling:
    """Pure ASGI middleware around an instrumented application. Instrumentation describes each request at length
    before the sampler is asked; here it is asked first, and only requests whose trace is kept are described."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        with sampled_first(headers):
            await self._app(scope, receive, send)


class HttpTelemetry:
    """Pure ASGI middleware. `route_of` answers the template of the route that served a scope, such as
    `/appointments/{id}`, or `unmatched`: paths themselves are never labels.

    `quiet` are templates whose requests are counted but not logged, such as those of probes.
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
        trace_id = sampled_trace_id()
        duration = self._metrics.histogram("http_request_duration_seconds", route, label, str(status))
        duration.observe(took, {"trace_id": trace_id} if trace_id else None)
        if route in self._quiet and status < 500:
            return
        latency_ms = round(took * 1000, 2)
        _log.info("http_request", method=label, route=route, status=status, latency_ms=latency_ms)
        if took > SLOW_SECONDS:
            _log.warning("slow_operation", category="performance", route=route, latency_ms=latency_ms)
