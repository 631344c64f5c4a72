"""Attempts at more than is allowed are counted by their kind, and logged with where they came from."""

from pathlib import Path
from typing import Any

import pytest

from services.api import security
from tests.api.test_identity import claims_of, forged
from tests.api.test_socket_handshake import denied
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.log_lines import lines_of
from tests.processes import until
from tests.running import SECRET, Api
from tests.sockets import following

ELSEWHERE = {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9", "X-Real-IP": "203.0.113.9"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "api.jsonl"


@pytest.fixture
async def api(make_api: MakeApi, log: Path) -> Api:
    return await make_api(log_file=log, chat_messages_per_minute=1)


async def told(log: Path, number: int) -> list[dict[str, Any]]:
    """The security events, once there are so many."""

    async def events() -> list[dict[str, Any]]:
        found = [line for line in lines_of(log) if line["event"] == "security_event"]
        return found if len(found) >= number else []

    events_told: list[dict[str, Any]] = await until(events)
    assert len(events_told) == number
    return events_told


def counted(api: Api, kind: str) -> float:
    return api.runtime.metrics.sample("security_events_total", kind=kind)


async def test_a_role_that_asks_for_more_than_it_may_is_told_of(api: Api, clinic: Clinic, log: Path) -> None:
    patient = await clinic.patient()
    response = await api.as_(patient).get("/admin/flags", headers={"User-Agent": "curl/8.1", **ELSEWHERE})
    assert response.status_code == 403
    (line,) = await told(log, 1)
    assert counted(api, "privilege") == 1
    said = {name: line[name] for name in ("kind", "client_ip", "user_agent", "user_id", "category", "level")}
    assert said == {
        "kind": "privilege",
        "client_ip": "127.0.0.1",
        "user_agent": "curl/8.1",
        "user_id": patient.user_id,
        "category": "security",
        "level": "info",
    }
    assert line["correlation_id"] == response.headers["X-Correlation-ID"]


async def test_what_the_guard_refuses_a_role_is_told_of_as_well(api: Api, clinic: Clinic, log: Path) -> None:
    session = await clinic.session()
    message = {"client_message_id": "1", "body": "Hello"}
    response = await api.as_(clinic.operator).post(f"/chat/{session.context}/messages", json=message)
    assert response.status_code == 403
    (line,) = await told(log, 1)
    assert (line["kind"], line["user_id"]) == ("privilege", clinic.operator.user_id)


async def test_a_signature_that_is_not_ours_is_told_of(api: Api, clinic: Clinic, log: Path) -> None:
    claims = claims_of(clinic.operator)
    forgeries = [
        forged({"alg": "HS256"}, claims, b"another secret that is long enough"),
        forged({"alg": "none"}, claims, SECRET.encode()),
    ]
    for token in forgeries:
        assert (await api.anonymous.get("/api/v1/me", headers={"Authorization": f"Bearer {token}"})).status_code == 401
    assert [line["kind"] for line in await told(log, 2)] == ["signature", "signature"]
    assert counted(api, "signature") == 2


async def test_no_token_and_one_that_is_out_of_date_are_no_attempts(api: Api, clinic: Clinic) -> None:
    old = forged({"alg": "HS256"}, claims_of(clinic.operator, exp=1), SECRET.encode())
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Bearer {old}"}):
        assert (await api.anonymous.get("/api/v1/me", headers=headers)).status_code == 401
    assert counted(api, "signature") == counted(api, "suspicious_ip") == 0


async def test_whoever_is_faster_than_the_limits_is_told_of(api: Api, clinic: Clinic, log: Path) -> None:
    session = await clinic.session()
    for number in range(2):
        message = {"client_message_id": str(number), "body": "Hello"}
        await api.as_(session.patient).post(f"/chat/{session.context}/messages", json=message)
    async with following(api, session.patient, session.context) as socket:
        await socket.send(type="message", client_message_id="3", body="Hello")
        assert (await socket.next("refused"))["code"] == "RATE_LIMITED"
    assert [line["kind"] for line in await told(log, 2)] == ["rate_limit"] * 2
    assert counted(api, "rate_limit") == 2


async def test_a_page_that_may_open_no_sockets_is_told_of(api: Api, clinic: Clinic, log: Path) -> None:
    session = await clinic.session()
    await denied(api, session.context, session.patient, headers={"Origin": "https://evil.example"})
    (line,) = await told(log, 1)
    assert (line["kind"], counted(api, "other")) == ("other", 1)


async def test_an_address_that_goes_on_failing_is_suspicious_once_a_minute(
    api: Api, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = [7.0]
    monkeypatch.setattr(security, "monotonic", lambda: 60 * minute[0])
    for _ in range(security.TOLERATED_FAILURES):
        await api.anonymous.get("/api/v1/me", headers=ELSEWHERE)
    assert counted(api, "suspicious_ip") == 0
    for _ in range(20):
        await api.anonymous.get("/api/v1/me")
    assert counted(api, "suspicious_ip") == 1
    minute[0] += 1
    for _ in range(security.TOLERATED_FAILURES + 1):
        await api.anonymous.get("/api/v1/me")
    lines = await told(log, 2)
    assert {(line["kind"], line["level"], line["client_ip"]) for line in lines} == {
        ("suspicious_ip", "warning", "127.0.0.1")
    }


def test_addresses_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "REMEMBERED_ADDRESSES", 100)
    failures = security.Failures()
    for number in range(1000):
        failures.add(f"203.0.113.{number}")
        assert len(failures._counts) <= 100


def test_whoever_fails_most_is_not_forgotten_first_when_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "REMEMBERED_ADDRESSES", 100)
    failures = security.Failures()
    for number in range(99):
        failures.add(f"203.0.113.{number}")
    suspicious = [failures.add("198.51.100.7") for _ in range(security.TOLERATED_FAILURES)]
    for number in range(50):
        failures.add(f"192.0.2.{number}")
    assert suspicious == [False] * security.TOLERATED_FAILURES
    assert failures.add("198.51.100.7")


def test_whoever_has_many_addresses_of_ipv6_is_one() -> None:
    failures = security.Failures()
    told = [failures.add(f"2001:db8:1:1::{number:x}") for number in range(security.TOLERATED_FAILURES + 2)]
    assert told.count(True) == 1
    assert not failures.add("2001:db8:1:2::1")
    assert not failures.add("fe80::1%lo")
