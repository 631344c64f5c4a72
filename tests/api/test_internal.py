"""Alertmanager's receiver: who may tell of alerts, what is understood, and that each is kept once."""

import asyncio
import json
from itertools import permutations
from typing import Any

import httpx2
import orjson
import pytest

from libs.domain import alerts
from libs.domain.db import Database
from services.api.internal import ALERTS_LIMIT, BODY_LIMITS, FAULTS_SHOWN, PAIRS_KEPT, TEXT_KEPT
from tests.api.expect import faults, found, moment, problem
from tests.api.test_public import NO_DATABASE
from tests.clinic import Clinic
from tests.conftest import MakeApi, Urls
from tests.running import ALERTS_TOKEN, Api, running_api

JSON = {"Content-Type": "application/json"}
BEARER = {"Authorization": f"Bearer {ALERTS_TOKEN}"}
NEVER = "0001-01-01T00:00:00Z"
START, END = "2030-01-01T10:00:00.123456789Z", "2030-01-01T13:00:00+01:00"
LABELS = {"alertname": "OutboxLag", "severity": "critical", "component": "outbox", "metric": "outbox_dispatch_lag"}
ANNOTATIONS = {"summary": "The outbox is late.", "value": "73.5", "threshold": "60"}


def firing(fingerprint: str = "a", start: str = START, **fields: Any) -> dict[str, Any]:
    """An alert as Alertmanager 0.25 writes it."""
    return {
        "status": "firing",
        "labels": LABELS,
        "annotations": ANNOTATIONS,
        "startsAt": start,
        "endsAt": NEVER,
        "generatorURL": "http://prometheus:9090/graph?g0.expr=up",
        "fingerprint": fingerprint,
    } | fields


def resolved(fingerprint: str = "a", start: str = START, end: str = END, **fields: Any) -> dict[str, Any]:
    return firing(fingerprint, start, status="resolved", endsAt=end, **fields)


def payload(*told: Any) -> dict[str, Any]:
    return {
        "receiver": "sessiongate",
        "status": "firing",
        "alerts": told,
        "groupLabels": {"alertname": "OutboxLag"},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager:9093",
        "version": "4",
        "groupKey": '{}:{alertname="OutboxLag"}',
        "truncatedAlerts": 0,
    }


async def send(api: Api, *told: Any) -> httpx2.Response:
    # Escaped, so that it may hold what is no text.
    return await api.anonymous.post("/internal/alerts", content=json.dumps(payload(*told)), headers=BEARER | JSON)


async def tell(api: Api, *told: Any) -> None:
    assert (await send(api, *told)).status_code == 204


