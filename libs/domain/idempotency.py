"""Idempotency keys: what a client sends twice has one effect and one answer.

The answer is stored in the effect's own transaction, so neither is ever there without the other. Only
success is stored: what was refused has had no effect, and may be tried again under the same key.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import text

from libs.domain.db import Database
from libs.domain.transaction import Transaction
from libs.guardrails import Principal, Reason, Refused

KEY_MAX_LENGTH: Final = 255
KEPT_FOR: Final = timedelta(hours=24)

_LOCK: Final = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:name, 0))")
_FIND: Final = text("""
    SELECT fingerprint, status, body FROM idempotency_keys
    WHERE user_id = :user_id AND operation = :operation AND key = :key
""")
_STORE: Final = text("""
    INSERT INTO idempotency_keys (tenant_id, user_id, operation, key, fingerprint, status, body)
    VALUES (:tenant_id, :user_id, :operation, :key, :fingerprint, :status, :body)
""")
_PRUNE: Final = "DELETE FROM idempotency_keys WHERE created_at < clock() - $1::interval"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was sent: its status and its body."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """One request under a key. `operation` is what was asked for, so that the same key means something else
    elsewhere; `fingerprint` is a digest of all that the client sent."""

    caller: Principal
    operation: str
    key: str
    fingerprint: bytes


async def claim(tx: Transaction, request: Request) -> Answer | None:
    """The stored answer, or None for whoever may now have the effect: until the transaction ends, nobody
    else may.

    Raises `Refused`: `IDEMPOTENCY_IN_FLIGHT` while another transaction has the claim, and
    `IDEMPOTENCY_KEY_REUSED` when the key belongs to a different request.
    """
    name = f"idempotency {request.caller.user_id} {request.operation} {request.key}"
    if not (await tx.execute(_LOCK, {"name": name})).scalar_one():
        raise Refused(Reason.IDEMPOTENCY_IN_FLIGHT, retry_after=1)
    identity = {"user_id": request.caller.user_id, "operation": request.operation, "key": request.key}
    stored = (await tx.execute(_FIND, identity)).one_or_none()
    if stored is None:
        return None
    if stored.fingerprint != request.fingerprint:
        raise Refused(Reason.IDEMPOTENCY_KEY_REUSED)
    return Answer(stored.status, stored.body)


async def store(tx: Transaction, request: Request, answer: Answer) -> None:
    """Keeps the answer of a request whose claim this transaction has."""
    await tx.execute(
        _STORE,
        {
            "tenant_id": request.caller.tenant_id,
            "user_id": request.caller.user_id,
            "operation": request.operation,
            "key": request.key,
            "fingerprint": request.fingerprint,
            "status": answer.status,
            "body": answer.body,
        },
    )


async def prune(database: Database) -> None:
    """Forgets what is older than `KEPT_FOR`."""
    async with database.autocommit() as connection:
        await connection.execute(_PRUNE, KEPT_FOR)
