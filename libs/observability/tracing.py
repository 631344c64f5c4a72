"""Traces: spans in the standard OpenTelemetry way, exported when a collector is configured.

Reads the standard variables: `OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`) switches the export
on, `OTEL_EXPORTER_OTLP_PROTOCOL` chooses `http/protobuf` or `grpc`, `OTEL_TRACES_SAMPLER_ARG` is the
share of traces kept besides those that contain an error. Without a collector nothing is recorded, but ids exist and
reach the logs.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from opentelemetry import propagate, trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.instrumentation.utils import suppress_http_instrumentation
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN, Link, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from libs.observability.context import CORRELATION_ID, TENANT_ID, TRACEPARENT, fields, traceparent
from libs.observability.redaction import RedactingSpanExporter, Redactor, scrub_error
from libs.observability.registry import Metrics
from libs.observability.sampling import Tail
from libs.observability.spans import RecordedSpan, Recorder, id_of_next_root, new_trace_id

DEFAULT_RATIO: Final = 0.1
SHUTDOWN_SECONDS: Final = 3.0
QUEUE_SPANS: Final = 2048
EXPORT_PAUSE_MS: Final = 250
"""How long ended spans wait for others."""
EXPORT_SPANS: Final = 32
"""How many go at once. Requests wait while an export is written down; one export waits for the answer to another, so
more would reach a collector that is far away."""

# Of the headers that concern traces, baggage is not among those that are read: it is anybody's.
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_SCOPE: Final = InstrumentationScope("sessiongate")

with suppress_http_instrumentation():
    _NOT_INSTRUMENTED: Final = get_current()
    """The context of a request that instrumentation leaves alone."""


class Tracing:
    """The spans of one process, until `shutdown`. Exceptions of the `expected` types are answers, not errors.
    Without `tail` nothing is recorded."""

    def __init__(
        self,
        provider: Recorder,
        resource: Resource,
        expected: tuple[type[Exception], ...],
        tail: Tail[RecordedSpan] | None = None,
        queue: "_BoundedQueue | None" = None,
    ) -> None:
        self.provider: Final = provider
        self.resource: Final = resource
        self.expected: Final = expected
        self.tail: Final = tail
        self._queue: Final = queue

    def flush(self) -> None:
        """Exports what is to be exported at this moment."""
        if self._queue:
            self._queue.force_flush()

    def shutdown(self) -> None:
        """Exports what is left; gives up on a collector that does not answer."""
        if self._queue:
            # The SDK has no deadline of its own: it waits for each batch and its retries.
            ending = threading.Thread(target=self._queue.shutdown, name="tracing shutdown", daemon=True)
            ending.start()
            ending.join(SHUTDOWN_SECONDS)
            if ending.is_alive():
                self._queue.give_up()


_tracing: Tracing | None = None


class _BoundedQueue(BatchSpanProcessor):
    """The SDK's queue of ended spans, but one that tells what it loses, and loses the newest."""

    def __init__(self, exporter: SpanExporter, metrics: Metrics) -> None:
        not_exported = metrics.counter("obs_spans_dropped_total", "export_failed")
        self._taking = _Taking(exporter, self, not_exported.inc)
        super().__init__(
            self._taking, QUEUE_SPANS, schedule_delay_millis=EXPORT_PAUSE_MS, max_export_batch_size=EXPORT_SPANS
        )
        self._on_lost = metrics.counter("obs_spans_dropped_total", "queue_full").inc
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

    def give_up(self) -> None:
        """What waits is not exported."""
        self._taking.give_up()

    def taken(self, number: int) -> None:
        """The exporter has so many of them now, and they no longer wait."""
        with self._lock:
            self._waiting -= number


