import time
from typing import Annotated

from fastapi import Depends, Query, Request, Response

from libs.domain.chat import messages
from libs.domain.chat.messages import After, Before, Newest, NewMessage
from libs.guardrails import Reason, Refused
from libs.guardrails.context import MAX_ID
from libs.guardrails.operations import GetMessages, SendMessage
from libs.observability.tracing import span
from services.api.chat.schemas import HistoryOut, MessageOut, SendMessageIn
from services.api.guards import Can, Claimed, Tx, guarded_router, runtime_of
from services.api.schemas import DEFAULT_LIMIT, Digits, Limit, refusals

router = guarded_router("/chat/{context}", tag="chat", sessions_only=True)

_BY_APPOINTMENT = (
    Reason.SESSION_CONTEXT_INVALID,
    Reason.SESSION_CONTEXT_REQUIRED,
    Reason.SESSION_NOT_READY,
    Reason.SESSION_NOT_FOUND,
    Reason.APPOINTMENT_NOT_FOUND,
    Reason.SESSION_NOT_ACTIVE,
)

Seq = Annotated[int | None, Query(ge=0, le=MAX_ID), Digits]


async def _page(after_seq: Seq = None, before_seq: Seq = None) -> Newest | After | Before:
    """A dependency, so that its refusal comes before the context is opened."""
    if after_seq is not None and before_seq is not None:
        errors = [{"pointer": "/before_seq", "in": "query", "detail": "Give after_seq or before_seq, not both."}]
        raise Refused(Reason.VALIDATION_FAILED, errors=errors)
    if after_seq is not None:
        return After(after_seq)
    return Newest() if before_seq is None else Before(before_seq)


@router.post("/messages", status_code=201, responses=refusals(*_BY_APPOINTMENT, Reason.IDEMPOTENCY_CONFLICT))
async def send_message(
    claim: Claimed[SendMessage], new: SendMessageIn, request: Request, response: Response
) -> MessageOut:
    """Sends a message; 200 instead of 201 when it was stored before under the same id."""
    runtime = runtime_of(request)
    began = time.perf_counter()
    with span("chat.send"):
        sent = await runtime.chat.send(claim, NewMessage(new.client_message_id, new.body, new.kind, new.media_url))
    if sent.repeated:
        response.status_code = 200
        runtime.metrics.counter("chat_message_retries_total").inc()
    else:
        runtime.metrics.counter("chat_messages_total", "received").inc()
        duration = runtime.metrics.histogram("chat_message_processing_duration_seconds", "received")
        duration.observe(time.perf_counter() - began)
    return MessageOut.of(sent.message)


@router.get("/messages", responses=refusals(*_BY_APPOINTMENT))
async def get_messages(
    context: Can[GetMessages],
    tx: Tx,
    page: Annotated[Newest | After | Before, Depends(_page)],
    limit: Limit = DEFAULT_LIMIT,
) -> HistoryOut:
    """A page of the conversation: what follows `after_seq`, what precedes `before_seq`, or the newest."""
    history = await messages.history(tx, context, page, limit)
    items = [MessageOut.of(message) for message in history.items]
    return HistoryOut(items=items, has_more=history.has_more, last_seq=history.last_seq)
