"""What operators do for their tenant, and that nobody else does it."""

from datetime import timedelta
from typing import Any

from libs.domain.db import Database
from libs.guardrails import Principal, Role
from tests.api.expect import DAY, ahead, faults, found, moment, problem
from tests.clinic import MINUTE, Clinic
from tests.conftest import MakeApi
from tests.running import Api

NEW_USER = {"role": "doctor", "name": "Grace Banda", "country": "MW"}


async def subscription(clinic: Clinic, patient: Principal, **fields: Any) -> dict[str, Any]:
    """The body that gives the patient a unit of text."""
    return {
        "patient_id": patient.user_id,
        "plan": "basic",
        "starts_at": await ahead(clinic, -DAY),
        "ends_at": await ahead(clinic, 30 * DAY),
        "text_sessions_remaining": 1,
        "voice_calls_remaining": 0,
        "video_calls_remaining": 0,
    } | fields


async def audited(clinic: Clinic) -> list[tuple[Any, ...]]:
    """Actor, action, subject and details of the audit log."""
    rows = await clinic.fetch("SELECT actor_id, action, subject, details FROM audit_log ORDER BY id")
    return [tuple(row) for row in rows]


async def test_an_operator_adds_people_who_can_then_sign_in(api: Api, clinic: Clinic) -> None:
    operator = api.as_(clinic.operator)
    added = []
    for role in Role:
        created = found(
            await operator.post("/admin/users", json={"role": role, "name": "Zoë 👩‍⚕️", "country": "ZM"}), 201
        )
        person = Principal(created["id"], clinic.tenant_id, role)
        assert created == {
            "id": person.user_id,
            "tenant_id": clinic.tenant_id,
            "role": role,
            "name": "Zoë 👩‍⚕️",
            "country": "ZM",
            "active": True,
        }
        if role is not Role.SERVICE:
            assert found(await api.as_(person).get("/me")) == created
        added.append((clinic.operator.user_id, "user_created", f"user:{person.user_id}", {"role": role}))
    assert await audited(clinic) == added


async def test_a_person_may_be_added_for_later(api: Api, clinic: Clinic) -> None:
    operator = api.as_(clinic.operator)
    created = found(await operator.post("/admin/users", json=NEW_USER | {"active": False}), 201)
    doctor = Principal(created["id"], clinic.tenant_id, Role.DOCTOR)
    problem(await api.as_(doctor).get("/me"), 401, "UNAUTHENTICATED")
    assert found(await operator.get("/doctors"))["items"] == []


BAD_USERS: dict[str, list[object]] = {
    "role": ["king", "", "Doctor", 1, None],
    "name": ["", "x" * 201, "a\x00b", 7, None, ["x"]],
    "country": ["", "M", "MWI", "mw", "M1", "MW\n", "ＭＷ", 12, None],
    "active": ["true", 1, 0, None, "yes"],
}


async def test_what_a_person_is_made_of_is_validated(api: Api, clinic: Clinic) -> None:
    operator = api.as_(clinic.operator)
    for field, values in BAD_USERS.items():
        for value in values:
            refused = await operator.post("/admin/users", json=NEW_USER | {field: value})
            assert faults(refused) == [f"/{field}"], value
    for field in ("id", "tenant_id", "created_at"):
        refused = await operator.post("/admin/users", json=NEW_USER | {field: 1})
        assert faults(refused) == [""], "What the service decides cannot be set."
        assert f'"{field}"' not in refused.text
    assert await clinic.fetchval("SELECT count(*) FROM users") == 1
    assert await audited(clinic) == []


async def test_a_deactivated_person_is_out_at_once_until_activated_again(api: Api, clinic: Clinic) -> None:
    doctor = await clinic.doctor()
    path = f"/admin/users/{doctor.user_id}"
    operator = api.as_(clinic.operator)
    for active in (False, True):
        changed = found(await operator.patch(path, json={"active": active}))
        assert (changed["id"], changed["active"]) == (doctor.user_id, active)
        assert (await api.as_(doctor).get("/me")).status_code == (200 if active else 401)
    assert [entry[:3] for entry in await audited(clinic)] == [
        (clinic.operator.user_id, "user_deactivated", f"user:{doctor.user_id}"),
        (clinic.operator.user_id, "user_activated", f"user:{doctor.user_id}"),
    ]


async def test_activating_lets_what_waited_for_the_person_start(api: Api, clinic: Clinic) -> None:
    doctor = await clinic.doctor(active=False)
    waiting = await clinic.appointment(doctor)
    assert (await clinic.convert())[waiting].result == "failed"
    found(await api.as_(clinic.operator).patch(f"/admin/users/{doctor.user_id}", json={"active": True}))
    assert (await clinic.convert())[waiting].result == "created"


