"""What fires, since when, does anybody hear of it, and can the alerts be trusted?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Column, Query, above, board, row, stat, states, table, timeseries
from deploy.generate.boards.promql import STEP, increase, or_zero, per_minute, quantile, rate, ratio

# The watchdog always fires, and nothing is wrong while it does.
_FIRING: Final = 'ALERTS{alertstate="firing", alertname!="Watchdog"}'
_NOTIFICATIONS: Final = "alertmanager_notifications_total"
_FAILED: Final = "alertmanager_notifications_failed_total"


def _firing(severity: str) -> str:
    return or_zero(f'count({_FIRING[:-1]}, severity="{severity}"}})')


BOARD: Final = board(
    "alerts",
    "alerts",
    "What fires and since when, whether anybody hears of it, and whether the rules themselves work.",
    row(
        "Now",
        [
            stat("Critical", "Somebody has to come now.", _firing("critical"), unit=units.Short, limits=above(1)),
            stat("High", "To be looked at today.", _firing("high"), unit=units.Short, limits=above(1)),
            stat("Warning", "To be looked at soon.", _firing("warning"), unit=units.Short, limits=above(1, 10)),
            stat("Info", "To be known.", _firing("info"), unit=units.Short),
            stat(
                "Not delivered, 1 h",
                "Notifications that no try could deliver. Whoever should know does not.",
                increase(_FAILED, over="1h"),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "Failed rules, 1 h",
                "Evaluations that ended in an error: their alerts cannot fire.",
                increase("prometheus_rule_evaluation_failures_total", over="1h"),
                unit=units.Short,
                limits=above(1),
            ),
        ],
        [
            table(
                "Firing",
                "Each with its labels, the newest first.",
                Column(
                    "active since",
                    f"1000 * ALERTS_FOR_STATE and ignoring (alertstate) {_FIRING}",
                    "dateTimeFromNow",
                ),
                empty="all quiet",
            ),
        ],
    ),
    row(
        "History",
        [
            states(
                "What fired when",
                "Two that begin together have mostly one cause: the one that begins first.",
                Query(f"max by (alertname) ({_FIRING})", "{{alertname}}"),
                {"1": "firing"},
                above(1),
                empty="all quiet",
            ),
        ],
        [
            timeseries(
                "Firing by severity",
                "How bad it was, and for how long.",
                Query(f"count by (severity) ({_FIRING})", "{{severity}}"),
                unit=units.Short,
                stacked=True,
                empty="all quiet",
            ),
            table(
                "Most often in this period",
                "How many minutes each has fired. What fires often and needs nobody should be changed.",
                Column(
                    "minutes",
                    f"sum by (alertname, severity) (count_over_time({_FIRING}[$__range:1m]))",
                    units.Short,
                ),
                empty="all quiet",
            ),
        ],
    ),
    row(
        "Channels",
        [
            timeseries(
                "Notifications",
                "Sent by Alertmanager, by the kind of receiver.",
                Query(per_minute(_NOTIFICATIONS, "integration"), "{{integration}}"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Notifications that failed",
                "The share of each kind of receiver that could not be delivered.",
                Query(ratio(rate(_FAILED, "integration"), rate(_NOTIFICATIONS, "integration")), "{{integration}}"),
                unit=units.PercentUnit,
                limits=above(0.05, 0.5),
                empty="none sent",
            ),
            timeseries(
                "Duration of notifications, P95",
                "By the kind of receiver.",
                Query(quantile(0.95, "alertmanager_notification_latency_seconds", "integration"), "{{integration}}"),
                unit=units.Seconds,
            ),
        ],
        [
            timeseries(
                "On the way to Alertmanager",
                "Waiting in Prometheus, dropped or failed. Above 0 for long, Alertmanager is away.",
                Query("sum(prometheus_notifications_queue_length)", "waiting"),
                Query(f"sum(increase(prometheus_notifications_dropped_total[{STEP}]))", "dropped"),
                Query(f"sum(increase(prometheus_notifications_errors_total[{STEP}]))", "failed"),
                unit=units.Short,
            ),
            timeseries(
                "In Alertmanager",
                "Suppressed are silenced, or inhibited by a more urgent one.",
                Query("sum by (state) (alertmanager_alerts)", "{{state}}"),
                unit=units.Short,
                stacked=True,
            ),
            timeseries(
                "Kept by the API",
                "Alerts that it was told of, each once. None of them while something fires: nobody will find it in the"
                " list of alerts later.",
                Query(per_minute("alerts_received_total", "status"), "{{status}}"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Silences",
                "What somebody has decided not to hear, for a time.",
                Query("sum by (state) (alertmanager_silences)", "{{state}}"),
                unit=units.Short,
            ),
        ],
    ),
    row(
        "Rules",
        [
            timeseries(
                "Evaluations that failed",
                "By group of rules.",
                Query(
                    f"sum by (rule_group) (increase(prometheus_rule_evaluation_failures_total[{STEP}]))",
                    "{{rule_group}}",
                ),
                unit=units.Short,
                limits=above(1),
            ),
            timeseries(
                "Time to evaluate",
                "Of each group of rules. It has to stay below the interval of evaluation.",
                Query("max by (rule_group) (prometheus_rule_group_last_duration_seconds)", "{{rule_group}}"),
                unit=units.Seconds,
            ),
            timeseries(
                "Rules",
                "How many each group has. A group that goes missing is a file that could not be loaded.",
                Query("max by (rule_group) (prometheus_rule_group_rules)", "{{rule_group}}"),
                unit=units.Short,
                stacked=True,
            ),
            timeseries(
                "Configuration that could be loaded",
                "1, or 0 while the one on disk has an error and the last good one is in force.",
                Query("min(prometheus_config_last_reload_successful)", "Prometheus"),
                Query("min(alertmanager_config_last_reload_successful)", "Alertmanager"),
                unit=units.BoolYesNo,
            ),
        ],
    ),
)
