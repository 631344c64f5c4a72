"""Where webhooks may be sent: to public addresses by https, and to networks that the operator of this installation
allows.

An address of a receiver is a wish of a tenant. It must not become a way into the network that this program runs in:
what a name resolves to is checked at each delivery, and the connection is made to the address that was checked.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self, TypeAlias

import httpx2

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

Resolve: TypeAlias = Callable[[str, int], Awaitable[list[Address]]]
"""The addresses of a host. Raises OSError when there are none."""

LONGEST_URL: Final = 2000

_PUBLIC_IPV6: Final = ip_network("2000::/3")
"""All there is to reach in IPv6. Forms that stand for IPv4 addresses (mapped, NAT64) lie outside."""

_NOT_PUBLIC_EITHER: Final = tuple(
    map(
        ip_network,
        (
            "192.88.99.0/24",  # 6to4 relays
            "168.63.129.16/32",  # the metadata of a cloud, at a public address
            "2002::/16",  # 6to4: stands for an IPv4 address
            "2001::/23",  # Teredo, likewise, and other protocols
            "3fff::/20",  # documentation
            "5f00::/16",  # segment routing
        ),
    )
)


class ForbiddenDestinationError(Exception):
    """The destination may not be sent to; the message says why in a sentence, without repeating it."""


def is_public(address: Address) -> bool:
    """Whether the address belongs to the public internet and to nothing of the machine or the network around it."""
    if isinstance(address, IPv6Address) and (address not in _PUBLIC_IPV6 or address.scope_id):
        return False
    if any(address in network for network in _NOT_PUBLIC_EITHER):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


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


def literal(url: httpx2.URL) -> Address | None:
    """The address that the URL itself names."""
    try:
        return ip_address(url.host)
    except ValueError:
        return None


def port_of(url: httpx2.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


_LOOKUPS: Final = ThreadPoolExecutor(32, "resolve")
"""Threads of their own: a name server that does not answer holds up those who ask it, and nobody else."""


async def resolve(host: str, port: int) -> list[Address]:
    """The addresses that the system knows."""
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_LOOKUPS, partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    return list(dict.fromkeys(ip_address(where[0]) for *_, where in found))