class _Taking(SpanExporter):
    """An exporter that says what it takes from the queue, and how much of it the collector does not get."""

    def __init__(self, exporter: SpanExporter, queue: _BoundedQueue, on_failed: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._queue = queue
        self._on_failed = on_failed
        self._given_up = False

    def give_up(self) -> None:
        """Begins and repeats nothing more; an export on its way has a timeout of its own."""
        self._given_up = True
        self._exporter.shutdown()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._queue.taken(len(spans))
        result = SpanExportResult.FAILURE
        try:
            if not self._given_up:
                result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._on_failed(len(spans))
        return result

    def shutdown(self) -> None:
        if not self._given_up:
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def configure_tracing(
    service: str, version: str, metrics: Metrics, *, expected: tuple[type[Exception], ...] = ()
) -> Tracing:
    """Called once at the start of a process, never at import: exporters do not survive a fork. An exception of one of
    the `expected` types does not mark the span that it leaves as failed."""
    global _tracing
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    ratio = _ratio()
    resource = Resource.create({"service.name": service, "service.version": version})
    propagate.set_global_textmap(_PROPAGATOR)
    # Instrumentations still have the names of attributes that became stable as an option, and ask for it once.
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    if endpoint:
        queue = _BoundedQueue(RedactingSpanExporter(_exporter(), Redactor()), metrics)
        tail = Tail[RecordedSpan](lambda span: queue.on_end(span.readable(resource)), metrics)
        _tracing = Tracing(Recorder(tail, ratio), resource, expected, tail, queue)
    else:
        _tracing = Tracing(Recorder(None), resource, expected)
    return _tracing


def tracer_provider() -> trace.TracerProvider:
    """The configured provider, for instrumentation that wants one."""
    return _tracing.provider if _tracing else trace.NoOpTracerProvider()


def is_recording() -> bool:
    """Whether there is a collector, so that spans are recorded at all."""
    return _tracing is not None and _tracing.tail is not None


def _ratio() -> float:
    given = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or str(DEFAULT_RATIO)
    try:
        ratio = float(given)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ValueError("OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1.")
    return ratio


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


def span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Mapping[str, str] | None = None,
    attempt: int = 1,
    links: Sequence[Mapping[str, str]] = (),
    root: bool = False,
    **attributes: Any,
) -> AbstractContextManager[trace.Span]:
    """A span around the block. Its parent is the current span, or that of the carrier `parent`, or none
    with `root`; `links` are carriers too. From the second `attempt` at what `parent` asked for on, it is a root linked
    to it: a late retry would only stretch that trace. An exception marks it as failed."""
    if _tracing is None:
        return nullcontext(INVALID_SPAN)
    if parent is None:
        within: trace.Span = INVALID_SPAN if root else trace.get_current_span()
    else:
        within, links = _placed(parent, attempt, links)
    bound = fields()
    described = {CORRELATION_ID: bound.get(CORRELATION_ID), TENANT_ID: bound.get(TENANT_ID), **attributes}
    return _Current(_tracing.provider.begin(name, _SCOPE, within, kind, _without_none(described), _links(links)))


def record_span(
    name: str,
    *,
    parent: Mapping[str, str] | None,
    start_ns: int,
    end_ns: int,
    attempt: int = 1,
    kind: SpanKind = SpanKind.INTERNAL,
    span_id: str | None = None,
    links: Sequence[Mapping[str, str]] = (),
    failed: str | None = None,
    **attributes: Any,
) -> Mapping[str, str]:
    """Records what is over already: one span, from `start_ns` to `end_ns` in Unix time, in the trace of the carrier
    `parent` (None for a root) unless this was not the first `attempt`; see `span`. Answers its carrier.

    `span_id` gives the span the id, in 16 hex digits, under which a row refers to it. `failed` describes a failure.
    The correlation id is that of the parent, else of a link.
    """
    if _tracing is None or _tracing.tail is None:
        return {}
    carriers = links if parent is None else [parent, *links]
    correlation_id = next((carrier[CORRELATION_ID] for carrier in carriers if CORRELATION_ID in carrier), None)
    within: trace.Span = INVALID_SPAN
    if parent is not None:
        within, links = _placed(parent, attempt, links)
    described = _without_none({CORRELATION_ID: correlation_id, **attributes})
    recorded = _tracing.provider.begin(
        name,
        _SCOPE,
        within,
        kind,
        described,
        _links(links),
        start_ns=start_ns,
        span_id=int(span_id, 16) if span_id else None,
    )
    if failed is not None:
        recorded.set_status(StatusCode.ERROR, failed)
    recorded.end(end_ns)
    told = {TRACEPARENT: traceparent(recorded.get_span_context())}
    return told if correlation_id is None else {CORRELATION_ID: correlation_id, **told}


