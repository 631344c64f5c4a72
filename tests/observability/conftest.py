"""Tracing that is configured for one test, and a collector for it."""

import threading
from collections.abc import Callable, Iterator

import pytest

from libs.observability import tracing
from libs.observability.registry import Metrics
from libs.observability.testing import OtlpReceiver
from libs.observability.tracing import Tracing, configure_tracing

Configure = Callable[..., Tracing]


def traceparent(trace_id: int, flags: str = "01", span_id: int = 0xB7) -> dict[str, str]:
    """A carrier."""
    return {"traceparent": f"00-{trace_id:032x}-{span_id:016x}-{flags}"}


@pytest.fixture(autouse=True)
def _unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test configures ends with it."""
    monkeypatch.setattr(tracing, "_tracing", None)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.fixture
def metrics() -> Metrics:
    return Metrics((), version="0", service="test")


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, receiver: OtlpReceiver, metrics: Metrics) -> Iterator[Configure]:
    """Configures tracing with environment variables, whose names lack their `OTEL_`; ended before `receiver`."""
    configured: list[Tracing] = []

    def configure(*, expected: tuple[type[Exception], ...] = (), **environment: str) -> Tracing:
        for name, value in environment.items():
            monkeypatch.setenv(f"OTEL_{name}", value)
        configured.append(configure_tracing("test", "1.2.3", metrics, expected=expected))
        return configured[-1]

    yield configure
    for each in configured:
        each.shutdown()
    # An exporter that still tries would say so in the log of another test.
    for thread in threading.enumerate():
        if thread.name == "tracing shutdown":
            thread.join()


@pytest.fixture
def kept(configure: Configure, receiver: OtlpReceiver) -> Tracing:
    """Tracing that exports everything to `receiver`."""
    return configure(EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint, TRACES_SAMPLER_ARG="1")
