"""Does everybody hear of what happened, and if not, who does not?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Query, above, below, board, heatmap, latency, row, stat, timeseries
from deploy.generate.boards.promql import increase, largest, per_minute, rate, ratio

_ATTEMPTS: Final = "outbox_dispatch_attempts_total"
_FAILURES: Final = "outbox_dispatch_failures_total"
_WEBHOOKS: Final = "webhook_deliveries_total"
_DELIVERED: Final = 'webhook_deliveries_total{result="delivered"}'

BOARD: Final = board(
    "outbox",
    "outbox and webhooks",
    "Whether notifications and webhooks go out, how late they are, and what was given up.",
    row(
        "Now",
        [
            stat(
                "Lag",
                "How long the oldest thing that is due has waited for a worker; webhooks are not counted.",
                largest("outbox_dispatch_lag_seconds"),
                unit=units.Seconds,
                limits=above(10, 60),
            ),
            stat(
                "Waiting",
                "Deliveries that are pending, webhooks among them.",
                largest('worker_queue_depth{queue="outbox"}'),
                unit=units.Short,
            ),
            stat(
                "Given up",
                "Notifications that failed six times: somebody was not told. `sessiongate outbox dead` says who.",
                largest("outbox_dead"),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "Deliveries that failed",
                "The share of attempts in the last ten minutes.",
                ratio(rate(_FAILURES, over="10m"), rate(_ATTEMPTS, over="10m")),
                unit=units.PercentUnit,
                limits=above(0.05, 0.25),
                empty="no attempts",
            ),
            stat(
                "Webhooks delivered",
                "The share of attempts in the last ten minutes. One endpoint that is down is its operator's; all of"
                " them are ours.",
                ratio(rate(_DELIVERED, over="10m"), rate(_WEBHOOKS, over="10m")),
                unit=units.PercentUnit,
                limits=below(0.9, 0.5),
                empty="no attempts",
            ),
            stat(
                "Lost wake-ups, 10 min",
                "What Redis did not take. Workers then look for themselves, a second later.",
                increase("doorbell_failures_total", over="10m"),
                unit=units.Short,
                limits=above(1),
            ),
        ],
    ),
    row(
        "Outbox",
        [
            timeseries(
                "Lag",
                "A steep line is a worker that is gone or stuck; a plateau is one that cannot keep up.",
                Query(largest("outbox_dispatch_lag_seconds"), "lag"),
                unit=units.Seconds,
                limits=above(60),
            ),
            timeseries(
                "Waiting",
                "Deliveries in the outbox, and wake-up calls that no worker has answered yet.",
                Query(largest("worker_queue_depth", "queue"), "{{queue}}"),
                unit=units.Short,
            ),
            timeseries(
                "Given up",
                "It falls when somebody replays.",
                Query(largest("outbox_dead"), "dead"),
                unit=units.Short,
                limits=above(1),
            ),
        ],
        [
            timeseries(
                "Attempts by event",
                "What there is to tell.",
                Query(per_minute(_ATTEMPTS, "event_name"), "{{event_name}}"),
                unit=units.EventsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Failures by event",
                "One event alone is a fault in telling of it; all of them are the database.",
                Query(per_minute(_FAILURES, "event_name"), "{{event_name}}"),
                unit=units.EventsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Jobs that woke a worker",
                "By what they asked for and how they ended.",
                Query(per_minute("job_duration_seconds_count", "task", "result"), "{{task}}: {{result}}"),
                unit=units.CountsPerMinute,
            ),
        ],
    ),
    row(
        "Webhooks",
        [
            timeseries(
                "Deliveries by result",
                "`rejected`: the receiver answered with an error. `gone`: with 410, which turns it off. `forbidden`:"
                " the endpoint leads into a network that is not public. `unreachable` and `timeout` for all endpoints:"
                " the worker has no way out.",
                Query(per_minute(_WEBHOOKS, "result"), "{{result}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            latency(
                "Duration of deliveries",
                "Mostly the receivers' own time.",
                "webhook_delivery_duration_seconds",
            ),
            heatmap(
                "Duration of deliveries, distribution",
                "A band at the top is one receiver that lets us wait.",
                "webhook_delivery_duration_seconds",
                unit=units.Seconds,
            ),
        ],
    ),
)
