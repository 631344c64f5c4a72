"""Requests and sockets that fail, or take long, or should not have come."""

from typing import Final

from deploy.generate.objectives import NOT_OPENED, REQUESTS, RESPONSES, RESPONSES_FAILED
from libs.observability.rules import MINIMUM_EVENTS, Alert

_OPENED: Final = "sum(increase(chat_connections_opened_total[5m]))"
_NOT_OPENED: Final = f"sum(increase({NOT_OPENED}[5m]))"

REQUESTS_AND_CHAT: Final = (
    Alert(
        name="HighErrorRate",
        expr=f"sum(rate({RESPONSES_FAILED}[5m])) / sum(rate({RESPONSES}[5m])) > 0.05",
        lasting="5m",
        severity="high",
        component="http",
        metric="http_responses_total",
        summary="Many requests fail",
        description="{{ $value | humanizePercentage }} of requests were answered with 5xx.",
        runbook="docs/runbooks/failing-requests.md",
    ),
    Alert(
        name="HighResponseTime",
        expr=f"histogram_quantile(0.95, sum by (le) (rate({REQUESTS.replace('_count', '_bucket')}[5m]))) > 2",
        lasting="5m",
        severity="warning",
        component="http",
        metric="http_request_duration_seconds",
        summary="Requests are answered slowly",
        description="One request in twenty takes longer than {{ $value | humanizeDuration }}.",
        runbook="docs/runbooks/slow-requests.md",
    ),
    Alert(
        name="EventLoopLag",
        expr="histogram_quantile(0.99, sum by (le, job, instance) (rate(asyncio_loop_lag_seconds_bucket[5m]))) > 0.25",
        lasting="5m",
        severity="warning",
        component="process",
        metric="asyncio_loop_lag_seconds",
        summary="A process is too busy to answer in time",
        description="The event loop of {{ $labels.instance }} lags by {{ $value | humanizeDuration }}.",
        runbook="docs/runbooks/slow-requests.md",
    ),
    Alert(
        name="AuthFailures",
        expr="60 * sum(rate(auth_failures_total[1m])) > 10",
        severity="warning",
        component="identity",
        metric="auth_failures_total",
        summary="Many tokens are refused",
        description='{{ $value | printf "%.0f" }} requests in a minute had no valid token.',
        runbook="docs/runbooks/refused-tokens.md",
    ),
    Alert(
        name="SuspiciousAddress",
        # Such an address is counted once a minute.
        expr='sum(increase(security_events_total{kind="suspicious_ip"}[5m])) > 2',
        severity="warning",
        component="security",
        metric="security_events_total",
        summary="An address goes on although its tokens are refused",
        description="For several minutes an address had more than ten requests refused in each.",
        runbook="docs/runbooks/refused-tokens.md",
    ),
    Alert(
        name="PrivilegeAttempts",
        expr='sum(increase(security_events_total{kind="privilege"}[5m])) > 50',
        severity="warning",
        component="security",
        metric="security_events_total",
        summary="Somebody asks for more than the role allows, again and again",
        description='{{ $value | printf "%.0f" }} requests within five minutes asked for more than a role allows.',
        runbook="docs/runbooks/refused-tokens.md",
    ),
    Alert(
        name="ChatConnectionSuccessLow",
        expr=f"{_OPENED} / ({_OPENED} + {_NOT_OPENED}) < 0.95\nand\n{_OPENED} + {_NOT_OPENED} > {MINIMUM_EVENTS}",
        lasting="5m",
        severity="warning",
        component="realtime",
        metric="chat_connection_failures_total",
        summary="Sockets fail to open",
        description="Only {{ $value | humanizePercentage }} of sockets were opened.",
        runbook="docs/runbooks/chat-connections.md",
    ),
)
