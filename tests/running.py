"""API servers for tests: the real application behind the real server, on a port of its own."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx2
import uvicorn
from fastapi import FastAPI

from libs.domain import tokens
from libs.domain.runtime import Runtime
from libs.domain.settings import FlagSettings
from libs.guardrails import Principal
from services.api.main import open_app, server_config
from services.api.settings import ApiSettings
from tests import log_lines

SECRET: Final = "a secret of tests that is long enough to be one"
ALERTS_TOKEN: Final = "a token of tests with which alerts are sent"


@dataclass(frozen=True)
class Api:
    """A running API. `as_(principal)` is a client with that person's token, `anonymous` one without."""

    url: str
    app: FastAPI
    server: uvicorn.Server
    anonymous: httpx2.AsyncClient
    _clients: dict[Principal, httpx2.AsyncClient] = field(default_factory=dict)

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.app.state.runtime
        return runtime

    def as_(self, principal: Principal) -> httpx2.AsyncClient:
        if principal not in self._clients:
            headers = {"Authorization": f"Bearer {token_of(principal)}"}
            self._clients[principal] = client_of(f"{self.url}/api/v1", headers=headers)
        return self._clients[principal]

    async def close(self) -> None:
        for client in (self.anonymous, *self._clients.values()):
            await client.aclose()


def client_of(url: str, **options: Any) -> httpx2.AsyncClient:
    """A client of a server on this machine; reading the certificates of the world would take most of the time."""
    return httpx2.AsyncClient(base_url=url, verify=False, **options)


def token_of(principal: Principal) -> str:
    return tokens.issue(principal, SECRET, issuer="sessiongate")


@asynccontextmanager
async def running_api(database_url: str, redis_url: str, **settings: Any) -> AsyncIterator[Api]:
    """`settings` are fields of `ApiSettings` in lower case and flags in upper case. What it logs goes to a file, and is
    checked at the end: see `tests.log_lines`."""
    with TemporaryDirectory() as folder:
        log = settings.setdefault("log_file", Path(folder) / "api.jsonl")
        async with _running_api(database_url, redis_url, settings) as api:
            yield api
        log_lines.check(log)


@asynccontextmanager
async def _running_api(database_url: str, redis_url: str, settings: Mapping[str, Any]) -> AsyncIterator[Api]:
    flags = FlagSettings(**{name: value for name, value in settings.items() if name.isupper()})
    defaults: dict[str, Any] = {
        "database_url": database_url,
        "redis_url": redis_url,
        "jwt_secret": SECRET,
        "alerts_token": ALERTS_TOKEN,
        "metrics_allow": "127.0.0.0/8",
        "api_port": 0,
    }
    chosen = ApiSettings(**(defaults | {name: value for name, value in settings.items() if name.islower()}))
    async with open_app(chosen, flags) as app:
        server = uvicorn.Server(server_config(app, chosen))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            assert not serving.done(), "The server did not start."
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        api = Api(url, app, server, client_of(url))
        try:
            yield api
        finally:
            await api.close()
            server.should_exit = True
            await serving
