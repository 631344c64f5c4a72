"""What those who watch conversations live are told, read for many conversations at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from libs.domain.sessions.sessions import COLUMNS, Session, session_of
from libs.guardrails.operations import LIVE


@dataclass(frozen=True, slots=True)
class Party:
    """A participant: how far he or she has read, and whether the user is still active."""

    user_id: int
    last_read_seq: int
    active: bool


@dataclass(frozen=True, slots=True)
class State:
    """A conversation at one moment. `last_seq` is the number of its last message, `revision` that of its last
    change of a reaction; `session` is None while its appointment has none."""

    conversation_id: int
    last_seq: int
    revision: int
    session: Session | None
    parties: tuple[Party, ...]

    @property
    def is_over(self) -> bool:
        return self.session is not None and self.session.status not in LIVE


@dataclass(frozen=True, slots=True)
class ChangedReaction:
    """How a reaction stands; `on` is false when it was taken back. `revision` numbers the change."""

    conversation_id: int
    message_id: int
    user_id: int
    emoji: str
    on: bool
    revision: int


_STATES: Final = f"""
    SELECT c.id AS conversation_id, c.last_seq, c.revision,
        (SELECT json_agg(json_build_object('user_id', p.user_id, 'last_read_seq', p.last_read_seq, 'active', u.active))
         FROM participants p JOIN users u ON u.id = p.user_id WHERE p.conversation_id = c.id) AS parties,
        {COLUMNS}
    FROM conversations c LEFT JOIN sessions ON sessions.id = c.session_id
    WHERE c.id = ANY ($1)
"""

# $1 conversations, $2 the revision after which each is read, $3 at most so many of each.
_REACTIONS: Final = """
    SELECT r.conversation_id, m.id AS message_id, r.user_id, r.emoji, r.present AS on, r.revision
    FROM unnest($1::bigint[], $2::bigint[]) AS known (conversation_id, revision)
    CROSS JOIN LATERAL (
        SELECT * FROM reactions r WHERE r.conversation_id = known.conversation_id AND r.revision > known.revision
        ORDER BY r.revision LIMIT $3
    ) AS r
    JOIN messages m ON m.conversation_id = r.conversation_id AND m.seq = r.message_seq
    ORDER BY r.conversation_id, r.revision
"""


async def states(connection: "asyncpg.Connection[Any]", conversations: Sequence[int]) -> list[State]:
    return [_state(row) for row in await connection.fetch(_STATES, conversations)]


async def changed_reactions(
    connection: "asyncpg.Connection[Any]", known: Mapping[int, int], limit: int
) -> list[ChangedReaction]:
    """The reactions that changed after the revision known of each conversation, at most `limit` of each, in the
    order of their last change."""
    rows = await connection.fetch(_REACTIONS, list(known.keys()), list(known.values()), limit)
    return [ChangedReaction(**row) for row in rows]


def _state(row: Any) -> State:
    return State(
        conversation_id=row["conversation_id"],
        last_seq=row["last_seq"],
        revision=row["revision"],
        session=None if row["id"] is None else session_of(row),
        parties=tuple(Party(**party) for party in row["parties"] or ()),
    )
