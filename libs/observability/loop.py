"""The health of the event loop: how many tasks live, and how late it gets to them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from libs.observability.registry import Metrics

INTERVAL: Final = 0.5
"""Seconds between two looks."""


@asynccontextmanager
async def watch_loop(metrics: Metrics) -> AsyncIterator[None]:
    """Measures for the length of the block."""
    watching = asyncio.create_task(_watch(metrics), name="watch_loop")
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _watch(metrics: Metrics) -> None:
    tasks, lag = metrics.gauge("asyncio_tasks"), metrics.histogram("asyncio_loop_lag_seconds")
    loop = asyncio.get_running_loop()
    while True:
        expected = loop.time() + INTERVAL
        await asyncio.sleep(INTERVAL)
        lag.observe(max(0.0, loop.time() - expected))
        tasks.set(len(asyncio.all_tasks()))
