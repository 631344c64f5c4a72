"""An answer leaves in one piece, whatever comes before and after it on the connection."""

import asyncio
import socket
import struct
from typing import Any, Final

from services.api.joined_writes import HELD_BYTES, JoinedWrites
from tests.running import Api

DATA_SEGS_IN: Final = 152
"""Where Linux tells `tcpi_data_segs_in` in its `tcp_info`."""


async def connected(api: Api) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = api.url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


def request(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def pieces_received(writer: asyncio.StreamWriter) -> int:
    """How many segments with data have come over the connection."""
    info: bytes = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    received: int = struct.unpack_from("I", info, DATA_SEGS_IN)[0]
    return received


async def test_an_answer_arrives_in_one_piece(api: Api) -> None:
    reader, writer = await connected(api)
    for number in range(1, 11):
        writer.write(request("/healthz"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(15) == b'{"status":"ok"}'
        assert pieces_received(writer) == number
    writer.close()


async def test_answers_to_requests_that_came_together_keep_their_order(api: Api) -> None:
    reader, writer = await connected(api)
    writer.write(request("/healthz") + request("/nowhere") + request("/healthz", "Connection: close"))
    answers = await reader.read()
    places = [answers.index(b"200 OK"), answers.index(b"404 Not Found"), answers.rindex(b"200 OK")]
    assert places == sorted(set(places))
    assert answers.endswith(b'{"status":"ok"}')
    writer.close()


async def test_a_connection_that_is_to_be_closed_is_closed_after_the_answer(api: Api) -> None:
    reader, writer = await connected(api)
    writer.write(request("/healthz", "Connection: close"))
    assert (await reader.read()).endswith(b'{"status":"ok"}')
    writer.close()


async def test_a_client_that_is_gone_before_its_answer_disturbs_nobody(api: Api) -> None:
    for _ in range(20):
        _, writer = await connected(api)
        writer.write(request("/readyz"))
        await writer.drain()
        writer.transport.abort()
    assert (await api.anonymous.get("/healthz")).status_code == 200


async def test_much_is_not_held_back() -> None:
    """Whoever sends it has to learn that nobody reads it."""
    written: list[int] = []

    class Transport(asyncio.Transport):
        def write(self, data: Any) -> None:
            written.append(len(data))

        def is_closing(self) -> bool:
            return False

    joined = JoinedWrites(Transport(), asyncio.get_running_loop())
    for _ in range(10):
        joined.write(bytes(HELD_BYTES // 4))
    assert written == [HELD_BYTES // 4 * 5] * 2
    await asyncio.sleep(0)
    assert sum(written) == HELD_BYTES // 4 * 10
