"""Dispatching the outbox: at least once, in order per aggregate and consumer, under leases.

A delivery is claimed by a lease that outlives the attempt and is fenced by a random token, so a
dispatcher that hangs loses its claim and cannot finish what another has taken over. Nothing is
claimed while an earlier delivery of the same aggregate to the same consumer is pending.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol
from uuid import UUID, uuid4

from opentelemetry.trace import SpanKind, StatusCode

from libs.domain.db import Database, is_transient
from libs.domain.outbox.events import Consumer, EventName, Lane
from libs.domain.tables import PENDING_DELIVERY
from libs.domain.telemetry import logger
from libs.observability.context import continued
from libs.observability.redaction import scrub_error
from libs.observability.registry import Metrics
from libs.observability.tracing import record_span, span

_log: Final = logger("outbox")

BATCH: Final = 200
WEBHOOK_BATCH: Final = 4
"""How many events one endpoint may get at once, from each worker."""

LEASE_SECONDS: Final = 30
MAX_ATTEMPTS: Final = 6
BACKOFF_SECONDS: Final = {Consumer.NOTIFICATIONS: (2.0, 300.0), Consumer.WEBHOOK: (60.0, 3600.0)}
"""First and longest wait; the real one is drawn at random below the doubled value (full jitter). Whoever runs a
receiver needs time to notice that it is down."""

_PENDING: Final = PENDING_DELIVERY.replace("dispatched_at", "{0}.dispatched_at").replace("dead_at", "{0}.dead_at")


def _claiming(whose: str) -> str:
    return f"""
    WITH buried AS (
        -- Whoever took these on did not live to tell, time and again.
        UPDATE outbox_deliveries d SET dead_at = clock(), lease_until = NULL, lease_token = NULL
        WHERE {_PENDING.format("d")} AND {whose} AND d.attempts >= {MAX_ATTEMPTS} AND d.lease_until <= clock()
    ),
    claimed AS MATERIALIZED (
        SELECT d.id FROM outbox_deliveries d
        WHERE {_PENDING.format("d")} AND {whose} AND d.available_at <= clock() AND d.attempts < {MAX_ATTEMPTS}
          AND (d.lease_until IS NULL OR d.lease_until <= clock())
          AND NOT EXISTS (
              SELECT FROM outbox_deliveries earlier
              WHERE {_PENDING.format("earlier")} AND earlier.consumer = d.consumer
                AND earlier.aggregate = d.aggregate AND earlier.id < d.id)
        ORDER BY d.available_at, d.id
        LIMIT $2
        FOR UPDATE OF d SKIP LOCKED
    )
    UPDATE outbox_deliveries d
    SET lease_until = clock() + make_interval(secs => $3), lease_token = $4, attempts = d.attempts + 1
    FROM claimed, outbox_events e
    WHERE d.id = claimed.id AND e.id = d.event_id
    RETURNING d.id, d.consumer, d.attempts, e.event_id, e.tenant_id, e.name, e.payload, e.occurred_at,
              e.correlation_id, e.trace_context
    """


_CLAIM: Final = _claiming("d.lane = $1")
_CLAIM_WEBHOOK: Final = _claiming(f"d.lane = '{Lane.WEBHOOKS}' AND d.consumer = $1")

_WAITING_WEBHOOKS: Final = f"""
    SELECT consumer FROM outbox_deliveries
    WHERE {PENDING_DELIVERY} AND lane = '{Lane.WEBHOOKS}' AND available_at <= clock()
      AND (lease_until IS NULL OR lease_until <= clock())
    GROUP BY consumer ORDER BY min(available_at)
"""

_DISPATCHED: Final = """
    UPDATE outbox_deliveries SET dispatched_at = clock(), lease_until = NULL, response_status = $3
    WHERE id = ANY ($1::bigint[]) AND lease_token = $2
"""

_FAILED: Final = """
    UPDATE outbox_deliveries
    SET lease_until = NULL, last_error = $3, available_at = clock() + make_interval(secs => $4),
        response_status = $5, dead_at = CASE WHEN $6 THEN clock() END
    WHERE id = $1 AND lease_token = $2
