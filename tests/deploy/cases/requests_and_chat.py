"""Cases of HTTP and of sockets."""

from typing import Final

from tests.deploy.cases.case import Case, Firing, Quiet


def _requests(status: str, values: str) -> dict[str, str]:
    return {f'http_responses_total{{class="{status}"}}': values}


def _durations(metric: str, labels: str, *, below: str, above: str, many: int) -> dict[str, str]:
    """So many observations a minute, all of them between two bounds of the histogram."""
    return {
        f'{metric}_bucket{{{labels}le="{below}"}}': "0+0x60",
        f'{metric}_bucket{{{labels}le="{above}"}}': f"0+{many}x60",
        f'{metric}_bucket{{{labels}le="+Inf"}}': f"0+{many}x60",
    }


REQUESTS_AND_CHAT: Final[tuple[Case, ...]] = (
    Firing(
        "HighErrorRate",
        _requests("2xx", "0+94x60") | _requests("5xx", "0+6x60"),
        after=15,
        says="6% of requests were answered with 5xx.",
        value="0.06",
    ),
    Quiet("HighErrorRate", _requests("2xx", "0+95x60") | _requests("5xx", "0+5x60"), after=30),
    Quiet("HighErrorRate", _requests("2xx", "0+50x60") | _requests("4xx", "0+50x60"), after=30),
    # Half of the requests are quick, and probes do not count.
    Firing(
        "HighResponseTime",
        _durations("http_request_duration_seconds", 'route="/api/v1/me",', below="2.5", above="5.0", many=10)
        | _durations("http_request_duration_seconds", 'route="/healthz",', below="0.0", above="0.005", many=1000),
        after=15,
        says="One request in twenty takes longer than 4.875s.",
        value="4.875",
    ),
    Quiet(
        "HighResponseTime",
        _durations("http_request_duration_seconds", 'route="/api/v1/me",', below="0.5", above="1.0", many=10),
        after=30,
    ),
    Firing(
        "EventLoopLag",
        _durations(
            "asyncio_loop_lag_seconds", 'job="sessiongate-api",instance="api:8000",', below="0.5", above="1.0", many=10
        ),
        after=15,
        says="The event loop of api:8000 lags by 995ms.",
        value="0.995",
        labels=(("job", "sessiongate-api"), ("instance", "api:8000")),
    ),
    Quiet(
        "EventLoopLag",
        _durations(
            "asyncio_loop_lag_seconds", 'job="sessiongate-api",instance="api:8000",', below="0.1", above="0.25", many=10
        ),
        after=30,
    ),
    Firing(
        "AuthFailures",
        {
            'auth_failures_total{reason="expired"}': "0+6x10",
            'auth_failures_total{reason="invalid_token"}': "0+5x10",
        },
        after=5,
        says="11 requests in a minute had no valid token.",
        value="11",
    ),
    Quiet("AuthFailures", {'auth_failures_total{reason="expired"}': "0+10x10"}, after=10),
    Firing(
        "SuspiciousAddress",
        {'security_events_total{kind="suspicious_ip"}': "0 0 0 0 0 0 1 2 3"},
        after=8,
        says="For several minutes an address had more than ten requests refused in each.",
        value="3",
    ),
    Quiet("SuspiciousAddress", {'security_events_total{kind="suspicious_ip"}': "0 0 0 0 0 0 1 1 1"}, after=8),
    Quiet("SuspiciousAddress", {'security_events_total{kind="rate_limit"}': "0+9x20"}, after=20),
    Firing(
        "PrivilegeAttempts",
        {'security_events_total{kind="privilege"}': "0+11x20"},
        after=6,
        says="55 requests within five minutes asked for more than a role allows.",
        value="55",
    ),
    Quiet("PrivilegeAttempts", {'security_events_total{kind="privilege"}': "0+10x20"}, after=20),
    Firing(
        "ChatConnectionSuccessLow",
        {
            "chat_connections_opened_total": "0+94x20",
            'chat_connection_failures_total{reason="upgrade"}': "0+4x20",
            'chat_connection_failures_total{reason="auth"}': "0+2x20",
        },
        after=15,
        says="Only 94% of sockets were opened.",
        value="0.94",
    ),
    Quiet(
        "ChatConnectionSuccessLow",
        {
            "chat_connections_opened_total": "0+95x20",
            'chat_connection_failures_total{reason="upgrade"}': "0+5x20",
        },
        after=20,
    ),
    # They were open before.
    Quiet(
        "ChatConnectionSuccessLow",
        {
            "chat_connections_opened_total": "0+50x20",
            'chat_connection_failures_total{reason="upgrade"}': "0+0x20",
            'chat_connection_failures_total{reason="timeout"}': "0+30x20",
            'chat_connection_failures_total{reason="protocol"}': "0+20x20",
        },
        after=20,
    ),
    # Two at night, of which one has failed.
    Quiet(
        "ChatConnectionSuccessLow",
        {"chat_connections_opened_total": "0+1x20", 'chat_connection_failures_total{reason="upgrade"}': "0+1x20"},
        after=20,
    ),
    Quiet(
        "ChatConnectionSuccessLow",
        {"chat_connections_opened_total": "0+0x20", 'chat_connection_failures_total{reason="upgrade"}': "0+0x20"},
        after=20,
    ),
)
