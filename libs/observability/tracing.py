"""Traces: spans in the standard OpenTelemetry way, exported when a collector is configured.

Reads the standard variables: `OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`) switches the export
on, `OTEL_EXPORTER_OTLP_PROTOCOL` chooses `http/protobuf` or `grpc`, `OTEL_TRACES_SAMPLER_ARG` is the
share of traces kept. Without a collector nothing is recorded, but ids exist and reach the logs.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_http_instrumentation
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from libs.observability.context import CORRELATION_ID, TENANT_ID, fields
from libs.observability.redaction import RedactingSpanExporter, Redactor
from libs.observability.registry import Metrics

DEFAULT_RATIO: Final = 0.1
SHUTDOWN_SECONDS: Final = 3.0
QUEUE_SPANS: Final = 2048

_NO_TRACER: Final = trace.NoOpTracer()
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_forced_span_id: ContextVar[int | None] = ContextVar("forced_span_id", default=None)
_forced_trace_id: ContextVar[int | None] = ContextVar("forced_trace_id", default=None)


class _IdGenerator(RandomIdGenerator):
    """Random ids, but for a trace that was found to be kept, and the span whose id a row already refers to."""

    def generate_trace_id(self) -> int:
        return _forced_trace_id.get() or super().generate_trace_id()

    def generate_span_id(self) -> int:
        return _forced_span_id.get() or super().generate_span_id()


class Tracing:
    """The spans of one process, until `shutdown`."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider: Final = provider
        self.tracer: Final = provider.get_tracer("sessiongate")

    def shutdown(self) -> None:
        """Exports what is left; gives up on a collector that does not answer."""
        # The SDK has no deadline of its own: it waits for each batch and its retries.
        ending = threading.Thread(target=self.provider.shutdown, name="tracing shutdown", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_SECONDS)


_tracing: Tracing | None = None


class _BoundedQueue(BatchSpanProcessor):
    """The SDK's queue of ended spans, but one that tells what it loses, and loses the newest."""

    def __init__(self, exporter: SpanExporter, on_lost: Callable[[], None]) -> None:
        super().__init__(_Taking(exporter, self), QUEUE_SPANS, schedule_delay_millis=1000)
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._waiting = 0

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._lock:
            full = self._waiting >= QUEUE_SPANS
            self._waiting += not full
        if full:
            self._on_lost()
        else:
            super().on_end(span)

    def taken(self, number: int) -> None:
        """The exporter has so many of them now, and they no longer wait."""
        with self._lock:
            self._waiting -= number


class _Taking(SpanExporter):
    """An exporter that says what it takes from the queue."""

    def __init__(self, exporter: SpanExporter, queue: _BoundedQueue) -> None:
        self._exporter = exporter
        self._queue = queue

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._queue.taken(len(spans))
        return self._exporter.export(spans)

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def configure_tracing(service: str, version: str, metrics: Metrics) -> Tracing:
    """Called once at the start of a process, never at import: exporters do not survive a fork."""
    global _tracing
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    ratio = _ratio()
    provider = TracerProvider(
        sampler=_sampler(ratio) if endpoint else ALWAYS_OFF,
        resource=Resource.create({"service.name": service, "service.version": version}),
        id_generator=_IdGenerator(),
        shutdown_on_exit=False,
    )
    if endpoint:
        lost = metrics.counter("obs_spans_dropped_total", "queue_full")
        provider.add_span_processor(_BoundedQueue(RedactingSpanExporter(_exporter(), Redactor()), on_lost=lost.inc))
    _tracing = Tracing(provider)
    return _tracing


def tracer_provider() -> trace.TracerProvider:
    """The configured provider, for instrumentation that wants one."""
    return _tracing.provider if _tracing else trace.NoOpTracerProvider()


def _ratio() -> float:
    given = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or str(DEFAULT_RATIO)
    try:
        ratio = float(given)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ValueError("OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1.")
    return ratio


def _sampler(ratio: float) -> Sampler:
    """Kept or not depends on the trace id alone, so that all processes agree and no client can force it."""
    by_id = TraceIdRatioBased(ratio)
    return ParentBased(by_id, remote_parent_sampled=by_id, remote_parent_not_sampled=by_id)


