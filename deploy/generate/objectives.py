"""What this product promises, as objectives over 30 days."""

from typing import Final

from libs.observability.rules import Objective
from services.api.public import PROBES

REQUESTS: Final = f"""http_request_duration_seconds_count{{route!~"{"|".join(sorted(PROBES))}"}}"""
"""Those of people: probes come every few seconds, and would make any share of the others look small."""

FAILED: Final = REQUESTS.replace("{", '{status=~"5..",')

RESPONSES: Final = "http_responses_total"
RESPONSES_FAILED: Final = 'http_responses_total{class="5xx"}'
"""All answers, and those that failed: where the first failure must show, for these series are there before it."""

NOT_OPENED: Final = 'chat_connection_failures_total{reason=~"auth|upgrade|other"}'
"""Sockets that were refused; those that failed for other reasons were open before."""


def _slower(histogram: str, bound: float) -> str:
    """The rate of events that took longer than one of the histogram's bounds."""
    within = f'{histogram}_bucket{{le="{bound}"}}'
    return f"(sum(rate({histogram}_count[$window])) - sum(rate({within}[$window])))"


OBJECTIVES: Final = (
    Objective(
        name="availability",
        target=0.999,
        bad=f"sum(rate({RESPONSES_FAILED}[$window]))",
        events=f"sum(rate({RESPONSES}[$window]))",
        component="http",
        metric="http_responses_total",
        failing="requests fail by a fault of ours",
        runbook="docs/runbooks/failing-requests.md",
    ),
    Objective(
        name="booking",
        target=0.95,
        bad=_slower("booking_post_own_duration_seconds", 0.5),
        events="sum(rate(booking_post_own_duration_seconds_count[$window]))",
        component="scheduling",
        metric="booking_post_own_duration_seconds",
        failing="bookings take longer than 500 ms, others' time not counted",
        runbook="docs/runbooks/slow-requests.md",
    ),
    Objective(
        name="sessions_on_time",
        target=0.99,
        bad=_slower("appointment_start_delay_seconds", 1.0),
        events="sum(rate(appointment_start_delay_seconds_count[$window]))",
        component="conversion",
        metric="appointment_start_delay_seconds",
        failing="sessions start more than a second late",
        runbook="docs/runbooks/backlog-grows.md",
    ),
)
