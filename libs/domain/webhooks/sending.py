"""The consumer that posts events to webhook endpoints, signed as Standard Webhooks has it."""

import asyncio
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Final

import httpx2
import orjson
from opentelemetry.trace import SpanKind, StatusCode

from libs.domain.outbox.dispatch import Event, NotDeliveredError
from libs.domain.runtime import VERSION, Runtime
from libs.domain.sealing import Field
from libs.domain.telemetry import logger
from libs.domain.webhooks import endpoints, secrets
from libs.domain.webhooks.destinations import (
    Destinations,
    ForbiddenDestinationError,
    Lookups,
    Resolve,
    literal,
    port_of,
)
from libs.observability.tracing import exemplar, span

_log: Final = logger("webhooks")

TIMEOUT_SECONDS: Final = 5.0
"""For all of a delivery, from the first question for an address to the end of the answer."""

LONGEST_ANSWER: Final = 65_536
"""Bytes of an answer that are read, so that the receiver is not cut off; nothing is made of them."""

_GONE: Final = 410

_ENDPOINT: Final = """
    SELECT e.url, e.disabled_at IS NULL AS enabled, extract(epoch FROM clock())::bigint AS now,
           (SELECT array_agg(s.secret ORDER BY s.id DESC) FROM current s) AS secrets,
           (SELECT array_agg(s.key_id ORDER BY s.id DESC) FROM current s) AS key_ids
    FROM webhook_endpoints e WHERE e.id = $1
"""
_CURRENT: Final = """
    WITH current AS (
        SELECT id, secret, key_id FROM webhook_secrets
        WHERE endpoint_id = $1 AND (expires_at IS NULL OR expires_at > clock())
    )
"""


@dataclass(frozen=True, slots=True)
class _Target:
    url: httpx2.URL
    now: int
    secrets: Sequence[bytes]


class Webhooks:
    """Posts each event to the endpoint that it is for, with nothing of the trace that led to it.

    There is no client, which would keep cookies and could follow redirects, and a connection is used once: another
    tenant's receiver may have the same address.
    """

    def __init__(
        self, runtime: Runtime, *, resolve: Resolve | None = None, trusted: ssl.SSLContext | None = None
    ) -> None:
        settings = runtime.settings
        self._runtime = runtime
        self._resolve = resolve or Lookups().resolve
        self._destinations = Destinations.parse(settings.webhook_ports, settings.webhook_allow_networks)
        self._transport = httpx2.AsyncHTTPTransport(
            verify=trusted or ssl.create_default_context(),
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

    async def deliver(self, events: Sequence[Event]) -> int:
        (event,) = events
        endpoint_id = int(event.consumer.partition(":")[2])
        target = await self._target(endpoint_id)
        began, result = time.perf_counter(), "unreachable"
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                status = await self._post(target, event)
            result = "delivered" if 200 <= status < 300 else "gone" if status == _GONE else "rejected"
        except TimeoutError:
            result = "timeout"
            raise NotDeliveredError(f"The receiver did not answer within {TIMEOUT_SECONDS:g} s.") from None
        except ForbiddenDestinationError as error:
            result = "forbidden"
            raise NotDeliveredError(f"The receiver may not be sent to. {error}") from None
        except (httpx2.HTTPError, OSError) as error:
            raise NotDeliveredError(f"The receiver cannot be reached: {type(error).__name__}.") from error
        finally:
            metrics = self._runtime.metrics
            metrics.counter("webhook_deliveries_total", result).inc()
            metrics.histogram("webhook_delivery_duration_seconds").observe(time.perf_counter() - began, exemplar())
        if result == "gone":
            await self._disable(event.tenant_id, endpoint_id)
        if result != "delivered":
            raise NotDeliveredError(f"The receiver answered {status}.", status=status, final=result == "gone")
        return status

    async def close(self) -> None:
        await self._transport.aclose()

    async def _target(self, endpoint_id: int) -> _Target:
        async with self._runtime.database.autocommit() as connection:
            row = await connection.fetchrow(_CURRENT + _ENDPOINT, endpoint_id)
        if row is None:
            raise NotDeliveredError("The endpoint was removed.", final=True)
        if not row["enabled"]:
            raise NotDeliveredError("The endpoint is disabled.", final=True)
        stored = map(Field, row["secrets"], row["key_ids"])
        keys = self._runtime.field_keys
        opened = [secrets.opened(keys, endpoint_id, secret) for secret in stored]
        return _Target(httpx2.URL(row["url"]), row["now"], opened)

    async def _post(self, target: _Target, event: Event) -> int:
        """The status of the answer. Connects to an address that was checked, and to no other."""
        url, body, message_id = target.url, _body(event), str(event.event_id)
        host = url.raw_host.decode()
        address = literal(url)
        addresses = [address] if address else await self._resolve(event.tenant_id, host, port_of(url))
        for address in addresses:
            self._destinations.check(url, address)
        headers = {
            "Host": url.netloc.decode(),
            "User-Agent": f"Sessiongate/{VERSION}",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "webhook-id": message_id,
            "webhook-timestamp": str(target.now),
            "webhook-signature": secrets.signature(target.secrets, message_id, target.now, body),
        }
        for number, address in enumerate(addresses, 1):
            request = httpx2.Request(
                "POST",
                url.copy_with(host=str(address)),
                headers=headers,
                content=body,
                extensions={"sni_hostname": host},
            )
            try:
                return await self._send(request, url)
            except httpx2.ConnectError:
                if number == len(addresses):
                    raise
        raise OSError("no address")

    async def _send(self, request: httpx2.Request, url: httpx2.URL) -> int:
        with span("POST", kind=SpanKind.CLIENT) as call:
            call.set_attributes(
                {
                    "http.request.method": "POST",
                    "server.address": url.host,
                    "server.port": port_of(url),
                    "url.full": str(url.copy_with(username=None, password=None, query=None, fragment=None)),
                }
            )
            response = await self._transport.handle_async_request(request)
            try:
                read = 0
                async for chunk in response.aiter_raw():
                    read += len(chunk)
                    if read >= LONGEST_ANSWER:
                        break
            finally:
                await response.aclose()
            call.set_attribute("http.response.status_code", response.status_code)
            if response.status_code >= 400:
                call.set_status(StatusCode.ERROR)
        return response.status_code

    async def _disable(self, tenant_id: int, endpoint_id: int) -> None:
        async with self._runtime.begin() as tx:
            disabled = await endpoints.disable_gone(tx, tenant_id, endpoint_id)
        if disabled:
            _log.warning("webhook_disabled", endpoint_id=endpoint_id, tenant_id=tenant_id, reason="gone")


def _body(event: Event) -> bytes:
    """What is signed and sent: ids and facts only, as the event has them."""
    told: dict[str, Any] = {
        "type": event.name.value,
        "timestamp": event.occurred_at.astimezone(UTC),
        "data": event.payload,
    }
    return orjson.dumps(told, option=orjson.OPT_UTC_Z)
