"""One appointment from booking to chat, through processes as in production: the API, a worker, and a
collector that gets their traces."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from libs.observability.testing import OtlpReceiver, attributes
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.processes import ApiProcess, Worker, running_api_process, running_worker, until

CONFIRM_ID = "550e8400-e29b-41d4-a716-446655440000"
PRIVATE = ("my knee hurts", "151 12345678", "jane.roe@example.com", "hunter2")
FLAGS = {"ENFORCE_SESSION_GATED_CHAT": "true", "ENFORCE_SESSION_GATED_BILLING": "true"}


@dataclass
class Story:
    """What a run of the story left behind, once both processes have stopped."""

    api: ApiProcess
    worker: Worker
    spans: list[Span]
    appointment_id: int
    session_id: int
    moved: dict[tuple[str, ...], float]
    converted: float
    notified: float

    def only(self, name: str, **with_attributes: Any) -> Span:
        """The one span of that name and with those attributes."""
        fitting = [s for s in self.spans if s.name == name and with_attributes.items() <= attributes(s).items()]
        assert len(fitting) == 1, f"{len(fitting)} spans {name} {with_attributes}"
        return fitting[0]

    def traces(self, name: str) -> set[str]:
        """The ids of the traces in which there is a span of that name."""
        return {each.trace_id.hex() for each in self.spans if each.name == name}


async def json(request: Any, status: int) -> Any:
    response = await request
    assert response.status_code == status, response.text
    return response.json()


async def converse(clinic: Clinic, api: ApiProcess) -> tuple[int, str]:
    """Books, confirms, waits and chats; answers the appointment's id and the session's context."""
    doctor, patient = await clinic.doctor(), await clinic.patient()
    async with api.client(doctor) as doctors, api.client(patient) as patients:
        starts_at = await clinic.fetchval("SELECT clock()") + timedelta(seconds=1.5)
        new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": starts_at.isoformat()}
        appointment_id = (await json(patients.post("/appointments", json=new), 201))["id"]
        correlated = {"X-Correlation-ID": CONFIRM_ID}
        await json(doctors.post(f"/appointments/{appointment_id}/confirm", headers=correlated), 200)
        message = {"client_message_id": "1", "body": f"Hello, {' '.join(PRIVATE)}"}

        early = await json(patients.post(f"/chat/{appointment_id}/messages", json=message), 403)
        assert early["code"] == "SESSION_NOT_READY"

        async def converted() -> str | None:
            polled = await json(patients.get(f"/appointments/{appointment_id}/session"), 200)
            return polled["session_context"]  # type: ignore[no-any-return]

        context = await until(converted)

        redirected = await json(patients.post(f"/chat/{appointment_id}/messages", json=message), 400)
        assert (redirected["code"], redirected["session_context"]) == ("SESSION_CONTEXT_REQUIRED", context)
        await json(patients.post(f"/chat/{context}/messages", json=message), 201)
        await json(doctors.post(f"/chat/{context}/messages", json={"client_message_id": "2", "body": "Hello"}), 201)
        history = await json(patients.get(f"/chat/{context}/messages"), 200)
        assert [each["seq"] for each in history["items"]] == [1, 2]

        for party in (doctors, patients):

            async def told(party: httpx2.AsyncClient = party) -> bool:
                items = (await json(party.get("/notifications"), 200))["items"]
                return [item["kind"] for item in items] == ["session_started", "appointment_confirmed"]

            await until(told)
        return appointment_id, context


@pytest.fixture
async def story(clinic: Clinic, urls: Urls, tmp_path: Path) -> AsyncIterator[Story]:
    async with AsyncExitStack() as stack:
        collector = stack.enter_context(OtlpReceiver())
        tracing = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint, "OTEL_TRACES_SAMPLER_ARG": "1"}
        api = await stack.enter_async_context(
            running_api_process(urls.app, urls.redis, tmp_path / "api.jsonl", **FLAGS, **tracing)
        )
        worker = await stack.enter_async_context(
            running_worker(urls.app, urls.redis, tmp_path / "worker.jsonl", **tracing)
        )
        before = await api.samples()
        appointment_id, context = await converse(clinic, api)
        after = await api.samples()
        converted = await worker.sample("appointment_sessions_created_total", modality="text")
        notified = await worker.sample("outbox_dispatch_attempts_total", event_name="session_started")
        assert await api.stop() == 0
        assert await worker.stop() == 0
        yield Story(
            api=api,
            worker=worker,
            spans=collector.spans(),
            appointment_id=appointment_id,
            session_id=int(context.partition(":")[2]),
            moved={series: value - before.get(series, 0) for series, value in after.items()},
            converted=converted,
            notified=notified,
        )


async def test_one_appointment_can_be_followed_through_traces_logs_and_metrics(story: Story) -> None:
    the_traces_hang_together(story)
    the_logs_name_who_confirmed(story)
    the_metrics_moved(story)


def the_traces_hang_together(story: Story) -> None:
    confirm = story.only("POST /api/v1/appointments/{appointment_id}/confirm")
    assert attributes(confirm)["correlation_id"] == CONFIRM_ID
    assert confirm.parent_span_id == b""

    # Converting is part of the story that began with confirming, and linked to the run that did it, which
    # converts appointments of many stories and has a trace of its own.
    convert = story.only("appointments.convert")
    assert (convert.trace_id, convert.parent_span_id) == (confirm.trace_id, confirm.span_id)
    assert attributes(convert) == {
        "appointment_id": story.appointment_id,
        "session_id": story.session_id,
        "tenant_id": attributes(convert)["tenant_id"],
        "correlation_id": CONFIRM_ID,
    }
    (link,) = convert.links
    (run,) = [each for each in story.spans if each.span_id == link.span_id]
    assert (run.name, run.trace_id, run.parent_span_id) == ("appointments.auto_start", link.trace_id, b"")
    assert run.trace_id != confirm.trace_id
    assert run.start_time_unix_nano > confirm.end_time_unix_nano

    started = story.only("outbox.dispatch", event_name="session_started")
    assert (started.trace_id, started.parent_span_id) == (convert.trace_id, convert.span_id)
    written = story.only("outbox.write", event_name="appointment_confirmed")
    assert (written.trace_id, written.parent_span_id) == (confirm.trace_id, confirm.span_id)
    confirmed = story.only("outbox.dispatch", event_name="appointment_confirmed")
    assert (confirmed.trace_id, confirmed.parent_span_id) == (written.trace_id, written.span_id)
    for dispatch in (started, confirmed):
        inside = [each for each in story.spans if each.parent_span_id == dispatch.span_id]
        (delivered,) = [each for each in inside if each.name == "notifications.deliver"]
        assert attributes(dispatch)["correlation_id"] == attributes(delivered)["correlation_id"] == CONFIRM_ID
    rung = story.only("arq.enqueue dispatch_outbox", correlation_id=CONFIRM_ID)
    job = story.only("arq.job dispatch_outbox", correlation_id=CONFIRM_ID)
    assert (rung.trace_id, rung.parent_span_id) == (confirm.trace_id, confirm.span_id)
    assert (job.trace_id, job.parent_span_id) == (confirm.trace_id, rung.span_id)

    for name, parent in (
        ("scheduling.book", "POST /api/v1/appointments"),
        ("chat.send", "POST /api/v1/chat/{context}/messages"),
        ("redis.publish", "chat.send"),
    ):
        requests = {each.span_id for each in story.spans if each.name == parent}
        assert {each.parent_span_id for each in story.spans if each.name == name} <= requests
    # Two were refused, which is an answer.
    assert [each.status.code for each in story.spans if each.name == "chat.send"] == [0, 0, 0, 0]
    assert [private for private in PRIVATE if private in str(story.spans)] == []


def the_logs_name_who_confirmed(story: Story) -> None:
    lines = [line for line in story.worker.lines() if line.get("correlation_id") == CONFIRM_ID]
    assert {(line["event"], line.get("event_name")) for line in lines} >= {
        ("job_finished", None),
        ("outbox_dispatched", "appointment_confirmed"),
        ("appointment_session_conversion", None),
        ("outbox_dispatched", "session_started"),
    }
    (conversion,) = story.worker.lines("appointment_session_conversion")
    assert (conversion["result"], conversion["session_id"]) == ("created", story.session_id)
    assert conversion["trace_id"] in {
        each.trace_id.hex() for each in story.spans if each.name == "appointments.auto_start"
    }
    (request,) = [line for line in story.api.lines("http_request") if line["correlation_id"] == CONFIRM_ID]
    assert request["span_id"] == story.only("POST /api/v1/appointments/{appointment_id}/confirm").span_id.hex()
    # The last requests came right before the end: nothing of them was lost.
    served = {each.span_id.hex() for each in story.spans if each.kind == Span.SPAN_KIND_SERVER}
    assert served == {line["span_id"] for line in story.api.lines("http_request")}
    (blocked,) = story.api.lines("guard_blocked")
    assert blocked["message"] == "SessionContextGuard: Chat operation blocked"
    for log in (story.api.log, story.worker.log):
        assert [private for private in PRIVATE if private in log.read_text()] == []


def the_metrics_moved(story: Story) -> None:
    assert (story.converted, story.notified) == (1, 1)
    expected = {
        ("chat_blocked_session_context_required_total", "send_message"): 1,
        ("chat_requests_total", "send_message"): 4,
        ("chat_messages_total", "received"): 2,
        ("chat_message_processing_duration_seconds_count", "received"): 2,
        ("guard_verdicts_total", "send_message", "SESSION_NOT_READY", "refused"): 1,
        ("guard_verdicts_total", "send_message", "none", "allowed"): 2,
        ("scheduling_book_duration_seconds_count",): 1,
        ("errors_total", "infra", "system"): 0,
    }
    assert {series: story.moved[series] for series in expected} == expected
    confirms = ("http_request_duration_seconds_count", "POST", "/api/v1/appointments/{appointment_id}/confirm", "200")
    assert story.moved[confirms] == 1


async def test_an_interrupted_api_ends_in_good_order(urls: Urls, tmp_path: Path) -> None:
    async with running_api_process(urls.app, urls.redis, tmp_path / "api.jsonl") as api:
        async with api.client() as client:
            await client.get("/api/v1/me")
        assert await api.stop(signal.SIGINT) == 0
    assert [line["status"] for line in api.lines("http_request")] == [401]