def record_step(
    name: str,
    *,
    start_ns: int,
    end_ns: int,
    kind: SpanKind = SpanKind.INTERNAL,
    failed: str | None = None,
    attributes: dict[str, Any],
) -> None:
    """Records what is over already within the current span."""
    if _tracing is None or _tracing.tail is None:
        return
    within = trace.get_current_span()
    recorded = _tracing.provider.begin(name, _SCOPE, within, kind, attributes, (), start_ns=start_ns)
    if failed is not None:
        recorded.set_status(StatusCode.ERROR, failed)
    recorded.end(end_ns)


@contextmanager
def served(name: str, headers: Mapping[str, str], *, recorded: bool) -> Iterator[None]:
    """The span of a request around the block: in the trace that `headers` continue, or in a new one.

    Instrumentation describes a request at length. That is left to it where the trace is chosen to be kept; in all
    other traces it is switched off for the block, and the span begun here is what an error would show. Unless
    `recorded` there is neither, but ids.
    """
    if _tracing is None:
        yield
        return
    provider = _tracing.provider
    within = _span_of(headers) if TRACEPARENT in headers else INVALID_SPAN
    continued = within.get_span_context().trace_id
    trace_id = continued or new_trace_id()
    if recorded and provider.chooses(trace_id):
        # Of a trace that is continued, instrumentation learns from the headers as well.
        token = id_of_next_root.set(None if continued else trace_id)
        try:
            yield
        finally:
            id_of_next_root.reset(token)
    else:
        begun = provider.begin(name, _SCOPE, within, SpanKind.SERVER, {}, (), trace_id=trace_id, recorded=recorded)
        with _Current(begun, _NOT_INSTRUMENTED):
            yield


def record_error(error: Exception) -> None:
    """Tells of an exception that is dealt with within the current span, and marks that as failed."""
    _fail(trace.get_current_span(), error)


def exemplar(carrier: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """What leads from an observation to a trace, the current one or that of a carrier; None unless it is kept in any
    case."""
    within = trace.get_current_span() if carrier is None else _span_of(carrier)
    context = within.get_span_context()
    return {"trace_id": f"{context.trace_id:032x}"} if context.is_valid and context.trace_flags.sampled else None


class _Current:
    """Has a span be the current one for the block, and ends it."""

    __slots__ = ("_begun", "_context", "_token")

    def __init__(self, begun: trace.Span, context: Context | None = None) -> None:
        self._begun = begun
        self._context = context

    def __enter__(self) -> trace.Span:
        self._token = attach(trace.set_span_in_context(self._begun, self._context))
        return self._begun

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if isinstance(error, Exception):
                _fail(self._begun, error)
        finally:
            detach(self._token)
            self._begun.end()


def _fail(span: trace.Span, error: Exception) -> None:
    if _tracing is None or not isinstance(error, _tracing.expected):
        span.record_exception(error)
        span.set_status(StatusCode.ERROR, f"{type(error).__name__}: {scrub_error(error)}")


def _placed(
    cause: Mapping[str, str], attempt: int, links: Sequence[Mapping[str, str]]
) -> tuple[trace.Span, Sequence[Mapping[str, str]]]:
    """In which span an attempt belongs, and what it is linked to."""
    return (_span_of(cause), links) if attempt == 1 else (INVALID_SPAN, [cause, *links])


def _without_none(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


def _span_of(carrier: Mapping[str, str]) -> trace.Span:
    return trace.get_current_span(_PROPAGATOR.extract(carrier, Context()))


def _links(carriers: Sequence[Mapping[str, str]]) -> list[Link]:
    contexts = [_span_of(carrier).get_span_context() for carrier in carriers]
    return [Link(context) for context in contexts if context.is_valid]
