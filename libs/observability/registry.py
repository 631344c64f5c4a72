"""The metrics of one process, made from a catalogue and from nothing else."""

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from libs.observability.catalogue import OTHER, OWN, MetricSpec

MAX_SERIES: Final = 2000
"""Per metric; whatever comes after that is counted under `other`."""

Child = Counter | Gauge | Histogram

_CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


class Metrics:
    """`metrics.counter("x_total", "a").inc()`: label values by position, as the catalogue orders them.

    A name, kind or number of labels that the catalogue does not know raises LookupError: that is a
    mistake in the program. A label value that it does not know becomes `other`: that is data.
    Exemplars are given to `observe` and `inc` as `{"trace_id": …}`.
    """

    def __init__(self, catalogue: Iterable[MetricSpec], *, version: str, service: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry: Final = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._metrics: dict[str, _Metric] = {}
        for spec in (*OWN, *catalogue):
            if spec.name in self._metrics:
                raise ValueError(f"The metric {spec.name} is declared twice.")
            self._metrics[spec.name] = _Metric(spec, self.registry)
        self._children: dict[tuple[str, ...], Child] = {}
        for spec in (*OWN, *catalogue):
            for values in spec.series():
                self._child((spec.name, *values))
        build = Gauge("build_info", "What is running", ["service", "version", "python"], registry=self.registry)
        build.labels(service, version, platform.python_version()).set(1)
        self.gauge("process_cpu_limit_cores").set(_cpu_limit())
        self.gauge("process_memory_limit_bytes").set(_memory_limit())

    def counter(self, *name_and_labels: str) -> Counter:
        child = self._children.get(name_and_labels) or self._child(name_and_labels)
        if isinstance(child, Counter):
            return child
        raise _no("counter", name_and_labels)

    def gauge(self, *name_and_labels: str) -> Gauge:
        child = self._children.get(name_and_labels) or self._child(name_and_labels)
        if isinstance(child, Gauge):
            return child
        raise _no("gauge", name_and_labels)

    def histogram(self, *name_and_labels: str) -> Histogram:
        child = self._children.get(name_and_labels) or self._child(name_and_labels)
        if isinstance(child, Histogram):
            return child
        raise _no("histogram", name_and_labels)

    def sample(self, name: str, **labels: str) -> float:
        """The present value of one series by its exposed name, such as `x_seconds_count`; 0 if absent."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def _child(self, key: tuple[str, ...]) -> Child:
        name, *values = key
        metric = self._metrics.get(name)
        if metric is None:
            raise _no("metric", key)
        if len(values) != len(metric.spec.labels):
            raise LookupError(f"{name} takes {len(metric.spec.labels)} label values, not {len(values)}.")
        admitted, rejected = metric.admit(values)
        child = metric.parent.labels(*admitted) if values else metric.parent
        if rejected:
            # Not remembered under the rejected value: a stranger's values must not fill this process.
            self.counter("obs_label_values_rejected_total", name).inc()
        else:
            self._children[key] = child
        return child


class _Metric:
    """One metric, and which label values it has met."""

    def __init__(self, spec: MetricSpec, registry: CollectorRegistry) -> None:
        names = [label.name for label in spec.labels]
        self.spec: Final = spec
        self.parent: Final = _parent(spec, names, registry)
        self._known = [set(label.values or ()) for label in spec.labels]
        self._series: set[tuple[str, ...]] = set()

    def admit(self, values: list[str]) -> tuple[tuple[str, ...], bool]:
        """The values that will be used, and whether any of them was replaced."""
        admitted = tuple(self._admit(position, value) for position, value in enumerate(values))
        if len(self._series) >= MAX_SERIES and admitted not in self._series:
            admitted = (OTHER,) * len(values)
        self._series.add(admitted)
        return admitted, admitted != tuple(values)

    def _admit(self, position: int, value: str) -> str:
        label, known = self.spec.labels[position], self._known[position]
        if value in known or value == OTHER:
            return value
        if label.values is None and len(known) < label.limit:
            known.add(value)
            return value
        return OTHER


def _no(kind: str, key: tuple[str, ...]) -> LookupError:
    return LookupError(f"The catalogue has no {kind} {key[0]!r}.")


def _parent(spec: MetricSpec, names: list[str], registry: CollectorRegistry) -> Child:
    match spec.kind:
        case "counter":
            return Counter(spec.name, spec.help, names, registry=registry)
        case "gauge":
            return Gauge(spec.name, spec.help, names, registry=registry)
        case "histogram":
            return Histogram(spec.name, spec.help, names, registry=registry, buckets=spec.buckets)


def _cpu_limit() -> float:
    """Cores that this process may use: the cgroup's quota, else those of the machine."""
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _memory_limit() -> float:
    """Bytes that this process may use: the cgroup's limit, else the machine's memory."""
    try:
        return float(_MEMORY_LIMIT.read_text())
    except (OSError, ValueError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
