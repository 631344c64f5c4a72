"""API and worker processes for tests: started as in production, asked by their metrics and logs, killed at will."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from libs.guardrails import Principal
from tests import log_lines
from tests.running import SECRET, token_of

PATIENCE_SECONDS: Final = 20.0


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = PATIENCE_SECONDS) -> Any:
    """What `condition` answers once it is true. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not (answer := await condition()):
            await asyncio.sleep(0.01)
    return answer


@dataclass
class Worker:
    """A worker process and its log file."""

    process: Process
    log: Path

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """What it has logged so far."""
        return [line for line in log_lines.lines_of(self.log) if event in (None, line["event"])]

    async def is_started(self) -> bool:
        assert self.process.returncode is None, f"The worker ended with {self.process.returncode}."
        return any(line["worker"].endswith(f":{self.process.pid}") for line in self.lines("worker_started"))

    async def sample(self, name: str, **labels: str) -> float:
        """One value of its metrics."""
        port = self.lines("worker_started")[-1]["metrics_port"]
        async with httpx2.AsyncClient() as client:
            exposition = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return float(sample.value)
        raise LookupError(f"There is no series {name} {labels}.")

    async def stop(self) -> int:
        """SIGTERM; answers the exit status."""
        if self.process.returncode is None:
            self.process.terminate()
        return await self.process.wait()

    async def kill(self) -> None:
        """SIGKILL, as the kernel does it when memory is short."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


async def start_worker(
    database_url: str,
    redis_url: str,
    log: Path,
    settings: Mapping[str, str] | None = None,
    *,
    stderr: int | None = None,
) -> Worker:
    """Starts a worker; `settings` are environment variables."""
    environment = {
        **os.environ,
        "SESSIONGATE_DATABASE_URL": database_url,
        "SESSIONGATE_REDIS_URL": redis_url,
        "SESSIONGATE_WORKER_METRICS_PORT": "0",
        "SESSIONGATE_METRICS_ALLOW": "127.0.0.0/8",
        "SESSIONGATE_LOG_FILE": str(log),
        **(settings or {}),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.worker", env=environment, stderr=stderr
    )
    return Worker(process, log)


@asynccontextmanager
async def running_worker(database_url: str, redis_url: str, log: Path, **settings: str) -> AsyncIterator[Worker]:
    """A worker that has started; killed at the end if it still runs. Then what it logged is checked."""
    worker = await start_worker(database_url, redis_url, log, settings)
    try:
        await until(worker.is_started)
        yield worker
    finally:
        await worker.kill()
    log_lines.check(log)


@dataclass
class ApiProcess:
    """An API process, its address and its log file."""

    process: Process
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, principal: Principal | None = None) -> httpx2.AsyncClient:
        """A client with that person's token; without one, of the root."""
        if principal is None:
            return httpx2.AsyncClient(base_url=self.url)
        headers = {"Authorization": f"Bearer {token_of(principal)}"}
        return httpx2.AsyncClient(base_url=f"{self.url}/api/v1", headers=headers)

    async def is_started(self) -> bool:
        assert self.process.returncode is None, f"The API ended with {self.process.returncode}."
        try:
            async with self.client() as client:
                return (await client.get("/healthz")).status_code == 200
        except httpx2.TransportError:
            return False

    async def samples(self) -> dict[tuple[str, ...], float]:
        """Its metrics, by name and label values."""
        async with self.client() as client:
            exposition = (await client.get("/metrics")).text
        families = text_string_to_metric_families(exposition)
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in log_lines.lines_of(self.log) if line["event"] == event]

    async def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Answers the exit status."""
        self.process.send_signal(signum)
        return await self.process.wait()


@asynccontextmanager
async def running_api_process(
    database_url: str, redis_url: str, log: Path, **settings: str
) -> AsyncIterator[ApiProcess]:
    """An API that serves; killed at the end if it still runs. `settings` are environment variables."""
    port = int(settings.setdefault("SESSIONGATE_API_PORT", str(free_port())))
    environment = {
        **os.environ,
        "SESSIONGATE_DATABASE_URL": database_url,
        "SESSIONGATE_REDIS_URL": redis_url,
        "SESSIONGATE_JWT_SECRET": SECRET,
        "SESSIONGATE_METRICS_ALLOW": "127.0.0.0/8",
        "SESSIONGATE_LOG_FILE": str(log),
        **settings,
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.api", env=environment)
    api = ApiProcess(process, port, log)
    try:
        await until(api.is_started)
        yield api
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    log_lines.check(log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
