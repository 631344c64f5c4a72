from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field

from libs.domain.chat.messages import Message
from libs.guardrails.context import MAX_ID
from services.api.schemas import In, Out, SafeStr

ClientMessageId = Annotated[SafeStr, Field(min_length=1, max_length=200)]
Body = Annotated[SafeStr, Field(min_length=1, max_length=4000)]


class SendMessageIn(In):
    """`client_message_id` is yours to choose, unique in the conversation: sending it again is harmless."""

    client_message_id: ClientMessageId
    body: Body
    kind: Literal["text", "image", "voice"] = "text"
    media_url: Annotated[SafeStr, Field(max_length=2048, pattern=r"^https?://\S+$")] | None = None


class ReplyIn(In):
    """As in sending; the path names the message that is answered."""

    client_message_id: ClientMessageId
    body: Body


class MarkAsReadIn(In):
    """Beyond the last message, `seq` means the last."""

    seq: Annotated[int, Field(strict=True, ge=0, le=MAX_ID)]


class MarkAsReadOut(Out):
    """How far you have read; it never goes back."""

    last_read_seq: int


class Sender(Out):
    id: int
    role: str


class ReactionOut(Out):
    emoji: str
    user_ids: list[int]


class ReplyTo(Out):
    id: int
    seq: int
    excerpt: str


class MessageOut(Out):
    """`seq` numbers the messages of a conversation without gaps; order is `seq`, never time."""

    id: int
    seq: int
    client_message_id: str
    sender: Sender
    kind: str
    body: str
    media_url: str | None
    reply_to: ReplyTo | None
    reactions: list[ReactionOut]
    sent_at: datetime

    @classmethod
    def of(cls, message: Message) -> Self:
        return cls(
            id=message.id,
            seq=message.seq,
            client_message_id=message.client_message_id,
            sender=Sender(id=message.sender_id, role=message.sender_role),
            kind=message.kind,
            body=message.body,
            media_url=message.media_url,
            reply_to=ReplyTo.model_validate(message.reply_to) if message.reply_to else None,
            reactions=[ReactionOut.model_validate(reaction) for reaction in message.reactions],
            sent_at=message.sent_at,
        )


class HistoryOut(Out):
    """Messages in `seq` order; `has_more` tells of more in the direction asked for."""

    items: list[MessageOut]
    has_more: bool
    last_seq: int
