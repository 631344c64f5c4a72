"""A wake-up call is part of what made it, unless it comes late."""

from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from libs.domain.catalogue import CATALOGUE
from libs.domain.jobs import ConvertDue, DispatchOutbox
from libs.observability import tracing
from libs.observability.registry import Metrics
from libs.observability.testing import OtlpReceiver, attributes
from libs.observability.tracing import configure_tracing
from services.worker.runner import functions

ID = "550e8400-e29b-41d4-a716-446655440000"
CARRIER = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-00", "correlation_id": ID}


@pytest.mark.parametrize("attempt", [1, 2, 3])
async def test_the_first_try_of_a_job_is_part_of_its_cause_and_others_are_linked_to_it(
    collector: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    monkeypatch.setattr(tracing, "_tracing", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
    metrics = Metrics(CATALOGUE, version="0", service="test")
    configured = configure_tracing("test", "0", metrics)
    woken: list[Any] = []
    jobs = functions({ConvertDue: lambda: None, DispatchOutbox: lambda: woken.append(1)}, metrics)
    (job,) = [each for each in jobs if each.name == DispatchOutbox.name]
    await job.coroutine({"job_try": attempt}, payload={}, carrier=CARRIER)
    configured.shutdown()

    (span,) = collector.spans()
    assert woken == [1]
    assert (span.name, span.kind) == ("arq.job dispatch_outbox", Span.SPAN_KIND_CONSUMER)
    assert attributes(span) == {"correlation_id": ID, "job.try": attempt}
    cause = ("a" * 32, "b" * 16)
    if attempt == 1:
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == cause
        assert list(span.links) == []
    else:
        assert span.trace_id.hex() != cause[0]
        assert span.parent_span_id == b""
        assert [(link.trace_id.hex(), link.span_id.hex()) for link in span.links] == [cause]
