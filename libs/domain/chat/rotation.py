"""Sealing what is stored with the first of the field keys, so that the others can be dropped.

Bodies are never changed by the services, whose role may not; this runs as the owner of the schema.
"""

from collections.abc import AsyncIterator
from typing import Any, Final

import asyncpg

from libs.domain.chat.bodies import Bodies, StoredBody

BATCH: Final = 500

_IN_USE: Final = "SELECT key_id, count(*) AS messages FROM messages GROUP BY key_id ORDER BY key_id NULLS FIRST"
_OTHERS: Final = """
    SELECT id, conversation_id, client_message_id, body, sealed_body, key_id FROM messages
    WHERE id > $1 AND key_id IS DISTINCT FROM $2 ORDER BY id LIMIT $3 FOR UPDATE
"""
_RESEAL: Final = """
    UPDATE messages m SET body = NULL, sealed_body = anew.sealed_body, key_id = $3
    FROM unnest($1::bigint[], $2::bytea[]) AS anew (id, sealed_body) WHERE m.id = anew.id
"""


async def in_use(connection: "asyncpg.Connection[Any]") -> dict[str | None, int]:
    """How many messages each key seals; None stands for those that are stored in clear."""
    return {row["key_id"]: row["messages"] for row in await connection.fetch(_IN_USE)}


async def rotate(connection: "asyncpg.Connection[Any]", bodies: Bodies) -> AsyncIterator[int]:
    """Seals every message with the current key; yields how many each batch, which is one transaction, sealed.

    Safe to interrupt and to run again. Raises `UnreadableFieldError` when an older key is not configured, and
    leaves that batch as it is.
    """
    last_id = 0
    while True:
        async with connection.transaction():
            rows = await connection.fetch(_OTHERS, last_id, bodies.current, BATCH)
            if not rows:
                return
            sealed = [_anew(row, bodies).sealed_body for row in rows]
            await connection.execute(_RESEAL, [row["id"] for row in rows], sealed, bodies.current)
            last_id = rows[-1]["id"]
        yield len(rows)


def _anew(row: Any, bodies: Bodies) -> StoredBody:
    place = (row["conversation_id"], row["client_message_id"])
    body = bodies.open(*place, StoredBody(row["body"], row["sealed_body"], row["key_id"]))
    return bodies.seal(*place, body)
