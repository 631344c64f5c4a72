"""Is the service keeping its promises, and if not, where does it hurt?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Column, Query, above, board, latency, row, stat, table, timeseries
from deploy.generate.boards.promql import increase, largest, or_zero, per_minute, quantile, rate, ratio, total
from deploy.generate.objectives import FAILED, REQUESTS, RESPONSES, RESPONSES_FAILED
from libs.observability.rules import PAGE

_BURN: Final = "/ (1 - slo:objective:ratio)"


def _kept(window: str) -> str:
    """The share of good events; nothing where there were no events, whose ratio is no number."""
    return f"1 - slo:error_ratio:rate{window} >= 0"


BOARD: Final = board(
    "slo-overview",
    "SLO overview",
    "Whether the service keeps its promises. Begin here: whatever is red leads to the board of its part.",
    row(
        "Now",
        [
            stat(
                "Urgent alerts",
                "Critical alerts page whoever is on call, high ones tell the team, which sees to them today. The"
                " board of alerts lists them.",
                or_zero('count(ALERTS{alertstate="firing", severity=~"critical|high"})'),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "Processes that answer",
                "API and worker processes that Prometheus can read.",
                "count by (service) (build_info)",
                unit=units.Short,
                legend="{{service}}",
            ),
            stat(
                "Waiting for a session",
                "Appointments that are due and have no session: people who look at an empty room.",
                largest("appointments_due_count"),
                unit=units.Short,
                limits=above(1, 10),
            ),
            stat(
                "Requests that failed",
                "The share that was answered with 5xx in the last five minutes.",
                ratio(rate(RESPONSES_FAILED, over="5m"), rate(RESPONSES, over="5m")),
                unit=units.PercentUnit,
                limits=above(0.001, 0.05),
                empty="no traffic",
            ),
            stat(
                "Open sockets",
                "Clients that follow a conversation. A sudden fall is an outage, whatever else is green.",
                total("chat_connections_active"),
                unit=units.Short,
            ),
            stat(
                "Sessions ended, 1 h",
                "How much is at stake at this time of day.",
                increase("chat_session_duration_seconds_count", over="1h"),
                unit=units.Short,
            ),
        ],
    ),
    row(
        "Objectives",
        [
            stat(
                "Kept in the last hour",
                "The share of good events of each objective.",
                _kept("1h"),
                unit=units.PercentUnit,
                legend="{{slo}}",
                empty="no events",
            ),
            stat(
                "Kept in three days",
                "The share of good events of each objective.",
                _kept("3d"),
                unit=units.PercentUnit,
                legend="{{slo}}",
                empty="no events",
            ),
            stat(
                "Promised",
                "The share of good events that each objective asks for.",
                "slo:objective:ratio",
                unit=units.PercentUnit,
                legend="{{slo}}",
            ),
        ],
        [
            timeseries(
                "Budget burn over an hour",
                "How many times faster than allowed the error budget is spent: at 1 it lasts exactly for its period."
                f" The line is {PAGE[0].factor:g}, at which somebody is paged.",
                Query(f"slo:error_ratio:rate1h {_BURN}", "{{slo}}"),
                unit=units.NoUnit,
                limits=above(PAGE[0].factor),
            ),
            timeseries(
                "Budget burn over six hours",
                f"The slower fire; the line is {PAGE[1].factor:g}, at which somebody is paged.",
                Query(f"slo:error_ratio:rate6h {_BURN}", "{{slo}}"),
                unit=units.NoUnit,
                limits=above(PAGE[1].factor),
            ),
        ],
        [
            timeseries(
                "Booking, without third parties",
                "The objective: 95 % within half a second of our own time.",
                Query(quantile(0.5, "booking_post_own_duration_seconds"), "P50"),
                Query(quantile(0.95, "booking_post_own_duration_seconds"), "P95"),
                unit=units.Seconds,
                limits=above(0.5),
            ),
            timeseries(
                "Bookings and conflicts",
                "A conflict is a slot that somebody else took first. Conflicts without bookings point to the calendar.",
                Query(per_minute("scheduling_book_duration_seconds_count"), "attempts"),
                Query(per_minute("scheduling_book_conflict_total"), "conflicts"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Delay of starts",
                "The objective: 99 % of sessions start within a second of their time.",
                Query(quantile(0.5, "appointment_start_delay_seconds"), "P50"),
                Query(quantile(0.99, "appointment_start_delay_seconds"), "P99"),
                unit=units.Seconds,
                limits=above(1),
            ),
        ],
    ),
    row(
        "Requests",
        [
            timeseries(
                "Requests by status",
                "A rise of 401 is a key that changed, of 403 and 400 a flag or a client, of 503 the database.",
                Query(rate(REQUESTS, "status"), "{{status}}"),
                unit=units.RequestsPerSecond,
                stacked=True,
            ),
            timeseries(
                "Requests that failed",
                "The share answered with 5xx.",
                Query(ratio(rate(RESPONSES_FAILED), rate(RESPONSES)), "5xx"),
                unit=units.PercentUnit,
                limits=above(0.001, 0.05),
                empty="no traffic",
            ),
            timeseries(
                "In flight",
                "Requests being served at this moment. When it climbs while the rate does not, something they wait for"
                " is slow.",
                Query(total("http_requests_in_flight"), "in flight"),
                unit=units.Short,
            ),
        ],
        [
            latency(
                "Duration",
                "Of all requests. A point leads to the trace of one of them.",
                "http_request_duration_seconds",
            ),
            latency("Duration by route, P95", "Which address is slow.", "http_request_duration_seconds", "route"),
        ],
        [
            table(
                "Routes",
                "Every address with traffic in the last five minutes.",
                Column(
                    "P95", quantile(0.95, "http_request_duration_seconds", "route", "method", over="5m"), units.Seconds
                ),
                Column("requests", rate(REQUESTS, "route", "method", over="5m") + " > 0", units.RequestsPerSecond),
                Column(
                    "failed",
                    ratio(rate(FAILED, "route", "method", over="5m"), rate(REQUESTS, "route", "method", over="5m")),
                    units.PercentUnit,
                ),
                empty="no traffic",
            ),
            timeseries(
                "Errors by module",
                "Which part of the program could not do what was asked.",
                Query(rate("errors_total", "module"), "{{module}}"),
                unit=units.CountsPerSecond,
                stacked=True,
            ),
            timeseries(
                "Errors by type",
                "What kind they were. Timeouts and system errors are ours, the others mostly the callers'.",
                Query(rate("errors_total", "type"), "{{type}}"),
                unit=units.CountsPerSecond,
                stacked=True,
            ),
        ],
    ),
)
