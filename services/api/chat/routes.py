from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request, Response

from libs.domain.chat import messages, presence, reactions, reading
from libs.domain.chat.messages import After, Before, Newest
from libs.domain.chat.sending import NewMessage
from libs.guardrails import Claim, Reason, Refused
from libs.guardrails.context import MAX_ID
from libs.guardrails.operations import (
    AddReaction,
    GetMessages,
    MarkAsRead,
    RemoveReaction,
    ReplyToMessage,
    SendMessage,
    StartTyping,
    StopTyping,
)
from libs.observability.tracing import span
from services.api.chat.schemas import (
    HistoryOut,
    MarkAsReadIn,
    MarkAsReadOut,
    MessageOut,
    ReplyIn,
    SendMessageIn,
)
from services.api.guards import Can, Claimed, Tx, guarded_router, runtime_of
from services.api.schemas import DEFAULT_LIMIT, OF_ANY_IDENTIFIER, Digits, IdPath, Limit, Storable, refusals

router = guarded_router("/chat/{context}", tag="chat", sessions_only=True)

Seq = Annotated[int | None, Query(ge=0, le=MAX_ID), Digits]


async def _page(after_seq: Seq = None, before_seq: Seq = None) -> Newest | After | Before:
    """A dependency, so that its refusal comes before the context is opened."""
    if after_seq is not None and before_seq is not None:
        errors = [{"pointer": "/before_seq", "in": "query", "detail": "Give after_seq or before_seq, not both."}]
        raise Refused(Reason.VALIDATION_FAILED, errors=errors)
    if after_seq is not None:
        return After(after_seq)
    return Newest() if before_seq is None else Before(before_seq)


_SENDING = refusals(*OF_ANY_IDENTIFIER, Reason.IDEMPOTENCY_CONFLICT, Reason.RATE_LIMITED)
_STORED_BEFORE: dict[int | str, dict[str, Any]] = {
    200: {"model": MessageOut, "description": "It was stored before, under the same id."}
}


@router.post("/messages", status_code=201, responses=_SENDING | _STORED_BEFORE)
async def send_message(
    claim: Claimed[SendMessage], new: SendMessageIn, request: Request, response: Response
) -> MessageOut:
    """Sends a message; 200 instead of 201 when it was stored before under the same id."""
    message = NewMessage(new.client_message_id, new.body, new.kind, new.media_url)
    return await _send(request, response, claim, message)


@router.post(
    "/messages/{message_id}/replies",
    status_code=201,
    responses=refusals(*OF_ANY_IDENTIFIER, Reason.MESSAGE_NOT_FOUND, Reason.IDEMPOTENCY_CONFLICT, Reason.RATE_LIMITED)
    | _STORED_BEFORE,
)
async def reply_to_message(
    claim: Claimed[ReplyToMessage], message_id: IdPath, new: ReplyIn, request: Request, response: Response
) -> MessageOut:
    """Sends a message that answers another one of the conversation."""
    message = NewMessage(new.client_message_id, new.body, reply_to=message_id)
    return await _send(request, response, claim, message)


async def _send(
    request: Request, response: Response, claim: Claim[SendMessage] | Claim[ReplyToMessage], message: NewMessage
) -> MessageOut:
    with span("chat.send"):
        sent = await runtime_of(request).chat.send(claim, message)
    if sent.repeated:
        response.status_code = 200
    return MessageOut.of(sent.message)


@router.get("/messages", responses=refusals(*OF_ANY_IDENTIFIER))
async def get_messages(
    context: Can[GetMessages],
    tx: Tx,
    page: Annotated[Newest | After | Before, Depends(_page)],
    request: Request,
    limit: Limit = DEFAULT_LIMIT,
) -> HistoryOut:
    """A page of the conversation: what follows `after_seq`, what precedes `before_seq`, or the newest."""
    history = await messages.history(tx, runtime_of(request).bodies, context, page, limit)
    items = [MessageOut.of(message) for message in history.items]
    return HistoryOut(items=items, has_more=history.has_more, last_seq=history.last_seq)


Emoji = Annotated[str, Path(min_length=1, max_length=32, description="Of 1 to 32 characters."), Storable]
_ON_MESSAGE = refusals(*OF_ANY_IDENTIFIER, Reason.MESSAGE_NOT_FOUND)


@router.put("/messages/{message_id}/reactions/{emoji}", status_code=204, responses=_ON_MESSAGE)
async def add_reaction(context: Can[AddReaction], tx: Tx, message_id: IdPath, emoji: Emoji) -> None:
    """Marks a message; doing so again changes nothing."""
    await reactions.react(tx, context, message_id, emoji)


@router.delete("/messages/{message_id}/reactions/{emoji}", status_code=204, responses=_ON_MESSAGE)
async def remove_reaction(context: Can[RemoveReaction], tx: Tx, message_id: IdPath, emoji: Emoji) -> None:
    """Takes your mark back; doing so again changes nothing."""
    await reactions.react(tx, context, message_id, emoji)


@router.put("/typing", status_code=204, responses=refusals(*OF_ANY_IDENTIFIER))
async def start_typing(context: Can[StartTyping], tx: Tx) -> None:
    """Shows the others for ten seconds that you are writing."""
    await presence.typing(tx, context)


@router.delete("/typing", status_code=204, responses=refusals(*OF_ANY_IDENTIFIER))
async def stop_typing(context: Can[StopTyping], tx: Tx) -> None:
    """Shows the others that you are not writing any more."""
    await presence.typing(tx, context)


@router.put("/read", responses=refusals(*OF_ANY_IDENTIFIER))
async def mark_as_read(context: Can[MarkAsRead], tx: Tx, mark: MarkAsReadIn) -> MarkAsReadOut:
    """Says up to which message you have read."""
    return MarkAsReadOut(last_read_seq=await reading.mark_as_read(tx, context, mark.seq))
