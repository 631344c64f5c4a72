"""The sockets of this process, and what is counted and logged of each."""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from libs.domain.telemetry import logger
from libs.guardrails import Principal
from libs.observability.registry import Metrics
from services.api.realtime.slots import Slots
from services.api.realtime.wire import NO_PONG, Wire

_log: Final = logger("realtime")

# Frames that are not what the protocol of WebSockets allows, or not UTF-8, or too long.
_BREACHES: Final = {1002, 1007, 1009}


class Connections:
    def __init__(self, slots: Slots, metrics: Metrics) -> None:
        self._slots = slots
        self._metrics = metrics
        self._open: Counter[int] = Counter()

    @asynccontextmanager
    async def open(self, caller: Principal, wire: Wire) -> AsyncIterator[None]:
        """For the life of a socket. Raises `Refused(RATE_LIMITED)` when the caller has enough of them."""
        async with self._slots.held(caller):
            self._open[caller.user_id] += 1
            self._metrics.counter("chat_connections_opened_total").inc()
            self._measure()
            _log.info("chat_connection_opened")
            began = time.monotonic()
            try:
                yield
            finally:
                self._open[caller.user_id] -= 1
                if not self._open[caller.user_id]:
                    del self._open[caller.user_id]
                self._measure()
                self._account_for(wire)
                _log.info(
                    "chat_connection_closed",
                    code=wire.closed_with,
                    duration_ms=round(1000 * (time.monotonic() - began)),
                )

    def failed(self, reason: str) -> None:
        """`reason` is a label value of `chat_connection_failures_total`."""
        self._metrics.counter("chat_connection_failures_total", reason).inc()

    def _account_for(self, wire: Wire) -> None:
        if wire.too_slow:
            self._metrics.counter("chat_message_errors_total", "delivery").inc()
        elif wire.closed_with == NO_PONG:
            self.failed("timeout")
        elif wire.closed_with in _BREACHES:
            self.failed("protocol")

    def _measure(self) -> None:
        self._metrics.gauge("chat_connections_active").set(self._open.total())
        self._metrics.gauge("chat_active_users").set(len(self._open))