def _exporter() -> SpanExporter:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol != "http/protobuf":
        raise ValueError("OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf or grpc.")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()


@contextmanager
def span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Mapping[str, str] | None = None,
    links: Sequence[Mapping[str, str]] = (),
    root: bool = False,
    **attributes: Any,
) -> Iterator[trace.Span]:
    """A span around the block. Its parent is the current span, or that of the carrier `parent`, or none
    with `root`; `links` are carriers too. An exception marks it as failed."""
    context = Context() if root else _context_of(parent) if parent is not None else None
    current = _tracer().start_span(name, context, kind, _without_none(_identified(attributes)), links=_links(links))
    with trace.use_span(current, end_on_exit=True):
        yield current


def record_span(
    name: str,
    *,
    parent: Mapping[str, str] | None,
    start_ns: int,
    end_ns: int,
    span_id: str | None = None,
    links: Sequence[Mapping[str, str]] = (),
    failed: str | None = None,
    **attributes: Any,
) -> None:
    """Records what is over already: one span, from `start_ns` to `end_ns` in Unix time.

    Under `parent` (a carrier; None for a root) it does nothing unless that trace is kept. `span_id`
    gives the span the id, in 16 hex digits, under which a row refers to it. `failed` describes a failure.
    The correlation id is that of the parent, else of a link.
    """
    if parent is not None and not is_sampled(parent):
        return
    context = Context() if parent is None else _context_of(parent)
    carriers = links if parent is None else [parent, *links]
    correlation_id = next((carrier[CORRELATION_ID] for carrier in carriers if CORRELATION_ID in carrier), None)
    identified = _without_none({CORRELATION_ID: correlation_id, **attributes})
    token = _forced_span_id.set(int(span_id, 16) if span_id else None)
    try:
        recorded = _tracer().start_span(name, context, attributes=identified, links=_links(links), start_time=start_ns)
    finally:
        _forced_span_id.reset(token)
    if failed is not None:
        recorded.set_status(Status(StatusCode.ERROR, failed))
    recorded.end(end_ns)


@contextmanager
def sampled_first(headers: Mapping[str, str]) -> Iterator[None]:
    """Decides whether the trace of a request is kept before the block describes its span: the trace that `headers`
    continue, or a new one. Unless it is kept, the block is not instrumented and its span has nothing but ids."""
    if _tracing is None:
        yield
        return
    provider = _tracing.provider
    parent = propagate.extract(headers, Context())
    trace_id = trace.get_current_span(parent).get_span_context().trace_id or provider.id_generator.generate_trace_id()
    if provider.sampler.should_sample(parent, trace_id, "").decision is not Decision.DROP:
        token = _forced_trace_id.set(trace_id)
        try:
            yield
        finally:
            _forced_trace_id.reset(token)
    else:
        ids = SpanContext(trace_id, provider.id_generator.generate_span_id(), is_remote=False)
        with suppress_http_instrumentation(), trace.use_span(NonRecordingSpan(ids)):
            yield


def is_sampled(carrier: Mapping[str, str]) -> bool:
    """Whether the trace of the carrier is kept. The flags are a bit field; other bits occur."""
    return _span_context(carrier).trace_flags.sampled


def sampled_trace_id() -> str | None:
    """The id of the current trace if it is kept: what an exemplar may point to."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid and context.trace_flags.sampled else None


def _tracer() -> trace.Tracer:
    return _tracing.tracer if _tracing else _NO_TRACER


def _identified(attributes: dict[str, Any]) -> dict[str, Any]:
    bound = fields()
    return {CORRELATION_ID: bound.get(CORRELATION_ID), TENANT_ID: bound.get(TENANT_ID), **attributes}


def _without_none(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


def _context_of(carrier: Mapping[str, str]) -> Context:
    return _PROPAGATOR.extract(carrier, Context())


def _span_context(carrier: Mapping[str, str]) -> SpanContext:
    return trace.get_current_span(_context_of(carrier)).get_span_context()


def _links(carriers: Sequence[Mapping[str, str]]) -> list[Link]:
    contexts = [_span_context(carrier) for carrier in carriers]
    return [Link(context) for context in contexts if context.is_valid]
