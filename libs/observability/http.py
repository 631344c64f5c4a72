"""What every HTTP request says about itself: a correlation id, a span, a duration, one log line."""

import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from opentelemetry import trace

from libs.observability.context import accept_correlation_id, bind
from libs.observability.logging import get_logger
from libs.observability.registry import Metrics
from libs.observability.tracing import sampled_trace_id, span

_log: Final = get_logger("http", "infra")

HEADER: Final = b"x-correlation-id"
SLOW_SECONDS: Final = 1.0

_READ: Final = frozenset({HEADER, b"traceparent", b"tracestate"})

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class HttpTelemetry:
    """Pure ASGI middleware. `route_of` answers the template of the route that served a scope, such as
    `/appointments/{id}`, or `unmatched`: paths themselves are never labels.

    `quiet` are templates whose requests are counted but neither logged nor traced, such as those of probes;
    they have no parameters. A socket gets its correlation id and no more: it lasts too long for one span.
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
        offered = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _READ}
        correlation_id = accept_correlation_id(offered.get(HEADER))
        with bind(correlation_id=correlation_id):
            if scope["type"] == "websocket":
                await self._app(scope, receive, send)
            elif scope["path"] in self._quiet:
                await self._serve(scope, receive, send, correlation_id)
            else:
                await self._traced(scope, receive, send, correlation_id, offered)

    async def _traced(
        self, scope: Scope, receive: Receive, send: Send, correlation_id: str, offered: Mapping[bytes, str]
    ) -> None:
        """Serves inside of a span that continues the caller's trace, if there is one."""
        carried = {name.decode(): value for name, value in offered.items() if name != HEADER}
        attributes = {
            "http.request.method": _label(scope["method"]),
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
        }
        with span(_label(scope["method"]), kind=trace.SpanKind.SERVER, parent=carried, **attributes):
            await self._serve(scope, receive, send, correlation_id)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, correlation_id: str) -> None:
        status = 500

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER, correlation_id.encode())]
            await send(message)

        began = time.perf_counter()
        self._in_flight.inc()
        try:
            await self._app(scope, receive, answered)
        finally:
            self._in_flight.dec()
            self._tell(scope, status, time.perf_counter() - began)

    def _tell(self, scope: Scope, status: int, took: float) -> None:
        route, label = self._route_of(scope), _label(scope["method"])
        current = trace.get_current_span()
        if current.is_recording():
            current.update_name(f"{label} {route}")
            current.set_attributes({"http.route": route, "http.response.status_code": status})
            if status >= 500:
                current.set_status(trace.StatusCode.ERROR)
        trace_id = sampled_trace_id()
        duration = self._metrics.histogram("http_request_duration_seconds", route, label, str(status))
        duration.observe(took, {"trace_id": trace_id} if trace_id else None)
        if route in self._quiet and status < 500:
            return
        latency_ms = round(took * 1000, 2)
        _log.info("http_request", method=label, route=route, status=status, latency_ms=latency_ms)
        if took > SLOW_SECONDS:
            _log.warning("slow_operation", category="performance", route=route, latency_ms=latency_ms)


def _label(method: str) -> str:
    return method if method in _METHODS else "OTHER"
