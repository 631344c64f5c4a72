"""Which requests and frames leave spans behind, and whose trace they belong to."""

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from opentelemetry import baggage, propagate
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from libs.observability.testing import OtlpReceiver, attributes
from tests.clinic import Clinic, LiveSession
from tests.conftest import MakeApi, Urls
from tests.processes import PATIENCE_SECONDS, until
from tests.running import Api, running_api
from tests.sockets import following, opened

ID = "550e8400-e29b-41d4-a716-446655440000"
CHOSEN = "f" * 16 + "1" * 16
NOT_CHOSEN = "f" * 32
NO_REDIS = "redis://127.0.0.1:1"


def continuing(trace_id: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{'1' * 16}-01", "X-Correlation-ID": ID}


@pytest.fixture(autouse=True)
def _half_are_kept(collector: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all traces, besides those with errors."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")


@pytest.fixture
async def traced(make_api: MakeApi, tmp_path: Path) -> Api:
    return await make_api(log_file=tmp_path / "api.jsonl")


async def arrived(collector: OtlpReceiver, name: str) -> Span:
    """The first span of that name."""
    return (await asyncio.to_thread(collector.wait_for, name))[0]


async def logged(path: Path, number: int) -> list[dict[str, Any]]:
    """The first lines that tell of requests."""

    async def written() -> list[dict[str, Any]]:
        found = [line for line in map(orjson.loads, path.read_bytes().splitlines()) if line["event"] == "http_request"]
        return found if len(found) >= number else []

    return list(await until(written))


@pytest.mark.parametrize("trace_id", [CHOSEN, NOT_CHOSEN])
async def test_a_request_that_fails_shows_the_same_whether_or_not_its_trace_was_chosen(
    traced: Api, clinic: Clinic, collector: OtlpReceiver, owner: "asyncpg.Connection[Any]", trace_id: str
) -> None:
    await owner.execute("ALTER TABLE notifications RENAME TO gone")
    answer = await traced.as_(clinic.operator).get("/notifications?limit=3", headers=continuing(trace_id))
    assert answer.status_code == 500

    served = await arrived(collector, "GET /api/v1/notifications")
    assert (served.trace_id.hex(), served.parent_span_id.hex()) == (trace_id, "1" * 16)
    assert (served.kind, served.status.code) == (Span.SPAN_KIND_SERVER, 2)
    assert (
        attributes(served).items()
        >= {
            "http.request.method": "GET",
            "http.route": "/api/v1/notifications",
            "http.response.status_code": 500,
            "correlation_id": ID,
        }.items()
    )
    (event,) = [event for event in served.events if event.name == "exception"]
    described = {item.key: item.value.string_value for item in event.attributes}
    assert described["exception.type"] == "sqlalchemy.exc.ProgrammingError"
    assert served.status.message.endswith('relation "notifications" does not exist')
    assert "services/api/notifications/routes.py" in described["exception.stacktrace"]
    failed = await arrived(collector, "SELECT notifications")
    assert (failed.parent_span_id, failed.status.message) == (served.span_id, "UndefinedTableError")
    assert {span.trace_id.hex() for span in collector.spans()} == {trace_id}
    assert len([span for span in collector.spans() if span.kind == Span.SPAN_KIND_SERVER]) == 1


async def test_refusals_and_probes_keep_no_trace(
    traced: Api, clinic: Clinic, collector: OtlpReceiver, owner: "asyncpg.Connection[Any]"
) -> None:
    headers = continuing(NOT_CHOSEN)
    session = await clinic.session()
    early = await clinic.appointment(patient=session.patient)
    message = {"client_message_id": "1", "body": "Hello"}
    patient = traced.as_(session.patient)
    answers = [
        await traced.anonymous.get("/api/v1/me", headers=headers),
        await patient.get("/appointments/987654", headers=headers),
        await patient.post("/appointments", json={}, headers=headers),
        await patient.post(f"/chat/{early}/messages", json=message, headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [401, 404, 422, 403]
    await owner.execute("ALTER TABLE workers RENAME TO gone")
    for trace_id in (CHOSEN, NOT_CHOSEN):
        assert (await traced.anonymous.get("/readyz", headers=continuing(trace_id))).status_code == 500
    await patient.get("/me", headers=continuing(CHOSEN))
    await arrived(collector, "GET /api/v1/me")
    names = {(span.trace_id.hex(), span.name) for span in collector.spans() if span.kind == Span.SPAN_KIND_SERVER}
    assert names == {(CHOSEN, "GET /api/v1/me")}
    assert NOT_CHOSEN not in {span.trace_id.hex() for span in collector.spans()}


async def test_an_error_is_kept_here_while_redis_is_away(
    collector: OtlpReceiver, urls: Urls, clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    await owner.execute("ALTER TABLE notifications RENAME TO gone")
    async with running_api(urls.app, NO_REDIS) as traced, asyncio.timeout(PATIENCE_SECONDS):
        client = traced.as_(clinic.operator)
        for _ in range(5):
            assert (await client.get("/notifications", headers=continuing(NOT_CHOSEN))).status_code == 500
            assert (await client.get("/me")).status_code == 200
        served = await asyncio.to_thread(collector.wait_for, "GET /api/v1/notifications", 5)
    assert {span.trace_id.hex() for span in served} == {NOT_CHOSEN}


async def test_other_systems_get_a_trace_and_a_correlation_id_of_ours(
    traced: Api, collector: OtlpReceiver, tmp_path: Path
) -> None:
    for path in ("/internal/alerts", "/webhooks/provider", "/internally"):
        answer = await traced.anonymous.get(path, headers=continuing(CHOSEN))
        assert (answer.headers["X-Correlation-ID"] == ID) is (path == "/internally")
    lines = await logged(tmp_path / "api.jsonl", 3)
    assert [line["trace_id"] == CHOSEN for line in lines] == [False, False, True]


async def test_baggage_is_not_accepted(traced: Api) -> None:
    context = propagate.extract({"baggage": "tenant=1", **continuing(CHOSEN)})
    assert baggage.get_all(context) == {}


async def test_each_frame_is_a_trace_of_its_own_and_an_error_keeps_it(
    traced: Api, clinic: Clinic, collector: OtlpReceiver, owner: "asyncpg.Connection[Any]"
) -> None:
    session = await clinic.session()
    for fault in (False, True):
        async with following(traced, session.patient, session.context) as patient:
            for number in range(20):
                if fault and number == 19:
                    await owner.execute("ALTER TABLE messages RENAME TO gone")
                await patient.send(type="message", client_message_id=f"{fault} {number}", body="Hello")
                await patient.next("refused" if fault and number == 19 else "ack")

    async def failed() -> list[Span]:
        return [span for span in collector.spans("chat.frame") if span.status.code == 2]

    async with opened(traced, session.doctor, session.context, headers=continuing(CHOSEN)) as doctor:
        await doctor.send(type="ping")
        await doctor.next("pong")
    (broken,) = await until(failed)
    assert [span for span in collector.spans() if span.kind == Span.SPAN_KIND_SERVER] == []
    frames = collector.spans("chat.frame")
    assert len({frame.trace_id for frame in frames}) == len(frames) > 1
    assert {frame.parent_span_id for frame in frames} == {b""}
    assert CHOSEN not in {frame.trace_id.hex() for frame in frames}
    assert attributes(broken)["frame_type"] == "message"
    (sent,) = [span for span in collector.spans("chat.send") if span.trace_id == broken.trace_id]
    assert (sent.parent_span_id, sent.status.code) == (broken.span_id, 2)


async def test_each_sender_of_a_group_sees_the_statement_that_stored_it_once(
    traced: Api, clinic: Clinic, collector: OtlpReceiver
) -> None:
    sessions = [await clinic.session("voice") for _ in range(3)]
    chosen = [f"{number:016x}{'1' * 16}" for number in range(1, 4)]

    async def send(live: LiveSession, trace_id: str) -> int:
        message = {"client_message_id": "1", "body": "Hello"}
        client = traced.as_(live.patient)
        answer = await client.post(f"/chat/{live.context}/messages", json=message, headers=continuing(trace_id))
        return answer.status_code

    assert await asyncio.gather(*map(send, sessions, chosen)) == [201] * 3
    assert await clinic.fetchval("SELECT count(DISTINCT xmin::text) FROM messages") < 3

    async def all_arrived() -> bool:
        return len([span for span in collector.spans() if span.name.startswith("POST ")]) == 3

    await until(all_arrived)
    stored = [span.trace_id.hex() for span in collector.spans() if span.name == "INSERT messages"]
    assert sorted(stored) == chosen
