"""Who is writing at this moment: told to whoever watches, and stored nowhere."""

from libs.domain.chat import conversations
from libs.domain.transaction import Transaction
from libs.guardrails import SessionContext
from libs.guardrails.operations import StartTyping, StopTyping


async def typing(tx: Transaction, context: SessionContext[StartTyping] | SessionContext[StopTyping]) -> None:
    conversation_id = await conversations.find(tx, context)
    if conversation_id is not None:
        tx.typing(conversation_id, context.caller.user_id, on=context.operation is StartTyping)
