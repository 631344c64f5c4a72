"""Is what people use charged, is what is charged paid, and does the ledger hold?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Column, Query, above, board, heatmap, latency, row, stat, table, timeseries
from deploy.generate.boards.promql import increase, largest, part, per_minute, quantile, rate, ratio

_UNITS: Final = "billing_units_charged_total"
_ENDED: Final = "chat_session_duration_seconds_count"
_PAYOUT: Final = "billing_payout_minor_total"
_BLOCKED: Final = "billing_blocked_session_context_required_total"
_REQUESTS: Final = (
    'http_request_duration_seconds{route=~"/api/v1/sessions/.+/(end|deductions|billing)|/api/v1/billing/.+'
    '|/api/v1/admin/refunds|/api/appointments/.+|/api/text-appointments/.+"}'
)
_COUNT: Final = part(_REQUESTS, "count")
_FAULTS: Final = _COUNT.replace("}", ', status=~"5.."}')

BOARD: Final = board(
    "billing",
    "billing",
    "Whether what people use is charged once, what is charged is paid, and the ledger holds.",
    row(
        "Now",
        [
            stat(
                "Units charged, 1 h",
                "Taken from patients, of all modalities.",
                increase(_UNITS, over="1h"),
                unit=units.Short,
            ),
            stat(
                "Paid to doctors, 1 d",
                "In the minor unit of each currency, such as cents.",
                increase(_PAYOUT, "currency", over="1d"),
                unit=units.Short,
                legend="{{currency}}",
                empty="nothing yet",
            ),
            stat(
                "Failed billing requests",
                "The share answered with 5xx in the last ten minutes.",
                ratio(rate(_FAULTS, over="10m"), rate(_COUNT, over="10m")),
                unit=units.PercentUnit,
                limits=above(0.001, 0.05),
                empty="no requests",
            ),
            stat(
                "Blocked, 10 min",
                "Billing calls that named an appointment and not its session.",
                increase(_BLOCKED, over="10m"),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "Violated invariants",
                "What the last audit found, of all invariants. Anything but 0 is a wrong bill or on its way to one.",
                largest("sum by (instance) (audit_violations)"),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "Since the last audit",
                "0 violations say nothing when nobody looks.",
                f"time() - {largest('audit_last_run_timestamp_seconds')}",
                unit=units.Seconds,
                limits=above(1800),
            ),
        ],
    ),
    row(
        "Charges and payouts",
        [
            timeseries(
                "Units charged",
                "By modality. Sessions that end without units being charged were short, or are not billed.",
                Query(increase(_UNITS, "modality", over="1h"), "{{modality}}"),
                unit=units.Short,
                stacked=True,
            ),
            timeseries(
                "Units per session",
                "Of an hour. A jump is double charging, a fall sessions that are not charged; compare with the day"
                " before.",
                Query(f"{rate(_UNITS, 'modality', over='1h')} / {rate(_ENDED, 'modality', over='1h')}", "{{modality}}"),
                unit=units.Short,
            ),
            timeseries(
                "Payouts",
                "Of an hour, in the minor unit of each currency. They move with the units; when they do not, doctors"
                " are not paid.",
                Query(increase(_PAYOUT, "currency", over="1h"), "{{currency}}"),
                unit=units.Short,
                empty="nothing paid",
            ),
        ],
    ),
    row(
        "Settlement",
        [
            latency(
                "Settling",
                "The one statement that ends and charges sessions, at the end of each or by the worker.",
                "settlement_duration_seconds",
                limits=above(1, 5),
            ),
            heatmap(
                "Settling, distribution",
                "A slow band is a lock on a balance or an account.",
                "settlement_duration_seconds",
                unit=units.Seconds,
            ),
            timeseries(
                "Sessions that ended",
                "What there is to settle.",
                Query(per_minute(_ENDED, "modality"), "{{modality}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
        ],
        [
            timeseries(
                "Billing requests by route",
                "Ends, deductions, bills, balances and refunds, and the old ways by appointment.",
                Query(f"60 * {rate(_COUNT, 'route')}", "{{route}}"),
                unit=units.RequestsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Billing requests by status",
                "402 is a patient without units, 409 one who was charged before.",
                Query(f"60 * {rate(_COUNT, 'status')}", "{{status}}"),
                unit=units.RequestsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Duration of billing requests, P95",
                "By route.",
                Query(quantile(0.95, _REQUESTS, "route"), "{{route}}", exemplars=True),
                unit=units.Seconds,
            ),
        ],
    ),
    row(
        "The ledger, and the old ways",
        [
            table(
                "Invariants that are violated",
                "`sessiongate audit` names the rows, `sessiongate explain` tells their story.",
                Column("rows", largest("audit_violations", "invariant") + " > 0", units.Short),
                empty="all hold",
            ),
            timeseries(
                "Billing blocked, by endpoint",
                "Clients that still bill by appointment where the session is what has to be billed.",
                Query(per_minute(_BLOCKED, "endpoint"), "{{endpoint}}"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Appointments closed by legacy commands",
                "Those with a session belong to their session's end: none of them may be here.",
                Query(
                    per_minute("legacy_trigger_appointments_processed_total", "has_session"), "session: {{has_session}}"
                ),
                unit=units.CountsPerMinute,
            ),
        ],
    ),
)
