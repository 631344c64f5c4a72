"""Rules as data: what follows from a catalogue and from an objective."""

import pytest

from libs.observability.catalogue import Label, MetricSpec, gauge, histogram
from libs.observability.rules import Alert, Group, Objective, Recording, aliases, document, scoped


def alert(expr: str) -> Alert:
    return Alert("A", expr, "high", "house", "doors", summary="Doors", description="Doors.", runbook="doors.md")


def objective(target: float) -> Objective:
    return Objective(
        "doors", target, "sum(rate(a[$window]))", "sum(rate(b[$window]))", "house", "a", "slam", "doors.md"
    )


def test_an_alert_tells_its_threshold_its_value_and_where_to_read_on() -> None:
    rule = alert("rate(doors_total[5m]) >= 0.25 and windows == 3").document()
    assert rule == {
        "alert": "A",
        "expr": "rate(doors_total[5m]) >= 0.25 and windows == 3",
        "labels": {"severity": "high", "component": "house"},
        "annotations": {
            "summary": "Doors",
            "description": "Doors.",
            "runbook": "doors.md",
            "metric": "doors",
            "value": '{{ $value | printf "%.6g" }}',
            "threshold": "0.25",
        },
    }


def test_an_alert_without_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="compares with no number"):
        alert('absent(doors{floor="3"})')


def test_a_rule_file_holds_its_groups_in_order() -> None:
    groups = [Group("b", (Recording("b:b", "b"),)), Group("a", (Recording("a:a", "a", {"floor": "1"}),))]
    assert document(groups) == {
        "groups": [
            {"name": "b", "rules": [{"record": "b:b", "expr": "b"}]},
            {"name": "a", "rules": [{"record": "a:a", "expr": "a", "labels": {"floor": "1"}}]},
        ]
    }


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("doors > 1", 'doors{job="house"} > 1'),
        ('rate(wait_seconds_bucket{le="}"}[5m])', 'rate(wait_seconds_bucket{job="house", le="}"}[5m])'),
        ("sum by (doors_open) (indoors) / doors:ratio", "sum by (doors_open) (indoors) / doors:ratio"),
    ],
)
def test_rules_can_be_confined_to_the_series_of_one_product(written: str, meant: str) -> None:
    groups = [Group("g", (Recording("a", written),))]
    assert scoped(groups, ["doors", "wait_seconds"], 'job="house"') == (Group("g", (Recording("a", meant),)),)


def test_a_metric_answers_under_its_other_name_as_well() -> None:
    catalogue = (
        histogram("wait_seconds", "Wait", Label("floor", ("1", "2")), source_alias="wait_ms"),
        gauge("open_doors", "Open doors", source_alias="doors_percent", alias_expr="100 * open_doors / doors"),
        gauge("windows", "Windows"),
    )
    rules = aliases(catalogue).rules
    assert [rule.record for rule in rules if isinstance(rule, Recording)] == [
        *["wait_ms"] * 3,
        "wait_ms_sum",
        "wait_ms_count",
        "doors_percent",
    ]
    assert rules[1] == Recording(
        "wait_ms",
        "1000 * histogram_quantile(0.95, sum by (le, floor) (rate(wait_seconds_bucket[5m])))",
        {"quantile": "0.95"},
    )


def test_only_a_histogram_in_seconds_can_be_told_as_a_summary() -> None:
    for name, alias, kind in (
        ("a_messages", "a_ms", "histogram"),
        ("a_seconds", "a", "histogram"),
        ("a", "b", "gauge"),
    ):
        with pytest.raises(ValueError, match="summary in milliseconds"):
            MetricSpec(name, kind, "A", buckets=(1.0,), source_alias=alias)  # type: ignore[arg-type]


def test_an_objective_is_paged_for_by_two_windows_and_only_with_enough_events() -> None:
    alerts = objective(0.99).alerts()
    assert alerts[1].expr.splitlines() == [
        'slo:error_ratio:rate30m{slo="doors"} > 0.06',
        "and",
        'slo:error_ratio:rate6h{slo="doors"} > 0.06',
        "and",
        'slo:events:increase30m{slo="doors"} > 20',
    ]
    assert [(alert.severity, alert.own_labels["window"], alert.threshold) for alert in alerts] == [
        ("critical", "1h", "0.144"),
        ("critical", "6h", "0.06"),
        ("warning", "1d", "0.03"),
        ("warning", "3d", "0.01"),
    ]
    assert {alert.own_labels["slo"] for alert in alerts} == {"doors"}


def test_an_objective_records_how_much_fails_over_each_window_and_what_was_promised() -> None:
    now, slow = objective(0.99).groups()
    recorded = {rule.record: rule for group in (now, slow) for rule in group.rules if isinstance(rule, Recording)}
    ratios = [name.removeprefix("slo:error_ratio:rate") for name in recorded if "error_ratio" in name]
    assert ratios == ["5m", "30m", "1h", "2h", "6h", "1d", "3d"]
    assert recorded["slo:error_ratio:rate3d"].expr == "sum(rate(a[3d]))\n/\nsum(rate(b[3d]))"
    assert recorded["slo:events:increase30m"].expr == "1800 * sum(rate(b[30m]))"
    assert recorded["slo:objective:ratio"].expr == "vector(0.99)"
    assert all(rule.labels == {"slo": "doors"} for rule in recorded.values())
    assert now.rules[-4:] == objective(0.99).alerts()
    assert (now.interval, slow.document()["interval"]) == (None, "2m")


@pytest.mark.parametrize("target", [0.9, 1.0, 1.5])
def test_an_objective_whose_budget_cannot_burn_fast_enough_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="cannot burn"):
        objective(target)
