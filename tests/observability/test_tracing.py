"""What is exported to a collector, and what is not."""

import asyncio
import random
import threading
from contextlib import suppress

import pytest
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.trace import SpanKind

from libs.observability.context import bind, carrier
from libs.observability.testing import OtlpReceiver, attributes
from libs.observability.tracing import (
    DEFAULT_RATIO,
    Tracing,
    exemplar,
    record_error,
    record_span,
    span,
    tracer_provider,
)
from tests.observability.conftest import Configure, traceparent

ID = "550e8400-e29b-41d4-a716-446655440000"
PHONE = "+4915112345678"
SECOND = 1_000_000_000


def only(receiver: OtlpReceiver, name: str) -> Span:
    """The one span of that name, once everything is exported."""
    (found,) = receiver.spans(name)
    return found


def test_without_a_collector_nothing_is_recorded_but_ids_exist(configure: Configure) -> None:
    threads = set(threading.enumerate())
    tracing_ = configure(TRACES_SAMPLER_ARG="1")
    assert set(threading.enumerate()) == threads
    with span("work") as current:
        assert not current.is_recording()
        assert current.get_span_context().is_valid
        assert exemplar() is None
        outer = carrier()["traceparent"]
        with span("more"):
            assert carrier()["traceparent"][:35] == outer[:35]
            assert carrier()["traceparent"][36:] != outer[36:]
    assert tracer_provider() is tracing_.provider


def test_before_tracing_is_configured_spans_are_harmless() -> None:
    with bind(correlation_id=ID), span("work", appointment_id=1) as current:
        assert not current.is_recording()
        assert carrier() == {"correlation_id": ID}
    record_span("over", parent=None, start_ns=1, end_ns=2)
    assert isinstance(tracer_provider(), trace.NoOpTracerProvider)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_spans_reach_the_collector_by_either_protocol(
    configure: Configure, receiver: OtlpReceiver, protocol: str
) -> None:
    endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    configure(EXPORTER_OTLP_ENDPOINT=endpoint, EXPORTER_OTLP_PROTOCOL=protocol, TRACES_SAMPLER_ARG="1")
    with span("work", appointment_id=12) as current:
        pass

    (arrived,) = receiver.wait_for("work")

    assert arrived.span_id.hex() == f"{current.get_span_context().span_id:016x}"
    assert attributes(arrived) == {"appointment_id": 12}


def test_endpoint_and_protocol_can_be_those_of_traces_alone(configure: Configure, receiver: OtlpReceiver) -> None:
    configured = configure(
        EXPORTER_OTLP_TRACES_ENDPOINT=f"{receiver.http_endpoint}/v1/traces",
        EXPORTER_OTLP_PROTOCOL="grpc",
        EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
        TRACES_SAMPLER_ARG="1",
    )
    with span("work"):
        pass
    configured.shutdown()
    assert only(receiver, "work")


def test_the_process_says_who_it_is(configure: Configure) -> None:
    described = configure().resource.attributes
    assert (described["service.name"], described["service.version"]) == ("test", "1.2.3")


@pytest.mark.parametrize("share", ["-0.1", "1.1", "ten", "nan", "10%"])
def test_a_share_that_is_none_is_refused_in_a_sentence(configure: Configure, share: str) -> None:
    with pytest.raises(ValueError, match=r"^OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1\.$"):
        configure(EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", TRACES_SAMPLER_ARG=share)


def test_a_protocol_that_is_not_spoken_is_refused_in_a_sentence(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"^OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf or grpc\.$"):
        configure(EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", EXPORTER_OTLP_PROTOCOL="http/json")


def kept_by_id(trace_id: int, ratio: float) -> bool:
    return trace_id % 2**64 < ratio * 2**64


def roots(number: int) -> list[bool]:
    """Which of so many new traces are kept."""
    flags = []
    for _ in range(number):
        with span("root", root=True):
            flags.append(exemplar() is not None)
    return flags


@pytest.mark.parametrize("given", ["", " ", "0.1"])
def test_a_tenth_of_all_traces_is_kept_unless_configured(
    configure: Configure, receiver: OtlpReceiver, given: str
) -> None:
    configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG=given)
    assert DEFAULT_RATIO == 0.1
    # Six standard deviations of a binomial distribution to each side.
    assert 128 < sum(roots(2000)) < 281


@pytest.mark.parametrize(("share", "kept"), [("0", 0), ("1", 100)])
def test_nothing_or_everything_can_be_kept(configure: Configure, receiver: OtlpReceiver, share: str, kept: int) -> None:
    configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG=share)
    assert sum(roots(100)) == kept


def test_whether_a_trace_is_kept_hangs_on_its_id_and_not_on_what_the_sender_says(
    configure: Configure, receiver: OtlpReceiver
) -> None:
    configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG="0.3")
    generator = random.Random(1)
    ids = [generator.getrandbits(128) for _ in range(300)]
    for trace_id in ids:
        for flags in ("00", "01", "02", "03"):
            with span("work", parent=traceparent(trace_id, flags)):
                assert carrier()["traceparent"].split("-")[1] == f"{trace_id:032x}"
                assert (exemplar() is not None) is kept_by_id(trace_id, 0.3)
                with span("more"):
                    assert (exemplar() is not None) is kept_by_id(trace_id, 0.3)
    assert 0 < sum(kept_by_id(trace_id, 0.3) for trace_id in ids) < 300


