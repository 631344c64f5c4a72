"""A collector that is away or slow: nobody waits for it, and what it does not get is counted."""

import socket
import time
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from libs.observability import tracing
from libs.observability.redaction import RedactingSpanExporter
from libs.observability.registry import Metrics
from libs.observability.testing import OtlpReceiver, capture_logs
from libs.observability.tracing import EXPORT_SPANS, QUEUE_SPANS, SHUTDOWN_SECONDS, Tracing, span
from tests.observability.conftest import Configure


class DeafCollector:
    """Takes connections and never answers."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture
def deaf() -> Iterator[str]:
    with DeafCollector() as endpoint:
        yield endpoint


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
@pytest.mark.parametrize("answers", [False, True], ids=["refuses connections", "never answers"])
def test_a_collector_that_fails_holds_up_nobody(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, metrics: Metrics, deaf: str, protocol: str, answers: bool
) -> None:
    monkeypatch.setattr(tracing, "SHUTDOWN_SECONDS", SHUTDOWN_SECONDS / 10)
    endpoint = deaf if answers else "http://127.0.0.1:1"
    with capture_logs():
        configured = configure(
            EXPORTER_OTLP_ENDPOINT=endpoint,
            EXPORTER_OTLP_PROTOCOL=protocol,
            EXPORTER_OTLP_TIMEOUT="1",
            TRACES_SAMPLER_ARG="1",
        )
        began = time.perf_counter()
        # More than the queue holds, so that it is full while the collector has nothing.
        for _ in range(5000):
            with span("work", appointment_id=12):
                pass
        per_span = (time.perf_counter() - began) / 5000
        lost = metrics.sample("obs_spans_dropped_total", reason="queue_full")

        began = time.perf_counter()
        configured.shutdown()
        ended_after = time.perf_counter() - began
        deadline = began + 10
        while (failed := metrics.sample("obs_spans_dropped_total", reason="export_failed")) < 5000 - lost:
            assert time.perf_counter() < deadline, "Nobody gave up."
            time.sleep(0.01)

    assert per_span < 0.001
    assert ended_after < SHUTDOWN_SECONDS
    # What does not wait and is not with the exporter is lost, and counted.
    assert 0 < lost <= 5000 - QUEUE_SPANS
    assert lost + failed == 5000


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_what_a_collector_does_not_get_is_counted(configure: Configure, metrics: Metrics, protocol: str) -> None:
    with capture_logs():
        configured = configure(
            EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
            EXPORTER_OTLP_PROTOCOL=protocol,
            EXPORTER_OTLP_TIMEOUT="0.1",
            TRACES_SAMPLER_ARG="1",
        )
        for _ in range(7):
            with span("work"):
                pass
        configured.shutdown()
    assert metrics.sample("obs_spans_dropped_total", reason="export_failed") == 7
    assert metrics.sample("obs_spans_dropped_total", reason="queue_full") == 0


def test_what_an_exporter_fails_at_is_counted(
    kept: Tracing, receiver: OtlpReceiver, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LookupError

    with capture_logs():
        with monkeypatch.context() as broken:
            broken.setattr(RedactingSpanExporter, "_redacted", refuse)
            with span("lost"):
                pass
            kept.flush()
        with span("found"):
            pass
        kept.flush()
    assert [each.name for each in receiver.spans()] == ["found"]
    assert metrics.sample("obs_spans_dropped_total", reason="export_failed") == 1


def test_nothing_is_lost_while_the_collector_keeps_up(kept: Tracing, receiver: OtlpReceiver, metrics: Metrics) -> None:
    for number in range(3):
        for _ in range(QUEUE_SPANS // 2):
            with span("work"):
                pass
        kept.flush()
        assert len(receiver.spans("work")) == (number + 1) * (QUEUE_SPANS // 2)
    assert metrics.sample("obs_spans_dropped_total", reason="queue_full") == 0


def test_an_export_is_short(configure: Configure, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    export = RedactingSpanExporter.export

    def counted(self: RedactingSpanExporter, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        sizes.append(len(spans))
        return export(self, spans)

    monkeypatch.setattr(RedactingSpanExporter, "export", counted)
    configured = configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG="1")
    for _ in range(1000):
        with span("work"):
            pass
    configured.shutdown()
    assert sum(sizes) == len(receiver.spans("work")) == 1000
    assert max(sizes) == EXPORT_SPANS
