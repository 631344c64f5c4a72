"""The operations that concern a session, one class each.

The class is used as a type: `SessionContext[SendMessage]` is the proof that sending was allowed, and
is no proof of anything else. Its attributes are the operation's policy; `decide` reads nothing else.
"""

from enum import StrEnum
from typing import ClassVar

from libs.guardrails.permissions import Role


class Family(StrEnum):
    """Which column of the rollout flags concerns an operation that arrives by appointment id."""

    CHAT = "chat"
    BILLING = "billing"
    LIFECYCLE = "lifecycle"


class SessionStatus(StrEnum):
    WAITING = "waiting"
    CONNECTING = "connecting"
    ACTIVE = "active"
    ENDED = "ended"
    EXPIRED = "expired"
    MISSED = "missed"
    DECLINED = "declined"


LIVE = frozenset({SessionStatus.WAITING, SessionStatus.CONNECTING, SessionStatus.ACTIVE})
ALWAYS = frozenset(SessionStatus)

_PARTIES = frozenset({Role.PATIENT, Role.DOCTOR})
_PARTIES_AND_OPERATORS = _PARTIES | {Role.OPERATOR}


class Operation:
    """Base of all operations; a subclass is complete when it gives its policy as class arguments.

    `name` is the label value and the word in logs. `passes` are the session states in which the
    operation is allowed. `roles` are the roles that may perform it on a session they take part in
    (operators take part in every session of their tenant). `by_appointment` tells whether the
    rollout flags may let it through with a plain appointment id. `calls_only` tells that a text session
    knows no such thing, `charges` that the session's units must have begun to run. `reads` is true when
    it changes nothing, so that its facts need no lock.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    passes: ClassVar[frozenset[SessionStatus]]
    roles: ClassVar[frozenset[Role]]
    by_appointment: ClassVar[bool]
    calls_only: ClassVar[bool]
    charges: ClassVar[bool]
    reads: ClassVar[bool]

    def __init_subclass__(
        cls,
        *,
        name: str,
        family: Family,
        passes: frozenset[SessionStatus] = LIVE,
        roles: frozenset[Role] = _PARTIES,
        by_appointment: bool = False,
        calls_only: bool = False,
        charges: bool = False,
        reads: bool = False,
    ) -> None:
        cls.name = name
        cls.family = family
        cls.passes = passes
        cls.roles = roles
        cls.by_appointment = by_appointment
        cls.calls_only = calls_only
        cls.charges = charges
        cls.reads = reads
        OPERATIONS[name] = cls


OPERATIONS: dict[str, type[Operation]] = {}
"""Every operation by its name, in the order of definition."""


def names_of(family: Family) -> list[str]:
    """The operations of a family, by name."""
    return [name for name, operation in OPERATIONS.items() if operation.family is family]


class SendMessage(Operation, name="send_message", family=Family.CHAT, by_appointment=True):
    """Write a message into the session's conversation."""


class GetMessages(
    Operation,
    name="get_messages",
    family=Family.CHAT,
    passes=ALWAYS,
    roles=_PARTIES_AND_OPERATORS,
    by_appointment=True,
    reads=True,
):
    """Read the conversation; stays possible after the end, and for operators (audited)."""


class ReplyToMessage(Operation, name="reply_to_message", family=Family.CHAT, by_appointment=True):
    """Write a message that answers another one of the conversation."""


class AddReaction(Operation, name="add_reaction", family=Family.CHAT, by_appointment=True):
    """Mark a message with an emoji."""


class RemoveReaction(Operation, name="remove_reaction", family=Family.CHAT, by_appointment=True):
    """Take such a mark of one's own back."""


class StartTyping(Operation, name="start_typing", family=Family.CHAT, by_appointment=True, reads=True):
    """Show the others that one is writing."""


class StopTyping(Operation, name="stop_typing", family=Family.CHAT, by_appointment=True, reads=True):
    """Show that one is not writing any more."""


class MarkAsRead(Operation, name="mark_as_read", family=Family.CHAT, passes=ALWAYS, by_appointment=True):
    """Say up to where one has read; stays possible after the end."""


class Join(Operation, name="join", family=Family.CHAT, by_appointment=True):
    """Follow the conversation live, over a socket."""


class ViewSession(
    Operation,
    name="view_session",
    family=Family.LIFECYCLE,
    passes=ALWAYS,
    roles=_PARTIES_AND_OPERATORS,
    reads=True,
):
    """See the session's state."""


class CompleteSession(
    Operation,
    name="complete_session",
    family=Family.BILLING,
    passes=ALWAYS,
    roles=_PARTIES_AND_OPERATORS,
):
    """End the session; idempotent, hence allowed in every state."""


class DeductInterval(
    Operation, name="deduct_interval", family=Family.BILLING, roles=_PARTIES_AND_OPERATORS, charges=True
):
    """Charge the units that have run so far."""


class ViewBilling(
    Operation,
    name="view_billing",
    family=Family.BILLING,
    passes=ALWAYS,
    roles=_PARTIES_AND_OPERATORS,
    reads=True,
):
    """See what the session was charged."""


class Ring(Operation, name="ring", family=Family.LIFECYCLE, calls_only=True):
    """Call the other party, who has a while to answer."""


class Answer(Operation, name="answer", family=Family.LIFECYCLE, calls_only=True):
    """Take the other party's call."""


class Connect(Operation, name="connect", family=Family.LIFECYCLE, calls_only=True):
    """Say that one hears the other party; repeated, that one still does."""


class Decline(
    Operation,
    name="decline",
    family=Family.LIFECYCLE,
    passes=frozenset({SessionStatus.CONNECTING, SessionStatus.DECLINED}),
    calls_only=True,
):
    """Refuse the call, which ends it."""


class EndSession(
    Operation,
    name="end_session",
    family=Family.BILLING,
    passes=ALWAYS,
    roles=_PARTIES_AND_OPERATORS,
    by_appointment=True,
    charges=True,
):
    """Legacy: end and bill by appointment."""


class ProcessPayment(
    Operation,
    name="process_payment",
    family=Family.BILLING,
    passes=ALWAYS,
    roles=_PARTIES_AND_OPERATORS,
    by_appointment=True,
    charges=True,
):
    """Legacy: pay the doctor by appointment."""


class ProcessDeduction(
    Operation,
    name="process_deduction",
    family=Family.BILLING,
    passes=ALWAYS,
    roles=_PARTIES_AND_OPERATORS,
    by_appointment=True,
    charges=True,
):
    """Legacy: deduct units by appointment."""
