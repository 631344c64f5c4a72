"""Whatever becomes of connections and of Redis: a client that resumes gets every message once and in order."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

from libs.guardrails import Principal
from tests.clinic import Clinic, LiveSession
from tests.conftest import Urls
from tests.redis_server import RedisServer
from tests.running import token_of
from tests.sockets import PROTOCOL
from tests.storms.apis import Sabotage, let_nobody_resume, running_process
from tests.storms.proxy import Proxy, running_proxy

CONVERSATIONS = 5
CALM_SECONDS = 60.0
"""Within which everything arrives once nothing fails any more."""


@dataclass(frozen=True)
class Scale:
    """How many messages are sent while how often a client has to come back."""

    messages: int
    reconnections: int


LONG = Scale(messages=10_000, reconnections=200)
SHORT = Scale(messages=1_000, reconnections=30)


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    return LONG if request.config.getoption("--storm") == "full" else SHORT


@dataclass
class Client:
    """Sends its messages until each is acknowledged, follows the conversation, and comes back when it is cut off."""

    port: int
    session: LiveSession
    who: Principal
    to_send: int
    expected: int
    got: list[int] = field(default_factory=list)
    connections: int = 0

    @property
    def is_done(self) -> bool:
        return len(self.got) >= self.expected

    async def run(self) -> None:
        """Until all is sent and all expected numbers, or more frames than those, have arrived."""
        unacknowledged = [f"{self.who.user_id}-{number}" for number in range(self.to_send)]
        while unacknowledged or not self.is_done:
            try:
                await self._connected(unacknowledged)
            except (ConnectionClosed, InvalidHandshake, InvalidMessage, OSError, EOFError, TimeoutError):
                await asyncio.sleep(random.uniform(0, 0.1))

    async def _connected(self, unacknowledged: list[str]) -> None:
        self.connections += 1
        async with connect(
            f"ws://127.0.0.1:{self.port}/api/v1/chat/{self.session.context}/socket",
            additional_headers={"Authorization": f"Bearer {token_of(self.who)}"},
            subprotocols=[PROTOCOL],
            open_timeout=5,
            close_timeout=0.1,
        ) as connection:
            await connection.send(_frame(type="hello", after_seq=self.got[-1] if self.got else 0))
            await self._send_next(connection, unacknowledged)
            while unacknowledged or not self.is_done:
                frame = orjson.loads(await connection.recv())
                match frame["type"]:
                    case "message":
                        self.got.append(frame["message"]["seq"])
                    case "ack":
                        assert frame["client_message_id"] == unacknowledged.pop(0)
                        await self._send_next(connection, unacknowledged)
                    case "refused":
                        raise AssertionError(frame)

    async def _send_next(self, connection: ClientConnection, unacknowledged: list[str]) -> None:
        if unacknowledged:
            await connection.send(_frame(type="message", client_message_id=unacknowledged[0], body="Hello"))


def _frame(**fields: Any) -> str:
    return orjson.dumps(fields).decode()


@dataclass
class Storm:
    """What failed, and what each client got."""

    clients: list[Client]
    faults: dict[str, int]

    def out_of_order(self) -> list[Client]:
        """The clients that did not get every number once and in order."""
        return [client for client in self.clients if client.got != list(range(1, client.expected + 1))]


async def rage(
    urls: Urls,
    clinic: Clinic,
    folder: Path,
    scale: Scale,
    *,
    sabotage: Sabotage | None = None,
    calm: float = CALM_SECONDS,
) -> Storm:
    """Clients in pairs talk through two API processes, over connections that fail and with a Redis that restarts."""
    redis = RedisServer(folder)
    await redis.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(redis.kill)
        ports = [
            await stack.enter_async_context(
                running_process(urls.app, redis.url, folder / f"api-{number}.jsonl", sabotage=sabotage)
            )
            for number in range(2)
        ]
        proxy = await stack.enter_async_context(running_proxy(ports))
        clients = []
        each = scale.messages // (2 * CONVERSATIONS)
        for _ in range(CONVERSATIONS):
            session = await clinic.session()
            for who in (session.patient, session.doctor):
                clients.append(Client(proxy.port, session, who, to_send=each, expected=2 * each))
        running = asyncio.gather(*(client.run() for client in clients))
        try:
            await _fail(proxy, redis, clients, scale)
            async with asyncio.timeout(calm):
                await running
        except TimeoutError:
            pass
        return Storm(clients, proxy.faults)


async def _fail(proxy: Proxy, redis: RedisServer, clients: Sequence[Client], scale: Scale) -> None:
    """Connections fail as messages arrive, until enough clients had to come back. Redis dies after a third of that,
    and is there again for the last half."""
    while (came_back := _reconnections(clients)) < scale.reconnections and not all(
        client.is_done for client in clients
    ):
        await asyncio.sleep(0.01)
        arrived = sum(len(client.got) for client in clients) / 2
        if arrived * scale.reconnections * 1.5 >= scale.messages * came_back:
            await proxy.fail()
        if scale.reconnections <= 3 * came_back < 1.5 * scale.reconnections:
            await redis.kill()
        elif 2 * came_back >= scale.reconnections:
            await redis.start()


def _reconnections(clients: Sequence[Client]) -> int:
    return sum(client.connections - 1 for client in clients)


async def test_a_client_that_resumes_gets_every_message_once_and_in_order(
    urls: Urls, clinic: Clinic, tmp_path: Path, scale: Scale
) -> None:
    storm = await rage(urls, clinic, tmp_path, scale)
    print(storm.faults, _reconnections(storm.clients), "reconnections")
    assert storm.out_of_order() == []
    assert _reconnections(storm.clients) >= scale.reconnections
    assert len(storm.faults) == 3
    stored = await clinic.fetch("SELECT count(*), max(seq) FROM messages GROUP BY conversation_id")
    assert [tuple(row) for row in stored] == [(scale.messages // CONVERSATIONS,) * 2] * CONVERSATIONS


async def test_the_storm_finds_a_server_that_does_not_let_clients_resume(
    urls: Urls, clinic: Clinic, tmp_path: Path
) -> None:
    storm = await rage(
        urls, clinic, tmp_path, Scale(messages=300, reconnections=20), sabotage=let_nobody_resume, calm=3.0
    )
    assert storm.out_of_order() != []
