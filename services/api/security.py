"""Refusals that may be somebody's attempt at more than they may: counted and logged as security events."""

from collections import Counter
from ipaddress import ip_network
from time import monotonic
from typing import Final

from starlette.requests import HTTPConnection

from libs.domain.telemetry import logger
from libs.guardrails import Reason, Refused
from libs.observability.registry import Metrics

_log: Final = logger("security")

TOLERATED_FAILURES: Final = 10
"""So often an address may fail to authenticate within a minute before it is suspicious."""

REMEMBERED_ADDRESSES: Final = 10_000

_USER_AGENT_LIMIT: Final = 200

_KINDS: Final = {
    Reason.ROLE_NOT_ALLOWED: "privilege",
    Reason.RATE_LIMITED: "rate_limit",
    Reason.ORIGIN_NOT_ALLOWED: "other",
}


def notice(refused: Refused, connection: HTTPConnection, metrics: Metrics) -> None:
    """Tells of a refusal if it concerns security."""
    if kind := _KINDS.get(refused.reason):
        report(kind, connection, metrics)


def report(kind: str, connection: HTTPConnection, metrics: Metrics) -> None:
    """Counts and logs; `kind` is a label value of `security_events_total`."""
    metrics.counter("security_events_total", kind).inc()
    user_agent = connection.headers.get("user-agent", "")[:_USER_AGENT_LIMIT]
    told = _log.warning if kind == "suspicious_ip" else _log.info
    told("security_event", kind=kind, client_ip=address_of(connection), user_agent=user_agent)


def address_of(connection: HTTPConnection) -> str | None:
    """Where the connection comes from: the other end of the socket, whatever headers claim."""
    return connection.client.host if connection.client else None


class Failures:
    """How often each address has failed to authenticate in the present minute."""

    def __init__(self) -> None:
        self._minute = 0
        self._counts: Counter[str | None] = Counter()

    def add(self, address: str | None) -> bool:
        """Whether the address is suspicious from now on; true once a minute."""
        minute = int(monotonic() // 60)
        if minute != self._minute:
            self._minute = minute
            self._counts.clear()
        whose = _network_of(address)
        if len(self._counts) >= REMEMBERED_ADDRESSES and whose not in self._counts:
            del self._counts[next(iter(self._counts))]  # the one that came first
        self._counts[whose] += 1
        return self._counts[whose] == TOLERATED_FAILURES + 1


def _network_of(address: str | None) -> str | None:
    """Who is at an address: of IPv6 everybody has 2⁶⁴ of them."""
    return (
        address
        if address is None or ":" not in address
        else str(ip_network((address.partition("%")[0], 64), strict=False))
    )
