"""Every trace that contains an error is kept, whole, and what that takes has bounds."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import pytest
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode, get_current_span, use_span

from libs.observability import sampling
from libs.observability.context import carrier
from libs.observability.registry import Metrics
from libs.observability.sampling import REMEMBERED_SPANS, SPANS_PER_TRACE, Tail
from libs.observability.testing import OtlpReceiver, attributes
from libs.observability.tracing import Tracing, is_recording, record_span, record_step, span, tracer_provider
from tests.observability.conftest import Configure, traceparent

NOT_CHOSEN = 2**64 - 1
"""The id of a trace that belongs to no share smaller than all."""


@pytest.fixture
def tailed(configure: Configure, receiver: OtlpReceiver) -> Tracing:
    """Tracing that exports nothing but errors."""
    return configure(expected=(LookupError,), EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG="0")


def tail_of(tracing: Tracing) -> Tail[object]:
    assert tracing.tail is not None
    return tracing.tail  # type: ignore[return-value]


def names(receiver: OtlpReceiver) -> list[str]:
    return sorted(each.name for each in receiver.spans())


def a_request(number: int, *, fails: bool) -> str:
    """Five spans, one of which may fail in the middle; answers the id of the trace."""
    with span("request", root=True, number=number) as root:
        with span("guard"):
            pass
        with span("work") as work, span("statement"):
            if fails:
                work.set_status(StatusCode.ERROR)
        record_step("told", start_ns=1, end_ns=2, attributes={})
    return f"{root.get_span_context().trace_id:032x}"


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_of_ten_thousand_traces_all_with_an_error_are_whole_and_a_tenth_of_the_others(
    configure: Configure, receiver: OtlpReceiver, metrics: Metrics, protocol: str
) -> None:
    endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    tracing = configure(EXPORTER_OTLP_ENDPOINT=endpoint, EXPORTER_OTLP_PROTOCOL=protocol)
    failing = set(random.Random(1).sample(range(10_000), 200))
    ids: dict[str, bool] = {}
    for number in range(10_000):
        ids[a_request(number, fails=number in failing)] = number in failing
        if number % 500 == 0:
            tracing.flush()
    open_traces, remembered = tail_of(tracing).sizes()
    tracing.shutdown()

    exported = Counter(each.trace_id.hex() for each in receiver.spans())
    assert set(exported.values()) == {5}
    assert {trace_id for trace_id, fails in ids.items() if fails} <= exported.keys()
    # Six standard deviations of a binomial distribution to each side.
    others = sum(not ids[trace_id] for trace_id in exported)
    assert 801 < others < 1159
    assert open_traces == 0
    assert remembered <= REMEMBERED_SPANS
    kept = {reason: metrics.sample("obs_traces_kept_total", reason=reason) for reason in ("head", "error", "remote")}
    assert sum(kept.values()) == len(exported)
    assert kept["head"] == others + 200 - kept["error"]
    assert metrics.sample("obs_spans_dropped_total", reason="queue_full") == 0


def test_a_trace_without_an_error_is_not_exported_and_does_not_say_that_it_is(
    tailed: Tracing, receiver: OtlpReceiver
) -> None:
    with span("work"):
        assert carrier()["traceparent"].endswith("-00")
    tailed.shutdown()
    assert receiver.spans() == []


def test_what_ends_before_and_after_the_error_is_exported_alike(tailed: Tracing, receiver: OtlpReceiver) -> None:
    with span("request") as request:
        with span("before"):
            pass
        with pytest.raises(ValueError), span("broken"):
            raise ValueError
        with span("after"):
            pass
        told = carrier()
    with span("much later", parent=told):
        pass
    tailed.shutdown()
    assert names(receiver) == ["after", "before", "broken", "much later", "request"]
    assert {each.trace_id.hex() for each in receiver.spans()} == {f"{request.get_span_context().trace_id:032x}"}
    parents = {each.name: each.parent_span_id.hex() for each in receiver.spans()}
    assert set(parents.values()) == {"", f"{request.get_span_context().span_id:016x}"}


@pytest.mark.parametrize(
    ("error", "errs"),
    [(ValueError("no"), True), (LookupError("refused"), False), (KeyError(), False), (asyncio.CancelledError(), False)],
)
def test_an_expected_exception_is_an_answer_and_no_error(
    tailed: Tracing, receiver: OtlpReceiver, error: BaseException, errs: bool
) -> None:
    with pytest.raises(type(error)), span("work"):
        raise error
    tailed.shutdown()
    assert names(receiver) == ["work"] * errs


def test_what_another_process_found_is_kept_here_before_and_after(
    tailed: Tracing, receiver: OtlpReceiver, metrics: Metrics
) -> None:
    tail = tail_of(tailed)
    for trace_id, when in ((NOT_CHOSEN, "before"), (NOT_CHOSEN - 1, "meanwhile"), (NOT_CHOSEN - 2, "after")):
        if when == "before":
            tail.keep(trace_id)
        with span(f"{when} 1", parent=traceparent(trace_id)):
            if when == "meanwhile":
                tail.keep(trace_id)
            with span(f"{when} 2"):
                pass
        if when == "after":
            tail.keep(trace_id)
        tail.keep(trace_id)
        record_span(f"{when} 3", parent=traceparent(trace_id), start_ns=1, end_ns=2)
    with span("another", parent=traceparent(NOT_CHOSEN - 3)):
        pass
    tailed.shutdown()
    assert names(receiver) == sorted(f"{when} {n}" for when in ("before", "meanwhile", "after") for n in (1, 2, 3))
    assert metrics.sample("obs_traces_kept_total", reason="remote") == 3
    assert tail.sizes() == (0, 1)


def test_a_verdict_about_a_trace_that_never_comes_here_counts_as_none(tailed: Tracing, metrics: Metrics) -> None:
    tail_of(tailed).keep(NOT_CHOSEN)
    assert metrics.sample("obs_traces_kept_total", reason="remote") == 0


def test_a_trace_is_remembered_for_a_minute(
    tailed: Tracing, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, metrics: Metrics
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    tail = tail_of(tailed)
    for trace_id, passed in ((1, 0.0), (2, 30.0), (3, 61.0)):
        now = 1000.0 + passed
        with span(f"trace {trace_id}", parent=traceparent(trace_id)):
            pass
    assert tail.sizes() == (0, 2)
    for trace_id in (1, 2, 3):
        tail.keep(trace_id)
    tailed.shutdown()
    assert names(receiver) == ["trace 2", "trace 3"]
    assert metrics.sample("obs_spans_dropped_total", reason="evicted") == 0


def test_the_oldest_traces_make_room_and_are_counted(
    tailed: Tracing, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, metrics: Metrics
) -> None:
    monkeypatch.setattr(sampling, "REMEMBERED_SPANS", 30)
    tail = tail_of(tailed)
    for trace_id in range(1, 21):
        with span("outer", parent=traceparent(trace_id)), span("inner"):
            pass
    # A trace of two spans takes the room of three.
    assert tail.sizes() == (0, 20)
    assert metrics.sample("obs_spans_dropped_total", reason="evicted") == 20
    for trace_id in range(20, 0, -1):
        tail.keep(trace_id)
    tailed.shutdown()
    assert {int.from_bytes(each.trace_id) for each in receiver.spans()} == set(range(11, 21))
    for trace_id in range(100, 1000):
        tail.keep(trace_id)
    assert tail.sizes() == (0, 0)
    assert tail._remembered <= 30


def test_what_is_forgotten_is_freed_without_the_garbage_collector(
    tailed: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "REMEMBERED_SPANS", 30)
    spans = []
    gc.disable()
    try:
        for _ in range(20):
            with span("outer", root=True) as outer, span("inner") as inner:
                spans += [weakref.ref(outer), weakref.ref(inner)]
        del outer, inner
        alive = [each() is not None for each in spans]
    finally:
        gc.enable()
    assert alive == [False] * 20 + [True] * 20


def test_a_long_trace_loses_its_newest_spans_but_not_the_one_that_fails(
    tailed: Tracing, receiver: OtlpReceiver, metrics: Metrics
) -> None:
    with span("outer") as outer:
        for _ in range(SPANS_PER_TRACE + 7):
            with span("inner"):
                pass
        outer.set_status(StatusCode.ERROR)
    tailed.shutdown()
    assert Counter(names(receiver)) == {"inner": SPANS_PER_TRACE, "outer": 1}
    assert metrics.sample("obs_spans_dropped_total", reason="truncated") == 7


def test_traces_that_never_end_make_room_for_others(
    tailed: Tracing, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, metrics: Metrics
) -> None:
    monkeypatch.setattr(sampling, "OPEN_TRACES", 10)
    tracer = tracer_provider().get_tracer("test")
    forgotten = []
    for _ in range(15):
        with use_span(tracer.start_span("forgotten")) as begun:
            forgotten.append(begun)
            with span("before"):
                pass
            late = tracer.start_span("late")
        if len(forgotten) == 1:
            of_the_first = late
    assert tail_of(tailed).sizes() == (10, 0)
    assert metrics.sample("obs_spans_dropped_total", reason="evicted") == 5
    of_the_first.end()
    assert metrics.sample("obs_spans_dropped_total", reason="truncated") == 1
    for each in forgotten:
        each.set_status(StatusCode.ERROR)
        each.end()
    tailed.shutdown()
    # Those that were given up have nothing left but what failed.
    assert Counter(names(receiver)) == {"forgotten": 15, "before": 10}


def test_threads_may_have_their_parts_in_one_trace(tailed: Tracing, receiver: OtlpReceiver) -> None:
    with span("outer") as outer:
        part = carrier()

        def work() -> None:
            for _ in range(50):
                with span("inner", parent=part), span("innermost"):
                    pass

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outer.set_status(StatusCode.ERROR)
    tailed.shutdown()
    assert Counter(names(receiver)) == {"outer": 1, "inner": 200, "innermost": 200}
    assert tail_of(tailed).sizes() == (0, 0)


class Pause:
    def __await__(self) -> Generator[None]:
        yield


def abandon(name: str, parent: dict[str, str]) -> None:
    """Leaves a coroutine with an open span to the garbage collector."""
    circle: list[object] = []

    async def work() -> None:
        circle.append(coroutine)
        with span(name, parent=parent):
            try:
                await Pause()
            finally:
                with span(f"end of {name}"):
                    pass

    coroutine = work()
    copy_context().run(coroutine.send, None)


def test_spans_that_the_garbage_collector_ends_in_the_middle_of_another_are_not_lost(
    tailed: Tracing, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Collecting(sampling.Trace[object]):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            gc.collect()

    gc.collect()
    monkeypatch.setattr(sampling, "Trace", Collecting)
    gc.disable()
    try:
        for number in range(3):
            abandon(f"abandoned {number}", traceparent(NOT_CHOSEN))
            with span("next"):
                pass
    finally:
        gc.enable()
    assert tail_of(tailed).sizes() == (0, 6)
    tail_of(tailed).keep(NOT_CHOSEN)
    tailed.shutdown()
    assert names(receiver) == [f"abandoned {number}" for number in range(3)]


def test_a_call_outside_of_any_trace_is_not_recorded_and_neither_is_what_is_within(
    kept: Tracing, receiver: OtlpReceiver
) -> None:
    record_step("SELECT", kind=SpanKind.CLIENT, start_ns=1, end_ns=2, attributes={})
    with span("POST", kind=SpanKind.CLIENT) as call, span("within"):
        assert not call.is_recording()
    with span("work"):
        record_step("SELECT", kind=SpanKind.CLIENT, start_ns=1, end_ns=2, failed="no", attributes={"table": "users"})
    kept.shutdown()
    assert names(receiver) == ["SELECT", "work"]
    (statement,) = receiver.spans("SELECT")
    assert (statement.status.code, statement.status.message, attributes(statement)) == (2, "no", {"table": "users"})


def test_a_span_keeps_to_what_opentelemetry_promises(tailed: Tracing, receiver: OtlpReceiver) -> None:
    tracer = tracer_provider().get_tracer("library", "1.2", attributes={"a": "b"})
    with suppress(LookupError), tracer.start_as_current_span("work", attributes={"one": 1}) as work:
        assert get_current_span() is work
        work.set_attribute("two", 2)
        work.set_attributes({"three": 3})
        work.add_event("seen", {"what": "it"}, 17)
        work.add_link(INVALID_SPAN.get_span_context())
        work.update_name("renamed")
        raise LookupError
    fine = tracer.start_span("fine")
    fine.set_status(StatusCode.ERROR, "no")
    fine.set_status(StatusCode.UNSET)
    fine.set_status(StatusCode.OK)
    fine.set_status(StatusCode.ERROR)
    fine.end()
    with tracer.start_as_current_span("bad") as bad:
        bad.set_status(StatusCode.ERROR, "no")
        bad.set_status(StatusCode.UNSET)
    for ended in (work, fine):
        ended.set_attribute("late", True)
        ended.set_attributes({"late": True})
        ended.add_event("late")
        ended.add_link(work.get_span_context())
        ended.update_name("late")
        ended.set_status(StatusCode.ERROR, "late")
        ended.end(1)
        assert not ended.is_recording()
    tailed.shutdown()
    (renamed,), (unwell,) = receiver.spans("renamed"), receiver.spans("bad")
    assert (unwell.status.code, unwell.status.message) == (2, "no")
    assert len(receiver.spans()) == 2
    assert attributes(renamed) == {"one": 1, "two": 2, "three": 3}
    assert (renamed.status.code, renamed.status.message) == (2, "LookupError: ")
    assert [event.name for event in renamed.events] == ["seen", "exception"]
    assert renamed.events[0].time_unix_nano == 17
    assert renamed.end_time_unix_nano >= renamed.start_time_unix_nano


def test_without_a_collector_nothing_is_remembered(configure: Configure) -> None:
    tracing = configure()
    assert tracing.tail is None
    assert not is_recording()
    with pytest.raises(ValueError), span("work"):
        raise ValueError
    assert record_span("over", parent=None, start_ns=1, end_ns=2) == {}


def test_what_is_chosen_takes_no_room_once_it_is_over(kept: Tracing) -> None:
    for _ in range(3):
        with span("work", root=True), span("more"):
            pass
    assert tail_of(kept).sizes() == (0, 0)
    assert tail_of(kept)._remembered == 0
