"""Sending and reading messages.

Sending is the hot path: one statement locks the session row, judges it, numbers the message and stores
it, and always answers the facts it saw. The guard then seals the context from those facts or names the
refusal, so there is no moment between the check and the act in which a session could end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

import asyncpg
from sqlalchemy import text

from libs.domain import audit, people
from libs.domain.chat.send_statement import JOIN_BY_APPOINTMENT, SEND_BY_APPOINTMENT, SEND_BY_SESSION
from libs.domain.db import Database, driver
from libs.domain.sessions import expiry, facts
from libs.domain.telemetry import logger
from libs.domain.transaction import Bell, Transaction, transaction
from libs.guardrails import (
    AppointmentRef,
    Claim,
    Facts,
    Guard,
    Principal,
    Reason,
    Refused,
    Role,
    SessionContext,
    SessionRef,
)
from libs.guardrails.operations import GetMessages, SendMessage

_log: Final = logger("chat")


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message as the client wrote it; `client_message_id` makes sending it again harmless."""

    client_message_id: str
    body: str
    kind: str = "text"
    media_url: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    id: int
    seq: int
    client_message_id: str
    sender_id: int
    sender_role: str
    kind: str
    body: str
    media_url: str | None
    sent_at: datetime


@dataclass(frozen=True, slots=True)
class Sent:
    """`repeated` is true when the message was stored by an earlier request with the same id."""

    message: Message
    repeated: bool


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest page of a conversation."""


@dataclass(frozen=True, slots=True)
class After:
    """What follows `seq`, oldest first."""

    seq: int


@dataclass(frozen=True, slots=True)
class Before:
    """What precedes `seq`; the page holds the nearest."""

    seq: int


@dataclass(frozen=True, slots=True)
class History:
    """Messages in `seq` order. `has_more` tells of more in the direction asked for."""

    items: list[Message]
    has_more: bool
    last_seq: int


class Chat:
    """The chat room: what a process needs to send."""

    def __init__(self, database: Database, bell: Bell, guard: Guard, *, response_window: timedelta) -> None:
        self._database = database
        self._bell = bell
        self._guard = guard
        self._response_window = response_window

    async def send(self, claim: Claim[SendMessage], new: NewMessage) -> Sent:
        """Stores `new`, or answers the message stored under its id before.

        Raises `Refused`: whatever the guard says, or `IDEMPOTENCY_CONFLICT` when the id was used for
        another message.
        """
        if isinstance(claim.subject, AppointmentRef):
            return await self._send_by_appointment(claim, claim.subject, new)
        async with self._database.autocommit() as connection:
            row = await self._insert(connection, claim.caller, claim.subject, new)
        known = _facts(row)
        if known.session and known.session.overdue:
            await self._expire(known.session.id)
        context = self._guard.open(claim, known)
        return self._sent(context, row, new)

    async def _send_by_appointment(self, claim: Claim[SendMessage], subject: AppointmentRef, new: NewMessage) -> Sent:
        """The legacy way in: where the flags allow it, it acts on the session, if there is one."""
        async with transaction(self._database, self._bell) as tx:
            active = await people.is_active(tx, claim.caller)
            known = replace(await facts.load(tx, subject, claim.caller.tenant_id, lock=True), caller_active=active)
            context = self._guard.open(claim, known)
            connection = await driver(await tx.connection())
            if known.session is not None:
                row = await self._insert(connection, claim.caller, known.session.ref, new)
            else:
                message = _arguments(subject.id, claim.caller, new)
                await connection.execute(JOIN_BY_APPOINTMENT, *message[:4])
                row = await connection.fetchrow(SEND_BY_APPOINTMENT, *message)
            return self._sent(context, row, new)

    async def _insert(
        self, connection: "asyncpg.Connection[Any]", caller: Principal, session: SessionRef, new: NewMessage
    ) -> Any:
        passes = [status.value for status in SendMessage.passes]
        arguments = (
            *_arguments(session.id, caller, new),
            session.kind.value,
            passes,
            self._response_window,
        )
        try:
            return await connection.fetchrow(SEND_BY_SESSION, *arguments)
        except asyncpg.UniqueViolationError:
            # The same id was stored while this statement waited for the lock; now it is visible.
            return await connection.fetchrow(SEND_BY_SESSION, *arguments)

    async def _expire(self, session_id: int) -> None:
        async with transaction(self._database, self._bell) as tx:
            await expiry.expire_sessions(tx, only=session_id)

    def _sent(self, context: SessionContext[SendMessage], row: Any, new: NewMessage) -> Sent:
        caller = context.caller
        stored = Message(
            id=row["message_id"],
            seq=row["seq"],
            client_message_id=new.client_message_id,
            sender_id=caller.user_id,
            sender_role=caller.role.value,
            kind=new.kind,
            body=new.body,
            media_url=new.media_url,
            sent_at=row["sent_at"],
        )
        if row["repeated"] and not row["same"]:
            raise Refused(Reason.IDEMPOTENCY_CONFLICT)
        _log.info(
            "chat_message_stored",
            category="message",
            session_id=context.session.id if context.session else None,
            appointment_id=context.appointment.id if context.appointment else None,
            user_id=caller.user_id,
            operation=SendMessage.name,
            message_id=stored.id,
        )
        if row["activated"] and context.session:
            _log.info(
                "session_state_changed",
                session_id=context.session.id,
                status="active",
                user_id=caller.user_id,
            )
        return Sent(stored, row["repeated"])


def _arguments(subject_id: int, caller: Principal, new: NewMessage) -> tuple[Any, ...]:
    return (
        subject_id,
        caller.tenant_id,
        caller.user_id,
        caller.role.value,
        new.client_message_id,
        new.kind,
        new.body,
        new.media_url,
    )


def _facts(row: Any) -> Facts:
    if row["session_id"] is None:
        return Facts(caller_active=row["caller_active"])
    return Facts(caller_active=row["caller_active"], session=facts.session_facts(row))


_PAGE: Final = """
    SELECT m.id, m.seq, m.client_message_id, m.sender_id, p.role AS sender_role, m.kind, m.body,
           m.media_url, m.sent_at
    FROM messages m JOIN participants p ON p.conversation_id = m.conversation_id AND p.user_id = m.sender_id
    WHERE m.conversation_id = :conversation_id {bound}
    ORDER BY m.seq {order} LIMIT :limit
