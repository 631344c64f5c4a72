"""How far each participant has read: a watermark that never goes back."""

from typing import Final

from sqlalchemy import text

from libs.domain.chat import conversations
from libs.domain.transaction import Transaction
from libs.guardrails import SessionContext
from libs.guardrails.operations import MarkAsRead

_MARK: Final = text(
    """
    UPDATE participants p SET last_read_seq = greatest(p.last_read_seq, least(:seq, c.last_seq))
    FROM conversations c, participants before
    WHERE c.id = :conversation_id AND p.conversation_id = c.id AND p.user_id = :user_id
      AND before.conversation_id = p.conversation_id AND before.user_id = p.user_id
    RETURNING p.last_read_seq, p.last_read_seq > before.last_read_seq AS moved
    """
)


async def mark_as_read(tx: Transaction, context: SessionContext[MarkAsRead], seq: int) -> int:
    """Moves the caller's watermark up to `seq`, or to the last message if there are not so many; answers where
    it stands."""
    conversation_id = await conversations.enter(tx, context)
    parameters = {"conversation_id": conversation_id, "user_id": context.caller.user_id, "seq": seq}
    row = (await tx.execute(_MARK, parameters)).one()
    if row.moved:
        tx.changed(conversation_id)
    watermark: int = row.last_read_seq
    return watermark
