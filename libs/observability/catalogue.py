"""Metrics as data: what a service may count, declared before anything is counted.

A catalogue is a tuple of `MetricSpec`. The registry, the series that exist at zero, and every document
or rule that mentions a metric follow from it; nothing else can create a metric.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]

OTHER: Final = "other"
"""What a label says instead of a value it does not know."""

DURATION_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds. The thresholds of service level objectives must be among the bounds: 0.5 and 5 are."""

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# The last two belong to the Prometheus target; a metric that has them is renamed on scraping.
_FORBIDDEN_LABELS = frozenset({"email", "phone", "url", "path", "message", "job", "instance"})
_UNITS = ("_seconds", "_bytes", "_messages")


@dataclass(frozen=True, slots=True)
class Label:
    """A label with its possible values: a closed set, or (None) the first `limit` that occur."""

    name: str
    values: tuple[str, ...] | None = None
    limit: int = 80

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _FORBIDDEN_LABELS or self.name.endswith("_id"):
            raise ValueError(f"{self.name!r} is no name for a label: ids and personal data are never labels.")

    def has(self, value: str) -> bool:
        return self.values is None or value in self.values


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. `combinations` lists the label values that really occur together, where the product of
    all closed sets would be mostly nonsense; None means the whole product. `source_alias` is the name
    under which a recording rule answers as well: with `alias_expr` or, without one, with a summary in ms.
    `emitter` is the only kind of process in which it moves; None means any."""

    name: str
    kind: Kind
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    combinations: tuple[tuple[str, ...], ...] | None = None
    source_alias: str | None = None
    alias_expr: str | None = None
    emitter: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not snake_case.")
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: counters, and only counters, end in _total.")
        if self.kind == "histogram" and not (self.buckets and self.name.endswith(_UNITS)):
            raise ValueError(f"{self.name}: a histogram has buckets and ends in its base unit.")
        in_seconds = self.kind == "histogram" and self.name.endswith("_seconds")
        if self.source_alias and not (self.alias_expr or (in_seconds and self.source_alias.endswith("_ms"))):
            raise ValueError(f"{self.name}: only a histogram in seconds is a summary in milliseconds as well.")
        for values in self.combinations or ():
            if len(values) != len(self.labels) or not all(map(Label.has, self.labels, values)):
                raise ValueError(f"{self.name}: {values} are not values of its labels.")

    def series(self) -> Iterable[tuple[str, ...]]:
        """The label values of all series that exist from the start; none when a label is open."""
        if self.combinations is not None:
            return self.combinations
        closed = [label.values for label in self.labels if label.values is not None]
        return product(*closed) if len(closed) == len(self.labels) else ()


def counter(
    name: str,
    help: str,  # noqa: A002
    *labels: Label,
    combinations: Iterable[Sequence[str]] | None = None,
) -> MetricSpec:
    listed = None if combinations is None else tuple(tuple(values) for values in combinations)
    return MetricSpec(name, "counter", help, labels, combinations=listed)


def gauge(
    name: str,
    help: str,  # noqa: A002
    *labels: Label,
    source_alias: str | None = None,
    alias_expr: str | None = None,
) -> MetricSpec:
    return MetricSpec(name, "gauge", help, labels, source_alias=source_alias, alias_expr=alias_expr)


def histogram(
    name: str,
    help: str,  # noqa: A002
    *labels: Label,
    buckets: tuple[float, ...] = DURATION_BUCKETS,
    source_alias: str | None = None,
    alias_expr: str | None = None,
) -> MetricSpec:
    return MetricSpec(name, "histogram", help, labels, buckets, source_alias=source_alias, alias_expr=alias_expr)


def emitted_by(emitter: str, *specs: MetricSpec) -> tuple[MetricSpec, ...]:
    """Metrics that move in one kind of process alone; in the others they are there, and stay at zero."""
    return tuple(replace(spec, emitter=emitter) for spec in specs)


OWN: Final = (
    counter("obs_label_values_rejected_total", "Label values mapped to other", Label("metric", limit=1000)),
    counter(
        "obs_log_redactions_total",
        "Values masked in logs",
        Label("kind", ("email", "phone", "body", "secret", "name")),
    ),
    counter(
        "obs_log_lines_dropped_total",
        "Log lines lost because the queue was full",
        Label("level", ("routine", "urgent")),
    ),
    counter(
        "obs_spans_dropped_total",
        "Spans lost",
        Label("reason", ("queue_full", "export_failed", "evicted", "truncated")),
    ),
    counter(
        "obs_traces_kept_total", "Traces of which spans were exported", Label("reason", ("head", "error", "remote"))
    ),
    gauge("asyncio_tasks", "Live asyncio tasks"),
    histogram(
        "asyncio_loop_lag_seconds",
        "Event-loop lag",
        buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
    ),
    gauge(
        "process_cpu_limit_cores",
        "CPU quota of this process group",
        source_alias="cpu_utilization_percent",
        alias_expr="100 * rate(process_cpu_seconds_total[5m]) / process_cpu_limit_cores",
    ),
    gauge(
        "process_memory_limit_bytes",
        "Memory limit of this process group",
        source_alias="memory_utilization_percent",
        alias_expr="100 * process_resident_memory_bytes / process_memory_limit_bytes",
    ),
)
"""What the library itself emits; every registry has it."""
