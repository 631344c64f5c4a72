"""The rollout flags: what they are called, and whom each of them is on for.

A flag has the value of the process environment until an override says otherwise. Overrides are data, and
resolving them is pure; who stores them and tells of changes is the business of a `FlagSource`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final, Protocol

from libs.guardrails.operations import Family


class Flag(StrEnum):
    """A rollout flag; the value is its name in the environment, in logs and in metrics."""

    ENFORCE_SESSION_GATED_CHAT = "ENFORCE_SESSION_GATED_CHAT"
    ENFORCE_SESSION_GATED_BILLING = "ENFORCE_SESSION_GATED_BILLING"
    DISABLE_LEGACY_APPOINTMENT_TRIGGERS = "DISABLE_LEGACY_APPOINTMENT_TRIGGERS"
    ALLOW_LEGACY_APPOINTMENT_CHAT = "ALLOW_LEGACY_APPOINTMENT_CHAT"


ENFORCES: Final[Mapping[Flag, Family]] = {
    Flag.ENFORCE_SESSION_GATED_CHAT: Family.CHAT,
    Flag.ENFORCE_SESSION_GATED_BILLING: Family.BILLING,
}
"""The flags that refuse requests when they are on, and of which family of operations."""


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


TENANT: Final = "tenant"
"""The kind of thing that `Target.allow` can name; more may follow."""


def position(flag: Flag, tenant_id: int) -> float:
    """Where a tenant stands in the rollout of a flag, from 0 to just below 1; a share reaches those below it.

    The first 48 bits of SHA-256 over `FLAG:tenant`, as a fraction: the same in every process, on every machine
    and in every version, so that a tenant who is reached stays reached while the share grows. The name of the
    flag takes part, lest the same tenants be the first each time.
    """
    return int.from_bytes(sha256(f"{flag.value}:{tenant_id}".encode()).digest()[:6]) / 2**48


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a flag is on for: those of `allow` (ids by kind), a `share` of all tenants (0 to 1), and by `default`
    (None: as in the environment) everybody else. Raises ValueError when the share is none."""

    default: bool | None = None
    share: float | None = None
    allow: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError("a share is a number from 0 to 1")

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> "Target":
        """Reads what `as_json` made, of this version or of another one."""
        allow = {kind: frozenset(ids) for kind, ids in (document.get("allow") or {}).items()}
        return cls(document.get("default"), document.get("share"), allow)

    def as_json(self) -> dict[str, Any]:
        allow = {kind: sorted(ids) for kind, ids in sorted(self.allow.items())}
        return {"default": self.default, "share": self.share, "allow": allow}

    def allows(self, tenant_id: int) -> bool:
        return tenant_id in self.allow.get(TENANT, ())

    def reaches(self, flag: Flag, tenant_id: int) -> bool:
        return self.share is not None and position(flag, tenant_id) < self.share


@dataclass(frozen=True, slots=True)
class Tripwire:
    """When a flag goes back to false by itself: when it refuses more than `share` of the requests over `minutes`,
    provided there are `minimum` of them. Raises ValueError for what can never be so."""

    share: float = 0.1
    minutes: int = 5
    minimum: int = 50

    def __post_init__(self) -> None:
        if not (0 <= self.share < 1 and 1 <= self.minutes <= 60 and self.minimum >= 1):
            raise ValueError("a tripwire has a share from 0 to below 1, 1 to 60 minutes, and a minimum of 1 or more")

    def is_crossed(self, requests: int, refused: int) -> bool:
        return requests >= self.minimum and refused > self.share * requests


@dataclass(frozen=True, slots=True)
class Override:
    """What is said of a flag at run time: of one tenant, or (None) of all that have no override of their own.

    Raises ValueError, with a sentence for whoever asked for it, when it makes no sense.
    """

    flag: Flag
    tenant_id: int | None
    target: Target
    tripwire: Tripwire | None = None

    def __post_init__(self) -> None:
        if self.tenant_id is not None and self.target != Target(self.target.default):
            raise ValueError("One tenant has a flag on or off; shares and lists are of all tenants.")
        if self.tripwire and self.flag not in ENFORCES:
            raise ValueError(f"{self.flag.value} refuses no requests when it is on, so it has no tripwire.")
        if self.tripwire and self.target == Target(default=False):
            raise ValueError("A flag that is off has no tripwire.")


class Origin(StrEnum):
    """What decided the value of a flag for a tenant."""

    TENANT = "tenant"
    ALLOW = "allow"
    SHARE = "share"
    EVERYONE = "everyone"
    ENVIRONMENT = "environment"


@dataclass(frozen=True, slots=True)
class Value:
    """The value of one flag, where it comes from, and the override that gave it; None if the environment did."""

    enabled: bool
    origin: Origin
    override: Override | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """How far the rollout has come: the environment's flags, and the overrides. A `FlagSource` of one moment."""

    environment: Flags
    overrides: Mapping[tuple[Flag, int | None], Override] = field(default_factory=dict)

    @classmethod
    def of(cls, environment: Flags, overrides: Iterable[Override]) -> "Rollout":
        return cls(environment, {(override.flag, override.tenant_id): override for override in overrides})

    def value(self, flag: Flag, tenant_id: int | None) -> Value:
        """The tenant's own override counts first, then the override of all tenants: its list, its share, its
        default; then the environment. With None, the value for a tenant whom none of the first three reaches."""
        everyone = self.overrides.get((flag, None))
        if tenant_id is not None:
            own = self.overrides.get((flag, tenant_id))
            if own and own.target.default is not None:
                return Value(own.target.default, Origin.TENANT, own)
            if everyone and everyone.target.allows(tenant_id):
                return Value(True, Origin.ALLOW, everyone)
            if everyone and everyone.target.reaches(flag, tenant_id):
                return Value(True, Origin.SHARE, everyone)
        if everyone and everyone.target.default is not None:
            return Value(everyone.target.default, Origin.EVERYONE, everyone)
        return Value(self.environment[flag], Origin.ENVIRONMENT)

    def for_tenant(self, tenant_id: int) -> Flags:
        return Flags(**{flag.value.lower(): self.value(flag, tenant_id).enabled for flag in Flag})

    def shadowing(self) -> list[Override]:
        """The overrides because of which some tenant has another value than that of the environment."""
        return [
            override
            for override in self.overrides.values()
            if override.target.default is (not self.environment[override.flag])
            or (not self.environment[override.flag] and (override.target.share or override.target.allow))
        ]
