"""The rollout report, the decision log and the audit log, as an operator asks the API for them."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Response

from libs.domain.db import Database
from libs.domain.decisions import recorder, rollout
from libs.guardrails import Flag, Principal
from tests.api.calls import Owner
from tests.api.expect import DAY, faults, found, moment, problem
from tests.clinic import Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi, Urls
from tests.processes import running_api_process, until
from tests.running import Api

CHAT, ALLOW = Flag.ENFORCE_SESSION_GATED_CHAT, Flag.ALLOW_LEGACY_APPOINTMENT_CHAT


async def read(api: Api, caller: Principal, identifier: object, user_agent: str = "okhttp/4.12.0") -> Response:
    return await api.as_(caller).get(f"/chat/{identifier}/messages", headers={"User-Agent": user_agent})


async def send(api: Api, caller: Principal, identifier: object, text: str, user_agent: str) -> Response:
    message = {"client_message_id": f"{identifier} {text}", "body": text}
    return await api.as_(caller).post(f"/chat/{identifier}/messages", json=message, headers={"User-Agent": user_agent})


async def decided(clinic: Clinic, number: int) -> None:
    """Waits until so many verdicts are rows of the totals, and with them all of their decisions."""

    async def written() -> bool:
        total: int = await clinic.fetchval("SELECT coalesce(sum(requests), 0)::bigint FROM decision_totals")
        assert total <= number
        return total == number

    await until(written)


async def flags_of(api: Api, clinic: Clinic, **query: str) -> dict[str, Any]:
    report = found(await api.as_(clinic.operator).get("/admin/rollout", params=query))
    assert [flag["flag"] for flag in report["flags"]] == list(Flag)
    return {flag.pop("flag"): flag for flag in report["flags"]}


async def test_the_report_counts_what_two_clients_did(make_api: MakeApi, clinic: Clinic) -> None:
    watching = await make_api()
    enforcing = await make_api(ENFORCE_SESSION_GATED_CHAT=True, ALLOW_LEGACY_APPOINTMENT_CHAT=True)
    first, second = await clinic.session(), await clinic.session()
    early = await clinic.appointment(patient=first.patient, starts_in=DAY)
    old, new = "okhttp/4.12.0 (Android 14)", "Clinic-App/7.1"
    for number in range(3):
        found(await send(watching, first.patient, first.appointment_id, f"Hello {number}", old), 201)
    found(await send(watching, second.patient, second.appointment_id, "Hello", old), 201)
    found(await read(watching, first.patient, first.appointment_id, new))
    for _ in range(4):
        found(await read(watching, second.doctor, second.context, new))
    problem(await send(enforcing, first.patient, first.appointment_id, "Hello", old), 400, "SESSION_CONTEXT_REQUIRED")
    found(await send(enforcing, first.patient, early, "Hello", new), 201)
    problem(await send(watching, first.patient, early, "Hello", new), 403, "SESSION_NOT_READY")
    problem(await read(watching, first.patient, second.context, new), 404, "SESSION_NOT_FOUND")
    await decided(clinic, 13)

    flags = await flags_of(watching, clinic)
    chat = flags[CHAT]
    seen = {(c["operation"], c["client"]): (c["would_be_refused"], c["refused"], c["users"]) for c in chat["callers"]}
    assert seen == {("send_message", "okhttp"): (4, 1, 2), ("get_messages", "clinic-app"): (1, 0, 1)}
    assert (chat["requests"], chat["would_be_refused"], chat["refused"], chat["users"]) == (13, 5, 1, 2)
    assert (chat["safe_to_enforce"], chat["enforced_when"]) == (False, True)
    assert chat["why"] == "Of 13 requests 5 would have been refused and 1 were refused; users: 2."
    times = await clinic.fetchrow("SELECT min(at), max(at) FROM decisions WHERE flag = $1", CHAT.value)
    assert (moment(chat["first_seen"]), moment(chat["last_seen"])) == tuple(times)
    allowing = flags[ALLOW]
    assert (allowing["would_be_refused"], allowing["refused"], allowing["users"]) == (1, 1, 1)
    assert (allowing["safe_to_enforce"], allowing["enforced_when"]) == (False, False)
    assert [(c["operation"], c["client"]) for c in allowing["callers"]] == [("send_message", "clinic-app")]


async def test_a_flag_is_safe_to_enforce_once_there_is_traffic_and_none_of_it_is_refused(
    make_api: MakeApi, clinic: Clinic, clock: Clock
) -> None:
    api = await make_api()
    session = await clinic.session()
    silent = await flags_of(api, clinic)
    assert {flag: silent[flag]["safe_to_enforce"] for flag in Flag} == dict.fromkeys(Flag, False)
    assert silent[CHAT]["why"] == "No traffic seen: there were no chat requests."

    found(await read(api, session.patient, session.appointment_id))
    await decided(clinic, 1)
    assert not (await flags_of(api, clinic))[CHAT]["safe_to_enforce"]

    await clock.advance(2 * DAY)
    gone = (await flags_of(api, clinic))[CHAT]
    assert (gone["safe_to_enforce"], gone["requests"], gone["callers"]) == (False, 0, [])
    found(await read(api, session.patient, session.context))
    await decided(clinic, 2)
    flags = await flags_of(api, clinic)
    assert {flag for flag in Flag if flags[flag]["safe_to_enforce"]} == {CHAT, ALLOW}
    assert flags[CHAT]["why"] == "Of 1 chat requests none would have been refused."
    assert not (await flags_of(api, clinic, since="3d"))[CHAT]["safe_to_enforce"]


async def test_since_is_a_span_or_a_moment(make_api: MakeApi, clinic: Clinic, clock: Clock) -> None:
    api = await make_api()
    session = await clinic.session()
    found(await read(api, session.patient, session.appointment_id))
    await decided(clinic, 1)
    at = await clinic.fetchval("SELECT at FROM decisions")
    await clock.advance(timedelta(hours=2))
    after = (at + timedelta(minutes=2)).isoformat()
    for since, seen in {"90m": 0, "3h": 1, "1d": 1, at.isoformat(): 1, after: 0, "99999d": 1}.items():
        assert (await flags_of(api, clinic, since=since))[CHAT]["would_be_refused"] == seen, since
    report = found(await api.as_(clinic.operator).get("/admin/rollout", params={"since": after}))
    assert moment(report["since"]).isoformat() == after
    for nonsense in ("", "24", "0h", "-1h", "1w", "2h30m", "2030-01-01", "2030-01-01T00:00:00", "9" * 400 + "h"):
        assert faults(await api.as_(clinic.operator).get("/admin/rollout", params={"since": nonsense})) == ["/since"]


async def test_an_operator_sees_the_own_tenant_alone(make_api: MakeApi, clinic: Clinic, database: Database) -> None:
    api = await make_api()
    elsewhere = await Clinic.open(database, "Elsewhere")
    theirs = await elsewhere.session()
    found(await read(api, theirs.patient, theirs.appointment_id))
    problem(await read(api, theirs.patient, (await clinic.session()).appointment_id), 404, "APPOINTMENT_NOT_FOUND")
    found(await read(api, elsewhere.operator, theirs.context))
    await decided(clinic, 3)
    ours = (await flags_of(api, clinic))[CHAT]
    assert (ours["requests"], ours["would_be_refused"], ours["callers"]) == (0, 0, [])
    assert (await flags_of(api, elsewhere))[CHAT]["would_be_refused"] == 1
    for path, number in (("/admin/decisions", 2), ("/admin/audit-log", 1)):
        assert found(await api.as_(clinic.operator).get(path))["items"] == []
        assert len(found(await api.as_(elsewhere.operator).get(path))["items"]) >= number
        problem(await api.as_(theirs.doctor).get(path), 403, "ROLE_NOT_ALLOWED")
    problem(await api.as_(theirs.doctor).get("/admin/rollout"), 403, "ROLE_NOT_ALLOWED")


MANY = """
    INSERT INTO decisions (tenant_id, at, operation, identifier, user_id, role, client, verdict, reason, flag, flags)
    SELECT $1, clock(), 'get_messages', '12', n % 1000, 'patient', 'client-' || n % 500, 'warned',
           'SESSION_CONTEXT_REQUIRED', 'ENFORCE_SESSION_GATED_CHAT', '{}'
    FROM generate_series(1, 200000) n
