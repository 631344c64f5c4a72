"""The session guard as a library: pure decisions, no framework, no SQL.

    claim = Claim(SendMessage, caller, parse_context("text_session:7"))
    context = guard.open(claim, facts)      # SessionContext[SendMessage], or Refused is raised

A plain appointment id is never permission to start anything live; only a session context is.
"""

from libs.guardrails.context import (
    AppointmentFacts,
    AppointmentRef,
    Claim,
    Facts,
    SessionContext,
    SessionFacts,
    SessionKind,
    SessionRef,
    addresses,
    parse_context,
)
from libs.guardrails.decision import Verdict, decide
from libs.guardrails.flags import (
    ENFORCES,
    FixedFlags,
    Flag,
    Flags,
    FlagSource,
    Origin,
    Override,
    Rollout,
    Target,
    Tripwire,
    Value,
)
from libs.guardrails.guard import Guard, Witness
from libs.guardrails.operations import OPERATIONS, Family, Operation, SessionStatus
from libs.guardrails.permissions import ROLES, Permission, Principal, Role
from libs.guardrails.reasons import Kind, Reason, Refused

__all__ = [
    "ENFORCES",
    "OPERATIONS",
    "ROLES",
    "AppointmentFacts",
    "AppointmentRef",
    "Claim",
    "Facts",
    "Family",
    "FixedFlags",
    "Flag",
    "FlagSource",
    "Flags",
    "Guard",
    "Kind",
    "Operation",
    "Origin",
    "Override",
    "Permission",
    "Principal",
    "Reason",
    "Refused",
    "Role",
    "Rollout",
    "SessionContext",
    "SessionFacts",
    "SessionKind",
    "SessionRef",
    "SessionStatus",
    "Target",
    "Tripwire",
    "Value",
    "Verdict",
    "Witness",
    "addresses",
    "decide",
    "parse_context",
]
