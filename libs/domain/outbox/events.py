"""What can happen that someone must hear of. Payloads hold ids and facts, never personal data."""

from enum import StrEnum
from typing import Final


class EventName(StrEnum):
    APPOINTMENT_CONFIRMED = "appointment_confirmed"
    APPOINTMENT_CANCELLED = "appointment_cancelled"
    APPOINTMENT_EXPIRED = "appointment_expired"
    RESCHEDULE_PROPOSED = "reschedule_proposed"
    RESCHEDULE_ACCEPTED = "reschedule_accepted"
    RESCHEDULE_REJECTED = "reschedule_rejected"
    SESSION_STARTED = "session_started"
    SESSION_ENDING_SOON = "session_ending_soon"
    SESSION_ENDED = "session_ended"
    SESSION_CHARGED = "session_charged"
    LEGACY_CHARGED = "legacy_charged"
    CHARGES_REFUNDED = "charges_refunded"
    PING = "ping"
    """An operator tries a webhook; nobody else hears of it."""


class Lane(StrEnum):
    """Lanes are claimed on their own, so that what is urgent never queues behind what is not."""

    URGENT = "urgent"
    NORMAL = "normal"
    WEBHOOKS = "webhooks"
    """Claimed for each endpoint on its own, so that none waits for another."""


class Consumer(StrEnum):
    """Each consumer has its own delivery of an event, so that a slow one holds back no other. There are as many
    webhooks as there are endpoints: see `webhook`."""

    NOTIFICATIONS = "notifications"
    WEBHOOK = "webhook"


LANES: Final[dict[EventName, Lane]] = {
    EventName.SESSION_STARTED: Lane.URGENT,
    EventName.SESSION_ENDING_SOON: Lane.URGENT,
    EventName.SESSION_ENDED: Lane.URGENT,
}
"""Everything not named here travels in the normal lane."""

UNTOLD: Final = frozenset({EventName.SESSION_CHARGED, EventName.LEGACY_CHARGED, EventName.CHARGES_REFUNDED})
"""What happens is told to the parties; what it costs they ask for."""


def webhook(endpoint_id: int) -> str:
    """The consumer that is one endpoint."""
    return f"{Consumer.WEBHOOK}:{endpoint_id}"


def deliver(lane: str) -> str:
    """The SQL that gives every consumer its delivery of each row of the CTE `event` (id, tenant_id, name,
    aggregate), in the order of the events, which is that of dispatching; `lane` is an SQL expression."""
    return f"""
        INSERT INTO outbox_deliveries (event_id, consumer, lane, aggregate)
        SELECT event.id, '{Consumer.NOTIFICATIONS}', {lane}, event.aggregate FROM event
        WHERE event.name <> ALL ('{{{",".join(UNTOLD)}}}')
        UNION ALL
        SELECT event.id, '{Consumer.WEBHOOK}:' || endpoint.id, '{Lane.WEBHOOKS}', event.aggregate
        FROM event JOIN webhook_endpoints endpoint ON endpoint.tenant_id = event.tenant_id
            AND event.name = ANY (endpoint.events) AND endpoint.disabled_at IS NULL
        ORDER BY 1
    """
