"""The webhook endpoints of a tenant: where it wants to be told what happens, and of what."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Row, Select, delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as insert_unless

from libs.domain import audit
from libs.domain.outbox.events import EventName, webhook
from libs.domain.pages import Page, page_of
from libs.domain.sealing import FieldKeys
from libs.domain.tables import outbox_deliveries, webhook_endpoints, webhook_secrets
from libs.domain.transaction import Transaction
from libs.domain.webhooks import secrets
from libs.domain.webhooks.destinations import normal
from libs.guardrails import Principal, Reason, Refused

ENDPOINTS_PER_TENANT: Final = 10
OLD_SECRET_LASTS: Final = timedelta(hours=24)

AVAILABLE: Final = tuple(name for name in EventName if name is not EventName.PING)
DEFAULT: Final = tuple(name for name in AVAILABLE if not name.startswith(("appointment_", "reschedule_")))
"""What happens to sessions and to money; what the parties arrange about appointments is on request."""


class DisabledReason(StrEnum):
    OPERATOR = "operator"
    GONE = "gone"
    """It answered 410."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    id: int
    url: str
    description: str | None
    events: Sequence[str]
    disabled_at: datetime | None
    disabled_reason: DisabledReason | None
    created_at: datetime

    @property
    def enabled(self) -> bool:
        return self.disabled_at is None


_ENDPOINT: Final = [webhook_endpoints.c[name] for name in Endpoint.__dataclass_fields__]


async def register(
    tx: Transaction, caller: Principal, keys: FieldKeys, *, url: str, description: str | None, events: Sequence[str]
) -> tuple[Endpoint, str]:
    """Adds an endpoint at a `url` that was checked; answers it with its secret, which is never told again. Refuses a
    second endpoint at the same address, and more than `ENDPOINTS_PER_TENANT`."""
    address = normal(url)
    of_tenant = webhook_endpoints.c.tenant_id == caller.tenant_id
    number = (await tx.execute(select(func.count()).select_from(webhook_endpoints).where(of_tenant))).scalar_one()
    if number >= ENDPOINTS_PER_TENANT:
        raise _invalid_url(f"There are {ENDPOINTS_PER_TENANT} endpoints already.")
    values = {
        "tenant_id": caller.tenant_id,
        "url": str(address),
        "description": description,
        "events": list(events),
    }
    added = await tx.execute(
        insert_unless(webhook_endpoints).values(values).on_conflict_do_nothing().returning(*_ENDPOINT)
    )
    row = added.one_or_none()
    if row is None:
        raise _invalid_url("There is an endpoint with this address already.")
    endpoint = _endpoint(row)
    secret = await _add_secret(tx, caller, keys, endpoint.id)
    # Of the address the host alone: the rest of it may be a secret.
    await audit.record(tx, caller, "webhook_registered", webhook(endpoint.id), host=address.host, events=list(events))
    return endpoint, secret


async def listed(tx: Transaction, caller: Principal, cursor: int | None, limit: int) -> Page[Endpoint]:
    """The endpoints of the caller's tenant, newest first."""
    statement = select(*_ENDPOINT).where(webhook_endpoints.c.tenant_id == caller.tenant_id)
    return await page_of(tx, statement, webhook_endpoints.c.id, cursor, limit, _endpoint)


async def get(tx: Transaction, caller: Principal, endpoint_id: int) -> Endpoint:
    """Refuses with `NOT_FOUND` what the caller's tenant does not have, as do all that follow."""
    return _endpoint(await _one(tx, select(*_ENDPOINT).where(*_own(caller, endpoint_id))))


async def change(
    tx: Transaction,
    caller: Principal,
    endpoint_id: int,
    *,
    enabled: bool | None = None,
    events: Sequence[str] | None = None,
    **described: str | None,
) -> Endpoint:
    """Changes what is given; `description` may be None. What waits for an endpoint that is disabled is given up, and
    can be delivered again once it is enabled."""
    values: dict[str, Any] = dict(described)
    if events is not None:
        values["events"] = list(events)
    if enabled is not None:
        at, reason = webhook_endpoints.c.disabled_at, webhook_endpoints.c.disabled_reason
        values |= (
            {"disabled_at": None, "disabled_reason": None}
            if enabled
            else {
                "disabled_at": func.coalesce(at, func.clock()),
                "disabled_reason": func.coalesce(reason, DisabledReason.OPERATOR.value),
            }
        )
    if not values:
        return await get(tx, caller, endpoint_id)
    statement = update(webhook_endpoints).where(*_own(caller, endpoint_id)).values(values).returning(*_ENDPOINT)
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise Refused(Reason.NOT_FOUND)
    changed = {"enabled": enabled, "events": values.get("events"), **described}
    told = {name: value for name, value in changed.items() if value is not None or name in described}
    await audit.record(tx, caller, "webhook_changed", webhook(endpoint_id), **told)
    return _endpoint(row)


