"""Draining the outbox: one task per lane, so that urgent deliveries never wait for others, and one per webhook that
has something to get, so that none waits for another that hangs."""

import asyncio
import time
from contextlib import suppress
from typing import Final

from libs.domain.outbox.dispatch import Dispatcher
from libs.domain.outbox.events import Lane
from libs.domain.telemetry import logger

_log: Final = logger("outbox")

LONGEST_SLEEP: Final = 1.0
WEBHOOKS_AT_ONCE: Final = 50


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


class WebhookLane:
    """Looks which webhooks have something to get, and serves each in a task of its own, so many at once. While all
    are taken, each gets a few events at a time, and whoever was served longest ago is next."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._serving: dict[str, asyncio.Task[None]] = {}
        self._served_at: dict[str, float] = {}
        self._woken = asyncio.Event()
        self._stopped = False

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        """Ends `run` once what was begun has been delivered or has failed."""
        self._stopped = True
        self._woken.set()

    async def run(self) -> None:
        """Dispatches until stopped."""
        try:
            while not self._stopped:
                self._woken.clear()
                try:
                    await self._begin()
                except Exception as error:
                    self._failed(error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LONGEST_SLEEP):
                        await self._woken.wait()
            await asyncio.gather(*self._serving.values())
        finally:
            for task in self._serving.values():
                task.cancel()

    async def _begin(self) -> None:
        waiting = [webhook for webhook in await self._dispatcher.waiting_webhooks() if webhook not in self._serving]
        waiting.sort(key=lambda webhook: self._served_at.get(webhook, 0.0))
        for webhook in waiting[: WEBHOOKS_AT_ONCE - len(self._serving)]:
            self._serving[webhook] = asyncio.create_task(self._serve(webhook))

    async def _serve(self, webhook: str) -> None:
        taken = 0
        try:
            while not self._stopped and (batch := await self._dispatcher.dispatch_webhook(webhook)):
                taken += batch
                if len(self._serving) >= WEBHOOKS_AT_ONCE:
                    break
        except Exception as error:
            self._failed(error)
        finally:
            del self._serving[webhook]
            self._served_at[webhook] = time.monotonic()
        if taken:  # what waits behind an earlier event would have us look without end
            self.wake()

    def _failed(self, error: Exception) -> None:
        _log.error("outbox_lane_failed", exc_info=error, exception_type=type(error).__name__)