async def listed(api: Api, clinic: Clinic, **query: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = found(await api.as_(clinic.operator).get("/admin/alerts", params=query))["items"]
    return items


async def told_counts(api: Api) -> dict[tuple[str, str], float]:
    registry = api.runtime.metrics.registry
    return {
        (severity, status): value
        for severity in alerts.Severity
        for status in ("firing", "resolved")
        if (value := registry.get_sample_value("alerts_received_total", {"severity": severity, "status": status}))
    }


async def test_an_alert_is_kept_and_shown_to_the_operators_of_every_tenant(api: Api, clinic: Clinic) -> None:
    await tell(api, firing())
    (alert,) = await listed(api, clinic)
    assert moment(alert.pop("last_seen_at")) <= await clinic.fetchval("SELECT clock()")
    assert alert == {
        "id": alert["id"],
        "source": "alertmanager",
        "fingerprint": "a",
        "status": "firing",
        "name": "OutboxLag",
        "severity": "critical",
        "component": "outbox",
        "metric": "outbox_dispatch_lag",
        "value": 73.5,
        "threshold": 60.0,
        "labels": LABELS,
        "annotations": ANNOTATIONS,
        "started_at": "2030-01-01T10:00:00.123456Z",
        "resolved_at": None,
        "deliveries": 1,
    }
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    assert [each["id"] for each in await listed(api, elsewhere)] == [alert["id"]]


async def test_in_whatever_order_it_is_told_an_alert_is_one_row_and_resolved_in_the_end(
    api: Api, clinic: Clinic
) -> None:
    orders = set(permutations(("firing", "firing", "resolved", "resolved")))
    for number, order in enumerate(orders):
        for status in order:
            await tell(api, firing(str(number)) if status == "firing" else resolved(str(number)))
    shown = await listed(api, clinic)
    assert [each["fingerprint"] for each in shown] == [str(number) for number in reversed(range(len(orders)))]
    for alert in shown:
        assert (alert["status"], alert["resolved_at"], alert["deliveries"]) == ("resolved", "2030-01-01T12:00:00Z", 4)
    begun_with_firing = sum(order[0] == "firing" for order in orders)
    assert await told_counts(api) == {
        ("critical", "firing"): begun_with_firing,
        ("critical", "resolved"): len(orders),
    }


async def test_an_alert_that_fires_again_is_another(api: Api, clinic: Clinic) -> None:
    later = "2030-01-01T14:00:00Z"
    await tell(api, firing())
    await tell(api, resolved())
    await tell(api, firing(start=later))
    await tell(api, firing(start=later), resolved(end="2030-01-01T23:00:00Z"))
    again, first = await listed(api, clinic)
    assert (again["status"], again["started_at"], again["deliveries"]) == ("firing", later, 2)
    assert (first["resolved_at"], first["deliveries"]) == ("2030-01-01T12:00:00Z", 3)


async def test_what_is_told_twice_in_one_payload_is_over_if_it_is_once(api: Api, clinic: Clinic) -> None:
    await tell(api, resolved(), firing(), firing("b"))
    assert {each["fingerprint"]: each["status"] for each in await listed(api, clinic)} == {
        "a": "resolved",
        "b": "firing",
    }


async def test_a_thousand_alerts_from_two_peers_at_once_are_a_thousand_rows(make_api: MakeApi, clinic: Clinic) -> None:
    peers = [await make_api(), await make_api()]
    fired = [firing(f"{number:04}") for number in range(1000)]
    over = [resolved(f"{number:04}") for number in range(1000)]
    for told in (fired, over):
        # Not in the same order, or they would not get into each other's way.
        await asyncio.gather(*(tell(peer, *each) for peer in peers for each in (told, told[::-1], told[500:])))
    kept = await clinic.fetch("SELECT deliveries, resolutions, resolved_at IS NULL AS open FROM alerts")
    assert len(kept) == 1000
    assert {tuple(row) for row in kept} == {(8, 4, False), (12, 6, False)}
    counted = [await told_counts(peer) for peer in peers]
    for status in ("firing", "resolved"):
        assert sum(each.get(("critical", status), 0) for each in counted) == 1000


async def test_what_is_news_is_logged_once(make_api: MakeApi, clinic: Clinic, tmp_path: Any) -> None:
    log = tmp_path / "api.jsonl"
    api = await make_api(log_file=log)
    for alert in (firing(), firing(), resolved(), resolved(), firing()):
        await tell(api, alert)
    await api.close()

    def lines() -> list[dict[str, Any]]:
        return [line for line in map(orjson.loads, log.read_bytes().splitlines()) if line["component"] == "alerts"]

    async with asyncio.timeout(5):
        while len(lines()) < 2:
            await asyncio.sleep(0.01)
    fired, over = lines()
    assert (fired["event"], fired["level"], over["event"], over["level"]) == (
        *("alert_received", "warning"),
        *("alert_resolved", "info"),
    )
    for line in (fired, over):
        assert (line["alert"], line["severity"], line["alert_component"]) == ("OutboxLag", "critical", "outbox")


@pytest.mark.parametrize(
    ("label", "severity"),
    [
        ("low", "info"),
        ("medium", "warning"),
        ("high", "high"),
        ("critical", "critical"),
        ("info", "info"),
        ("warning", "warning"),
        ("page", "warning"),
        ("", "warning"),
    ],
)
async def test_severities_are_ours_whatever_the_rule_calls_them(
    api: Api, clinic: Clinic, label: str, severity: str
) -> None:
    await tell(api, firing(labels=LABELS | {"severity": label}))
    assert [each["severity"] for each in await listed(api, clinic)] == [severity]


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-inf", "12 %", "", "1e999"])
async def test_a_value_that_is_no_number_is_none(api: Api, clinic: Clinic, value: str) -> None:
    await tell(api, firing(annotations={"value": value}, labels={"alertname": "Bare"}))
    (alert,) = await listed(api, clinic)
    assert [alert[name] for name in ("value", "threshold", "component", "metric")] == [None] * 4


async def test_texts_are_kept_as_far_as_they_can_be(api: Api, clinic: Clinic) -> None:
    many = {f"{number:03}": "x" for number in range(1000)} | {"alertname": "O\x00" + "x" * 100_000, "severity": "high"}
    await tell(api, firing(labels=many, annotations={"sum\x00mary": "a\x00b 👩‍⚕️", "half": "\ud800"}))
    (alert,) = await listed(api, clinic)
    assert (alert["name"], alert["severity"]) == ("O\N{REPLACEMENT CHARACTER}" + "x" * (TEXT_KEPT - 2), "high")
    assert len(alert["labels"]) == PAIRS_KEPT
    assert alert["annotations"] == {"sum\ufffdmary": "a\ufffdb 👩‍⚕️", "half": "?"}


@pytest.mark.parametrize("end", [NEVER, START, "1999-01-01T00:00:00Z"])
async def test_an_alert_is_not_over_before_it_began(api: Api, clinic: Clinic, end: str) -> None:
    await tell(api, resolved(end=end))
    (alert,) = await listed(api, clinic)
    assert alert["resolved_at"] == alert["started_at"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another status": ({"status": "pending"}, "/status"),
    "no fingerprint": ({"fingerprint": ""}, "/fingerprint"),
    "a long fingerprint": ({"fingerprint": "f" * 101}, "/fingerprint"),
    "a fingerprint with NUL": ({"fingerprint": "f\x00"}, "/fingerprint"),
    "half a surrogate": ({"fingerprint": "\ud800"}, "/fingerprint"),
    "an unknown start": ({"startsAt": NEVER}, "/startsAt"),
    "a start without an offset": ({"startsAt": "2030-01-01T00:00:00"}, "/startsAt"),
    "a start that is a number": ({"startsAt": 1893456000}, "/startsAt"),
    "an end after the end of time": ({"endsAt": "9999-12-31T23:59:59-14:00"}, "/endsAt"),
    "no name": ({"labels": {"severity": "high"}}, "/labels"),
    "labels that are no texts": ({"labels": {"alertname": 7}}, "/labels/alertname"),
    "no annotations": ({"annotations": None}, "/annotations"),
}


@pytest.mark.parametrize("bad", BAD)
async def test_what_is_not_understood_is_pointed_at_and_the_rest_is_kept(api: Api, clinic: Clinic, bad: str) -> None:
    spoiled, pointer = BAD[bad]
    told = payload(firing("before"), firing("bad") | spoiled, resolved("after"))
    refused = await api.anonymous.post("/internal/alerts", content=json.dumps(told), headers=BEARER | JSON)
    assert faults(refused) == [f"/alerts/1{pointer}"]
    assert {each["fingerprint"] for each in await listed(api, clinic)} == {"before", "after"}


async def test_what_is_no_payload_is_refused(api: Api, clinic: Clinic) -> None:
    for body, pointers in (
        ({"version": "5", "alerts": []}, ["/version"]),
        ({"version": "4"}, ["/alerts"]),
        ({"version": "4", "alerts": {}}, ["/alerts"]),
        ({"version": "4", "alerts": [1] * (ALERTS_LIMIT + 1)}, ["/alerts"]),
        (payload(*[7] * 1000), [f"/alerts/{index}" for index in range(FAULTS_SHOWN)]),
        ([], [""]),
    ):
        assert faults(await api.anonymous.post("/internal/alerts", json=body, headers=BEARER)) == pointers
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        refused = await api.anonymous.post("/internal/alerts", content=content, headers=BEARER | JSON)
        assert refused.status_code in (400, 422)
    assert await listed(api, clinic) == []
    await tell(api)


async def test_a_payload_may_be_longer_than_what_clients_send_but_not_endless(api: Api, clinic: Clinic) -> None:
    (limit,) = BODY_LIMITS.values()
    whole = json.dumps(payload(firing())).ljust(limit)
    sent = await api.anonymous.post("/internal/alerts", content=whole, headers=BEARER | JSON)
    assert sent.status_code == 204
    longer = await api.anonymous.post("/internal/alerts", content=whole + " ", headers=BEARER | JSON)
    problem(longer, 413, "PAYLOAD_TOO_LARGE")
    elsewhere = await api.as_(clinic.operator).post("/admin/users", content=whole, headers=JSON)
    problem(elsewhere, 413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        f"Basic {ALERTS_TOKEN}",
        ALERTS_TOKEN,
        f"Bearer {ALERTS_TOKEN[:-1]}",
        f"Bearer {ALERTS_TOKEN}x",
        "Bearer ÿ",
    ],
)
async def test_only_who_knows_the_token_tells_of_alerts(api: Api, clinic: Clinic, authorization: str) -> None:
    headers = {"Authorization": authorization.encode("latin-1")}
    for content in (json.dumps(payload(firing())).encode(), b"\xff", b" " * 3_000_000):
        refused = await api.anonymous.post("/internal/alerts", content=content, headers=headers)  # type: ignore[arg-type]
        problem(refused, 401, "UNAUTHENTICATED")
        assert refused.headers["www-authenticate"] == "Bearer"
    assert await listed(api, clinic) == []