async def test_a_subscription_is_shown_audited_and_lets_what_waited_for_it_start(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient(units=None)
    waiting = await clinic.appointment(patient=patient)
    assert (await clinic.convert())[waiting].result == "failed"

    wanted = await subscription(clinic, patient)
    created = found(await api.as_(clinic.operator).post("/admin/subscriptions", json=wanted), 201)
    shown = dict(created)
    assert await audited(clinic) == [
        (
            clinic.operator.user_id,
            "subscription_created",
            f"user:{patient.user_id}",
            {"subscription_id": shown.pop("id")},
        )
    ]
    for name in ("starts_at", "ends_at"):
        assert moment(shown.pop(name)).isoformat() == wanted.pop(name)
    assert shown == wanted
    assert (await clinic.convert())[waiting].result == "created"


BAD_SUBSCRIPTIONS: dict[str, list[object]] = {
    "patient_id": [0, -1, 2**63, 1.5, True, "1", None],
    "plan": ["", "x" * 201, "a\x00b", 7, None],
    "starts_at": ["2030-01-01T00:00:00", "2030-01-01", "now", 1893456000, None, "0001-01-01T00:00:00+14:00"],
    "ends_at": ["2030-01-01T00:00:00", "9999-12-31T23:59:59-14:00", "2030-02-30T00:00:00Z", True],
    "text_sessions_remaining": [-1, 1_000_001, 2**63, 1.5, "1", True, None],
    "voice_calls_remaining": [-1, 1_000_001],
    "video_calls_remaining": [-1, 1_000_001],
}


async def test_what_a_subscription_is_made_of_is_validated(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient(units=None)
    wanted = await subscription(clinic, patient)
    post = api.as_(clinic.operator).post
    for field, values in BAD_SUBSCRIPTIONS.items():
        for value in values:
            assert faults(await post("/admin/subscriptions", json=wanted | {field: value})) == [f"/{field}"], value
    for end in (wanted["starts_at"], await ahead(clinic, -DAY - MINUTE)):
        assert faults(await post("/admin/subscriptions", json=wanted | {"ends_at": end})) == [""]
    assert await clinic.fetchval("SELECT count(*) FROM subscriptions") == 0


async def test_only_an_active_patient_of_the_own_tenant_gets_a_subscription(
    api: Api, clinic: Clinic, database: Database
) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    for person in (
        await clinic.doctor(),
        clinic.operator,
        await clinic.patient(units=None, active=False),
        await elsewhere.patient(units=None),
        Principal(2**63 - 1, clinic.tenant_id, Role.PATIENT),
    ):
        wanted = await subscription(clinic, person)
        assert faults(await api.as_(clinic.operator).post("/admin/subscriptions", json=wanted)) == ["/patient_id"]
    assert await clinic.fetchval("SELECT count(*) FROM subscriptions") == 0


async def test_nobody_else_administers(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient(units=None)
    callers = [await clinic.person(role) for role in Role if role is not Role.OPERATOR]
    for client in map(api.as_, callers):
        for response in (
            await client.post("/admin/users", json=NEW_USER),
            await client.patch(f"/admin/users/{patient.user_id}", json={"active": False}),
            await client.patch(f"/admin/users/{2**63 - 1}", json={"active": False}),
            await client.post("/admin/subscriptions", json=await subscription(clinic, patient)),
            await client.get("/admin/conversions"),
            await client.get("/admin/rollout"),
            await client.get("/admin/decisions"),
            await client.get("/admin/audit-log"),
            await client.get("/admin/alerts"),
        ):
            problem(response, 403, "ROLE_NOT_ALLOWED")
    assert await clinic.fetchval("SELECT count(*) FROM users WHERE active") == len([clinic.operator, patient, *callers])
    assert await clinic.fetchval("SELECT count(*) FROM subscriptions") == 0
    assert await audited(clinic) == []


async def test_the_people_of_another_tenant_do_not_exist(api: Api, clinic: Clinic, database: Database) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    theirs = await elsewhere.doctor()
    client = api.as_(clinic.operator)
    for user_id in (theirs.user_id, 2**63 - 1):
        problem(await client.patch(f"/admin/users/{user_id}", json={"active": False}), 404, "NOT_FOUND")
    assert await clinic.fetchval("SELECT active FROM users WHERE id = $1", theirs.user_id)
    created = found(await client.post("/admin/users", json=NEW_USER), 201)
    assert created["tenant_id"] == clinic.tenant_id
    assert created["id"] not in [
        item["id"] for item in found(await api.as_(elsewhere.operator).get("/doctors"))["items"]
    ]


async def test_conversions_are_reported_for_the_own_tenant(api: Api, clinic: Clinic, database: Database) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    await clinic.session()
    await clinic.appointment(modality="hologram", starts_in=-2 * MINUTE)
    await clinic.convert()

    report = found(await api.as_(clinic.operator).get("/admin/conversions"))
    assert timedelta(seconds=report.pop("oldest_due_seconds")) >= 2 * MINUTE
    assert report == {
        "appointments_due_count": 1,
        "appointment_sessions_created_total": 1,
        "appointment_session_conversion_failed_total": 1,
        "created_last_minute": 1,
        "failed_last_minute": 1,
        "needs_attention": 0,
        "backlog_alert": {"level": "ok", "count": 1},
        "error_rate_alert": {"level": "ok", "rate": 0.5, "attempted": 2, "failed": 1},
        "creation_alert": {"level": "ok"},
    }
    theirs = found(await api.as_(elsewhere.operator).get("/admin/conversions"))
    assert (theirs["appointments_due_count"], theirs["error_rate_alert"]["attempted"]) == (0, 0)


async def test_the_report_uses_the_configured_thresholds(api: Api, make_api: MakeApi, clinic: Clinic) -> None:
    tolerant = await make_api(error_rate_warning=0.6, error_rate_critical=0.7)
    for _ in range(5):
        await clinic.appointment()
        await clinic.appointment(modality="hologram")
    await clinic.convert()
    for asked, level in ((api, "critical"), (tolerant, "ok")):
        report = found(await asked.as_(clinic.operator).get("/admin/conversions"))
        assert report["error_rate_alert"] == {"level": level, "rate": 0.5, "attempted": 10, "failed": 5}
