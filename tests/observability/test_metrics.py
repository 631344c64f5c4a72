"""The catalogue, the registry made from it, and what a scraper reads."""

import asyncio
import platform
import time
from itertools import product

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from libs.domain.catalogue import CATALOGUE
from libs.observability import registry
from libs.observability.catalogue import (
    DURATION_BUCKETS,
    OTHER,
    OWN,
    Label,
    MetricSpec,
    counter,
    gauge,
    histogram,
)
from libs.observability.exposition import render
from libs.observability.loop import INTERVAL, watch_loop
from libs.observability.registry import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
ALL = (*OWN, *CATALOGUE)

CHAIRS = counter("chairs_total", "Chairs", Label("colour", ("red", "blue")), Label("legs", ("3", "4")))
GUESTS = counter("guests_total", "Guests", Label("table", limit=3))
WAIT = histogram("wait_seconds", "Wait", Label("colour", ("red", "blue")))
OPEN = gauge("open_doors", "Open doors")


def metrics_of(*specs: MetricSpec) -> Metrics:
    return Metrics(specs, version="1.2.3", service="test")


def exposed(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, _ = render(metrics, "")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_every_closed_series_is_there_from_the_start_at_zero(spec: MetricSpec) -> None:
    series = exposed(metrics_of(*CATALOGUE))
    closed = [label.values for label in spec.labels if label.values is not None]
    expected = spec.combinations or (product(*closed) if len(closed) == len(spec.labels) else ())
    for values in expected:
        labels = {(label.name, str(value)) for label, value in zip(spec.labels, values, strict=True)}
        names = [spec.name] if spec.kind != "histogram" else [f"{spec.name}_sum", f"{spec.name}_count"]
        for name in names:
            value = series[name, frozenset(labels)]
            assert value == 0 or name.startswith("process_")
        for bound in spec.buckets:
            assert series[f"{spec.name}_bucket", frozenset({*labels, ("le", str(float(bound)))})] == 0


def test_the_exposition_of_the_whole_catalogue_is_valid_in_both_formats() -> None:
    metrics = metrics_of(*CATALOGUE)
    for accept, parse in (("", parse_text), (OPENMETRICS, parse_openmetrics)):
        body, content_type = render(metrics, accept)
        families = {family.name: family for family in parse(body.decode())}
        for spec in ALL:
            family = families[spec.name.removesuffix("_total")]
            assert (family.type, family.documentation) == (spec.kind, spec.help)
        assert content_type.startswith("application/openmetrics-text" if accept else "text/plain")


def test_no_series_tells_when_it_was_created() -> None:
    assert not [name for name, _ in exposed(metrics_of(*CATALOGUE)) if name.endswith("_created")]


def test_the_build_and_the_limits_of_the_process_are_told() -> None:
    metrics = metrics_of()
    assert [labels for (name, labels) in exposed(metrics) if name == "build_info"] == [
        frozenset({("service", "test"), ("version", "1.2.3"), ("python", platform.python_version())})
    ]
    assert metrics.sample("process_cpu_limit_cores") > 0
    assert metrics.sample("process_memory_limit_bytes") > 1_000_000


def test_label_values_go_by_position_and_are_counted_apart() -> None:
    metrics = metrics_of(CHAIRS)
    metrics.counter("chairs_total", "red", "4").inc(2)
    assert metrics.sample("chairs_total", colour="red", legs="4") == 2
    assert metrics.sample("chairs_total", colour="red", legs="3") == 0


def test_an_unknown_label_value_becomes_other_and_is_counted_each_time() -> None:
    metrics = metrics_of(CHAIRS)
    for colour in ("green", "pink", "green"):
        metrics.counter("chairs_total", colour, "4").inc()
    assert metrics.sample("chairs_total", colour=OTHER, legs="4") == 3
    assert metrics.sample("obs_label_values_rejected_total", metric="chairs_total") == 3
    assert "green" not in render(metrics, "")[0].decode()


def test_an_open_label_takes_as_many_values_as_its_limit_says() -> None:
    metrics = metrics_of(GUESTS)
    for _ in range(2):
        for table in ("a", "b", "c", "d", "e"):
            metrics.counter("guests_total", table).inc()
    assert [metrics.sample("guests_total", table=table) for table in ("a", "b", "c", "d", OTHER)] == [2, 2, 2, 0, 4]
    assert metrics.sample("obs_label_values_rejected_total", metric="guests_total") == 4


def test_a_metric_has_no_more_series_than_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_SERIES", 10)
    metrics = metrics_of(counter("seats_total", "Seats", Label("row"), Label("seat")))
    for row, seat in product("abcdef", "uvwxyz"):
        metrics.counter("seats_total", row, seat).inc()
    values = [value for (name, _), value in exposed(metrics).items() if name == "seats_total"]
    assert len(values) == 11
    assert sum(values) == 36
    assert metrics.sample("seats_total", row=OTHER, seat=OTHER) == 26


def test_rejections_of_more_metrics_than_a_label_holds_are_still_counted() -> None:
    specs = [counter(f"thing{number}_total", "Things", Label("kind", ("a",))) for number in range(120)]
    metrics = metrics_of(*specs)
    for spec in specs:
        metrics.counter(spec.name, "b").inc()
    counted = [value for (name, _), value in exposed(metrics).items() if name == "obs_label_values_rejected_total"]
    assert counted == [1.0] * 120


def test_a_name_a_kind_or_a_number_of_labels_that_is_not_in_the_catalogue_is_a_mistake() -> None:
    metrics = metrics_of(CHAIRS, WAIT, OPEN)
    with pytest.raises(LookupError, match="no metric 'tables_total'"):
        metrics.counter("tables_total")
    for kind in (metrics.gauge, metrics.histogram):
        with pytest.raises(LookupError, match="chairs_total"):
            kind("chairs_total", "red", "4")
    for wrong in (metrics.counter, metrics.histogram):
        with pytest.raises(LookupError, match="open_doors"):
            wrong("open_doors")
    with pytest.raises(LookupError, match="wait_seconds"):
        metrics.counter("wait_seconds", "red")
    for values in ((), ("red",), ("red", "4", "5")):
        with pytest.raises(LookupError, match="takes 2 label values"):
            metrics.counter("chairs_total", *values)


def test_a_metric_declared_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="declared twice"):
        metrics_of(OPEN, OPEN)
    with pytest.raises(ValueError, match="declared twice"):
        metrics_of(gauge("asyncio_tasks", "Ours already"))


