"""Reactions: one of each emoji from each participant on a message, added and taken back idempotently."""

from typing import Final

from sqlalchemy import text

from libs.domain.chat import conversations
from libs.domain.transaction import Transaction
from libs.guardrails import Reason, Refused, SessionContext
from libs.guardrails.operations import AddReaction, RemoveReaction

REACTIONS_PER_USER: Final = 20
"""How many different reactions one participant may have on a message."""

_REACT: Final = text(
    """
    WITH message AS (
        SELECT m.conversation_id, m.seq,
            (SELECT count(*) FROM reactions r
             WHERE r.conversation_id = m.conversation_id AND r.message_seq = m.seq AND r.user_id = :user_id
               AND r.present AND r.emoji <> :emoji) AS others,
            EXISTS (SELECT FROM reactions r
                    WHERE r.conversation_id = m.conversation_id AND r.message_seq = m.seq AND r.user_id = :user_id
                      AND r.present AND r.emoji = :emoji) AS present
        FROM messages m WHERE m.id = :message_id AND m.conversation_id = :conversation_id
    ),
    numbered AS (
        UPDATE conversations c SET revision = c.revision + 1
        FROM message
        WHERE c.id = message.conversation_id AND message.present <> :wanted AND (message.others < :most OR NOT :wanted)
        RETURNING c.revision
    ),
    changed AS (
        INSERT INTO reactions (conversation_id, message_seq, user_id, emoji, present, revision)
        SELECT message.conversation_id, message.seq, :user_id, :emoji, :wanted, numbered.revision
        FROM message, numbered
        ON CONFLICT (conversation_id, message_seq, user_id, emoji)
            DO UPDATE SET present = excluded.present, revision = excluded.revision
        RETURNING revision
    )
    SELECT message.present, changed.revision FROM message LEFT JOIN changed ON true
    """
)


async def react(
    tx: Transaction, context: SessionContext[AddReaction] | SessionContext[RemoveReaction], message_id: int, emoji: str
) -> None:
    """Adds or takes back the caller's `emoji`; doing so again changes nothing.

    Raises `Refused`: `MESSAGE_NOT_FOUND`, or `VALIDATION_FAILED` beyond `REACTIONS_PER_USER`.
    """
    wanted = context.operation is AddReaction
    conversation_id = await conversations.enter(tx, context)
    parameters = {
        "conversation_id": conversation_id,
        "message_id": message_id,
        "user_id": context.caller.user_id,
        "emoji": emoji,
        "wanted": wanted,
        "most": REACTIONS_PER_USER,
    }
    row = (await tx.execute(_REACT, parameters)).one_or_none()
    if row is None:
        raise Refused(Reason.MESSAGE_NOT_FOUND)
    if row.revision is not None:
        tx.changed(conversation_id)
    elif wanted and not row.present:
        detail = f"You have {REACTIONS_PER_USER} reactions on this message; take one back first."
        raise Refused(Reason.VALIDATION_FAILED, errors=[{"pointer": "/emoji", "in": "path", "detail": detail}])
