"""A conversation as it is promised, in memory: what each request is answered, and what is then true.

Answers are a status and what the body says: the code of a refusal, a message, a page, or nothing. Messages go by
their numbers and people by their roles, whatever ids they have.
"""

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

Answer: TypeAlias = tuple[int, Any]

LASTS_MINUTES: Final = 30
RESPONSE_MINUTES: Final = 5


@dataclass
class Message:
    seq: int
    client_message_id: str
    sender: str
    body: str
    reply_to: "Message | None"
    reactions: dict[tuple[str, str], None] = field(default_factory=dict)
    """Emoji and role, in the order in which they were added."""

    def shown(self) -> dict[str, Any]:
        marks: dict[str, list[str]] = {}
        for emoji, role in self.reactions:
            marks.setdefault(emoji, []).append(role)
        return {
            "seq": self.seq,
            "client_message_id": self.client_message_id,
            "sender": self.sender,
            "body": self.body,
            "reply_to": (self.reply_to.seq, self.reply_to.body) if self.reply_to else None,
            "reactions": list(marks.items()),
        }


@dataclass
class Conversation:
    """Of an appointment that is due; `state` is that of its session, or `booked` while it has none."""

    state: str = "booked"
    messages: list[Message] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    minute: int = 0
    deadline: int = 0
    awaited: bool = False  # whether the doctor's clock runs

    def start(self) -> None:
        self.state, self.deadline = "waiting", self.minute + LASTS_MINUTES

    def pass_time(self, minutes: int) -> None:
        self.minute += minutes
        if self.state == "waiting" and self.minute >= self.deadline:
            self.state = "expired"

    def refusal(self, caller: str, by: str, *, roles: str = "patient doctor", live: bool = True) -> Answer | None:
        if caller == "stranger":
            return 404, "APPOINTMENT_NOT_FOUND" if by == "appointment" else "SESSION_NOT_FOUND"
        if caller not in roles:
            return 403, "ROLE_NOT_ALLOWED"
        if live and self.state in {"ended", "expired"}:
            return 409, "SESSION_NOT_ACTIVE"
        return None

    def message(self, seq: int) -> Message | None:
        return self.messages[seq - 1] if seq <= len(self.messages) else None

    def send(self, caller: str, by: str, client_message_id: str, body: str, reply_to: int | None = None) -> Answer:
        if refused := self.refusal(caller, by):
            return refused
        for stored in self.messages:
            if stored.client_message_id == client_message_id:
                known = (stored.sender, stored.body, stored.reply_to.seq if stored.reply_to else None)
                same = known == (caller, body, reply_to)
                return (200, stored.shown()) if same else (409, "IDEMPOTENCY_CONFLICT")
        original = self.message(reply_to) if reply_to else None
        if reply_to and original is None:
            return 404, "MESSAGE_NOT_FOUND"
        self.messages.append(Message(len(self.messages) + 1, client_message_id, caller, body, original))
        if self.state == "waiting" and caller == "doctor":
            self.state = "active"
        elif self.state == "waiting" and not self.awaited:
            self.awaited, self.deadline = True, min(self.deadline, self.minute + RESPONSE_MINUTES)
        return 201, self.messages[-1].shown()

    def react(self, caller: str, by: str, seq: int, emoji: str, *, on: bool) -> Answer:
        if refused := self.refusal(caller, by):
            return refused
        if (message := self.message(seq)) is None:
            return 404, "MESSAGE_NOT_FOUND"
        if on:
            message.reactions.setdefault((emoji, caller))
        else:
            message.reactions.pop((emoji, caller), None)
        return 204, None

    def type(self, caller: str, by: str) -> Answer:
        return self.refusal(caller, by) or (204, None)

    def follow(self, caller: str, by: str, after: int) -> Answer:
        return self.refusal(caller, by) or (101, [message.shown() for message in self.messages[after:]])

    def read(self, caller: str, by: str, seq: int) -> Answer:
        if refused := self.refusal(caller, by, live=False):
            return refused
        self.marks[caller] = max(self.marks.get(caller, 0), min(seq, len(self.messages)))
        return 200, {"last_read_seq": self.marks[caller]}

    def end(self, caller: str) -> Answer:
        if refused := self.refusal(caller, "session", roles="patient doctor operator", live=False):
            return refused
        over = self.state in {"ended", "expired"}
        self.state = self.state if over else "ended"
        return 200, {"already_ended": over}

    def page(self, caller: str, by: str, limit: int, after: int | None = None, before: int | None = None) -> Answer:
        if refused := self.refusal(caller, by, roles="patient doctor operator", live=False):
            return refused
        shown = [message.shown() for message in self.messages]
        if after is not None:
            shown = shown[after:]
        elif before is not None:
            shown = shown[: max(0, before - 1)]
        items = shown[:limit] if after is not None else shown[-limit:]
        return 200, {"items": items, "has_more": len(shown) > limit, "last_seq": len(self.messages)}