def test_only_kept_traces_are_exported_and_those_whole(configure: Configure, receiver: OtlpReceiver) -> None:
    configured = configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG="0.5")
    expected = set()
    for _ in range(50):
        with span("outer", root=True), span("inner"):
            if found := exemplar():
                expected.add(found["trace_id"])
    configured.shutdown()
    for name in ("outer", "inner"):
        assert {arrived.trace_id.hex() for arrived in receiver.spans(name)} == expected
    assert 0 < len(expected) < 50


def test_a_span_says_on_whose_behalf_and_about_what(kept: Tracing, receiver: OtlpReceiver) -> None:
    with (
        bind(correlation_id=ID, tenant_id=3, user_id=7),
        span("chat.send", kind=SpanKind.PRODUCER, session_id=7, event_name=None),
    ):
        pass
    kept.shutdown()
    arrived = only(receiver, "chat.send")
    assert attributes(arrived) == {"correlation_id": ID, "tenant_id": 3, "session_id": 7}
    assert arrived.kind == Span.SPAN_KIND_PRODUCER
    assert arrived.status.code == 0
    assert arrived.parent_span_id == b""


def test_spans_nest_and_a_root_or_another_parent_leaves_the_present_trace(
    kept: Tracing, receiver: OtlpReceiver
) -> None:
    with span("outer"):
        with span("inner"):
            pass
        with span("root", root=True):
            pass
        with span("remote", parent=traceparent(0xA1)):
            pass
        for name, broken in (("empty", {}), ("broken", {"traceparent": "00-nonsense"})):
            with span(name, parent=broken):
                pass
    kept.shutdown()
    outer, inner = only(receiver, "outer"), only(receiver, "inner")
    assert (inner.trace_id, inner.parent_span_id) == (outer.trace_id, outer.span_id)
    remote = only(receiver, "remote")
    assert (remote.trace_id.hex(), remote.parent_span_id.hex()) == (f"{0xA1:032x}", f"{0xB7:016x}")
    for name in ("root", "empty", "broken"):
        alone = only(receiver, name)
        assert alone.parent_span_id == b""
        assert alone.trace_id != outer.trace_id


async def test_spans_of_tasks_and_threads_do_not_become_each_others_parents(
    kept: Tracing, receiver: OtlpReceiver
) -> None:
    async def work(number: int) -> None:
        with span("outer", outbox_id=number):
            await asyncio.sleep(0)
            with span("inner", outbox_id=number):
                await asyncio.to_thread(innermost, number)

    def innermost(number: int) -> None:
        with span("innermost", outbox_id=number):
            pass

    await asyncio.gather(*map(work, range(20)))
    await asyncio.to_thread(kept.shutdown)
    spans = {(each.name, attributes(each)["outbox_id"]): each for each in receiver.spans()}
    for number in range(20):
        outer, inner, innermost_ = (spans[name, number] for name in ("outer", "inner", "innermost"))
        assert inner.parent_span_id == outer.span_id
        assert innermost_.parent_span_id == inner.span_id


def test_an_exception_marks_the_span_and_goes_on_masked(kept: Tracing, receiver: OtlpReceiver) -> None:
    with pytest.raises(ValueError, match="no"), span("work", url=f"https://example.com/?to={PHONE}"):
        raise ValueError(f"no {PHONE}")
    with suppress(asyncio.CancelledError), span("cancelled"):
        raise asyncio.CancelledError
    kept.shutdown()
    failed = only(receiver, "work")
    assert failed.status.code == 2
    (event,) = failed.events
    assert event.name == "exception"
    assert PHONE[1:] not in str(failed)
    assert only(receiver, "cancelled").status.code == 0


def test_of_what_an_exception_says_the_first_line_is_told_and_that_once(kept: Tracing, receiver: OtlpReceiver) -> None:
    tracer = tracer_provider().get_tracer("library")
    row = "I feel unwell"
    with (
        pytest.raises(ValueError, match="refused"),
        tracer.start_as_current_span("of a library"),
        span("outer"),
        span("inner"),
    ):
        raise ValueError(f"refused\nDETAIL: Failing row contains ({row}).\n[SQL: INSERT …]")
    kept.shutdown()
    (event,) = only(receiver, "inner").events
    described = {item.key: item.value.string_value for item in event.attributes}
    assert described["exception.type"] == "ValueError"
    assert described["exception.message"] == "refused"
    assert "in test_of_what_an_exception_says" in described["exception.stacktrace"]
    assert described["exception.stacktrace"].endswith("ValueError: refused")
    for name in ("of a library", "outer", "inner"):
        failed = only(receiver, name)
        assert (failed.status.code, failed.status.message) == (2, "ValueError: refused")
        assert ("exception" in [each.name for each in failed.events]) is (name == "inner")
        assert row not in str(failed)


