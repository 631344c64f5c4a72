"""Draining the outbox: one task per lane, so that urgent deliveries never wait for others, and one per webhook that
has something to get, so that none waits for another that hangs."""

import asyncio
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
    """Looks which webhooks have something to get, and drains each in a task of its own, so many at once."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._draining: dict[str, asyncio.Task[None]] = {}
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
            await asyncio.gather(*self._draining.values())
        finally:
            for task in self._draining.values():
                task.cancel()

    async def _begin(self) -> None:
        for webhook in await self._dispatcher.waiting_webhooks():
            if webhook not in self._draining and len(self._draining) < WEBHOOKS_AT_ONCE:
                task = asyncio.create_task(self._drain(webhook))
                self._draining[webhook] = task

    async def _drain(self, webhook: str) -> None:
        try:
            while not self._stopped and await self._dispatcher.dispatch_webhook(webhook):
                pass
        except Exception as error:
            self._failed(error)
        finally:
            del self._draining[webhook]

    def _failed(self, error: Exception) -> None:
        _log.error("outbox_lane_failed", exc_info=error, exception_type=type(error).__name__)
