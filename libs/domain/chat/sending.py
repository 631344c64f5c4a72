"""Sending messages.

Sending is the hot path: one statement locks the session row, judges it, numbers the message and stores
it, and answers the facts it saw. The guard then seals the context from those facts or names the
refusal, so there is no moment between the check and the act in which a session could end. Most messages go
together, by a statement for many; what that leaves out is stored or refused by one of its own.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, TypeAlias

import asyncpg

from libs.domain import people
from libs.domain.chat import conversations, messages
from libs.domain.chat.bodies import Bodies, StoredBody
from libs.domain.chat.group_commit import GroupCommit
from libs.domain.chat.messages import Message
from libs.domain.chat.send_statement import CONVERSATION_OF_SESSION, SEND_BY_APPOINTMENT, SEND_BY_SESSION
from libs.domain.db import Database, driver
from libs.domain.sessions import facts
from libs.domain.sessions.settlement import Settlement
from libs.domain.telemetry import logger
from libs.domain.transaction import Bell, transaction
from libs.guardrails import (
    AppointmentRef,
    Claim,
    Facts,
    Guard,
    Principal,
    Reason,
    Refused,
    SessionContext,
    SessionRef,
    SessionStatus,
)
from libs.guardrails.operations import ReplyToMessage, SendMessage
from libs.observability.registry import Metrics
from libs.observability.tracing import exemplar

_log: Final = logger("chat")

Sending: TypeAlias = SendMessage | ReplyToMessage

BURST: Final = timedelta(minutes=1)
"""A minute's worth of messages may come at once."""


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message as the client wrote it; `client_message_id` makes sending it again harmless, and `reply_to` is
    the id of the message it answers."""

    client_message_id: str
    body: str
    kind: str = "text"
    media_url: str | None = None
    reply_to: int | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """`repeated` is true when the message was stored by an earlier request with the same id."""

    message: Message
    repeated: bool


class Chat:
    """The chat room: what a process needs to send."""

    def __init__(
        self,
        database: Database,
        bell: Bell,
        guard: Guard,
        settlement: Settlement,
        bodies: Bodies,
        metrics: Metrics,
        *,
        response_window: timedelta,
        inactivity: timedelta,
        messages_per_minute: int,
    ) -> None:
        self._database = database
        self._bell = bell
        self._guard = guard
        self._settlement = settlement
        self._bodies = bodies
        self._response_window = response_window
        self._inactivity = inactivity
        self._pace = timedelta(minutes=1) / messages_per_minute
        self._together = GroupCommit(database, self._pace, BURST, _names(SendMessage.passes))
        self._received = metrics.counter("chat_messages_total", "received")
        self._retries = metrics.counter("chat_message_retries_total")
        self._duration = metrics.histogram("chat_message_processing_duration_seconds", "received")

    async def send(self, claim: Claim[SendMessage] | Claim[ReplyToMessage], new: NewMessage) -> Sent:
        """Stores `new`, or answers the message stored under its id before.

        Raises `Refused`: whatever the guard says, `MESSAGE_NOT_FOUND` when there is none to reply to,
        `RATE_LIMITED`, or `IDEMPOTENCY_CONFLICT` when the id was used for another message.
        """
        began = time.perf_counter()
        if isinstance(claim.subject, AppointmentRef):
            sent = await self._send_by_appointment(claim, claim.subject, new, began)
        else:
            sent = await self._send_by_session(claim, claim.subject, new, began)
        if sent.repeated:
            self._retries.inc()
        else:
            self._bell.changed(sent.message.conversation_id)
            self._received.inc()
            self._duration.observe(time.perf_counter() - began, exemplar())
        return sent

    async def _send_by_session(self, claim: Claim[Sending], session: SessionRef, new: NewMessage, began: float) -> Sent:
        body = await self._stored_body(claim, session, new)
        if claim.operation is SendMessage:
            values = (session.id, session.kind.value, *_columns(claim.caller, new, body))
            row = await self._together.store(claim.caller, session.id, values)
            if row is not None:
                return self._sent(self._guard.open(claim, _facts(row)), row, new, began)
        async with self._database.autocommit() as connection:
            row = await self._insert(connection, claim, session, new, body)
            known = _facts(row)
            if not (known.session and known.session.overdue):
                context = self._guard.open(claim, known)
                return await self._judged(connection, context, row, new, began)
        # Not while holding a connection of the other pool.
        async with transaction(self._database, self._bell) as tx:
            await self._settlement.one(tx, known.session.id)
        context = self._guard.open(claim, known)
        raise AssertionError(f"An overdue session let {context.operation.name} through.")

    async def _send_by_appointment(
        self, claim: Claim[Sending], subject: AppointmentRef, new: NewMessage, began: float
    ) -> Sent:
        """The legacy way in: where the flags allow it, it acts on the session, if there is one."""
        async with transaction(self._database, self._bell) as tx:
            active = await people.is_active(tx, claim.caller)
            known = replace(await facts.load(tx, subject, claim.caller.tenant_id, lock=True), caller_active=active)
            context = self._guard.open(claim, known)
            connection = await driver(await tx.connection())
            if known.session is not None:
                body = self._bodies.seal(known.session.conversation_id, new.client_message_id, new.body)
                row = await self._insert(connection, claim, known.session.ref, new, body)
            else:
                conversation_id = await conversations.enter(tx, context)
                body = self._bodies.seal(conversation_id, new.client_message_id, new.body)
                row = await connection.fetchrow(SEND_BY_APPOINTMENT, *self._arguments(claim, subject.id, new, body))
            return await self._judged(connection, context, row, new, began)

    async def _stored_body(self, claim: Claim[Sending], session: SessionRef, new: NewMessage) -> StoredBody:
        if self._bodies.current is None:
            return StoredBody(new.body, None, None)
        # A sealed body is bound to its conversation, which for a session never changes.
        async with self._database.autocommit() as connection:
            found = await connection.fetchval(CONVERSATION_OF_SESSION, session.id, claim.caller.tenant_id)
        if found is None:
            async with transaction(self._database, self._bell) as tx:
                active = await people.is_active(tx, claim.caller)
            self._guard.open(claim, Facts(caller_active=active))
            raise AssertionError(f"A session that nobody knows let {claim.operation.name} through.")
        return self._bodies.seal(found, new.client_message_id, new.body)

    async def _insert(
        self,
        connection: "asyncpg.Connection[Any]",
        claim: Claim[Sending],
        session: SessionRef,
        new: NewMessage,
        body: StoredBody,
    ) -> Any:
        arguments = (
            *self._arguments(claim, session.id, new, body),
            session.kind.value,
            _names(claim.operation.passes),
            self._response_window,
            self._inactivity,
        )
        try:
            return await connection.fetchrow(SEND_BY_SESSION, *arguments)
        except asyncpg.UniqueViolationError:
            # The same id was stored while this statement waited for the lock; now it is visible.
            return await connection.fetchrow(SEND_BY_SESSION, *arguments)

    def _arguments(self, claim: Claim[Sending], subject_id: int, new: NewMessage, body: StoredBody) -> tuple[Any, ...]:
        return (subject_id, *_columns(claim.caller, new, body), new.reply_to, self._pace, BURST)

    async def _judged(
        self,
        connection: "asyncpg.Connection[Any]",
        context: SessionContext[Sending],
        row: Any,
        new: NewMessage,
        began: float,
    ) -> Sent:
        """What the guard let through may have been stored before, or not be stored for another reason."""
        if row["duplicate_id"] is not None:
            return await self._repeated(connection, context, row["duplicate_id"], new)
        if new.reply_to is not None and row["original_id"] is None:
            raise Refused(Reason.MESSAGE_NOT_FOUND)
        if row["message_id"] is None:
            raise Refused(Reason.RATE_LIMITED, retry_after=max(1, math.ceil(row["paced_for"])))
        return self._sent(context, row, new, began)

    def _sent(self, context: SessionContext[Sending], row: Any, new: NewMessage, began: float) -> Sent:
        caller = context.caller
        stored = Message(
            id=row["message_id"],
            conversation_id=row["conversation_id"],
            seq=row["seq"],
            client_message_id=new.client_message_id,
            sender_id=caller.user_id,
            sender_role=caller.role.value,
            kind=new.kind,
            body=new.body,
            media_url=new.media_url,
            reply_to=messages.original_of(row, row["conversation_id"], self._bodies),
            reactions=[],
            sent_at=row["sent_at"],
        )
        _log.info(
            "chat_message_stored",
            session_id=context.session.id if context.session else None,
            appointment_id=context.appointment.id if context.appointment else None,
            user_id=caller.user_id,
            operation=context.operation.name,
            message_id=stored.id,
            duration_ms=round(1000 * (time.perf_counter() - began), 2),
        )
        if row["activated"] and context.session:
            _log.info(
                "session_state_changed",
                session_id=context.session.id,
                status="active",
                user_id=caller.user_id,
            )
        return Sent(stored, repeated=False)

    async def _repeated(
        self, connection: "asyncpg.Connection[Any]", context: SessionContext[Sending], message_id: int, new: NewMessage
    ) -> Sent:
        stored = await messages.one(connection, self._bodies, message_id)
        original_id = stored.reply_to.id if stored.reply_to else None
        known = (stored.sender_id, stored.kind, stored.body, stored.media_url, original_id)
        if known != (context.caller.user_id, new.kind, new.body, new.media_url, new.reply_to):
            raise Refused(Reason.IDEMPOTENCY_CONFLICT)
        return Sent(stored, repeated=True)


def _columns(caller: Principal, new: NewMessage, body: StoredBody) -> tuple[Any, ...]:
    """Who sends what, in the order in which all statements take it."""
    who = (caller.tenant_id, caller.user_id, caller.role.value)
    return (*who, new.client_message_id, new.kind, *body, new.media_url)


def _names(states: Iterable[SessionStatus]) -> list[str]:
    return [state.value for state in states]


def _facts(row: Any) -> Facts:
    if row["session_id"] is None:
        return Facts(caller_active=row["caller_active"])
    return Facts(caller_active=row["caller_active"], session=facts.session_facts(row))