"""


@dataclass(frozen=True, slots=True)
class Event:
    """An event as a consumer gets it; `event_id` is the same on every attempt. `consumer` says which of its kind is
    meant, such as `webhook:7`."""

    event_id: UUID
    tenant_id: int
    name: EventName
    payload: dict[str, Any]
    occurred_at: datetime
    consumer: str


class NotDeliveredError(Exception):
    """The receiver did not take an event. `status` is its HTTP status, if it answered; `final` says that trying again
    by itself cannot help."""

    def __init__(self, message: str, *, status: int | None = None, final: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.final = final


class EventConsumer(Protocol):
    async def deliver(self, events: Sequence[Event]) -> int | None:
        """Takes all of the events or raises. Idempotent by `event_id`. Answers an HTTP status, if there is one."""


@dataclass(frozen=True, slots=True)
class _Delivery:
    id: int
    attempts: int
    event: Event
    carrier: dict[str, str]

    def described(self) -> dict[str, Any]:
        """What the span of the attempt is and says."""
        return {
            "kind": SpanKind.CONSUMER,
            "parent": self.carrier,
            "attempt": self.attempts,
            "event_id": str(self.event.event_id),
            "event_name": self.event.name.value,
            "outbox_id": self.id,
            "tenant_id": self.event.tenant_id,
            "consumer": self.event.consumer,
        }


class Dispatcher:
    """Dispatches one lane after the other's example; each lane has its own task in the worker, and so has each
    webhook."""

    def __init__(self, database: Database, consumers: Mapping[Consumer, EventConsumer], metrics: Metrics) -> None:
        self._database = database
        self._consumers = consumers
        self._metrics = metrics

    async def dispatch(self, lane: Lane) -> int:
        """Claims and delivers one batch; answers how many deliveries it took on."""
        token = uuid4()
        taken, by_consumer = await self._claim(_CLAIM, lane.value, BATCH, token)
        for consumer, deliveries in by_consumer.items():
            await self._deliver(consumer, deliveries, token)
        return taken

    async def waiting_webhooks(self) -> list[str]:
        """The webhooks that have something to be delivered now, those that have waited longest first."""
        async with self._database.autocommit() as connection:
            return [row["consumer"] for row in await connection.fetch(_WAITING_WEBHOOKS)]

    async def dispatch_webhook(self, webhook: str) -> int:
        """Claims a few deliveries of one webhook and makes them beside each other, which is in order for each
        aggregate; answers how many."""
        token = uuid4()
        taken, by_consumer = await self._claim(_CLAIM_WEBHOOK, webhook, WEBHOOK_BATCH, token)
        async with asyncio.TaskGroup() as group:
            for delivery in by_consumer[Consumer.WEBHOOK]:
                group.create_task(self._deliver(Consumer.WEBHOOK, [delivery], token))
        return taken

    async def _claim(
        self, statement: str, whose: str, limit: int, token: UUID
    ) -> tuple[int, dict[Consumer, list[_Delivery]]]:
        by_consumer: dict[Consumer, list[_Delivery]] = defaultdict(list)
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(statement, whose, limit, float(LEASE_SECONDS), token)
        for row in rows:
            try:
                consumer, delivery = Consumer(row["consumer"].partition(":")[0]), _delivery(row)
            except ValueError as error:  # written by another version of this program
                await self._unreadable(row, token, error)
            else:
                by_consumer[consumer].append(delivery)
        return len(rows), by_consumer

    async def _deliver(self, consumer: Consumer, deliveries: list[_Delivery], token: UUID) -> None:
        if len(deliveries) == 1:
            await self._deliver_one(consumer, deliveries[0], token)
            return
        began_ns = time.time_ns()
        try:
            status = await self._attempt(consumer, deliveries)
        except Exception:
            # One of them spoils the batch: find out which.
            for delivery in deliveries:
                await self._deliver_one(consumer, delivery, token)
            return
        delivered_ns = time.time_ns()
        await self._dispatched(deliveries, token, status)
        ended_ns = time.time_ns()
        for delivery in deliveries:
            dispatch = record_span("outbox.dispatch", start_ns=began_ns, end_ns=ended_ns, **delivery.described())
            record_span(f"{consumer}.deliver", parent=dispatch, start_ns=began_ns, end_ns=delivered_ns)

    async def _deliver_one(self, consumer: Consumer, delivery: _Delivery, token: UUID) -> None:
        with continued(delivery.carrier), span("outbox.dispatch", **delivery.described()) as dispatch:
            try:
                with span(f"{consumer}.deliver"):
                    status = await self._attempt(consumer, [delivery])
            except Exception as error:
                dispatch.set_status(StatusCode.ERROR, type(error).__name__)
                await self._failed(consumer, delivery, token, error)
            else:
                await self._dispatched([delivery], token, status)

    async def _attempt(self, consumer: Consumer, deliveries: list[_Delivery]) -> int | None:
        for delivery in deliveries:
            self._metrics.counter("outbox_dispatch_attempts_total", delivery.event.name).inc()
        return await self._consumers[consumer].deliver([delivery.event for delivery in deliveries])

    async def _dispatched(self, deliveries: list[_Delivery], token: UUID, status: int | None) -> None:
        async with self._database.autocommit() as connection:
            await connection.execute(_DISPATCHED, [delivery.id for delivery in deliveries], token, status)
        for delivery in deliveries:
            event = delivery.event
            with continued(delivery.carrier):
                _log.info(
                    "outbox_dispatched",
                    event_name=event.name,
                    outbox_id=delivery.id,
                    event_id=str(event.event_id),
                    attempts=delivery.attempts,
                    consumer=event.consumer,
                    tenant_id=event.tenant_id,
                )

    async def _postpone(
        self, delivery_id: int, attempts: int, token: UUID, error: Exception, kind: Consumer = Consumer.NOTIFICATIONS
    ) -> bool:
        """Has a delivery tried again later, or gives it up; whether it did."""
        status, final = (error.status, error.final) if isinstance(error, NotDeliveredError) else (None, False)
        first, longest = BACKOFF_SECONDS[kind]
        wait = random.uniform(0, min(longest, first * 2**attempts))  # noqa: S311
        dead = final or attempts >= MAX_ATTEMPTS
        async with self._database.autocommit() as connection:
            await connection.execute(_FAILED, delivery_id, token, scrub_error(error), wait, status, dead)
        return dead

    async def _unreadable(self, row: Any, token: UUID, error: ValueError) -> None:
        dead = await self._postpone(row["id"], row["attempts"], token, error)
        self._metrics.counter("outbox_dispatch_failures_total", row["name"]).inc()
        _log.error(
            "outbox_failed",
            event_name=row["name"],
            outbox_id=row["id"],
            attempts=row["attempts"],
            consumer=row["consumer"],
            tenant_id=row["tenant_id"],
            failure_reason=None,
            error_message=scrub_error(error),
            exception_type=type(error).__name__,
            dead=dead,
            transient=False,
        )

    async def _failed(self, consumer: Consumer, delivery: _Delivery, token: UUID, error: Exception) -> None:
        dead = await self._postpone(delivery.id, delivery.attempts, token, error, consumer)
        event = delivery.event
        self._metrics.counter("outbox_dispatch_failures_total", event.name).inc()
        unnotified = consumer is Consumer.NOTIFICATIONS and event.name is EventName.SESSION_STARTED
        if unnotified:
            self._metrics.counter("appointment_session_notification_failed_total").inc()
        # What a receiver refuses is nothing that we could mend.
        tell = _log.warning if isinstance(error, NotDeliveredError) else _log.error
        tell(
            "outbox_failed",
            event_name=event.name,
            outbox_id=delivery.id,
            event_id=str(event.event_id),
            attempts=delivery.attempts,
            consumer=event.consumer,
            tenant_id=event.tenant_id,
            failure_reason="notification_failed" if unnotified else None,
            error_message=scrub_error(error),
            exception_type=type(error).__name__,
            dead=dead,
            transient=is_transient(error),
        )


def _delivery(row: Any) -> _Delivery:
    event = Event(
        row["event_id"],
        row["tenant_id"],
        EventName(row["name"]),
        row["payload"],
        row["occurred_at"],
        row["consumer"],
    )
    carrier = row["trace_context"]
    if row["correlation_id"]:
        carrier.setdefault("correlation_id", row["correlation_id"])
    return _Delivery(row["id"], row["attempts"], event, carrier)
