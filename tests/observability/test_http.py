"""What every request says about itself: on a server with a small application, and on the real one."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import orjson
import pytest
import uvicorn
from fastapi.routing import iter_route_contexts
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from libs.domain.catalogue import CATALOGUE
from libs.observability import http, tracing
from libs.observability.context import fields, note
from libs.observability.exposition import render
from libs.observability.http import HttpTelemetry, Receive, Scope, Send
from libs.observability.registry import Metrics
from libs.observability.testing import CapturedLogs, OtlpReceiver, capture_logs
from libs.observability.tracing import configure_tracing, exemplar, served, span, tracer_provider
from services.api.main import RouteTemplates
from services.api.public import PROBES
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.processes import until
from tests.running import Api, token_of

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


@pytest.fixture
async def observed(make_api: MakeApi, tmp_path: Path) -> Api:
    return await make_api(log_file=tmp_path / "api.jsonl")


async def lines(path: Path, number: int) -> list[dict[str, Any]]:
    """The lines `http_request` of a log file, once there are so many."""

    async def written() -> list[dict[str, Any]]:
        found = [line for line in map(orjson.loads, path.read_bytes().splitlines()) if line["event"] == "http_request"]
        return found if len(found) >= number else []

    return list(await until(written))


async def test_the_label_is_the_whole_template_and_never_the_path(observed: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    client = observed.as_(session.patient)
    await client.get(f"/chat/{session.context}/messages", params={"limit": 3})
    await client.post(f"/sessions/{session.context}/end")
    await client.get("/appointments/987654")
    await client.get("/appointments/x")
    await observed.anonymous.get("/api/v1/appointments/987654")
    await client.put("/appointments")
    await observed.anonymous.get("/problems/SLOT_TAKEN")
    assert counted(observed.runtime.metrics) == {
        ("/api/v1/chat/{context}/messages", "GET", "200"): 1,
        ("/api/v1/sessions/{context}/end", "POST", "200"): 1,
        ("/api/v1/appointments/{appointment_id}", "GET", "404"): 1,
        ("/api/v1/appointments/{appointment_id}", "GET", "422"): 1,
        ("/api/v1/appointments/{appointment_id}", "GET", "401"): 1,
        ("/api/v1/appointments", "PUT", "405"): 1,
        ("/problems/{code}", "GET", "200"): 1,
    }
    exposed = render(observed.runtime.metrics, "")[0].decode()
    for part in ("987654", session.context, "SLOT_TAKEN"):
        assert part not in re.sub(r'reason="\w+"', "", exposed)


async def test_scanners_make_one_series(observed: Api, tmp_path: Path) -> None:
    for number in range(60):
        await observed.anonymous.get(f"/wp-admin/{number}.php?x={number}")
    await observed.anonymous.get("/api/v1/appointments/1/")
    assert counted(observed.runtime.metrics) == {("unmatched", "GET", "404"): 61}
    assert {line["route"] for line in await lines(tmp_path / "api.jsonl", 61)} == {"unmatched"}
    assert "wp-admin" not in (tmp_path / "api.jsonl").read_text()


async def test_there_is_a_label_for_every_route(observed: Api) -> None:
    template_of = RouteTemplates(observed.app)
    templates = set()
    for route in iter_route_contexts(observed.app.routes):
        assert template_of({"endpoint": route.endpoint}) == route.path
        templates.add(route.path)
    (label,) = [spec.labels[0] for spec in CATALOGUE if spec.name == "http_request_duration_seconds"]
    assert 15 < len(templates) < label.limit


async def test_probes_are_counted_but_not_told(observed: Api, clinic: Clinic, tmp_path: Path) -> None:
    for path in PROBES:
        assert (await observed.anonymous.get(path)).status_code == 200
    await observed.as_(clinic.operator).get("/me")
    assert [line["route"] for line in await lines(tmp_path / "api.jsonl", 1)] == ["/api/v1/me"]
    assert {route for route, _, _ in counted(observed.runtime.metrics)} == {*PROBES, "/api/v1/me"}


async def test_every_answer_has_a_correlation_id_which_problems_repeat(observed: Api, clinic: Clinic) -> None:
    client = observed.as_(clinic.operator)
    headers = {"X-Correlation-ID": ID, "Content-Type": "application/json"}
    answers = [
        await observed.anonymous.get("/nowhere", headers=headers),
        await observed.anonymous.get("/api/v1/me", headers=headers),
        await client.put("/me", headers=headers),
        await client.get("/appointments/1", headers=headers),
        await client.post("/appointments", content=b"{", headers=headers),
        await client.post("/appointments", content=b" " * 70_000, headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [404, 401, 405, 404, 400, 413]
    for each in answers:
        assert each.headers["X-Correlation-ID"] == each.json()["correlation_id"] == ID
    assert (await client.get("/me", headers=headers)).headers["X-Correlation-ID"] == ID


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_ours(
    observed: Api, clinic: Clinic, tmp_path: Path
) -> None:
    host, port = observed.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /api/v1/appointments HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer " + token_of(clinic.operator).encode() + b"\r\nContent-Length: 100\r\n\r\n{"
    )
    await writer.drain()
    metrics = observed.runtime.metrics

    async def arrived() -> bool:
        return metrics.sample("http_requests_in_flight") == 1

    await until(arrived)
    writer.close()
    (line,) = await lines(tmp_path / "api.jsonl", 1)
    assert (line["route"], line["status"]) == ("/api/v1/appointments", 400)
    assert metrics.sample("errors_total", module="infra", type="system") == 0
    assert metrics.sample("http_requests_in_flight") == 0


async def test_errors_are_counted_by_the_room_whose_route_it_was(observed: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    operator = observed.as_(clinic.operator)
    await observed.as_(session.patient).post("/appointments", json={})
    await operator.post(f"/chat/{session.context}/messages", json={"client_message_id": "1", "body": "Hello"})
    await observed.anonymous.get("/api/v1/me")
    await operator.get("/nowhere")

    def counted(module: str, kind: str) -> float:
        return observed.runtime.metrics.sample("errors_total", module=module, type=kind)

    assert counted("scheduling", "validation") == 1
    assert counted("conversation", "authorization") == 1
    assert counted("infra", "authentication") == 1


async def test_an_exemplar_leads_from_the_latency_to_the_trace(
    make_api: MakeApi, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
        traced = await make_api()
        await traced.as_(clinic.operator).get("/appointments/7", headers={"X-Correlation-ID": ID})
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        exposed = (await traced.anonymous.get("/metrics", headers=accept)).text
        (served,) = await asyncio.to_thread(receiver.wait_for, "GET /api/v1/appointments/{appointment_id}")
        exemplars = [
            sample.exemplar.labels
            for family in text_string_to_metric_families(exposed)  # type: ignore[no-untyped-call]
            for sample in family.samples
            if sample.exemplar and family.name == "http_request_duration_seconds"
        ]
        assert exemplars == [{"trace_id": served.trace_id.hex()}]
        # Probes make no spans, and whatever else the framework does none of its own.
        await traced.anonymous.get("/healthz")
        await traced.anonymous.get("/api/v1/me")
        await asyncio.to_thread(receiver.wait_for, "GET /api/v1/me")
        assert len([each for each in receiver.spans() if each.kind == Span.SPAN_KIND_SERVER]) == 2


def test_a_request_is_instrumented_only_if_its_trace_is_kept(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_tracing", None)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.3")
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
        configured = configure_tracing("test", "0", metrics)
        instrumentation = tracer_provider().get_tracer("instrumentation")
        kept = 0
        for _ in range(300):
            with served("GET", {}, recorded=True):
                instrumented = is_http_instrumentation_enabled()
                with span("another", root=True) as another:
                    pass
                with instrumentation.start_as_current_span("served") as begun, span("inner"):
                    assert begun.get_span_context().trace_id != another.get_span_context().trace_id
                    assert (exemplar() is not None) is instrumented
            kept += instrumented
        # Six standard deviations of a binomial distribution to each side.
        assert 42 < kept < 138
        for flags in ("00", "01"):
            for lower_half, instrumented in (("1" * 16, True), ("f" * 16, False)):
                with served("GET", {"traceparent": f"00-{'f' * 16}{lower_half}-{'1' * 16}-{flags}"}, recorded=True):
                    assert is_http_instrumentation_enabled() is instrumented
        configured.shutdown()


async def test_a_request_whose_trace_is_not_kept_has_ids_in_its_lines_and_no_spans(
    make_api: MakeApi, clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = await clinic.session()
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
        traced = await make_api(log_file=tmp_path / "api.jsonl")
        # Whether a trace is kept hangs on the lower half of its id.
        for name, trace_id in (("dropped", "f" * 32), ("kept", "f" * 16 + "1" * 16)):
            answer = await traced.as_(live.patient).post(
                f"/chat/{live.context}/messages",
                json={"client_message_id": name, "body": name},
                headers={"traceparent": f"00-{trace_id}-{'1' * 16}-01"},
            )
            assert answer.status_code == 201
        await asyncio.to_thread(receiver.wait_for, "chat.send")
        for line in await lines(tmp_path / "api.jsonl", 2):
            assert {"trace_id", "span_id"} <= line.keys()
        assert {arrived.trace_id.hex() for arrived in receiver.spans()} == {"f" * 16 + "1" * 16}
