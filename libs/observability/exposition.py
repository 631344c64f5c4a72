"""Handing metrics out: to whom, in which format, and a server small enough for a worker."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hmac import compare_digest
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Literal, Self

from prometheus_client.exposition import choose_encoder

from libs.observability.registry import Metrics

Verdict = Literal["ok", "unauthenticated", "forbidden"]

REQUEST_DEADLINE: Final = 5.0
REQUEST_LIMIT: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class MetricsAccess:
    """Who may read the metrics: whoever knows the credentials, or comes from an allow-listed network.

    The address is that of the socket's peer and never of a header. With neither configured nobody may.
    """

    basic_auth: str | None
    allow: tuple[IPv4Network | IPv6Network, ...]

    @classmethod
    def parse(cls, basic_auth: str | None, allow: str) -> Self:
        """From `user:password` and a comma-separated list of networks. Raises ValueError."""
        if basic_auth is not None and not all(basic_auth.partition(":")):
            raise ValueError("The credentials for metrics must have the form user:password.")
        try:
            networks = tuple(ip_network(part.strip()) for part in allow.split(",") if part.strip())
        except ValueError as error:
            raise ValueError(f"The networks that may read metrics: {error}.") from None
        return cls(basic_auth, networks)

    def verdict(self, authorization: str | None, peer: str | None) -> Verdict:
        """`unauthenticated` asks for credentials, `forbidden` when none would help."""
        if self._knows(authorization) or self._is_near(peer):
            return "ok"
        return "forbidden" if self.basic_auth is None else "unauthenticated"

    def _knows(self, authorization: str | None) -> bool:
        if self.basic_auth is None or authorization is None:
            return False
        scheme, _, encoded = authorization.partition(" ")
        try:
            offered = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            return False
        user, _, password = offered.partition(b":")
        wanted_user, _, wanted_password = self.basic_auth.encode().partition(b":")
        # Both are compared whatever the first says, so that time tells nothing.
        fits = compare_digest(user, wanted_user) & compare_digest(password, wanted_password)
        return fits and scheme.lower() == "basic"

    def _is_near(self, peer: str | None) -> bool:
        try:
            address = ip_address(peer or "")
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self.allow)


def render(metrics: Metrics, accept: str) -> tuple[bytes, str]:
    """The exposition and its content type: OpenMetrics, with exemplars, if the `Accept` header asks."""
    encode, content_type = choose_encoder(accept)
    return encode(metrics.registry), content_type


@asynccontextmanager
async def serve_metrics(metrics: Metrics, access: MetricsAccess, host: str, port: int) -> AsyncIterator[int]:
    """Answers `GET /metrics` and `GET /healthz` for the length of the block; yields the port, which is
    chosen by the system when 0 was given. Raises OSError when the port is taken."""
    server = await asyncio.start_server(_Exporter(metrics, access).answer, host, port, limit=REQUEST_LIMIT)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


class _Exporter:
    """One request per connection: a scraper comes every few seconds and wants nothing else."""

    def __init__(self, metrics: Metrics, access: MetricsAccess) -> None:
        self._metrics = metrics
        self._access = access

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_DEADLINE):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head, writer.get_extra_info("peername")))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            # Closing would wait for a client that does not read.
            writer.transport.abort()
        finally:
            writer.close()

    def _response(self, head: bytes, peername: object) -> bytes:
        request, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if method not in ("GET", "HEAD"):
            return _http(HTTPStatus.METHOD_NOT_ALLOWED, extra="Allow: GET, HEAD\r\n")
        if path == "/healthz":
            return _http(HTTPStatus.OK, b'{"status":"ok"}', "application/json", head=method == "HEAD")
        if path != "/metrics":
            return _http(HTTPStatus.NOT_FOUND)
        peer = peername[0] if isinstance(peername, tuple) else None
        match self._access.verdict(headers.get("authorization"), peer):
            case "unauthenticated":
                return _http(HTTPStatus.UNAUTHORIZED, extra='WWW-Authenticate: Basic realm="metrics"\r\n')
            case "forbidden":
                return _http(HTTPStatus.FORBIDDEN)
        body, content_type = render(self._metrics, headers.get("accept", ""))
        return _http(HTTPStatus.OK, body, content_type, head=method == "HEAD")


def _http(
    status: HTTPStatus, body: bytes = b"", content_type: str = "text/plain", *, extra: str = "", head: bool = False
) -> bytes:
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\nCache-Control: no-store\r\n{extra}\r\n"
    )
    return lines.encode() + (b"" if head else body)