@pytest.mark.parametrize(
    "name", ["user_id", "id_", "email", "phone", "url", "path", "message", "job", "instance", "Colour"]
)
def test_ids_and_personal_data_are_no_names_for_a_label(name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a label"):
        Label(name)


def test_the_rules_for_names_hold() -> None:
    with pytest.raises(ValueError, match="not snake_case"):
        gauge("openDoors", "x")
    with pytest.raises(ValueError, match="only counters, end in _total"):
        counter("chairs", "x")
    with pytest.raises(ValueError, match="only counters, end in _total"):
        gauge("chairs_total", "x")
    with pytest.raises(ValueError, match="ends in its base unit"):
        histogram("wait_ms", "x")
    with pytest.raises(ValueError, match="has buckets"):
        histogram("wait_seconds", "x", buckets=())


@pytest.mark.parametrize("combination", [("red",), ("red", "5"), ("red", "4", "x"), ("4", "red")])
def test_a_listed_combination_must_be_made_of_values_of_the_labels(combination: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="are not values of its labels"):
        counter("chairs_total", "Chairs", *CHAIRS.labels, combinations=[("red", "4"), combination])


def test_only_the_listed_combinations_exist_from_the_start() -> None:
    metrics = metrics_of(counter("chairs_total", "Chairs", *CHAIRS.labels, combinations=[("red", "4"), ("blue", "3")]))
    there = {labels for (name, labels) in exposed(metrics) if name == "chairs_total"}
    assert there == {frozenset({("colour", "red"), ("legs", "4")}), frozenset({("colour", "blue"), ("legs", "3")})}


def test_the_thresholds_of_the_objectives_are_bounds_of_the_buckets() -> None:
    assert {0.5, 5.0} <= set(DURATION_BUCKETS)
    for spec in CATALOGUE:
        if spec.source_alias:
            assert {0.5, 5.0} <= set(spec.buckets), spec.name


@pytest.mark.parametrize(("accept", "shown"), [(OPENMETRICS, True), ("text/plain", False), ("", False)])
def test_exemplars_are_shown_to_scrapers_that_ask_for_openmetrics(accept: str, shown: bool) -> None:
    metrics = metrics_of(WAIT)
    metrics.histogram("wait_seconds", "red").observe(0.3, {"trace_id": "a" * 32})
    body = render(metrics, accept)[0].decode()
    assert (f'# {{trace_id="{"a" * 32}"}} 0.3' in body) is shown


async def test_the_loop_is_watched_for_the_length_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.observability.loop.INTERVAL", INTERVAL / 50)
    metrics = metrics_of()
    deadline = time.monotonic() + 5
    async with watch_loop(metrics):
        while metrics.sample("asyncio_loop_lag_seconds_count") < 3:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
    assert metrics.sample("asyncio_tasks") >= 2
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "watch_loop"]