"""


async def test_the_report_over_many_rows_is_short_and_soon_there(api: Api, clinic: Clinic, owner: Owner) -> None:
    await owner.execute(MANY, clinic.tenant_id)
    async with asyncio.timeout(3):
        chat = (await flags_of(api, clinic))[CHAT]
    assert (chat["would_be_refused"], chat["users"]) == (200_000, 1000)
    assert len(chat["callers"]) == rollout.CALLERS_SHOWN
    assert {(c["would_be_refused"], c["users"]) for c in chat["callers"]} == {(400, 2)}


async def test_decisions_are_found_by_what_they_were_about(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(decision_sample_rate=1.0)
    session = await clinic.session()
    found(await send(api, session.patient, session.context, "Hello", "okhttp/4"), 201)
    found(await read(api, session.doctor, session.appointment_id))
    problem(await read(api, await clinic.patient(), session.appointment_id), 404, "APPOINTMENT_NOT_FOUND")
    await decided(clinic, 3)
    client = api.as_(clinic.operator)

    async def ids(**query: object) -> list[int]:
        page = found(await client.get("/admin/decisions", params={name: str(value) for name, value in query.items()}))
        return [item["id"] for item in page["items"]]

    refused, warned, allowed = await ids()
    assert await ids(verdict="refused") == [refused]
    assert await ids(operation="send_message") == [allowed]
    assert await ids(user_id=session.doctor.user_id) == [warned]
    assert await ids(appointment_id=session.appointment_id) == [refused, warned, allowed]
    assert await ids(session_id=session.ref.id, operation="get_messages", verdict="warned") == [warned]
    assert await ids(cursor=warned) == [allowed]
    shown = found(await client.get("/admin/decisions", params={"verdict": "warned"}))["items"][0]
    assert moment(shown.pop("at"))
    assert shown.pop("correlation_id")
    assert shown == {
        "id": warned,
        "operation": "get_messages",
        "identifier": str(session.appointment_id),
        "appointment_id": session.appointment_id,
        "session_id": session.ref.id,
        "user_id": session.doctor.user_id,
        "role": "doctor",
        "client": "okhttp",
        "verdict": "warned",
        "reason": "SESSION_CONTEXT_REQUIRED",
        "flag": CHAT,
        "flags": dict.fromkeys(Flag, False),
    }


async def test_the_audit_log_is_listed(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    operator = api.as_(clinic.operator)
    found(await read(api, clinic.operator, session.context))
    added = found(await operator.post("/admin/users", json={"role": "doctor", "name": "Grace", "country": "MW"}), 201)
    created, looked = found(await operator.get("/admin/audit-log"))["items"]
    assert (created["action"], created["subject"], created["details"]) == (
        "user_created",
        f"user:{added['id']}",
        {"role": "doctor"},
    )
    assert (looked["action"], looked["subject"]) == ("chat_history_read", session.context)
    assert created["actor_id"] == looked["actor_id"] == clinic.operator.user_id
    assert moment(looked["at"]) < moment(created["at"])


async def test_what_is_refused_waits_while_the_log_is_full(
    make_api: MakeApi, clinic: Clinic, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "ROOM", 3)
    api = await make_api(pool_size=4)
    session, stranger = await clinic.session(), await clinic.patient()
    async with owner.transaction():
        await owner.execute("LOCK TABLE decisions IN ACCESS EXCLUSIVE MODE")
        for _ in range(2):
            problem(await read(api, stranger, session.context), 404, "SESSION_NOT_FOUND")
        refused = [asyncio.create_task(read(api, stranger, session.context)) for _ in range(7)]
        done, _ = await asyncio.wait(refused, timeout=1)
        assert not done
        found(await read(api, session.patient, session.context))
    for response in await asyncio.gather(*refused):
        problem(response, 404, "SESSION_NOT_FOUND")
    await decided(clinic, 10)
    assert await clinic.fetchval("SELECT count(*) FROM decisions") == 9
    assert api.runtime.metrics.sample("guard_decisions_dropped_total", verdict="refused") == 0


async def test_a_killed_process_takes_its_last_half_second_along_and_no_more(
    clinic: Clinic, urls: Urls, tmp_path: Path
) -> None:
    session = await clinic.session()
    loop = asyncio.get_running_loop()
    answered: dict[str, float] = {}
    async with (
        running_api_process(urls.app, urls.redis, tmp_path / "api.jsonl") as api,
        api.client(session.patient) as client,
    ):
        began = loop.time()
        while loop.time() < began + 2:
            response = await client.get(f"/chat/{session.appointment_id}/messages")
            assert found(response)["items"] == []
            answered[response.headers["X-Correlation-ID"]] = loop.time()
        api.process.kill()
        killed = loop.time()
        await api.process.wait()
    kept = {row["correlation_id"] for row in await clinic.fetch("SELECT correlation_id FROM decisions")}
    assert len(kept) > 10
    assert [each for each, at in answered.items() if each not in kept and at < killed - 0.5] == []
    total = await clinic.fetchval("SELECT sum(requests)::int FROM decision_totals")
    assert total == len(kept), "What is counted and what is kept are written together."


async def test_an_orderly_end_loses_nothing(clinic: Clinic, urls: Urls, tmp_path: Path) -> None:
    session: LiveSession = await clinic.session()
    async with (
        running_api_process(urls.app, urls.redis, tmp_path / "api.jsonl") as api,
        api.client(session.patient) as client,
    ):
        for _ in range(20):
            found(await client.get(f"/chat/{session.appointment_id}/messages"))
        assert await api.stop() == 0
    assert await clinic.fetchval("SELECT count(*) FROM decisions") == 20
