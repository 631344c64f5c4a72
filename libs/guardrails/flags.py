"""The four rollout flags and where their values come from."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Flag(StrEnum):
    """A rollout flag; the value is its name in the environment, in logs and in metrics."""

    ENFORCE_SESSION_GATED_CHAT = "ENFORCE_SESSION_GATED_CHAT"
    ENFORCE_SESSION_GATED_BILLING = "ENFORCE_SESSION_GATED_BILLING"
    DISABLE_LEGACY_APPOINTMENT_TRIGGERS = "DISABLE_LEGACY_APPOINTMENT_TRIGGERS"
    ALLOW_LEGACY_APPOINTMENT_CHAT = "ALLOW_LEGACY_APPOINTMENT_CHAT"


@dataclass(frozen=True, slots=True)
class Flags:
    """The values of all flags as they stand for one tenant at one moment.

    All off means: watch and warn. All but `allow_legacy_appointment_chat` on means: nothing live
    happens without a session context.
    """

    enforce_session_gated_chat: bool = False
    enforce_session_gated_billing: bool = False
    disable_legacy_appointment_triggers: bool = False
    allow_legacy_appointment_chat: bool = False

    def __getitem__(self, flag: Flag) -> bool:
        return bool(getattr(self, flag.value.lower()))


class FlagSource(Protocol):
    """Whoever knows the flags. Reading is synchronous: a decision must not wait for I/O."""

    def for_tenant(self, tenant_id: int) -> Flags: ...


@dataclass(frozen=True, slots=True)
class FixedFlags:
    """The same flags for every tenant, such as those of the process environment."""

    flags: Flags

    def for_tenant(self, tenant_id: int) -> Flags:
        return self.flags
