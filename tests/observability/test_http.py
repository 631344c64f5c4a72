"""What every request says about itself: a server with a small application."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import httpx2
import pytest
import uvicorn

from libs.domain.catalogue import CATALOGUE
from libs.observability import http
from libs.observability.context import fields, note
from libs.observability.http import HttpTelemetry, Receive, Scope, Send
from libs.observability.registry import Metrics
from libs.observability.testing import CapturedLogs, capture_logs
from tests.processes import until

ID = "550e8400-e29b-41d4-a716-446655440000"


class Application:
    """Answers `/status/{status}` as told, and has a door at which requests wait."""

    def __init__(self) -> None:
        self.door = asyncio.Event()
        self.waiting = asyncio.Event()
        self.bound: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bound = dict(fields())
        note(user_id=7)
        match scope["path"].split("/")[1:]:
            case ["status", status]:
                await answer(send, int(status))
            case ["door"]:
                self.waiting.set()
                await self.door.wait()
                await answer(send, 200)
            case ["gone"]:
                self.waiting.set()
                while (await receive())["type"] != "http.disconnect":
                    pass
            case ["halfway"]:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                raise RuntimeError("broken halfway")
            case _:
                raise RuntimeError("broken")

    @staticmethod
    def route_of(scope: Scope) -> str:
        first = scope["path"].split("/")[1]
        return {"status": "/status/{status}", "probe": "/probe"}.get(first, f"/{first}")


async def answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CATALOGUE, version="0", service="test")


@pytest.fixture
def logs(metrics: Metrics) -> Iterator[CapturedLogs]:
    with capture_logs(metrics=metrics) as captured:
        yield captured


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
async def client(application: Application, metrics: Metrics, logs: CapturedLogs) -> AsyncIterator[httpx2.AsyncClient]:
    observed = HttpTelemetry(
        application, metrics=metrics, route_of=Application.route_of, quiet=frozenset({"/status/{status}"})
    )
    config = uvicorn.Config(observed, port=0, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as opened:
        yield opened
    server.should_exit = True
    await serving


def counted(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    """How many requests there were by route, method and status."""
    return {
        (sample.labels["route"], sample.labels["method"], sample.labels["status"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "http_request_duration_seconds_count"
    }


async def test_requests_are_counted_by_route_method_and_status(client: httpx2.AsyncClient, metrics: Metrics) -> None:
    for status in (200, 200, 404):
        await client.get(f"/status/{status}")
    await client.delete("/status/204")
    route = "/status/{status}"
    assert counted(metrics) == {(route, "GET", "200"): 2, (route, "GET", "404"): 1, (route, "DELETE", "204"): 1}


async def test_methods_that_are_none_share_a_label(client: httpx2.AsyncClient, metrics: Metrics) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
        await client.request(method, "/status/200")
    by_method = {method: number for (_, method, _), number in counted(metrics).items()}
    assert by_method == dict.fromkeys(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"), 1) | {"OTHER": 2}


async def test_the_time_taken_is_measured_and_told(
    client: httpx2.AsyncClient, application: Application, metrics: Metrics, logs: CapturedLogs
) -> None:
    request = asyncio.create_task(client.get("/door"))
    await application.waiting.wait()
    assert metrics.sample("http_requests_in_flight") == 1
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(0.1)
    held = asyncio.get_running_loop().time() - began
    application.door.set()
    await request
    labels = {"route": "/door", "method": "GET", "status": "200"}
    took = metrics.sample("http_request_duration_seconds_sum", **labels)
    assert held <= took < held + 5
    (line,) = logs.lines("http_request")
    assert line["latency_ms"] == pytest.approx(took * 1000, abs=0.01)
    assert metrics.sample("http_request_duration_seconds_bucket", **labels, le="0.05") == 0
    assert metrics.sample("http_requests_in_flight") == 0


async def test_a_request_is_one_line_with_what_was_noted_on_the_way(
    client: httpx2.AsyncClient, application: Application, logs: CapturedLogs
) -> None:
    application.door.set()
    await client.post("/door?token=swordfish", headers={"X-Correlation-ID": ID})
    (line,) = logs.lines("http_request")
    expected = {"method": "POST", "route": "/door", "status": 200, "correlation_id": ID, "user_id": 7, "level": "info"}
    assert expected.items() <= line.items()
    assert (line["module"], line["component"]) == ("infra", "http")
    assert "swordfish" not in logs.raw()


async def test_what_is_noted_in_one_request_is_not_known_in_the_next(
    client: httpx2.AsyncClient, application: Application
) -> None:
    for _ in range(2):
        await client.get("/status/200")
        assert set(application.bound) == {"correlation_id", "client"}


async def test_a_slow_request_is_told_apart(
    client: httpx2.AsyncClient, application: Application, logs: CapturedLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    application.door.set()
    await client.get("/door")
    assert logs.lines("slow_operation") == []
    monkeypatch.setattr(http, "SLOW_SECONDS", 0.0)
    await client.get("/door")
    (line,) = logs.lines("slow_operation")
    assert (line["route"], line["category"], line["level"]) == ("/door", "performance", "warning")
    assert line["latency_ms"] > 0


async def test_quiet_routes_are_counted_and_only_told_when_they_fail(
    client: httpx2.AsyncClient, metrics: Metrics, logs: CapturedLogs
) -> None:
    for status in (200, 404, 499, 500, 503):
        await client.get(f"/status/{status}")
    assert [line["status"] for line in logs.lines("http_request")] == [500, 503]
    assert sum(counted(metrics).values()) == 5


async def test_answers_are_counted_by_class_those_of_quiet_routes_apart(
    client: httpx2.AsyncClient, metrics: Metrics, application: Application
) -> None:
    assert answers(metrics) == {"1xx": 0, "2xx": 0, "3xx": 0, "4xx": 0, "5xx": 0}, "Before the first of them."
    application.door.set()
    for path in ("/status/503", "/broken", "/door"):
        await client.get(path)
    assert answers(metrics) == {"1xx": 0, "2xx": 1, "3xx": 0, "4xx": 0, "5xx": 1}


def answers(metrics: Metrics) -> dict[str, float]:
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return {each.labels["class"]: each.value for each in samples if each.name == "http_responses_total"}


@pytest.mark.parametrize(("path", "label"), [("/broken", "500"), ("/halfway", "200")])
async def test_an_exception_passes_and_is_counted_as_what_the_client_saw(
    client: httpx2.AsyncClient, metrics: Metrics, logs: CapturedLogs, path: str, label: str
) -> None:
    if label == "500":
        assert (await client.get(path)).status_code == 500
    else:
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get(path)
    assert counted(metrics) == {(path, "GET", label): 1}
    assert metrics.sample("http_requests_in_flight") == 0
    assert len(logs.lines("http_request")) == 1
    assert [line["exception_type"] for line in logs.lines("library_log")] == ["RuntimeError"]


async def test_a_client_that_leaves_is_counted_and_no_longer_in_flight(
    client: httpx2.AsyncClient, application: Application, metrics: Metrics
) -> None:
    request = asyncio.create_task(client.get("/gone"))
    await application.waiting.wait()
    assert metrics.sample("http_requests_in_flight") == 1
    request.cancel()

    async def over() -> bool:
        return metrics.sample("http_requests_in_flight") == 0

    await until(over)
    assert list(counted(metrics).values()) == [1]


@pytest.mark.parametrize("offered", [ID, ID.upper(), UUID(ID).hex])
async def test_a_correlation_id_is_taken_over_bound_and_returned(
    client: httpx2.AsyncClient, application: Application, offered: str
) -> None:
    answered = await client.get("/status/200", headers={"X-Correlation-ID": offered})
    assert answered.headers.get_list("X-Correlation-ID") == [offered]
    assert application.bound["correlation_id"] == offered


@pytest.mark.parametrize("offered", [None, b"", b"1", ID.encode() + b"0", b"{" + ID.encode() + b"}", b"\xff" * 32])
async def test_any_other_correlation_id_is_replaced(
    client: httpx2.AsyncClient, application: Application, offered: bytes | None
) -> None:
    headers = [] if offered is None else [(b"X-Correlation-ID", offered)]
    for status in (200, 404, 500):
        answered = await client.get(f"/status/{status}", headers=headers)
        (given,) = answered.headers.get_list("X-Correlation-ID")
        assert UUID(given).version == 4
        assert application.bound["correlation_id"] == given


# The real application from here on.
