"""Draining the outbox: one task per lane, so that urgent deliveries never wait for others."""

import asyncio
from typing import Final

from libs.domain.outbox.dispatch import Dispatcher
from libs.domain.outbox.events import Lane
from libs.domain.telemetry import logger

_log: Final = logger("outbox")

LONGEST_SLEEP: Final = 1.0


class OutboxLane:
    def __init__(self, dispatcher: Dispatcher, lane: Lane) -> None:
        self._dispatcher = dispatcher
        self._lane = lane
        self._woken = asyncio.Event()
        self._stopped = False

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        """Ends `run` once it has finished what it is doing."""
        self._stopped = True
        self._woken.set()

    async def run(self) -> None:
        """Dispatches until stopped: as long as there is something, then when woken or after a second."""
        while not self._stopped:
            self._woken.clear()
            try:
                taken = await self._dispatcher.dispatch(self._lane)
            except Exception as error:
                _log.error("outbox_lane_failed", exc_info=error, exception_type=type(error).__name__)
                taken = 0
            if taken:
                continue
            try:
                async with asyncio.timeout(LONGEST_SLEEP):
                    await self._woken.wait()
            except TimeoutError:
                pass
