"""Spans of OpenTelemetry's interface that cost little unless they are exported.

The SDK's own take 16 µs each, before anybody remembers them; these take half of that. They become the SDK's when they
are handed to an exporter.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util._decorator import _agnosticcontextmanager
from opentelemetry.util.types import Attributes

from libs.observability.redaction import scrub_error
from libs.observability.sampling import Tail, Trace, is_chosen
from libs.observability.stacks import Stack, type_of

_CHOSEN: Final = TraceFlags(TraceFlags.SAMPLED)
_NOT_CHOSEN: Final = TraceFlags(TraceFlags.DEFAULT)
_UNSET: Final = Status()
_IDS: Final = RandomIdGenerator()

_TOLD_IN: Final = "_told_in_trace"
"""The attribute of an exception that says in which trace it was recorded."""

new_trace_id: Final = _IDS.generate_trace_id

id_of_next_root: Final[ContextVar[int | None]] = ContextVar("id_of_next_root", default=None)
"""The trace id of the next root that instrumentation begins, if it was decided on before."""


class RecordedSpan(trace.Span):
    """A span and what it says of itself, until it ends."""

    def __init__(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: Sequence[Link],
        start_ns: int,
        scope: InstrumentationScope,
        tail: "Tail[RecordedSpan]",
        part: "Trace[RecordedSpan]",
    ) -> None:
        self.name = name
        self.context: Final = context
        self.parent: Final = parent
        self.kind: Final = kind
        self.attributes: Final = attributes
        self.links = links
        self.start_ns: Final = start_ns
        self.end_ns = 0
        self.events: list[Event] = []
        self.status = _UNSET
        self.scope: Final = scope
        self._tail: Final = tail
        self._part: Trace[RecordedSpan] | None = part

    def get_span_context(self) -> SpanContext:
        return self.context

    def is_recording(self) -> bool:
        return not self.end_ns

    def set_attribute(self, key: str, value: Any) -> None:
        if not self.end_ns:
            self.attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        if not self.end_ns:
            self.attributes.update(attributes)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        if not self.end_ns:
            self.events.append(Event(name, attributes, timestamp))

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        if not self.end_ns:
            self.links = [*self.links, Link(context, attributes)]

    def update_name(self, name: str) -> None:
        if not self.end_ns:
            self.name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Of a description the first line: instrumentation gives all that an exception says, and the further lines
        of that quote what people wrote."""
        new = status if isinstance(status, Status) else Status(status, description)
        known = self.status
        # What was declared to be well stays so, and nothing takes an error back but that.
        if self.end_ns or new.is_unset or known.status_code is StatusCode.OK:
            return
        if new.description is not None:
            self.status = Status(new.status_code, new.description.partition("\n")[0])
        elif known.status_code is not new.status_code:  # or who knows less would overwrite why it is an error
            self.status = new

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """The innermost span of a trace that an exception leaves tells of it; those around it only have failed."""
        trace_id = self.context.trace_id
        if self.end_ns or getattr(exception, _TOLD_IN, None) == trace_id:
            return
        with suppress(AttributeError):  # exceptions may be immutable
            setattr(exception, _TOLD_IN, trace_id)
        described = {
            "exception.type": type_of(exception),
            "exception.message": scrub_error(exception),
            "exception.stacktrace": Stack(exception),
            "exception.escaped": str(escaped),
        }
        # The exporter asks for the text of the stack, in a thread of its own.
        self.add_event("exception", cast(Attributes, described | dict(attributes or {})), timestamp)

    def end(self, end_time: int | None = None) -> None:
        # A trace remembers its ended spans: if they knew it still, only the garbage collector would free them.
        part, self._part = self._part, None
        if part is not None:
            self.end_ns = end_time or time.time_ns()
            self._tail.ended(part, self, failed=self.status.status_code is StatusCode.ERROR)

    def readable(self, resource: Resource) -> ReadableSpan:
        """The ended span as exporters know it, which is sampled in any case."""
        return ReadableSpan(
            name=self.name,
            context=SpanContext(self.context.trace_id, self.context.span_id, False, _CHOSEN),
            parent=self.parent,
            resource=resource,
            attributes=self.attributes,
            events=self.events,
            links=self.links,
            kind=self.kind,
            status=self.status,
            start_time=self.start_ns,
            end_time=self.end_ns,
            instrumentation_scope=self.scope,
        )


class Recorder(trace.TracerProvider):
    """Begins spans. Those of a share of all traces, `ratio`, say that they are sampled; the spans of all others are
    recorded as well. Without a `tail` nothing is recorded: spans have ids then, and nothing else."""

    def __init__(self, tail: Tail[RecordedSpan] | None, ratio: float = 0.0) -> None:
        self._tail = tail
        self._ratio = ratio

    def chooses(self, trace_id: int) -> bool:
        return self._tail is not None and is_chosen(trace_id, self._ratio)

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> "Tracer":
        scope = InstrumentationScope(instrumenting_module_name, instrumenting_library_version, schema_url, attributes)
        return Tracer(self, scope)

    def begin(
        self,
        name: str,
        scope: InstrumentationScope,
        within: trace.Span,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: Sequence[Link],
        *,
        start_ns: int | None = None,
        span_id: int | None = None,
        trace_id: int | None = None,
        recorded: bool = True,
    ) -> trace.Span:
        """A span within another, be that of this process or not, or a root if that is not valid: of a new trace, unless
        `trace_id` was decided on. What is within a span
        of this process that is not recorded is not recorded either; nor is a call to another system that belongs to
        nothing, such as when a loop looks whether there is something to do."""
        parent: SpanContext | None = within.get_span_context()
        if parent is not None and parent.is_valid:
            trace_id = parent.trace_id
            recorded = recorded and (parent.is_remote or isinstance(within, RecordedSpan))
        else:
            trace_id, parent = trace_id or new_trace_id(), None
            recorded = recorded and kind is not SpanKind.CLIENT
        span_id = span_id or _IDS.generate_span_id()
        if self._tail is None or not recorded:
            return NonRecordingSpan(SpanContext(trace_id, span_id, False, _NOT_CHOSEN))
        chosen = is_chosen(trace_id, self._ratio)
        context = SpanContext(trace_id, span_id, False, _CHOSEN if chosen else _NOT_CHOSEN)
        part = self._tail.begin(trace_id, chosen=chosen)
        start_ns = start_ns or time.time_ns()
        return RecordedSpan(name, context, parent, kind, attributes, links, start_ns, scope, self._tail, part)


class Tracer(trace.Tracer):
    """Begins the spans of one library."""

    def __init__(self, recorder: Recorder, scope: InstrumentationScope) -> None:
        self._recorder = recorder
        self._scope = scope

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> trace.Span:
        within = trace.get_current_span(context)
        trace_id = None
        if not within.get_span_context().is_valid and (trace_id := id_of_next_root.get()):
            id_of_next_root.set(None)
        return self._recorder.begin(
            name,
            self._scope,
            within,
            kind,
            dict(attributes or {}),
            links or (),
            start_ns=start_time,
            trace_id=trace_id,
        )

    @_agnosticcontextmanager
    def start_as_current_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> Iterator[trace.Span]:
        begun = self.start_span(name, context, kind, attributes, links, start_time)
        with trace.use_span(begun, end_on_exit, record_exception, set_status_on_exception):
            yield begun
