"""Secrets of webhooks, and signatures by them, as Standard Webhooks has them."""

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable
from typing import Any, Final

import asyncpg

from libs.domain.sealing import Field, FieldKeys

_PREFIX: Final = "whsec_"
_BYTES: Final = 32

_IN_USE: Final = "SELECT key_id, count(*) AS secrets FROM webhook_secrets GROUP BY key_id"
_OTHERS: Final = """
    SELECT id, endpoint_id, secret, key_id FROM webhook_secrets
    WHERE key_id IS DISTINCT FROM $1 ORDER BY id FOR UPDATE
"""
_RESEAL: Final = "UPDATE webhook_secrets SET secret = $2, key_id = $3 WHERE id = $1"


def new() -> bytes:
    return os.urandom(_BYTES)


def spelled(secret: bytes) -> str:
    """The secret as receivers are given it."""
    return _PREFIX + base64.b64encode(secret).decode()


def signature(secrets: Iterable[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one signature by each secret, any of which may be good for the receiver."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digests = (hmac.digest(secret, signed, hashlib.sha256) for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def sealed(keys: FieldKeys, endpoint_id: int, secret: bytes) -> Field:
    return keys.seal(_place(endpoint_id), secret)


def opened(keys: FieldKeys, endpoint_id: int, stored: Field) -> bytes:
    """Raises `UnreadableFieldError`."""
    return keys.open(_place(endpoint_id), stored)


def _place(endpoint_id: int) -> str:
    return f"webhook_secrets:{endpoint_id}"


async def in_use(connection: "asyncpg.Connection[Any]") -> dict[str | None, int]:
    """How many secrets each key seals; None stands for those that are stored in clear."""
    return {row["key_id"]: row["secrets"] for row in await connection.fetch(_IN_USE)}


async def rotate(connection: "asyncpg.Connection[Any]", keys: FieldKeys) -> int:
    """Seals every secret with the current key, all or none; answers how many had another. Raises
    `UnreadableFieldError` when an older key is not configured."""
    async with connection.transaction():
        rows = await connection.fetch(_OTHERS, keys.current)
        for row in rows:
            secret = opened(keys, row["endpoint_id"], Field(row["secret"], row["key_id"]))
            await connection.execute(_RESEAL, row["id"], *sealed(keys, row["endpoint_id"], secret))
    return len(rows)
