"""Do clients stay connected, and do their messages arrive?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Query, above, below, board, heatmap, latency, row, stat, timeseries
from deploy.generate.boards.promql import increase, mean, per_minute, quantile, rate, ratio, total
from deploy.generate.objectives import NOT_OPENED

_OPENED: Final = "chat_connections_opened_total"
_LAG: Final = 'asyncio_loop_lag_seconds{job="sessiongate-api"}'
_DURATION: Final = "chat_message_processing_duration_seconds"


def _opened_of_all(over: str) -> str:
    opened = rate(_OPENED, over=over)
    return ratio(opened, f"({opened} + {rate(NOT_OPENED, over=over)})")


BOARD: Final = board(
    "chat",
    "chat and sockets",
    "Whether clients stay connected, and whether what they write reaches the others.",
    row(
        "Now",
        [
            stat(
                "Open sockets",
                "Over all API processes.",
                total("chat_connections_active"),
                unit=units.Short,
            ),
            stat(
                "Connected users",
                "Whoever has sockets in two processes counts twice.",
                total("chat_active_users"),
                unit=units.Short,
            ),
            stat(
                "Successful connections",
                "Of all attempts in the last five minutes. A refusal by the guard is no failure.",
                _opened_of_all("5m"),
                unit=units.PercentUnit,
                limits=below(0.95, 0.8),
                empty="no attempts",
            ),
            stat(
                "Messages a minute",
                "Taken from clients, over HTTP or a socket, in the last five minutes.",
                "60 * " + rate('chat_messages_total{direction="received"}', over="5m"),
                unit=units.MessagesPerMinute,
            ),
            stat(
                "Lost wake-ups, 10 min",
                "What Redis did not take. Without it messages from other processes arrive two seconds late.",
                increase("doorbell_failures_total", over="10m"),
                unit=units.Short,
                limits=above(1),
            ),
        ],
    ),
    row(
        "Connections",
        [
            timeseries(
                "Open sockets by process",
                "All to 0 is an outage, one to 0 a restart: its clients should appear elsewhere within seconds.",
                Query(total("chat_connections_active", "instance"), "{{instance}}"),
                unit=units.Short,
                stacked=True,
            ),
            timeseries(
                "Connections opened and resumed",
                "Many at once come back after a restart. A steady stream of them is a network, or a proxy that cuts"
                " quiet connections.",
                Query(per_minute(_OPENED), "opened"),
                Query(per_minute("chat_reconnections_total"), "resumed"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Connections that were not opened",
                "`auth`: tickets and tokens. `upgrade`: a proxy, or a page of another origin.",
                Query(per_minute(NOT_OPENED, "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Connections that broke off",
                "`timeout`: clients that fell silent. `protocol`: a client with a fault.",
                Query(per_minute('chat_connection_failures_total{reason=~"timeout|protocol"}', "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
        ],
    ),
    row(
        "Messages",
        [
            timeseries(
                "Messages",
                "`received` from clients, `sent` to sockets, `broadcast` to rooms. Received without sent means that"
                " nobody else is there, or that rooms are not told.",
                Query(per_minute("chat_messages_total", "direction"), "{{direction}}"),
                Query(per_minute("chat_message_retries_total"), "sent again"),
                unit=units.MessagesPerMinute,
            ),
            latency(
                "Processing, P95",
                "From the frame or request to the stored message, and from what is new to the socket.",
                _DURATION,
                "direction",
            ),
            heatmap(
                "Processing of received messages",
                "A second band above the first is a lock or a slow disk.",
                f'{_DURATION}{{direction="received"}}',
                unit=units.Seconds,
            ),
        ],
        [
            timeseries(
                "Operations",
                "What clients ask of conversations.",
                Query(per_minute("chat_requests_total", "operation"), "{{operation}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Frames that were refused",
                "`blocked` by the guard, `delivery`: clients too slow to be served, `rate_limited`: too many at once.",
                Query(per_minute("chat_message_errors_total", "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Event-loop lag, P99",
                "How late the most delayed API process is for everything. Above a tenth of a second sockets feel it.",
                Query(f"max({quantile(0.99, _LAG, 'instance')})", "slowest"),
                unit=units.Seconds,
                limits=above(0.1, 0.5),
            ),
        ],
    ),
    row(
        "Sessions",
        [
            timeseries(
                "Sessions that ended",
                "By what they were.",
                Query(per_minute("chat_session_duration_seconds_count", "modality"), "{{modality}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Duration of sessions, median of an hour",
                "Shorter than usual points to sessions that break off.",
                Query(quantile(0.5, "chat_session_duration_seconds", "modality", over="1h"), "{{modality}}"),
                unit=units.Seconds,
            ),
            timeseries(
                "Messages per session, mean of an hour",
                "Near 0 means that people meet and cannot write.",
                Query(mean("chat_session_messages", over="1h"), "messages"),
                unit=units.Short,
            ),
        ],
    ),
)
