"""Flags as operators see and set them: for their own tenant, and at once."""

import asyncio
from typing import Any

import pytest

from libs.domain.db import Database
from libs.domain.flags import overrides
from libs.domain.transaction import transaction
from libs.guardrails import Flag, Override, Role, Target, Tripwire
from tests.api.expect import faults, found, problem
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.running import Api

CHAT = Flag.ENFORCE_SESSION_GATED_CHAT
BILLING = Flag.ENFORCE_SESSION_GATED_BILLING
TRIGGERS = Flag.DISABLE_LEGACY_APPOINTMENT_TRIGGERS
LENIENT = Flag.ALLOW_LEGACY_APPOINTMENT_CHAT
USUAL = {"share": 0.1, "minutes": 5, "minimum": 50}


def shown(flag: Flag, enabled: bool, origin: str, tripwire: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"flag": flag, "enabled": enabled, "origin": origin, "tripwire": tripwire}


async def test_each_flag_is_shown_with_its_value_and_what_decided_it(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(ENFORCE_SESSION_GATED_BILLING=True)
    listed = Target(None, None, {"tenant": frozenset({clinic.tenant_id})})
    async with transaction(clinic.database, clinic.bell) as tx:
        await overrides.put(tx, Override(CHAT, clinic.tenant_id, Target(True), Tripwire(0.2, 3, 7)), None)
        await overrides.put(tx, Override(CHAT, None, Target(False)), None)
        await overrides.put(tx, Override(TRIGGERS, None, listed), None)
        await overrides.put(tx, Override(LENIENT, None, Target(None, 1.0)), None)
    await api.runtime.flags.reload()
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")

    assert found(await api.as_(clinic.operator).get("/admin/flags"))["items"] == [
        shown(CHAT, True, "tenant", {"share": 0.2, "minutes": 3, "minimum": 7}),
        shown(BILLING, True, "environment"),
        shown(TRIGGERS, True, "allow"),
        shown(LENIENT, True, "share"),
    ]
    assert found(await api.as_(elsewhere.operator).get("/admin/flags"))["items"] == [
        shown(CHAT, False, "everyone"),
        shown(BILLING, True, "environment"),
        shown(TRIGGERS, False, "environment"),
        shown(LENIENT, True, "share"),
    ]


async def test_what_is_put_counts_before_it_is_answered_and_for_the_own_tenant_alone(
    make_api: MakeApi, clinic: Clinic
) -> None:
    api = await make_api()
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    ours, theirs = await clinic.session(), await elsewhere.session()
    operator = api.as_(clinic.operator)
    for enabled in (True, False, True):
        answer = found(await operator.put(f"/admin/flags/{CHAT}", json={"enabled": enabled}))
        assert answer == shown(CHAT, enabled, "tenant")
        history = await api.as_(ours.patient).get(f"/chat/{ours.appointment_id}/messages")
        assert history.status_code == (400 if enabled else 200)
        found(await api.as_(theirs.patient).get(f"/chat/{theirs.appointment_id}/messages"))
    rows = await clinic.fetch("SELECT tenant_id, actor_id, action, details FROM audit_log ORDER BY id")
    assert {tuple(row)[:3] for row in rows} == {(clinic.tenant_id, clinic.operator.user_id, "flag_changed")}
    assert [row["details"]["after"]["target"]["default"] for row in rows] == [True, False, True]


async def test_simultaneous_puts_are_each_seen_by_who_sent_the_last(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api()
    operator = api.as_(clinic.operator)
    puts = [operator.put(f"/admin/flags/{flag}", json={"enabled": number % 2 == 0}) for number, flag in enumerate(Flag)]
    for answer, flag in zip(await asyncio.gather(*puts), Flag, strict=True):
        assert found(answer)["flag"] == flag
    items = found(await operator.get("/admin/flags"))["items"]
    assert [item["enabled"] for item in items] == [True, False, True, False]


async def test_a_tripwire_is_set_and_removed_with_the_flag(api: Api, clinic: Clinic) -> None:
    operator = api.as_(clinic.operator)
    set_ = {"enabled": True, "tripwire": {"share": 0.1}}
    assert found(await operator.put(f"/admin/flags/{CHAT}", json=set_)) == shown(CHAT, True, "tenant", USUAL)
    assert found(await operator.put(f"/admin/flags/{CHAT}", json={"enabled": True})) == shown(CHAT, True, "tenant")


@pytest.mark.parametrize(
    ("flag", "body", "pointer"),
    [
        (TRIGGERS, {"enabled": True, "tripwire": USUAL}, "/tripwire"),
        (LENIENT, {"enabled": True, "tripwire": USUAL}, "/tripwire"),
        (CHAT, {"enabled": False, "tripwire": USUAL}, "/tripwire"),
        (CHAT, {"enabled": True, "tripwire": USUAL | {"share": 1}}, "/tripwire/share"),
        (CHAT, {"enabled": True, "tripwire": USUAL | {"share": -0.1}}, "/tripwire/share"),
        (CHAT, {"enabled": True, "tripwire": USUAL | {"share": "0.1"}}, "/tripwire/share"),
        (CHAT, {"enabled": True, "tripwire": USUAL | {"minutes": 61}}, "/tripwire/minutes"),
        (CHAT, {"enabled": True, "tripwire": USUAL | {"minimum": 0}}, "/tripwire/minimum"),
        (CHAT, {"enabled": "true"}, "/enabled"),
        (CHAT, {}, "/enabled"),
        ("FLY", {"enabled": True}, "/flag"),
        (CHAT.lower(), {"enabled": True}, "/flag"),
    ],
)
async def test_what_makes_no_sense_is_refused_and_changes_nothing(
    api: Api, clinic: Clinic, flag: str, body: dict[str, Any], pointer: str
) -> None:
    assert faults(await api.as_(clinic.operator).put(f"/admin/flags/{flag}", json=body)) == [pointer]
    assert await clinic.fetchval("SELECT count(*) FROM flag_overrides") == 0
    assert await clinic.fetchval("SELECT count(*) FROM audit_log") == 0


async def test_nobody_but_operators_sees_or_sets_flags(api: Api, clinic: Clinic, database: Database) -> None:
    for role in set(Role) - {Role.OPERATOR}:
        client = api.as_(await clinic.person(role))
        problem(await client.get("/admin/flags"), 403, "ROLE_NOT_ALLOWED")
        problem(await client.put(f"/admin/flags/{CHAT}", json={"enabled": False}), 403, "ROLE_NOT_ALLOWED")
    assert await clinic.fetchval("SELECT count(*) FROM flag_overrides") == 0
