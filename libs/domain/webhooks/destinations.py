"""Where webhooks may be sent: to public addresses by https, and to networks that the operator of this installation
allows.

An address of a receiver is a wish of a tenant. It must not become a way into the network that this program runs in:
what a name resolves to is checked at each delivery, and the connection is made to the address that was checked.
"""

import asyncio
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self, TypeAlias

import httpx2

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

Resolve: TypeAlias = Callable[[int, str, int], Awaitable[list[Address]]]
"""The addresses of a host, for a tenant: its id, the host, the port. Raises OSError when there are none."""

LONGEST_URL: Final = 2000

_PUBLIC_IPV6: Final = IPv6Network("2000::/3")
"""All there is to reach in IPv6. What stands for an IPv4 address (mapped, NAT64) and what is local lies outside."""

# Written out, because what Python calls global differs from version to version.
_NOT_PUBLIC: Final = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",  # carriers' NAT, and the metadata of a cloud
            "127.0.0.0/8",
            "168.63.129.16/32",  # the metadata of another cloud
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",  # multicast, reserved, broadcast
            "2001::/23",  # Teredo, which stands for an IPv4 address, and other protocols
            "2001:db8::/32",
            "2002::/16",  # 6to4, likewise
            "3fff::/20",
        ),
    )
)


class ForbiddenDestinationError(Exception):
    """The destination may not be sent to; the message says why in a sentence, without repeating it."""


def is_public(address: Address) -> bool:
    """Whether the address belongs to the public internet and to nothing of the machine or the network around it."""
    if isinstance(address, IPv6Address) and (address not in _PUBLIC_IPV6 or address.scope_id):
        return False
    return not any(address in network for network in _NOT_PUBLIC)


class Destinations:
    """The rules of this installation: `ports` of public servers, and the `networks` where anything goes."""

    def __init__(self, ports: frozenset[int], networks: tuple[Network, ...]) -> None:
        self._ports = ports
        self._networks = networks

    @classmethod
    def parse(cls, ports: str, networks: str) -> Self:
        """From the settings, which are lists separated by commas."""
        listed = filter(None, map(str.strip, networks.split(",")))
        return cls(frozenset(map(int, ports.split(","))), tuple(map(ip_network, listed)))

    def check_url(self, url: str) -> None:
        """What can be told without asking for the addresses of a name. Raises `ForbiddenDestinationError`."""
        try:
            parsed = httpx2.URL(url)
            address = literal(parsed)
            parsed.raw_host.decode().encode("idna")  # as the system will, which refuses names such as a..b
        except (httpx2.InvalidURL, UnicodeError, ValueError):
            raise ForbiddenDestinationError("Must be an address such as https://example.org/webhooks.") from None
        if parsed.scheme not in ("https", "http") or not parsed.host:
            raise ForbiddenDestinationError("Must be an https address.")
        if parsed.userinfo or parsed.fragment:
            raise ForbiddenDestinationError("Must have no user, no password and no fragment.")
        if address is not None:
            self.check(parsed, address)
        elif not self._networks:  # otherwise the name may turn out to be in one of them
            self._check_public(parsed)

    def check(self, url: httpx2.URL, address: Address) -> None:
        """Whether a request to `url` may be sent to `address`. Raises `ForbiddenDestinationError`."""
        if any(address in network for network in self._networks):
            return
        if not is_public(address):
            raise ForbiddenDestinationError("Must lead to a public address.")
        self._check_public(url)

    def _check_public(self, url: httpx2.URL) -> None:
        if url.scheme != "https":
            raise ForbiddenDestinationError("Must be an https address.")
        if port_of(url) not in self._ports:
            raise ForbiddenDestinationError(f"Must name one of the ports {', '.join(map(str, sorted(self._ports)))}.")


def normal(url: str) -> httpx2.URL:
    """A URL that was checked, as all its spellings have it: scheme and host in small letters, no port that goes without
    saying, and a path."""
    parsed = httpx2.URL(url)
    return parsed.copy_with(raw_path=parsed.raw_path)


def literal(url: httpx2.URL) -> Address | None:
    """The address that the URL itself names."""
    try:
        return ip_address(url.host)
    except ValueError:
        return None


def port_of(url: httpx2.URL) -> int:
    return (443 if url.scheme == "https" else 80) if url.port is None else url.port


LOOKUPS: Final = 32
LOOKUPS_PER_TENANT: Final = 4

_THREADS: Final = ThreadPoolExecutor(LOOKUPS, "resolve")
"""Threads of their own, since a name server that does not answer keeps a thread for long after the delivery has
failed."""


class Lookups:
    """Asks the system for addresses: once at a time for each name of a tenant, and for a few of its names at a time, so
    that a tenant whose names get no answer keeps others from theirs only together with many more such tenants."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[int, str, int], asyncio.Task[list[Address]]] = {}
        self._turns: defaultdict[int, asyncio.Semaphore] = defaultdict(partial(asyncio.Semaphore, LOOKUPS_PER_TENANT))

    async def resolve(self, tenant_id: int, host: str, port: int) -> list[Address]:
        """As `Resolve` has it. Whoever asks for what is asked for already gets the same answer."""
        asked = tenant_id, host, port
        if asked not in self._under_way:
            self._under_way[asked] = asyncio.create_task(self._look_up(*asked))
            self._under_way[asked].add_done_callback(partial(self._over, asked))
        return await asyncio.shield(self._under_way[asked])

    async def _look_up(self, tenant_id: int, host: str, port: int) -> list[Address]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        async with self._turns[tenant_id]:
            try:
                found = await asyncio.get_running_loop().run_in_executor(_THREADS, ask)
            except UnicodeError as error:
                raise OSError("not a name") from error
        return list(dict.fromkeys(ip_address(where[0]) for *_, where in found))

    def _over(self, asked: tuple[int, str, int], lookup: asyncio.Task[list[Address]]) -> None:
        del self._under_way[asked]
        if not lookup.cancelled():
            lookup.exception()  # whoever asked may have gone
