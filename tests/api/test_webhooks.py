"""What operators do with webhooks, and what they are shown."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from libs.domain.outbox.append import append
from libs.domain.outbox.events import EventName
from libs.domain.sealing import Field, FieldKeys, new_key
from libs.domain.transaction import transaction
from libs.domain.webhooks import secrets
from libs.domain.webhooks.endpoints import DEFAULT, ENDPOINTS_PER_TENANT
from tests.api.expect import faults, found, moment, problem
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import MakeApi, Urls
from tests.running import Api

WEBHOOK = {"url": "https://example.org/webhooks?key=hidden"}


async def registered(api: Api, clinic: Clinic, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = found(await api.as_(clinic.operator).post("/admin/webhooks", json=WEBHOOK | fields), 201)
    return answer


async def audited(clinic: Clinic) -> list[tuple[Any, ...]]:
    rows = await clinic.fetch("SELECT actor_id, action, subject, details FROM audit_log ORDER BY id")
    return [tuple(row) for row in rows]


async def happen(clinic: Clinic, *names: EventName) -> None:
    for name in names:
        async with transaction(clinic.database, clinic.bell) as tx:
            await append(tx, name, tenant_id=clinic.tenant_id, aggregate=f"test:{name}", payload={})


async def test_an_endpoint_is_registered_and_its_secret_shown_once(
    make_api: MakeApi, clinic: Clinic, tmp_path: Path
) -> None:
    api = await make_api(log_file=tmp_path / "api.jsonl")
    operator = api.as_(clinic.operator)
    keyed = {"Idempotency-Key": "a"}
    answer = found(await operator.post("/admin/webhooks", json=WEBHOOK, headers=keyed), 201)
    secret = answer.pop("secret")

    assert secret.startswith("whsec_")
    assert answer == {
        "id": answer["id"],
        "url": WEBHOOK["url"],
        "description": None,
        "events": [name.value for name in DEFAULT],
        "enabled": True,
        "disabled_at": None,
        "disabled_reason": None,
        "created_at": answer["created_at"],
    }
    assert {"session_started", "session_ended"} <= set(answer["events"])
    assert not any(name.startswith(("appointment_", "reschedule_", "ping")) for name in answer["events"])
    assert found(await operator.get(f"/admin/webhooks/{answer['id']}")) == answer
    assert found(await operator.get("/admin/webhooks"))["items"] == [answer]
    said = {"host": "example.org", "events": answer["events"]}
    assert await audited(clinic) == [(clinic.operator.user_id, "webhook_registered", f"webhook:{answer['id']}", said)]
    assert await clinic.fetchval("SELECT count(*) FROM idempotency_keys") == 0, "They would keep the secret."
    assert "hidden" not in (tmp_path / "api.jsonl").read_text()
    assert secret not in (tmp_path / "api.jsonl").read_text()


def test_receivers_are_told_of_every_event_that_there_is() -> None:
    told = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
    table = [line.split("|")[1] for line in told.splitlines() if line.startswith("| `")]
    assert {name.value for name in EventName} <= {name for cell in table for name in re.findall("`([a-z_]+)`", cell)}


async def test_an_address_is_registered_once_and_ten_at_most(api: Api, clinic: Clinic) -> None:
    await registered(api, clinic)
    operator = api.as_(clinic.operator)
    assert faults(await operator.post("/admin/webhooks", json=WEBHOOK)) == ["/url"]
    for number in range(1, ENDPOINTS_PER_TENANT):
        await registered(api, clinic, url=f"https://example.org/{number}")
    assert faults(await operator.post("/admin/webhooks", json={"url": "https://example.org/more"})) == ["/url"]
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    await registered(api, elsewhere)


async def test_an_address_is_the_same_however_it_is_spelled(api: Api, clinic: Clinic) -> None:
    assert (await registered(api, clinic, url="HTTPS://X.Example.org:443"))["url"] == "https://x.example.org/"
    operator = api.as_(clinic.operator)
    for spelled in ("https://x.example.org", "https://X.EXAMPLE.org/", "https://x.example.org:443/"):
        assert faults(await operator.post("/admin/webhooks", json={"url": spelled})) == ["/url"], spelled
    for another in ("https://x.example.org/?", "https://x.example.org/A%2Fb?C=d", "https://x.example.org/a%2Fb?C=d"):
        assert (await registered(api, clinic, url=another))["url"] == another


BAD_FIELDS: dict[str, list[object]] = {
    "url": [
        "http://example.org/",
        "https://127.0.0.1/",
        "https://u:p@example.org/",
        "https://e.org:22/",
        "https://a..b/",
        "",
        "x",
        1,
    ],
    "events": [[], ["ping"], ["no_such_event"], ["session_ended", "session_ended"], "session_ended", [1], None],
    "description": ["x" * 201, 1, "a\x00"],
}


async def test_what_an_endpoint_is_made_of_is_validated(api: Api, clinic: Clinic) -> None:
    operator = api.as_(clinic.operator)
    for field, values in BAD_FIELDS.items():
        for value in values:
            refused = await operator.post("/admin/webhooks", json=WEBHOOK | {field: value})
            assert [pointer.split("/")[1] for pointer in faults(refused)] == [field], value
            assert "127.0.0.1" not in refused.text
    assert await clinic.fetchval("SELECT count(*) FROM webhook_endpoints") == 0


async def test_an_endpoint_is_changed_disabled_and_enabled_again(api: Api, clinic: Clinic) -> None:
    endpoint = await registered(api, clinic, description="ours")
    path, operator = f"/admin/webhooks/{endpoint['id']}", api.as_(clinic.operator)

    changed = found(await operator.patch(path, json={"events": ["session_ended"], "description": None}))
    assert (changed["events"], changed["description"], changed["enabled"]) == (["session_ended"], None, True)
    disabled = found(await operator.patch(path, json={"enabled": False}))
    assert (disabled["enabled"], disabled["disabled_reason"]) == (False, "operator")
    assert found(await operator.patch(path, json={"enabled": False})) == disabled
    await happen(clinic, EventName.SESSION_ENDED)
    enabled = found(await operator.patch(path, json={"enabled": True}))
    assert enabled == changed
    await happen(clinic, EventName.SESSION_STARTED, EventName.SESSION_ENDED)

    listed = found(await operator.get(f"{path}/deliveries"))["items"]
    assert [each["type"] for each in listed] == ["session_ended"]
    assert faults(await operator.patch(path, json={})) == [""]
    assert [entry[3] for entry in await audited(clinic)][1:] == [
        {"events": ["session_ended"], "description": None},
        {"enabled": False},
        {"enabled": False},
        {"enabled": True},
    ]


async def test_an_endpoint_that_is_removed_leaves_no_secret_and_nothing_that_waits(api: Api, clinic: Clinic) -> None:
    endpoint = await registered(api, clinic)
    path, operator = f"/admin/webhooks/{endpoint['id']}", api.as_(clinic.operator)
    await happen(clinic, EventName.SESSION_ENDED)
    found(await operator.post(f"{path}/rotate-secret"))

    assert (await operator.delete(path)).status_code == 204

    for response in (
        await operator.get(path),
        await operator.delete(path),
        await operator.patch(path, json={"enabled": True}),
        await operator.post(f"{path}/rotate-secret"),
        await operator.post(f"{path}/test"),
        await operator.get(f"{path}/deliveries"),
    ):
        problem(response, 404, "NOT_FOUND")
    assert await clinic.fetchval("SELECT count(*) FROM webhook_secrets") == 0
    waiting = await clinic.fetch("SELECT consumer FROM outbox_deliveries")
    assert [row["consumer"] for row in waiting] == ["notifications"]
    assert (await audited(clinic))[-1][1:3] == ("webhook_removed", f"webhook:{endpoint['id']}")


async def test_deliveries_are_listed_by_page_and_by_what_became_of_them(api: Api, clinic: Clinic) -> None:
    endpoint = await registered(api, clinic)
    path, operator = f"/admin/webhooks/{endpoint['id']}/deliveries", api.as_(clinic.operator)
    for _ in range(3):
        await happen(clinic, EventName.SESSION_ENDED)
    ids = [row["id"] for row in await clinic.fetch("SELECT id FROM outbox_deliveries WHERE lane = 'webhooks'")]
    await clinic.fetch(
        "UPDATE outbox_deliveries SET dispatched_at = clock(), response_status = 204 WHERE id = $1", ids[0]
    )
    await clinic.fetch("UPDATE outbox_deliveries SET dead_at = clock(), last_error = 'no' WHERE id = $1", ids[1])

    first = found(await operator.get(path, params={"limit": 2}))
    second = found(await operator.get(path, params={"limit": 2, "cursor": first["next_cursor"]}))

    shown = [*first["items"], *second["items"]]
    assert [(each["id"], each["status"]) for each in shown] == [
        (ids[2], "pending"),
        (ids[1], "dead"),
        (ids[0], "delivered"),
    ]
    assert (shown[1]["last_error"], shown[2]["response_status"]) == ("no", 204)
    assert [each["next_attempt_at"] is None for each in shown] == [False, True, True]
    for status, delivery_id in (("pending", ids[2]), ("dead", ids[1]), ("delivered", ids[0])):
        listed = found(await operator.get(path, params={"status": status}))["items"]
        assert [each["id"] for each in listed] == [delivery_id]
    other = await registered(api, clinic, url="https://example.org/other")
    missed = f"/admin/webhooks/{other['id']}/deliveries/{ids[0]}/redeliver"
    problem(await operator.post(missed), 404, "NOT_FOUND")


async def test_a_new_secret_replaces_the_old_one_in_a_day(api: Api, clinic: Clinic) -> None:
    endpoint = await registered(api, clinic)
    path, operator = f"/admin/webhooks/{endpoint['id']}/rotate-secret", api.as_(clinic.operator)
    answers = [found(await operator.post(path)) for _ in range(2)]
    assert len({endpoint["secret"], *(answer["secret"] for answer in answers)}) == 3
    now = await clinic.fetchval("SELECT clock()")
    left = moment(answers[0]["old_secret_expires_at"]) - now
    assert timedelta(hours=23, minutes=59) < left <= timedelta(hours=24)
    assert (await audited(clinic))[-1][1:] == ("webhook_secret_rotated", f"webhook:{endpoint['id']}", {})


async def test_secrets_are_sealed_and_sealed_anew_when_the_key_is_rotated(
    make_api: MakeApi, clinic: Clinic, urls: Urls, tmp_path: Path
) -> None:
    old, new = new_key("old"), new_key("new")
    clear, sealing = await make_api(), await make_api(field_keys=old)
    endpoints = [await registered(clear, clinic), await registered(sealing, clinic, url="https://example.org/2")]
    stored = await clinic.fetch("SELECT key_id FROM webhook_secrets ORDER BY id")
    assert [row["key_id"] for row in stored] == [None, "old"]
    env = {
        "SESSIONGATE_DATABASE_URL": urls.owner,
        "SESSIONGATE_REDIS_URL": urls.redis,
        "SESSIONGATE_FIELD_KEYS": f"{new},{old}",
    }
    rotated = sessiongate(tmp_path, "keys", "rotate", "--json", env=env)
    assert json.loads(rotated.stdout) == {"sealed": 2, "key_id": "new"}
    listed = json.loads(sessiongate(tmp_path, "keys", "list", "--json", env=env).stdout)
    assert [(key["id"], key["webhook_secrets"]) for key in listed["keys"]] == [("new", 2), ("old", 0)]

    rows = await clinic.fetch("SELECT endpoint_id, secret, key_id FROM webhook_secrets ORDER BY id")
    keys = FieldKeys.parse(new)
    opened = [secrets.opened(keys, row["endpoint_id"], Field(row["secret"], row["key_id"])) for row in rows]
    assert [secrets.spelled(secret) for secret in opened] == [endpoint["secret"] for endpoint in endpoints]


async def test_what_was_given_up_is_listed_and_replayed_by_an_operator_of_its_tenant(api: Api, clinic: Clinic) -> None:
    endpoint = await registered(api, clinic)
    operator = api.as_(clinic.operator)
    await happen(clinic, EventName.SESSION_ENDED)
    await clinic.fetch("UPDATE outbox_deliveries SET dead_at = clock(), attempts = 6, last_error = 'no'")

    dead = found(await operator.get("/admin/outbox/dead"))["items"]
    webhook = f"webhook:{endpoint['id']}"
    assert [(each["consumer"], each["attempts"], each["last_error"]) for each in dead] == [
        (webhook, 6, "no"),
        ("notifications", 6, "no"),
    ]
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    assert found(await api.as_(elsewhere.operator).get("/admin/outbox/dead"))["items"] == []
    replay = f"/admin/outbox/dead/{dead[0]['id']}/replay"
    problem(await api.as_(elsewhere.operator).post(replay), 404, "NOT_FOUND")
    assert (await operator.post(replay)).status_code == 204
    problem(await operator.post(replay), 404, "NOT_FOUND")

    row = await clinic.fetchrow("SELECT * FROM outbox_deliveries WHERE id = $1", dead[0]["id"])
    assert (row["dead_at"], row["attempts"]) == (None, 0)
    assert (await audited(clinic))[-1] == (
        clinic.operator.user_id,
        "delivery_replayed",
        f"delivery:{dead[0]['id']}",
        {"consumer": webhook},
    )


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ({}, ["is_e", "is_d", "is_c", "is_b", "is_a"]),
        ({"action": "is_b"}, ["is_b"]),
        ({"subject": "user:7"}, ["is_c", "is_a"]),
        ({"actor_id": 2}, ["is_d", "is_c"]),
        ({"actor_id": 2, "subject": "user:7"}, ["is_c"]),
        ({"since": "90m"}, ["is_e", "is_d"]),
    ],
)
async def test_the_audit_log_is_searched(api: Api, clinic: Clinic, query: dict[str, Any], shown: list[str]) -> None:
    await clinic.fetch(
        """
        INSERT INTO audit_log (tenant_id, actor_id, action, subject, at)
        SELECT $1, actor, action, subject, clock() - hours * interval '1 hour'
        FROM (VALUES (1, 'is_a', 'user:7', 5), (NULL, 'is_b', 'webhook:1', 4), (2, 'is_c', 'user:7', 3),
                     (2, 'is_d', 'user:8', 1), (3, 'is_e', 'flag:X', 0)) AS entry (actor, action, subject, hours)
        """,
        clinic.tenant_id,
    )
    listed = found(await api.as_(clinic.operator).get("/admin/audit-log", params=query))["items"]
    assert [entry["action"] for entry in listed] == shown


async def test_the_audit_log_is_searched_from_a_moment_on(api: Api, clinic: Clinic) -> None:
    await registered(api, clinic)
    (entry,) = found(await api.as_(clinic.operator).get("/admin/audit-log"))["items"]
    for since, number in ((moment(entry["at"]), 1), (moment(entry["at"]) + timedelta(seconds=1), 0)):
        query = {"since": since.isoformat()}
        assert len(found(await api.as_(clinic.operator).get("/admin/audit-log", params=query))["items"]) == number
