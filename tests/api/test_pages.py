"""Lists, whatever they list: pages by cursor, newest first."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.api.expect import DAY, faults, found
from tests.clinic import Clinic
from tests.running import Api

Add = Callable[[Clinic], Awaitable[int]]


async def add_doctor(clinic: Clinic) -> int:
    return (await clinic.doctor()).user_id


async def add_appointment(clinic: Clinic) -> int:
    return await clinic.appointment(starts_in=DAY)


async def add_session(clinic: Clinic) -> int:
    return (await clinic.session()).ref.id


async def add_notification(clinic: Clinic) -> int:
    notification_id: int = await clinic.fetchval(
        "INSERT INTO notifications (tenant_id, user_id, kind, event_id)"
        " VALUES ($1, $2, 'session_ended', gen_random_uuid()) RETURNING id",
        clinic.tenant_id,
        clinic.operator.user_id,
    )
    return notification_id


async def add_decision(clinic: Clinic) -> int:
    decision_id: int = await clinic.fetchval(
        "INSERT INTO decisions (tenant_id, at, operation, identifier, user_id, role, client, verdict, flags)"
        " VALUES ($1, clock(), 'get_messages', '12', 1, 'patient', 'okhttp', 'refused', '{}') RETURNING id",
        clinic.tenant_id,
    )
    return decision_id


async def add_deed(clinic: Clinic) -> int:
    entry_id: int = await clinic.fetchval(
        "INSERT INTO audit_log (tenant_id, action, subject) VALUES ($1, 'user_created', 'user:1') RETURNING id",
        clinic.tenant_id,
    )
    return entry_id


async def add_alert(clinic: Clinic) -> int:
    alert_id: int = await clinic.fetchval(
        "INSERT INTO alerts (source, fingerprint, name, severity, labels, annotations, started_at, deliveries,"
        " resolutions) VALUES ('test', gen_random_uuid(), 'OutboxLag', 'critical', '{}', '{}', clock(), 1, 0)"
        " RETURNING id"
    )
    return alert_id


LISTS = {
    "/doctors": add_doctor,
    "/appointments": add_appointment,
    "/sessions": add_session,
    "/notifications": add_notification,
    "/admin/decisions": add_decision,
    "/admin/audit-log": add_deed,
    "/admin/alerts": add_alert,
    "/admin/chat/alerts": add_alert,
}


@pytest.mark.parametrize(("path", "add"), LISTS.items(), ids=LISTS)
async def test_walking_the_pages_while_rows_arrive_shows_each_old_row_once(
    api: Api, clinic: Clinic, path: str, add: Add
) -> None:
    there = [await add(clinic) for _ in range(7)]
    seen: list[int] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = found(await api.as_(clinic.operator).get(path, params=query))
        assert set(page) == {"items", "next_cursor", "has_more"}
        seen += [item["id"] for item in page["items"]]
        if not page["has_more"]:
            assert page["next_cursor"] is None
            break
        assert len(page["items"]) == 2
        query["cursor"] = page["next_cursor"]
        await add(clinic)
    assert seen == sorted(there, reverse=True)

    whole = found(await api.as_(clinic.operator).get(path))
    assert len(whole["items"]) == 7 + 3


@pytest.mark.parametrize("path", LISTS)
async def test_pages_are_bounded_and_cursors_are_ids(api: Api, clinic: Clinic, path: str) -> None:
    client = api.as_(clinic.operator)
    for limit in ("0", "101", "-1", "1.5", "", "ten", "9" * 30):
        assert faults(await client.get(path, params={"limit": limit})) == ["/limit"], limit
    for cursor in ("0", "-1", "1.5", "x", str(2**63), "9" * 5000):
        assert faults(await client.get(path, params={"cursor": cursor})) == ["/cursor"], cursor
    for limit in ("1", "100"):
        found(await client.get(path, params={"limit": limit, "cursor": str(2**63 - 1)}))


@pytest.mark.parametrize("path", ["/appointments", "/sessions"])
async def test_a_status_that_does_not_exist_is_pointed_at(api: Api, clinic: Clinic, path: str) -> None:
    assert faults(await api.as_(clinic.operator).get(path, params={"status": "SLEEPING"})) == ["/status"]