async def remove(tx: Transaction, caller: Principal, endpoint_id: int) -> None:
    """Forgets the endpoint, its secrets, and what it has not got."""
    await _one(tx, select(webhook_endpoints.c.id).where(*_own(caller, endpoint_id)).with_for_update())
    undelivered = outbox_deliveries.c.dispatched_at.is_(None) & (outbox_deliveries.c.lane == "webhooks")
    await tx.execute(delete(outbox_deliveries).where(outbox_deliveries.c.consumer == webhook(endpoint_id), undelivered))
    await tx.execute(delete(webhook_secrets).where(webhook_secrets.c.endpoint_id == endpoint_id))
    await tx.execute(delete(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id))
    await audit.record(tx, caller, "webhook_removed", webhook(endpoint_id))


async def rotate_secret(tx: Transaction, caller: Principal, keys: FieldKeys, endpoint_id: int) -> tuple[str, datetime]:
    """A new secret, never told again, and until when the one before signs as well."""
    await _one(tx, select(webhook_endpoints.c.id).where(*_own(caller, endpoint_id)).with_for_update())
    of_endpoint = webhook_secrets.c.endpoint_id == endpoint_id
    await tx.execute(delete(webhook_secrets).where(of_endpoint, webhook_secrets.c.expires_at <= func.clock()))
    retired = (
        update(webhook_secrets)
        .where(of_endpoint, webhook_secrets.c.expires_at.is_(None))
        .values(expires_at=func.clock() + OLD_SECRET_LASTS)
        .returning(webhook_secrets.c.expires_at)
    )
    expires_at: datetime = (await tx.execute(retired)).scalar_one()
    secret = await _add_secret(tx, caller, keys, endpoint_id)
    await audit.record(tx, caller, "webhook_secret_rotated", webhook(endpoint_id))
    return secret, expires_at


async def disable_gone(tx: Transaction, tenant_id: int, endpoint_id: int) -> bool:
    """Disables an endpoint that says it is no longer there; whether it was enabled until now."""
    statement = (
        update(webhook_endpoints)
        .where(webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.disabled_at.is_(None))
        .values(disabled_at=func.clock(), disabled_reason=DisabledReason.GONE.value)
    )
    disabled = (await tx.execute(statement)).rowcount == 1
    if disabled:
        reason = DisabledReason.GONE.value
        await audit.write(tx, tenant_id, None, "webhook_disabled", webhook(endpoint_id), {"reason": reason})
    return disabled


def _own(caller: Principal, endpoint_id: int) -> tuple[Any, Any]:
    return webhook_endpoints.c.tenant_id == caller.tenant_id, webhook_endpoints.c.id == endpoint_id


async def _one(tx: Transaction, statement: Select[Any]) -> Row[Any]:
    row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise Refused(Reason.NOT_FOUND)
    return row


async def _add_secret(tx: Transaction, caller: Principal, keys: FieldKeys, endpoint_id: int) -> str:
    secret = secrets.new()
    stored = secrets.sealed(keys, endpoint_id, secret)
    values = {"tenant_id": caller.tenant_id, "endpoint_id": endpoint_id, "secret": stored.data, "key_id": stored.key_id}
    await tx.execute(insert(webhook_secrets).values(values))
    return secrets.spelled(secret)


def _invalid_url(detail: str) -> Refused:
    return Refused(Reason.VALIDATION_FAILED, errors=[{"pointer": "/url", "detail": detail}])


def _endpoint(row: Row[Any]) -> Endpoint:
    fields = dict(row._mapping)
    fields["disabled_reason"] = row.disabled_reason and DisabledReason(row.disabled_reason)
    return Endpoint(**fields)