"""
_NEWEST: Final = text(_PAGE.format(bound="", order="DESC"))
_BEFORE: Final = text(_PAGE.format(bound="AND m.seq < :seq", order="DESC"))
_AFTER: Final = text(_PAGE.format(bound="AND m.seq > :seq", order="ASC"))
_CONVERSATION: Final = text(
    "SELECT id, last_seq FROM conversations WHERE session_id = :session_id OR appointment_id = :appointment_id"
)


async def history(
    tx: Transaction, context: SessionContext[GetMessages], page: Newest | After | Before, limit: int
) -> History:
    """One page of the conversation. An operator's look is written to the audit log."""
    conversation = (
        await tx.execute(
            _CONVERSATION,
            {
                "session_id": context.session.id if context.session else None,
                "appointment_id": context.appointment.id if context.appointment else None,
            },
        )
    ).one_or_none()
    if context.caller.role is Role.OPERATOR:
        await audit.record(tx, context.caller, "chat_history_read", str(_subject(context)))
    if conversation is None:
        return History([], has_more=False, last_seq=0)
    rows = await _page(tx, conversation.id, page, limit + 1)
    items = [Message(**row._mapping) for row in rows[:limit]]
    if not isinstance(page, After):
        items.reverse()
    return History(items, has_more=len(rows) > limit, last_seq=conversation.last_seq)


def _subject(context: SessionContext[GetMessages]) -> SessionRef | AppointmentRef:
    if context.session is not None:
        return context.session.ref
    assert context.appointment is not None
    return AppointmentRef(context.appointment.id)


async def _page(tx: Transaction, conversation_id: int, page: Newest | After | Before, limit: int) -> Sequence[Any]:
    parameters = {"conversation_id": conversation_id, "limit": limit}
    match page:
        case Newest():
            return (await tx.execute(_NEWEST, parameters)).all()
        case After(seq):
            return (await tx.execute(_AFTER, {**parameters, "seq": seq})).all()
        case Before(seq):
            return (await tx.execute(_BEFORE, {**parameters, "seq": seq})).all()
