"""Overrides of the rollout flags, as rows. Every change is audited and announced in its own transaction, so
nobody hears of a change that was not made."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import orjson
from sqlalchemy import Row, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import BigInteger, Text

from libs.domain import audit
from libs.domain.db import driver
from libs.domain.transaction import Transaction
from libs.guardrails import Flag, Override, Principal, Target, Tripwire

if TYPE_CHECKING:
    import asyncpg

CHANNEL: Final = "flag_overrides"
"""Where PostgreSQL tells of changes; a message says nothing but that there is one."""

_COLUMNS: Final = "flag, tenant_id, target::text AS target, tripwire::text AS tripwire"

# The other flags that a table may hold are another version's business.
_KNOWN: Final = [flag.value for flag in Flag]

_READ: Final = f"SELECT {_COLUMNS} FROM flag_overrides WHERE flag = ANY($1) ORDER BY flag, tenant_id NULLS FIRST"

_ONE_WRITER: Final = text("SELECT pg_advisory_xact_lock(hashtextextended('flag_overrides', 0))")
_FIND: Final = text(
    f"SELECT {_COLUMNS} FROM flag_overrides WHERE flag = :flag AND tenant_id IS NOT DISTINCT FROM :tenant_id FOR UPDATE"
).bindparams(bindparam("tenant_id", type_=BigInteger))
_ARMED: Final = text(f"""
    SELECT {_COLUMNS} FROM flag_overrides WHERE tripwire IS NOT NULL AND flag = ANY(:flags) FOR UPDATE SKIP LOCKED
""").bindparams(bindparam("flags", type_=ARRAY(Text)))
_PUT: Final = text("""
    INSERT INTO flag_overrides (flag, tenant_id, target, tripwire) VALUES (:flag, :tenant_id, :target, :tripwire)
    ON CONFLICT (flag, tenant_id) DO UPDATE
    SET target = excluded.target, tripwire = excluded.tripwire, changed_at = clock()
""").bindparams(bindparam("target", type_=JSONB), bindparam("tripwire", type_=JSONB(none_as_null=True)))
_CLEAR: Final = text(f"""
    DELETE FROM flag_overrides
    WHERE flag = ANY(:flags) AND (:tenant_id IS NULL OR tenant_id = :tenant_id)
    RETURNING {_COLUMNS}
""").bindparams(bindparam("flags", type_=ARRAY(Text)), bindparam("tenant_id", type_=BigInteger))
_ANNOUNCE: Final = text("SELECT pg_notify(:channel, '')")
_HISTORY: Final = text("""
    SELECT at, actor_id, tenant_id, action, subject, details FROM audit_log
    WHERE subject = coalesce(:subject, subject) AND action IN ('flag_changed', 'flag_cleared', 'flag_tripped')
    ORDER BY id DESC LIMIT :limit
""").bindparams(bindparam("subject", type_=Text))


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the history. `actor_id` is None for the command line and for tripwires, `tenant_id` for an
    override of all tenants; `before` and `after` are overrides as `as_json` writes them, or None."""

    at: datetime
    flag: str
    tenant_id: int | None
    action: str
    actor_id: int | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


def as_json(override: Override) -> dict[str, Any]:
    """What an override says, as the audit log and the command line show it."""
    tripwire = asdict(override.tripwire) if override.tripwire else None
    return {"target": override.target.as_json(), "tripwire": tripwire}


async def read(connection: "asyncpg.Connection[Any]", *, timeout: float | None = None) -> list[Override]:
    """All overrides. Raises ValueError for one that this version cannot read."""
    return [_override(row) for row in await connection.fetch(_READ, _KNOWN, timeout=timeout)]


async def all_of(tx: Transaction) -> list[Override]:
    """All overrides, as the transaction sees them."""
    return await read(await driver(await tx.connection()))


async def lock_armed(tx: Transaction) -> list[Override]:
    """The overrides with a tripwire, locked until the transaction ends, but for those that another one has locked."""
    rows = (await tx.execute(_ARMED, {"flags": _KNOWN})).all()
    return [_override(row) for row in rows]


async def put(tx: Transaction, override: Override, actor: Principal | None) -> Override | None:
    """Sets an override in place of the one there was, which it answers. `actor` is None for the command line."""
    await tx.execute(_ONE_WRITER)
    where = {"flag": override.flag.value, "tenant_id": override.tenant_id}
    found = (await tx.execute(_FIND, where)).one_or_none()
    before = _override(found) if found else None
    await store(tx, override)
    await note(tx, "flag_changed", override, before=before, after=override, actor=actor)
    return before


async def clear(tx: Transaction, flag: Flag | None = None, tenant_id: int | None = None) -> list[Override]:
    """Deletes all overrides, or those of one flag or of one tenant, and answers them."""
    await tx.execute(_ONE_WRITER)
    flags = [flag.value] if flag else _KNOWN
    rows = (await tx.execute(_CLEAR, {"flags": flags, "tenant_id": tenant_id})).all()
    cleared = [_override(row) for row in rows]
    for override in cleared:
        await note(tx, "flag_cleared", override, before=override, after=None)
    return cleared


async def store(tx: Transaction, override: Override) -> None:
    """Writes the row alone; whoever calls this tells of it with `note`."""
    row = {
        "flag": override.flag.value,
        "tenant_id": override.tenant_id,
        "target": override.target.as_json(),
        "tripwire": asdict(override.tripwire) if override.tripwire else None,
    }
    await tx.execute(_PUT, row)


async def note(
    tx: Transaction,
    action: str,
    concerned: Override,
    *,
    before: Override | None,
    after: Override | None,
    actor: Principal | None = None,
    **details: Any,
) -> None:
    """Audits a change and announces it to all processes once it is committed."""
    told = {"before": before and as_json(before), "after": after and as_json(after), **details}
    actor_id = actor.user_id if actor else None
    await audit.write(tx, concerned.tenant_id, actor_id, action, f"flag:{concerned.flag.value}", told)
    await tx.execute(_ANNOUNCE, {"channel": CHANNEL})


async def history(tx: Transaction, flag: Flag | None, limit: int) -> list[Change]:
    """The latest changes first."""
    subject = f"flag:{flag.value}" if flag else None
    rows = (await tx.execute(_HISTORY, {"subject": subject, "limit": limit})).all()
    return [
        Change(
            at=row.at,
            flag=row.subject.removeprefix("flag:"),
            tenant_id=row.tenant_id,
            action=row.action,
            actor_id=row.actor_id,
            before=row.details["before"],
            after=row.details["after"],
        )
        for row in rows
    ]


def _override(row: "Row[Any] | asyncpg.Record") -> Override:
    flag, tenant_id, target, tripwire = tuple(row)
    return Override(
        Flag(flag),
        tenant_id,
        Target.of_json(orjson.loads(target)),
        Tripwire(**orjson.loads(tripwire)) if tripwire else None,
    )
