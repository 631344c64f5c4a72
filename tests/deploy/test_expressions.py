"""Every expression of boards and rules refers to what there is, and can mean something."""

import re
from typing import Final

import pytest

from libs.domain.catalogue import CATALOGUE
from libs.observability.catalogue import OWN
from tests.architecture.test_contract import ROUTES
from tests.deploy.generated import RULES, Expression, of_boards, of_rules
from tests.deploy.promql import Reading, Series, Values, series_of

TARGET: Final[dict[str, Values]] = {"job": None, "instance": None}
ROUTE: Final = frozenset({route.partition(" ")[2] for route in ROUTES} | {"unmatched"})


def counter(*labels: str) -> Series:
    return Series(TARGET | dict.fromkeys(labels), counts=True)


def gauge(*labels: str) -> Series:
    return Series(TARGET | dict.fromkeys(labels))


FOREIGN: Final = {
    "up": gauge(),
    "build_info": gauge("service", "version", "python"),
    "process_cpu_seconds_total": counter(),
    "process_resident_memory_bytes": gauge(),
    "process_open_fds": gauge(),
    "process_max_fds": gauge(),
    "process_start_time_seconds": gauge(),
    "ALERTS": Series({"alertname": None, "alertstate": frozenset({"firing", "pending"}), "severity": None}, more=True),
    "ALERTS_FOR_STATE": Series({"alertname": None, "severity": None}, more=True),
    "prometheus_notifications_queue_length": gauge(),
    "prometheus_notifications_dropped_total": counter(),
    "prometheus_notifications_errors_total": counter("alertmanager"),
    "prometheus_rule_evaluation_failures_total": counter("rule_group"),
    "prometheus_rule_group_last_duration_seconds": gauge("rule_group"),
    "prometheus_rule_group_rules": gauge("rule_group"),
    "prometheus_config_last_reload_successful": gauge(),
    "alertmanager_notifications_total": counter("integration"),
    "alertmanager_notifications_failed_total": counter("integration"),
    "alertmanager_notification_latency_seconds_bucket": counter("integration", "le"),
    "alertmanager_alerts": gauge("state"),
    "alertmanager_silences": gauge("state"),
    "alertmanager_config_last_reload_successful": gauge(),
}
"""What Prometheus, Alertmanager and the client library have of their own."""


def known() -> dict[str, Series]:
    """All series there are: those that are scraped, and those that rules make of them."""
    found = dict(FOREIGN)
    for spec in (*OWN, *CATALOGUE):
        for name, series in series_of(spec, TARGET):
            route = {"route": ROUTE} if "route" in series.labels else {}
            found[name] = Series({**series.labels, **route}, series.counts)
    recordings = [rule for rules in RULES.values() for rule in rules if "record" in rule]
    for rule in recordings:
        answer = Reading(rule["expr"], found).answer or Series({})
        before = found.get(rule["record"], Series({})).labels
        added = {
            name: frozenset({value}) | (before.get(name) or frozenset())
            for name, value in rule.get("labels", {}).items()
        }
        found[rule["record"]] = Series({**answer.labels, **added}, answer.counts, answer.more)
    return found


KNOWN: Final = known()
RECORDED: Final = {rule["record"] for rules in RULES.values() for rule in rules if "record" in rule}
EXPRESSIONS: Final = (*of_boards(), *of_rules())


@pytest.mark.parametrize("expression", [*of_boards()], ids=str)
def test_no_panel_shows_a_counter_as_it_is(expression: Expression) -> None:
    answer = Reading(expression.text, KNOWN).answer
    assert answer is None or not answer.counts


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
def test_every_expression_can_mean_something(expression: Expression) -> None:
    reading = Reading(expression.text, KNOWN)
    answer = reading.answer or Series({})
    assert reading.mistakes == []
    assert [label for label in expression.quoted if not answer.has(label)] == []


@pytest.mark.parametrize("expression", [*of_rules()], ids=str)
def test_every_rule_says_of_which_jobs_it_takes_its_series(expression: Expression) -> None:
    scraped = [each for each in Reading(expression.text, KNOWN).selectors if each.name not in RECORDED]
    assert [each.name for each in scraped if "job" not in {matcher.name for matcher in each.matchers.matchers}] == []


def test_every_metric_is_looked_at_somewhere() -> None:
    words = {word for expression in EXPRESSIONS for word in re.findall(r"\w+", expression.text)}
    assert [spec.name for spec in (*OWN, *CATALOGUE) if not words & {name for name, _ in series_of(spec, {})}] == []


@pytest.mark.parametrize(
    ("expression", "mistake"),
    [
        ("sum(appointments_dew_count)", "there is no series appointments_dew_count"),
        ("chat_message_processing_duration_seconds", "there is no series chat_message_processing_duration_seconds"),
        ("sum by (operation) (appointments_due_count)", "there is no label operation here"),
        ("sum without (operation) (appointments_due_count)", "there is no label operation here"),
        ('appointments_due_count{operation="join"}', "there is no label operation here"),
        ('guard_verdicts_total{verdict="blocked"}', "guard_verdicts_total never has verdict='blocked'"),
        ('guard_verdicts_total{verdict=~"warned|blocked"}', "never has verdict='warned|blocked'"),
        ('http_request_duration_seconds_count{route="/api/v2/me"}', "never has route='/api/v2/me'"),
        ('appointment_start_delay_seconds_bucket{le="1"}', "never has le='1'"),
        ("rate(appointments_due_count[5m])", "rate() of what is no counter"),
        ("increase(sum(chat_messages_total)[5m:1m])", "increase() of what is no counter"),
        ("delta(chat_messages_total[5m])", "delta() of a counter"),
        ("auth_failures_total > 10", "> of a counter, which only ever grows"),
        ("histogram_quantile(0.95, sum(rate(settlement_duration_seconds_bucket[5m])))", "there is no label le here"),
        ("db_connections_in_use / on (task) db_connections_max", "there is no label task here"),
        (
            "sum by (reason) (rate(appointment_session_conversion_failed_total[5m]))"
            " / sum(rate(appointment_session_conversion_attempted_total[5m]))",
            "never meet: only one of them has reason",
        ),
        ("sum(rate(chat_messages_total[5m])", "unclosed left parenthesis"),
    ],
)
def test_what_cannot_work_is_noticed(expression: str, mistake: str) -> None:
    mistakes = Reading(expression, KNOWN).mistakes
    assert mistakes
    assert all(mistake in each for each in mistakes)


@pytest.mark.parametrize(
    "expression",
    [
        "1000 * rate(settlement_duration_seconds_sum[5m]) / ignoring (pool) db_connections_max",
        "sum by (reason) (auth_failures_total) / ignoring (reason) group_left () sum(auth_failures_total)",
        "max by (job) (up) and on (job) (asyncio_tasks > 1)",
        "topk(3, rate(chat_messages_total[5m])) or vector(0)",
        'absent(up{job="api"}) or time() - process_start_time_seconds > bool scalar(up)',
        "increase(http_request_duration_ms_count[5m])",
    ],
)
def test_what_works_is_let_through(expression: str) -> None:
    assert Reading(expression, KNOWN).mistakes == []
