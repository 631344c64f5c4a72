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
    CHARGES_REFUNDED = "charges_refunded"


class Lane(StrEnum):
    """Lanes are claimed on their own, so that what is urgent never queues behind what is not."""

    URGENT = "urgent"
    NORMAL = "normal"


class Consumer(StrEnum):
    """Each consumer has its own delivery of an event, so that a slow one holds back no other."""

    NOTIFICATIONS = "notifications"


LANES: Final[dict[EventName, Lane]] = {
    EventName.SESSION_STARTED: Lane.URGENT,
    EventName.SESSION_ENDING_SOON: Lane.URGENT,
    EventName.SESSION_ENDED: Lane.URGENT,
}
"""Everything not named here travels in the normal lane."""


def deliver(lane: str) -> str:
    """The SQL that gives every consumer its delivery of each row of the CTE `event` (id, aggregate); `lane`
    is an SQL expression."""
    return f"""
        INSERT INTO outbox_deliveries (event_id, consumer, lane, aggregate)
        SELECT event.id, consumer, {lane}, event.aggregate
        FROM event CROSS JOIN unnest('{{{",".join(Consumer)}}}'::text[]) AS consumer
    """
