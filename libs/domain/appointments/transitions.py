"""Which status an appointment may move to. The database holds the same table and refuses the rest."""

from enum import StrEnum
from typing import Final


class Status(StrEnum):
    PENDING = "PENDING"
    CONFIRMED = "CONFIRMED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    RESCHEDULE_PROPOSED = "RESCHEDULE_PROPOSED"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    NO_SHOW = "NO_SHOW"


TRANSITIONS: Final[dict[Status, frozenset[Status]]] = {
    Status.PENDING: frozenset({Status.CONFIRMED, Status.CANCELLED, Status.EXPIRED}),
    # Completing, no-show and cancelling without a session belong to the legacy paths alone.
    Status.CONFIRMED: frozenset(
        {
            Status.IN_PROGRESS,
            Status.CANCELLED,
            Status.RESCHEDULE_PROPOSED,
            Status.COMPLETED,
            Status.NO_SHOW,
        }
    ),
    Status.RESCHEDULE_PROPOSED: frozenset({Status.CONFIRMED, Status.CANCELLED}),
    Status.IN_PROGRESS: frozenset({Status.COMPLETED, Status.NO_SHOW}),
    Status.CANCELLED: frozenset(),
    Status.EXPIRED: frozenset(),
    Status.COMPLETED: frozenset(),
    Status.NO_SHOW: frozenset(),
}

HOLDS_SLOT: Final = frozenset({Status.PENDING, Status.CONFIRMED, Status.RESCHEDULE_PROPOSED, Status.IN_PROGRESS})
"""While in one of these, an appointment keeps its doctor busy."""
