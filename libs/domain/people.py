"""Tenants, users and subscriptions."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, insert, select, update

from libs.domain import audit
from libs.domain.conversion.unblocking import unblock
from libs.domain.pages import Page, page_of
from libs.domain.tables import subscriptions, tenants, users
from libs.domain.transaction import Transaction
from libs.guardrails import Principal, Reason, Refused, Role


@dataclass(frozen=True, slots=True)
class User:
    """`country` is an ISO 3166 code of two letters; it decides a doctor's payout."""

    id: int
    tenant_id: int
    role: Role
    name: str
    country: str
    active: bool


@dataclass(frozen=True, slots=True)
class NewSubscription:
    """Units of one patient, usable from `starts_at` until just before `ends_at`."""

    patient_id: int
    plan: str
    starts_at: datetime
    ends_at: datetime
    text_sessions_remaining: int
    voice_calls_remaining: int
    video_calls_remaining: int


_USER: Final = [users.c[name] for name in User.__dataclass_fields__]


async def is_active(tx: Transaction, principal: Principal) -> bool:
    """Whether the token names an active user in that tenant and role, until the transaction ends."""
    statement = (
        select(users.c.active)
        .where(users.c.tenant_id == principal.tenant_id, users.c.id == principal.user_id)
        .where(users.c.role == principal.role)
        .with_for_update(read=True)
    )
    return bool((await tx.execute(statement)).scalar_one_or_none())


async def get(tx: Transaction, tenant_id: int, user_id: int) -> User:
    """The user, who is known to exist."""
    statement = select(*_USER).where(users.c.tenant_id == tenant_id, users.c.id == user_id)
    return _user((await tx.execute(statement)).one())


async def doctors(tx: Transaction, tenant_id: int, cursor: int | None, limit: int) -> Page[User]:
    """The tenant's active doctors."""
    statement = select(*_USER).where(users.c.tenant_id == tenant_id, users.c.role == Role.DOCTOR.value, users.c.active)
    return await page_of(tx, statement, users.c.id, cursor, limit, _user)


async def require(tx: Transaction, tenant_id: int, role: Role, user_id: int, pointer: str) -> None:
    """Refuses with 422 at `pointer` unless the tenant has an active user of that role and id."""
    statement = select(users.c.id).where(
        users.c.tenant_id == tenant_id, users.c.id == user_id, users.c.role == role.value, users.c.active
    )
    if (await tx.execute(statement)).scalar_one_or_none() is None:
        errors = [{"pointer": pointer, "detail": f"No active {role} with this id."}]
        raise Refused(Reason.VALIDATION_FAILED, errors=errors)


async def create_tenant(tx: Transaction, name: str) -> int:
    return int((await tx.execute(insert(tenants).values(name=name).returning(tenants.c.id))).scalar_one())


async def create_user(
    tx: Transaction, tenant_id: int, *, role: Role, name: str, country: str, active: bool = True
) -> User:
    values = {"tenant_id": tenant_id, "role": role.value, "name": name, "country": country, "active": active}
    return _user((await tx.execute(insert(users).values(values).returning(*_USER))).one())


async def set_active(tx: Transaction, actor: Principal, user_id: int, *, active: bool) -> User:
    """Activates or deactivates a user; activating lets waiting appointments try again at once."""
    statement = (
        update(users)
        .where(users.c.tenant_id == actor.tenant_id, users.c.id == user_id)
        .values(active=active)
        .returning(*_USER)
    )
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise Refused(Reason.NOT_FOUND)
    await audit.record(tx, actor, "user_activated" if active else "user_deactivated", f"user:{user_id}")
    if active:
        await unblock(tx, [user_id])
    return _user(row)


async def subscribe(tx: Transaction, tenant_id: int, new: NewSubscription) -> int:
    """Adds a subscription and lets the patient's waiting appointments try again; answers its id."""
    values = {"tenant_id": tenant_id} | {name: getattr(new, name) for name in NewSubscription.__dataclass_fields__}
    created = await tx.execute(insert(subscriptions).values(values).returning(subscriptions.c.id))
    await unblock(tx, [new.patient_id])
    return int(created.scalar_one())


def _user(row: Row[Any]) -> User:
    fields = dict(row._mapping)
    fields["role"] = Role(row.role)
    return User(**fields)