def test_an_exception_is_told_in_each_trace_that_it_ends(kept: Tracing, receiver: OtlpReceiver) -> None:
    error = ValueError("shared")
    for _ in range(2):
        with suppress(ValueError), span("root", root=True):
            raise error
    kept.shutdown()
    assert [len(each.events) for each in receiver.spans("root")] == [1, 1]


def test_an_error_that_says_nothing_leaves_what_an_earlier_one_says(kept: Tracing, receiver: OtlpReceiver) -> None:
    with span("work") as work:
        record_error(ValueError("broken"))
        work.set_status(trace.StatusCode.ERROR)
    kept.shutdown()
    assert only(receiver, "work").status.message == "ValueError: broken"


def test_links_name_other_traces_and_leave_out_what_is_none(kept: Tracing, receiver: OtlpReceiver) -> None:
    links = [traceparent(0xA1), {}, {"correlation_id": ID}, traceparent(0xA2, "00", 0xB8)]
    with span("work", links=links):
        pass
    kept.shutdown()
    assert [(link.trace_id.hex(), link.span_id.hex()) for link in only(receiver, "work").links] == [
        (f"{0xA1:032x}", f"{0xB7:016x}"),
        (f"{0xA2:032x}", f"{0xB8:016x}"),
    ]


def test_what_is_over_is_recorded_under_the_id_that_a_row_refers_to(kept: Tracing, receiver: OtlpReceiver) -> None:
    with span("batch"):
        record_span(
            "appointments.convert",
            parent=traceparent(0xA1) | {"correlation_id": ID},
            span_id="00000000000000c4",
            start_ns=5 * SECOND,
            end_ns=7 * SECOND,
            links=[carrier()],
            appointment_id=12,
            session_id=None,
        )
    with span("later"):
        pass
    kept.shutdown()
    recorded, batch = only(receiver, "appointments.convert"), only(receiver, "batch")
    assert recorded.trace_id.hex() == f"{0xA1:032x}"
    assert recorded.parent_span_id.hex() == f"{0xB7:016x}"
    assert recorded.span_id.hex() == "00000000000000c4"
    assert (recorded.start_time_unix_nano, recorded.end_time_unix_nano) == (5 * SECOND, 7 * SECOND)
    assert [link.span_id for link in recorded.links] == [batch.span_id]
    assert attributes(recorded) == {"correlation_id": ID, "appointment_id": 12}
    # The id was meant for that one span.
    assert only(receiver, "later").span_id != recorded.span_id


def test_what_is_over_can_be_a_root_that_failed(kept: Tracing, receiver: OtlpReceiver) -> None:
    with span("present"):
        record_span(
            "notifications.deliver",
            parent=None,
            start_ns=1,
            end_ns=2,
            links=[traceparent(0xA1) | {"correlation_id": ID}],
            failed=f"could not tell {PHONE}",
        )
    kept.shutdown()
    recorded = only(receiver, "notifications.deliver")
    assert recorded.parent_span_id == b""
    assert recorded.trace_id != only(receiver, "present").trace_id
    assert [link.trace_id.hex() for link in recorded.links] == [f"{0xA1:032x}"]
    assert attributes(recorded) == {"correlation_id": ID}
    assert recorded.status.code == 2
    assert recorded.status.message == "could not tell ***5678"


def test_what_is_over_is_exported_as_the_rest_of_its_trace_is(configure: Configure, receiver: OtlpReceiver) -> None:
    configured = configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG="0.5")
    for trace_id in (0xA1, 2**64 - 1):
        for flags in ("00", "01"):
            record_span("over", parent=traceparent(trace_id, flags), start_ns=1, end_ns=2)
    configured.shutdown()
    assert [each.trace_id.hex() for each in receiver.spans()] == [f"{0xA1:032x}"] * 2


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True)])
def test_the_flags_of_a_trace_are_bits(flags: str, sampled: bool) -> None:
    assert (exemplar(traceparent(0xA1, flags)) is not None) is sampled


def test_an_exemplar_points_to_kept_traces_alone(configure: Configure, receiver: OtlpReceiver) -> None:
    configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG="0.5")
    assert exemplar() is None
    for trace_id, expected in ((2**63 - 1, {"trace_id": f"{2**63 - 1:032x}"}), (2**63, None)):
        with span("work", parent=traceparent(trace_id)):
            assert exemplar() == expected
    assert exemplar(traceparent(0xA1, "01")) == {"trace_id": f"{0xA1:032x}"}
    assert exemplar(traceparent(0xA1, "00")) is None
    assert exemplar({}) is None


def test_what_is_left_is_exported_at_the_end(kept: Tracing, receiver: OtlpReceiver) -> None:
    for _ in range(1500):
        with span("work"):
            pass
    kept.shutdown()
    assert len(receiver.spans("work")) == 1500


def test_after_the_end_spans_are_harmless(kept: Tracing, receiver: OtlpReceiver) -> None:
    kept.shutdown()
    kept.shutdown()
    with span("late"):
        pass
    assert receiver.spans() == []
