"""What requests to the API say about themselves."""

import asyncio
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from fastapi.routing import iter_route_contexts
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from libs.domain.catalogue import CATALOGUE
from libs.observability import tracing
from libs.observability.exposition import render
from libs.observability.registry import Metrics
from libs.observability.testing import OtlpReceiver
from libs.observability.tracing import configure_tracing, exemplar, served, span, tracer_provider
from services.api.main import RouteTemplates
from services.api.public import PROBES
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.observability.test_http import counted
from tests.processes import until
from tests.running import Api, token_of

ID = "550e8400-e29b-41d4-a716-446655440000"


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
