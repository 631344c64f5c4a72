"""Traces with an error are kept whole although they run through two processes, which sample one in ten."""

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from libs.guardrails import Principal
from libs.observability.sampling import is_chosen
from libs.observability.testing import OtlpReceiver, attributes
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.processes import ApiProcess, Worker, running_api_process, running_worker, until
from tests.receiver import receiving, register

REQUESTS: Final = 100
FAILING: Final = 12
RATIO: Final = 0.1
CONFIRM: Final = "POST /api/v1/appointments/{appointment_id}/confirm"
NOT_CHOSEN: Final = "f" * 32

_ATTEMPTED: Final = """
    SELECT split_part(e.trace_context ->> 'traceparent', '-', 2) AS trace_id, d.last_error IS NOT NULL AS failed
    FROM outbox_events e JOIN outbox_deliveries d ON d.event_id = e.id
    WHERE d.consumer = $1 AND d.attempts > 0 AND d.lease_until IS NULL
"""

WHOLE: Final = {
    ("sessiongate-api", CONFIRM),
    ("sessiongate-api", "UPDATE appointments"),
    ("sessiongate-api", "outbox.write"),
    ("sessiongate-api", "INSERT outbox_deliveries"),
    ("sessiongate-api", "COMMIT"),
    ("sessiongate-api", "arq.enqueue dispatch_outbox"),
    ("sessiongate-worker", "arq.job dispatch_outbox"),
    ("sessiongate-worker", "outbox.dispatch"),
    ("sessiongate-worker", "notifications.deliver"),
    ("sessiongate-worker", "webhook.deliver"),
    ("sessiongate-worker", "POST"),
}


@dataclass
class Processes:
    """An API and a worker, and the collector of both."""

    api: ApiProcess
    worker: Worker
    collector: OtlpReceiver

    def traces(self) -> Mapping[str, list[Span]]:
        found = defaultdict(list)
        for span in self.collector.spans():
            found[span.trace_id.hex()].append(span)
        return found

    def parts(self, trace_id: str) -> set[tuple[str, str]]:
        """What there is of a trace so far: services and names of spans."""
        return {(self.collector.service_of(span), span.name) for span in self.traces().get(trace_id, ())}


@pytest.fixture
async def processes(urls: Urls, tmp_path: Path, collector: OtlpReceiver) -> AsyncIterator[Processes]:
    tracing = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint}
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(
            running_api_process(urls.app, urls.redis, tmp_path / "api.jsonl", **tracing)
        )
        worker = await stack.enter_async_context(
            running_worker(
                urls.app,
                urls.redis,
                tmp_path / "worker.jsonl",
                SESSIONGATE_WEBHOOK_ALLOW_NETWORKS="127.0.0.0/8",
                **tracing,
            )
        )
        yield Processes(api, worker, collector)


async def confirm(api: ApiProcess, doctor: Principal, appointment_id: int, **headers: str) -> None:
    async with api.client(doctor) as client:
        answer = await client.post(f"/appointments/{appointment_id}/confirm", headers=headers)
    assert answer.status_code == 200, answer.text


async def requested(clinic: Clinic) -> tuple[int, Principal]:
    """An appointment to be confirmed, and who may."""
    doctor = await clinic.doctor()
    return await clinic.appointment(doctor=doctor, status="PENDING", starts_in=timedelta(days=1)), doctor


async def test_every_delivery_that_fails_keeps_its_trace_with_the_spans_of_both_processes(
    clinic: Clinic, processes: Processes
) -> None:
    appointments = [await requested(clinic) for _ in range(REQUESTS)]
    async with receiving() as receiver:
        endpoint_id, _ = await register(
            clinic.database, clinic.operator, f"{receiver.url}/hook?key=swordfish", "appointment_confirmed"
        )
        receiver.answers["/hook?key=swordfish"] = [*([204] * 7 + [500]) * FAILING, 204]
        for appointment_id, doctor in appointments:
            await confirm(processes.api, doctor, appointment_id)

        async def attempted() -> list[Any]:
            rows = await clinic.fetch(_ATTEMPTED, f"webhook:{endpoint_id}")
            return rows if len(rows) == REQUESTS else []

        rows = await until(attempted)
        assert all("traceparent" not in received.headers for received in receiver.got)
    failing = {row["trace_id"] for row in rows if row["failed"]}
    assert len(failing) > FAILING / 2

    async def whole() -> bool:
        return all(processes.parts(trace_id) >= WHOLE for trace_id in failing)

    await until(whole)
    assert await processes.api.stop() == 0
    assert await processes.worker.stop() == 0

    traces = processes.traces()
    for trace_id in failing:
        ids = {span.span_id for span in traces[trace_id]}
        assert {span.parent_span_id for span in traces[trace_id]} <= {b"", *ids}, "A span is missing."
        assert len(ids) == len(traces[trace_id]), "A span came twice."
        errors = {span.name for span in traces[trace_id] if span.status.code == Status.STATUS_CODE_ERROR}
        assert errors == {"outbox.dispatch", "webhook.deliver", "POST"}
        (call,) = [attributes(span) for span in traces[trace_id] if span.name == "POST"]
        assert (call["url.full"], call["http.response.status_code"]) == (f"{receiver.url}/[redacted]", 500)
    # Of the others there is the usual tenth, and a retry or two that came soon and failed again.
    for trace_id in traces.keys() - failing:
        links = {link.trace_id.hex() for span in traces[trace_id] for link in span.links}
        assert is_chosen(int(trace_id, 16), RATIO) or (links and links <= failing)


async def test_an_error_of_the_api_keeps_what_the_worker_did_in_the_same_trace(
    clinic: Clinic, processes: Processes, owner: "asyncpg.Connection[Any]"
) -> None:
    appointment_id, doctor = await requested(clinic)
    continued = {"traceparent": f"00-{NOT_CHOSEN}-{'1' * 16}-00"}
    await confirm(processes.api, doctor, appointment_id, **continued)

    async def dispatched() -> bool:
        return bool(processes.worker.lines("outbox_dispatched") and processes.worker.lines("job_finished"))

    await until(dispatched)
    assert processes.traces().get(NOT_CHOSEN) is None

    await owner.execute("ALTER TABLE notifications RENAME TO gone")
    async with processes.api.client(doctor) as client:
        assert (await client.get("/notifications", headers=continued)).status_code == 500

    async def both_sides() -> bool:
        return {service for service, _ in processes.parts(NOT_CHOSEN)} == {"sessiongate-api", "sessiongate-worker"}

    await until(both_sides)
    assert processes.parts(NOT_CHOSEN) > WHOLE - {
        ("sessiongate-worker", "webhook.deliver"),
        ("sessiongate-worker", "POST"),
    }
    (served,) = [span for span in processes.traces()[NOT_CHOSEN] if span.name == "GET /api/v1/notifications"]
    assert served.kind == Span.SPAN_KIND_SERVER
    assert served.status.code == Status.STATUS_CODE_ERROR
    described = attributes(served)
    assert described["http.route"] == "/api/v1/notifications"
    assert (described["http.request.method"], described["http.response.status_code"]) == ("GET", 500)
    assert await processes.worker.sample("obs_traces_kept_total", reason="remote") == 1
    samples = await processes.api.samples()
    assert samples["obs_traces_kept_total", "error"] == 1
