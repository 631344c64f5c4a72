"""Tickets: what opens one socket in the place of a token, for clients that cannot send headers with a handshake.

A ticket is good for half a minute, for one use, and for the user and the session context it was issued for.
Only its hash is stored.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg
from sqlalchemy import text

from libs.domain.transaction import Transaction
from libs.guardrails import AppointmentRef, Principal, Role, SessionContext, SessionRef
from libs.guardrails.operations import Join

LIFETIME_SECONDS: Final = 30

# Those nobody used go as others come.
_ISSUE: Final = text(
    """
    WITH pruned AS (DELETE FROM socket_tickets WHERE expires_at <= clock())
    INSERT INTO socket_tickets (digest, tenant_id, user_id, role, context, expires_at, token_expires_at)
    VALUES (:digest, :tenant_id, :user_id, :role, :context, clock() + make_interval(secs => :lifetime),
            clock() + make_interval(secs => :seconds_left))
    RETURNING expires_at
    """
)
_REDEEM: Final = """
    DELETE FROM socket_tickets WHERE digest = $1
    RETURNING tenant_id, user_id, role, context, expires_at > clock() AS fresh,
        extract(epoch FROM token_expires_at - clock())::float8 AS seconds_left
"""


@dataclass(frozen=True, slots=True)
class Ticket:
    """`value` is the secret, known to its holder alone from here on."""

    value: str
    expires_at: datetime


async def issue(
    tx: Transaction, context: SessionContext[Join], subject: SessionRef | AppointmentRef, *, seconds_left: float
) -> Ticket:
    """A ticket for what `context` allows now, addressed as `subject`. A socket that it opens lasts no longer than
    the caller's token does, `seconds_left`."""
    value, caller = secrets.token_urlsafe(32), context.caller
    issued = await tx.execute(
        _ISSUE,
        {
            "digest": _digest(value),
            "tenant_id": caller.tenant_id,
            "user_id": caller.user_id,
            "role": caller.role.value,
            "context": str(subject),
            "lifetime": LIFETIME_SECONDS,
            "seconds_left": seconds_left,
        },
    )
    return Ticket(value, issued.scalar_one())


async def redeem(
    connection: "asyncpg.Connection[Any]", value: str, subject: SessionRef | AppointmentRef
) -> tuple[Principal, float] | None:
    """Whose ticket it was, and for how many seconds the token behind it is still good. None when there is no
    such ticket, or it was used, is too old or was issued for something else; then too it is gone."""
    row = await connection.fetchrow(_REDEEM, _digest(value))
    if row is None or not row["fresh"] or row["context"] != str(subject):
        return None
    return Principal(row["user_id"], row["tenant_id"], Role(row["role"])), row["seconds_left"]


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()