async def test_no_user_tells_of_alerts_and_the_token_opens_nothing_else(api: Api, clinic: Clinic) -> None:
    token = api.as_(clinic.operator).headers["authorization"]
    problem(
        await api.anonymous.post("/internal/alerts", json=payload(firing()), headers={"Authorization": token}),
        401,
        "UNAUTHENTICATED",
    )
    problem(await api.anonymous.get("/api/v1/admin/alerts", headers=BEARER), 401, "UNAUTHENTICATED")


async def test_without_a_token_there_is_no_receiver(make_api: MakeApi) -> None:
    api = await make_api(alerts_token=None)
    for headers in ({}, BEARER, {"Authorization": "Bearer None"}, {"Authorization": "Bearer"}):
        refused = await api.anonymous.post("/internal/alerts", json=payload(firing()), headers=headers)
        assert "SESSIONGATE_ALERTS_TOKEN" in problem(refused, 404, "NOT_FOUND")["detail"]


async def test_a_sender_is_asked_to_come_again_while_the_database_is_away(urls: Urls) -> None:
    async with running_api(NO_DATABASE, urls.redis) as api:
        problem(await send(api, firing()), 503, "OVERLOADED")


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ({}, "dcba"),
        ({"status": "firing"}, "db"),
        ({"status": "resolved"}, "ca"),
        ({"severity": "high"}, "dc"),
        ({"component": "chat"}, "cb"),
        ({"status": "firing", "severity": "high", "component": "outbox"}, "d"),
    ],
)
async def test_alerts_are_found_by_what_they_are_about(
    api: Api, clinic: Clinic, query: dict[str, str], shown: str
) -> None:
    chat, high = LABELS | {"component": "chat"}, {"severity": "high"}
    await tell(api, resolved("a"), firing("b", labels=chat))
    await tell(api, resolved("c", labels=chat | high), firing("d", labels=LABELS | high))
    assert "".join(each["fingerprint"] for each in await listed(api, clinic, **query)) == shown


async def test_what_does_not_exist_is_not_filtered_by(api: Api, clinic: Clinic) -> None:
    client = api.as_(clinic.operator)
    for name, value in (("status", "open"), ("severity", "low"), ("component", "Chat"), ("component", "a" * 101)):
        assert faults(await client.get("/admin/alerts", params={name: value})) == [f"/{name}"]


async def test_what_is_over_or_not_told_any_more_is_forgotten_after_ninety_days(
    api: Api, clinic: Clinic, database: Database
) -> None:
    await tell(api, firing("fires"), firing("silent"), resolved("recent"), resolved("old"))
    await clinic.fetch(
        "UPDATE alerts SET started_at = clock() - interval '1 year', resolved_at = CASE fingerprint"
        " WHEN 'recent' THEN clock() - interval '89 days' WHEN 'old' THEN clock() - interval '91 days' END"
    )
    await clinic.fetch("UPDATE alerts SET last_seen_at = clock() - interval '91 days' WHERE fingerprint = 'silent'")
    await alerts.prune(database)
    assert {each["fingerprint"] for each in await listed(api, clinic)} == {"fires", "recent"}
