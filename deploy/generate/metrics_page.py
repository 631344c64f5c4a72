"""docs/metrics.md: what can be asked of Prometheus, from the catalogue."""

from collections.abc import Iterable
from typing import Final

from libs.domain.catalogue import ROOMS
from libs.observability.catalogue import DURATION_BUCKETS, OWN, Label, MetricSpec

_INTRODUCTION: Final = """\
<!-- Made by `make generate` from libs/domain/catalogue.py and libs/observability/catalogue.py; edit those. -->

# Metrics

The API and the worker serve `/metrics`, as OpenMetrics or as Prometheus text, to whom `SESSIONGATE_METRICS_ALLOW` or
`SESSIONGATE_METRICS_BASIC_AUTH` admits. Both have all of these; *from* says in which of them a metric moves, where it
is one alone. Gauges of the database are set by every worker alike: ask for their `max`.

Every series whose labels have known values exists from the start, at zero. A value that a label does not know is
counted as `other`, and so is whatever comes after the first values of a label that takes any. Ids are never labels.

Histograms have the bounds {bounds}, where nothing else is said. A name
after *also* is answered by a recording rule, a histogram's as a summary in milliseconds where the name ends in `_ms`.

Besides these there are `build_info` (`service`, `version`, `python`) and the client library's `process_*` and
`python_*`.
"""
_HEAD: Final = "| metric | kind | unit | labels | from | |\n|---|---|---|---|---|---|\n"
_UNITS: Final = {
    "timestamp_seconds": "Unix seconds",
    "seconds": "seconds",
    "bytes": "bytes",
    "cores": "cores",
    "minor_total": "minor units",
}
"""By how names end; whatever ends otherwise counts things."""


def files() -> dict[str, str]:
    rooms = {**ROOMS, "Each process, and its telemetry": OWN}
    sections = [f"\n## {room}\n\n{_HEAD}{_rows(specs)}" for room, specs in rooms.items()]
    return {"docs/metrics.md": _INTRODUCTION.format(bounds=_bounds(DURATION_BUCKETS)) + "".join(sections)}


def _rows(specs: Iterable[MetricSpec]) -> str:
    return "".join(f"| {' | '.join(_cells(spec))} |\n" for spec in specs)


def _cells(spec: MetricSpec) -> tuple[str, ...]:
    unit = next((unit for ending, unit in _UNITS.items() if spec.name.endswith(f"_{ending}")), "")
    sentences = [spec.help]
    if spec.buckets not in ((), DURATION_BUCKETS):
        sentences.append(f"Bounds: {_bounds(spec.buckets)}")
    if spec.source_alias:
        sentences.append(f"Also: `{spec.source_alias}`")
    labels = "<br>".join(map(_label, spec.labels))
    return f"`{spec.name}`", spec.kind, unit, labels, spec.emitter or "", ". ".join(sentences)


def _label(label: Label) -> str:
    values = f"the first {label.limit}" if label.values is None else ", ".join(f"`{value}`" for value in label.values)
    return f"`{label.name}`: {values}"


def _bounds(buckets: Iterable[float]) -> str:
    return ", ".join(f"{bound:g}" for bound in buckets)
