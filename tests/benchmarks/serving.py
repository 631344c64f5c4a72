"""Applications that the product is compared with, each in a process of its own, run by uvicorn's own command."""

import asyncio
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2
import psutil

from tests.processes import free_port, until


@dataclass(frozen=True)
class Served:
    """A running application."""

    port: int
    process: Process

    def processor_seconds(self) -> float:
        """What it has spent so far, in all of its threads."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


@asynccontextmanager
async def serving(factory: str, **environment: str) -> AsyncIterator[Served]:
    """The application that a factory of this package makes, such as `endpoints:bare`."""
    port = free_port()
    command = ["uvicorn", f"tests.benchmarks.{factory}", "--factory", "--port", str(port)]
    options = ["--log-level", "warning", "--no-access-log", "--no-server-header", "--no-proxy-headers"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, *options, env={**os.environ, **environment}
    )

    async def answers() -> bool:
        assert process.returncode is None, f"{factory} ended with {process.returncode}."
        try:
            async with httpx2.AsyncClient() as client:
                return (await client.get(f"http://127.0.0.1:{port}/openapi.json")).status_code == 200
        except httpx2.TransportError:
            return False

    try:
        await until(answers)
        yield Served(port, process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
