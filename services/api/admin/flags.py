from typing import Annotated, Self

from fastapi import Request
from pydantic import Field

from libs.domain.flags import overrides
from libs.guardrails import Flag, Origin, Override, Permission, Principal, Reason, Refused, Target, Tripwire, Value
from services.api.guards import acting, guarded_router, runtime_of
from services.api.schemas import In, Out, refusals

router = guarded_router("/admin/flags", tag="operators")

Administrator = Annotated[Principal, acting(Permission.ADMINISTER_FLAGS)]


class TripwireIn(In):
    """When the flag goes back to off by itself: when it refuses more than `share` of the requests over `minutes`,
    of which there must be `minimum`."""

    share: Annotated[float, Field(strict=True, ge=0, lt=1, examples=[0.1])]
    minutes: Annotated[int, Field(strict=True, ge=1, le=60)] = 5
    minimum: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 50


class SetFlag(In):
    enabled: Annotated[bool, Field(strict=True)]
    tripwire: TripwireIn | None = None


class TripwireOut(Out):
    share: float
    minutes: int
    minimum: int


class FlagOut(Out):
    """A flag as it stands for your tenant. `origin` tells what decided: an override of your `tenant`; one of all
    tenants, by its list (`allow`), its `share` or its default (`everyone`); or the `environment`."""

    flag: Flag
    enabled: bool
    origin: Origin
    tripwire: TripwireOut | None

    @classmethod
    def of(cls, flag: Flag, value: Value) -> Self:
        tripwire = value.override and value.override.tripwire
        shown = TripwireOut.model_validate(tripwire) if tripwire else None
        return cls(flag=flag, enabled=value.enabled, origin=value.origin, tripwire=shown)


class FlagsOut(Out):
    items: list[FlagOut]


@router.get("", responses=refusals())
async def list_flags(caller: Administrator, request: Request) -> FlagsOut:
    """The rollout flags as they stand for your tenant."""
    rollout = runtime_of(request).flags.rollout
    return FlagsOut(items=[FlagOut.of(flag, rollout.value(flag, caller.tenant_id)) for flag in Flag])


@router.put("/{flag}", responses=refusals())
async def set_flag(flag: Flag, caller: Administrator, request: Request, new: SetFlag) -> FlagOut:
    """Turns a flag on or off for your tenant: here before the answer, in all other processes within two seconds."""
    runtime = runtime_of(request)
    tripwire = Tripwire(**new.tripwire.model_dump()) if new.tripwire else None
    try:
        override = Override(flag, caller.tenant_id, Target(new.enabled), tripwire)
    except ValueError as error:
        raise Refused(
            Reason.VALIDATION_FAILED, errors=[{"pointer": "/tripwire", "in": "body", "detail": str(error)}]
        ) from None
    # A transaction of its own, because what follows must see it committed.
    async with runtime.begin() as tx:
        await overrides.put(tx, override, caller)
    await runtime.flags.reload()
    return FlagOut.of(flag, runtime.flags.rollout.value(flag, caller.tenant_id))
