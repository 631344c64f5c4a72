"""Whom does the guard refuse, whom would it refuse, and what do the flags say?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Column, Query, above, board, colours, row, stat, states, table, timeseries
from deploy.generate.boards.promql import increase, per_minute, rate, ratio

_VERDICTS: Final = "guard_verdicts_total"
_REFUSED: Final = 'guard_verdicts_total{verdict="refused"}'
_WARNED: Final = 'guard_verdicts_total{verdict="warned"}'
_CHAT_BLOCKED: Final = "chat_blocked_session_context_required_total"
_BILLING_BLOCKED: Final = "billing_blocked_session_context_required_total"

BOARD: Final = board(
    "guardrails",
    "guardrails and flags",
    "What the session guard decides, what enforcement would change, and what the flags say in every process.",
    row(
        "Now",
        [
            stat(
                "Chat blocked, 10 min",
                "The share of chat operations that were blocked because they named an appointment and not its session."
                " A client that was not updated, or a flag that came too early.",
                ratio(rate(_CHAT_BLOCKED, over="10m"), rate("chat_requests_total", over="10m")),
                unit=units.PercentUnit,
                limits=above(0.02, 0.1),
                empty="no chat",
            ),
            stat(
                "Billing blocked, 10 min",
                "Each is somebody whose session was not billed as they meant it to be.",
                increase(_BILLING_BLOCKED, over="10m"),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "Would be refused, 1 h",
                "Requests that were let through with a warning: turning enforcement on would refuse them.",
                increase(_WARNED, over="1h"),
                unit=units.Short,
            ),
            stat(
                "Tripwires, 1 d",
                "Flags that refused too much and turned themselves off.",
                increase("flag_tripwire_total", over="1d"),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "Decisions lost, 1 h",
                "Verdicts that the decision log had no room for, because the database takes no rows.",
                increase("guard_decisions_dropped_total", over="1h"),
                unit=units.Short,
                limits=above(1),
            ),
        ],
    ),
    row(
        "Flags",
        [
            states(
                "Flags",
                "What processes believe of a tenant without an override. Orange is a change on its way; it takes two"
                " seconds.",
                Query("avg by (flag) (feature_flag_enabled)", "{{flag}}"),
                {"0": "off", "1": "on"},
                colours(("blue", None), ("orange", 0.001), ("green", 1)),
            ),
            timeseries(
                "Processes that disagree",
                "0, but for two seconds after a change. A process for which it lasts cannot read the overrides:"
                " `flags_not_followed` in its log.",
                Query("max by (flag) (feature_flag_enabled) - min by (flag) (feature_flag_enabled)", "{{flag}}"),
                unit=units.Short,
                limits=above(1),
            ),
            timeseries(
                "Tripwires",
                "Flags that turned themselves off.",
                Query(per_minute("flag_tripwire_total", "flag"), "{{flag}}"),
                unit=units.CountsPerMinute,
            ),
        ],
    ),
    row(
        "Verdicts",
        [
            timeseries(
                "Verdicts",
                "Everything that the guard was asked.",
                Query(per_minute(_VERDICTS, "verdict"), "{{verdict}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Refused, by reason",
                "SESSION_CONTEXT_REQUIRED and SESSION_BILLING_REQUIRED come from the flags, the others do not.",
                Query(per_minute(_REFUSED, "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Would be refused, by reason",
                "Let through with a warning. At 0 for a week of traffic a flag is safe to enforce; the report of flags"
                " names the clients.",
                Query(per_minute(_WARNED, "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
        ],
        [
            timeseries(
                "Chat blocked, by operation",
                "The share of each operation that was blocked.",
                Query(
                    ratio(rate(_CHAT_BLOCKED, "operation"), rate("chat_requests_total", "operation")), "{{operation}}"
                ),
                unit=units.PercentUnit,
                limits=above(0.1),
                empty="no chat",
            ),
            timeseries(
                "Billing blocked, by endpoint",
                "Calls that named an appointment whose session is what has to be billed.",
                Query(per_minute(_BILLING_BLOCKED, "endpoint"), "{{endpoint}}"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Old spellings",
                "Requests that address a session as clients from before sessions do. At 0 those are gone.",
                Query(per_minute("legacy_identifier_total"), "requests"),
                unit=units.CountsPerMinute,
            ),
        ],
        [
            table(
                "Refused, 1 h",
                "Operations and reasons with at least one refusal.",
                Column("refused", increase(_REFUSED, "operation", "reason", over="1h") + " > 0", units.Short),
                empty="nothing refused",
            ),
            table(
                "Would be refused, 1 h",
                "Operations and reasons with at least one warning.",
                Column("warned", increase(_WARNED, "operation", "reason", over="1h") + " > 0", units.Short),
                empty="nothing to refuse",
            ),
        ],
    ),
    row(
        "Strangers",
        [
            timeseries(
                "Tokens that were refused",
                "More than 10 a minute is an attack, or a key that was changed on one side only.",
                Query(per_minute("auth_failures_total", "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
                limits=above(10),
            ),
            timeseries(
                "Attempts at more than is allowed",
                "`signature`: somebody forges tokens, or a key was changed on one side only. `suspicious_ip`: an"
                " address fails again and again. `privilege`: a role asks for what it may not.",
                Query(per_minute("security_events_total", "kind"), "{{kind}}"),
                unit=units.CountsPerMinute,
            ),
        ],
    ),
)
