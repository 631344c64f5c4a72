"""Every alert fires when it must and is quiet when it must be, by Prometheus' own judgement."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.generate.alerts import ALERTS
from deploy.generate.objectives import OBJECTIVES
from libs.observability.rules import Alert, Objective
from tests.deploy.cases import CASES
from tests.deploy.cases.case import Case, Firing, Quiet
from tests.deploy.monitoring import DEPLOY, installed

BY_NAME = {alert.name: alert for alerts in ALERTS.values() for alert in alerts}


def judged(program: str, *arguments: str) -> None:
    """Asks a program of Prometheus' for its judgement. Raises AssertionError with what it says when it is no."""
    said = subprocess.run([installed(program), *arguments], cwd=DEPLOY, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def told(alert: Alert, case: Firing) -> dict[str, Any]:
    annotations = {**alert.annotations, "description": case.says, "value": case.value}
    return {"exp_labels": dict(case.labels) | alert.own_labels, "exp_annotations": annotations}


def scraped(series: Mapping[str, str], job: str = "sessiongate-worker") -> list[dict[str, str]]:
    """The series as promtool reads them, with the job of those that have none."""

    def of_a_job(name: str) -> str:
        if 'job="' in name:
            return name
        metric, _, labels = name.rstrip("}").partition("{")
        inner = ",".join(filter(None, (labels, f'job="{job}"')))
        return f"{metric}{{{inner}}}"

    return [{"series": of_a_job(name), "values": values} for name, values in series.items()]


def document(case: Case) -> dict[str, Any]:
    alerts = [told(BY_NAME[case.alert], case)] if isinstance(case, Firing) else []
    return {
        "name": repr(case),
        "interval": "1m",
        "input_series": scraped(case.series),
        "alert_rule_test": [{"eval_time": f"{case.after}m", "alertname": case.alert, "exp_alerts": alerts}],
    }


def test_prometheus_and_alertmanager_accept_their_configurations() -> None:
    judged("promtool", "check", "config", "prometheus/prometheus.yml")
    judged("amtool", "check-config", "alertmanager/alertmanager.yml")


@pytest.mark.parametrize(
    ("severity", "receivers"),
    [("critical", "oncall,api"), ("high", "team,api"), ("warning", "team,api"), ("info", "api")],
)
def test_the_api_is_told_of_everything_and_people_of_what_they_have_to_see_to(severity: str, receivers: str) -> None:
    config = ("--config.file", "alertmanager/alertmanager.yml", f"--verify.receivers={receivers}")
    judged("amtool", "config", "routes", "test", *config, f"severity={severity}")


def test_the_watchdog_is_heard_by_whoever_waits_for_it_and_by_nobody_else() -> None:
    config = ("--config.file", "alertmanager/alertmanager.yml", "--verify.receivers=watchdog")
    judged("amtool", "config", "routes", "test", *config, "alertname=Watchdog", "severity=info")


def test_what_supersedes_an_alert_is_more_urgent() -> None:
    pairs = [(alert, BY_NAME[alert.supersedes]) for alert in BY_NAME.values() if alert.supersedes]
    assert pairs
    assert all((more.severity, less.severity) == ("critical", "warning") for more, less in pairs)


def run(rules: str, tests: list[dict[str, Any]], folder: Path) -> None:
    """Has the rules of one generated file tested."""
    file = folder / "tests.yml"
    files = [str(DEPLOY / f"prometheus/rules/{rules}.yml")]
    file.write_text(yaml.safe_dump({"rule_files": files, "evaluation_interval": "1m", "tests": tests}))
    judged("promtool", "test", "rules", str(file))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fire = {case.alert for case in CASES if isinstance(case, Firing)}
    are_quiet = {case.alert for case in CASES if isinstance(case, Quiet)}
    assert fire == BY_NAME.keys()
    assert are_quiet == BY_NAME.keys() - {"Watchdog"}


def test_every_alert_fires_and_is_quiet_as_its_cases_say(tmp_path: Path) -> None:
    run("alerts", [document(case) for case in CASES], tmp_path)


def test_what_others_count_under_the_same_names_is_no_alert_of_ours(tmp_path: Path) -> None:
    told_by_absence = {"AppointmentConversionJobMissing", "ApiMissing", "Watchdog"}
    strange = [
        Quiet(
            case.alert,
            {re.sub(r'job="[^"]*"', 'job="strangers"', name): values for name, values in case.series.items()},
            case.after,
        )
        for case in CASES
        if isinstance(case, Firing) and case.alert not in told_by_absence
    ]
    tests = [document(case) | {"input_series": scraped(case.series, "strangers")} for case in strange]
    run("alerts", tests, tmp_path)


def test_a_case_that_says_something_else_fails(tmp_path: Path) -> None:
    for case in (
        Firing("TargetDown", {"up": "0+0x5"}, after=4, says="something else", value="0"),
        Firing("TargetDown", {"up": "1+0x5"}, after=4, says="sessiongate-worker at  tells no metrics.", value="0"),
        Quiet("TargetDown", {"up": "0+0x5"}, after=4),
    ):
        with pytest.raises(AssertionError, match="TargetDown"):
            run("alerts", [document(case)], tmp_path)


# How fast budgets burn


def traffic(objective: Objective, bad: float, a_minute: float = 1000) -> dict[str, str]:
    """So many events a minute, for long enough, of which a share is bad."""

    def series(share: float) -> str:
        return f"0+{share * a_minute:g}x75"

    if objective.name == "availability":
        count = 'http_responses_total{class="%s"}'
        return {count % "2xx": series(1 - bad), count % "5xx": series(bad)}
    bound = {"booking": "0.5", "sessions_on_time": "1.0"}[objective.name]
    within = f'{objective.metric}_bucket{{le="{bound}"}}'
    return {within: series(1 - bad), f"{objective.metric}_count": series(1)}


def burning(objective: Objective, factor: float, windows: set[str], a_minute: float = 1000) -> dict[str, Any]:
    """Which alerts are there when the budget has burnt for a while, at `factor` times its pace."""
    bad = round(factor * objective.budget, 6)
    expected = []
    for alert in objective.alerts():
        if alert.own_labels["window"] in windows:
            annotations = {
                **alert.annotations,
                "description": f"{100 * bad:.4g}% of {objective.failing}; {100 * objective.budget:g}% may.",
                "value": f"{bad:g}",
            }
            expected.append({"exp_labels": alert.own_labels, "exp_annotations": annotations})
    return {
        "name": f"{objective.name} at {factor} times its pace, {a_minute} a minute",
        "interval": "1m",
        "input_series": scraped(traffic(objective, bad, a_minute=a_minute)),
        "alert_rule_test": [{"eval_time": "75m", "alertname": "SLOErrorBudgetBurn", "exp_alerts": expected}],
    }


def test_a_budget_that_burns_fast_pages_and_one_that_burns_slowly_opens_a_ticket(tmp_path: Path) -> None:
    tests = [
        burning(objective, factor, windows)
        for objective in OBJECTIVES
        for factor, windows in (
            (15, {"1h", "6h", "1d", "3d"}),
            (7, {"6h", "1d", "3d"}),
            (4, {"1d", "3d"}),
            (0.9, set()),
        )
    ]
    run("objectives", tests, tmp_path)


def test_the_failures_of_a_few_events_open_a_ticket_and_those_of_fewer_nothing(tmp_path: Path) -> None:
    tests = [
        burning(objective, 15, windows, a_minute=a_minute)
        for objective in OBJECTIVES
        for a_minute, windows in ((0.5, {"1d", "3d"}), (0.15, set()))
    ]
    run("objectives", tests, tmp_path)


# Other names of metrics


def test_a_histogram_is_told_as_a_summary_in_milliseconds_and_a_process_in_percent(tmp_path: Path) -> None:
    labels = 'route="/api/v1/me",method="GET",status="200"'
    buckets = {"0.1": "0+50x10", "0.25": "0+90x10", "0.5": "0+100x10", "+Inf": "0+100x10"}
    series = {f'http_request_duration_seconds_bucket{{{labels},le="{le}"}}': each for le, each in buckets.items()} | {
        f"http_request_duration_seconds_sum{{{labels}}}": "0+12x10",
        f"http_request_duration_seconds_count{{{labels}}}": "0+100x10",
        'booking_post_own_duration_seconds_bucket{le="0.5"}': "0+100x10",
        'booking_post_own_duration_seconds_bucket{le="+Inf"}': "0+100x10",
        'process_cpu_seconds_total{job="sessiongate-api"}': "0+30x10",
        'process_cpu_limit_cores{job="sessiongate-api"}': "2+0x10",
        'process_resident_memory_bytes{job="sessiongate-api"}': "256+0x10",
        'process_memory_limit_bytes{job="sessiongate-api"}': "1024+0x10",
    }
    answers = {
        'http_request_duration_ms{quantile="0.5"}': (
            '{method="GET",route="/api/v1/me",status="200"}',
            100,
        ),
        'http_request_duration_ms{quantile="0.95"}': (
            '{method="GET",route="/api/v1/me",status="200"}',
            375,
        ),
        'http_request_duration_ms{quantile="0.99"}': (
            '{method="GET",route="/api/v1/me",status="200"}',
            475,
        ),
        "http_request_duration_ms_sum": (
            '{job="sessiongate-worker",method="GET",route="/api/v1/me",status="200"}',
            120_000,
        ),
        "http_request_duration_ms_count": (
            '{job="sessiongate-worker",method="GET",route="/api/v1/me",status="200"}',
            1000,
        ),
        "booking_post_p95_ms": ("{}", 475),
        "cpu_utilization_percent": ('{job="sessiongate-api"}', 25),
        "memory_utilization_percent": ('{job="sessiongate-api"}', 25),
    }
    test = {
        "interval": "1m",
        "input_series": scraped(series),
        "promql_expr_test": [
            {
                "expr": f"sum without (quantile) (round({expr}, 0.001))",
                "eval_time": "10m",
                "exp_samples": [{"labels": answered, "value": value}],
            }
            for expr, (answered, value) in answers.items()
        ],
    }
    run("aliases", [test], tmp_path)
