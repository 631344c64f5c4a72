"""Messages as they are read: by page, by what follows a number, or one of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg
import orjson

from libs.domain import audit
from libs.domain.chat import conversations
from libs.domain.chat.bodies import Bodies, StoredBody
from libs.domain.db import driver
from libs.domain.transaction import Transaction
from libs.guardrails import AppointmentRef, Role, SessionContext, SessionRef
from libs.guardrails.operations import GetMessages

EXCERPT_LENGTH: Final = 100


@dataclass(frozen=True, slots=True)
class Original:
    """The message that another one replies to; `excerpt` is its beginning."""

    id: int
    seq: int
    excerpt: str


@dataclass(frozen=True, slots=True)
class Reaction:
    """Who marked a message with `emoji`, in the order in which they did."""

    emoji: str
    user_ids: list[int]


@dataclass(frozen=True, slots=True)
class Message:
    id: int
    conversation_id: int
    seq: int
    client_message_id: str
    sender_id: int
    sender_role: str
    kind: str
    body: str
    media_url: str | None
    reply_to: Original | None
    reactions: list[Reaction]
    sent_at: datetime


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


_READ: Final = """
    SELECT m.id, m.conversation_id, m.seq, m.client_message_id, m.sender_id, p.role AS sender_role, m.kind, m.body,
           m.sealed_body, m.key_id, m.media_url, m.sent_at,
           o.id AS original_id, o.seq AS original_seq, o.client_message_id AS original_client_message_id,
           o.body AS original_body, o.sealed_body AS original_sealed_body, o.key_id AS original_key_id,
           (SELECT json_agg(json_build_object('emoji', emoji, 'user_ids', user_ids) ORDER BY revision)::text
            FROM (SELECT emoji, array_agg(user_id ORDER BY revision) AS user_ids, min(revision) AS revision
                  FROM reactions
                  WHERE conversation_id = m.conversation_id AND message_seq = m.seq AND present
                  GROUP BY emoji) AS reaction) AS reactions
    FROM {source} JOIN participants p ON p.conversation_id = m.conversation_id AND p.user_id = m.sender_id
    LEFT JOIN messages o ON o.conversation_id = m.conversation_id AND o.seq = m.reply_to_seq
    {which}
"""
_NEWEST: Final = _READ.format(source="messages m", which="WHERE m.conversation_id = $1 ORDER BY m.seq DESC LIMIT $2")
_BEFORE: Final = _READ.format(
    source="messages m", which="WHERE m.conversation_id = $1 AND m.seq < $3 ORDER BY m.seq DESC LIMIT $2"
)
_AFTER: Final = _READ.format(
    source="messages m", which="WHERE m.conversation_id = $1 AND m.seq > $3 ORDER BY m.seq LIMIT $2"
)
_ONE: Final = _READ.format(source="messages m", which="WHERE m.id = $1")
# $1 conversations, $2 the number after which each is read, $3 at most so many of each.
FOLLOWING: Final = _READ.format(
    # Limited, so that of each conversation nothing else is ever read.
    source="""
        unnest($1::bigint[], $2::bigint[]) AS known (conversation_id, seq)
        CROSS JOIN LATERAL (
            SELECT * FROM messages m WHERE m.conversation_id = known.conversation_id AND m.seq > known.seq
            ORDER BY m.seq LIMIT $3
        ) AS m
    """,
    which="ORDER BY m.conversation_id, m.seq",
)
_LAST_SEQ: Final = "SELECT last_seq FROM conversations WHERE id = $1"


async def history(
    tx: Transaction, bodies: Bodies, context: SessionContext[GetMessages], which: Newest | After | Before, limit: int
) -> History:
    """One page of the conversation. An operator's look is written to the audit log."""
    conversation_id = await conversations.find(tx, context)
    if context.caller.role is Role.OPERATOR:
        await audit.record(tx, context.caller, "chat_history_read", str(_subject(context)))
    if conversation_id is None:
        return History([], has_more=False, last_seq=0)
    connection = await driver(await tx.connection())
    last_seq = await connection.fetchval(_LAST_SEQ, conversation_id)
    items = await _page(connection, bodies, conversation_id, which, limit + 1)
    has_more = len(items) > limit
    if has_more:
        items = items[:limit] if isinstance(which, After) else items[-limit:]
    return History(items, has_more=has_more, last_seq=max(last_seq, items[-1].seq if items else 0))


async def _page(
    connection: "asyncpg.Connection[Any]",
    bodies: Bodies,
    conversation_id: int,
    which: Newest | After | Before,
    limit: int,
) -> list[Message]:
    """At most `limit` messages, in `seq` order."""
    match which:
        case After(seq):
            rows = await connection.fetch(_AFTER, conversation_id, limit, seq)
        case Before(seq):
            rows = (await connection.fetch(_BEFORE, conversation_id, limit, seq))[::-1]
        case Newest():
            rows = (await connection.fetch(_NEWEST, conversation_id, limit))[::-1]
    return [_message_of(row, bodies) for row in rows]


async def following(
    connection: "asyncpg.Connection[Any]", bodies: Bodies, known: Mapping[int, int], limit: int
) -> list[Message]:
    """What follows the number known of each of several conversations, at most `limit` of each, in `seq` order."""
    rows = await connection.fetch(FOLLOWING, list(known.keys()), list(known.values()), limit)
    return [_message_of(row, bodies) for row in rows]


async def one(connection: "asyncpg.Connection[Any]", bodies: Bodies, message_id: int) -> Message:
    return _message_of(await connection.fetchrow(_ONE, message_id), bodies)


def _message_of(row: Any, bodies: Bodies) -> Message:
    conversation_id = row["conversation_id"]
    stored = StoredBody(row["body"], row["sealed_body"], row["key_id"])
    reactions = orjson.loads(row["reactions"]) if row["reactions"] else []
    return Message(
        id=row["id"],
        conversation_id=conversation_id,
        seq=row["seq"],
        client_message_id=row["client_message_id"],
        sender_id=row["sender_id"],
        sender_role=row["sender_role"],
        kind=row["kind"],
        body=bodies.open(conversation_id, row["client_message_id"], stored),
        media_url=row["media_url"],
        reply_to=original_of(row, conversation_id, bodies),
        reactions=[Reaction(**reaction) for reaction in reactions],
        sent_at=row["sent_at"],
    )


def original_of(row: Any, conversation_id: int, bodies: Bodies) -> Original | None:
    """The message replied to, from the columns that begin with `original_`."""
    if row["original_id"] is None:
        return None
    stored = StoredBody(row["original_body"], row["original_sealed_body"], row["original_key_id"])
    body = bodies.open(conversation_id, row["original_client_message_id"], stored)
    return Original(row["original_id"], row["original_seq"], body[:EXCERPT_LENGTH])


def _subject(context: SessionContext[GetMessages]) -> SessionRef | AppointmentRef:
    if context.session is not None:
        return context.session.ref
    assert context.appointment is not None
    return AppointmentRef(context.appointment.id)
