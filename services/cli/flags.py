"""`sessiongate flags …`: whom the rollout flags are on for, at run time."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy import select

from libs.domain.flags import overrides
from libs.domain.flags.overrides import Change
from libs.domain.runtime import flags_of
from libs.domain.settings import DatabaseSettings, FlagSettings
from libs.domain.tables import tenants
from libs.domain.transaction import Transaction, transaction
from libs.guardrails import Flag, Origin, Override, Rollout, Target, Tripwire
from libs.guardrails.context import MAX_ID
from libs.guardrails.flags import TENANT
from services.cli import home
from services.cli.database import opened
from services.cli.errors import CommandError
from services.cli.options import AsJson
from services.cli.rollout import report
from services.cli.seed import Silence

app = typer.Typer(no_args_is_help=True, help="The rollout flags: whom they refuse, and turning them on and off.")
app.command("report")(report)


class Switch(StrEnum):
    ON = "on"
    OFF = "off"


class Rest(StrEnum):
    """What becomes of the tenants that a share and a list do not reach."""

    ON = "on"
    OFF = "off"
    ENVIRONMENT = "environment"


_DEFAULT: Final = {Rest.ON: True, Rest.OFF: False, Rest.ENVIRONMENT: None}
_WORD: Final = {True: "on", False: "off", None: "as in the environment"}

TheFlag = Annotated[Flag, typer.Argument(metavar="FLAG", case_sensitive=False, help="The name of the flag.")]
AnyFlag = Annotated[Flag | None, typer.Argument(metavar="[FLAG]", case_sensitive=False, help="Only this flag.")]
TenantId = Annotated[int | None, typer.Option("--tenant", min=1, max=MAX_ID, help="Only this tenant.")]


@app.command("list")
def list_(tenant: TenantId = None, as_json: AsJson = False) -> None:
    """Show each flag, for a tenant without an override or for the one given, and where its value comes from."""

    async def ask() -> Rollout:
        async with _transaction() as tx:
            await _require_tenants(tx, [] if tenant is None else [tenant])
            return await _rollout(tx)

    rollout = asyncio.run(ask())
    concerned = [each for each in rollout.overrides.values() if tenant is None or each.tenant_id in (None, tenant)]
    if as_json:
        typer.echo(json.dumps({"flags": _values(rollout, tenant), "overrides": [_fields(each) for each in concerned]}))
        return
    table = Table("flag", "value", "origin", "environment")
    for row in _values(rollout, tenant):
        table.add_row(row["flag"], _WORD[row["enabled"]], row["origin"], _WORD[row["environment"]])
    Console().print(table)
    if concerned:
        _show(concerned)


@app.command("set")
def set_(
    flag: TheFlag,
    value: Annotated[Switch, typer.Argument(help="on or off.")],
    tenant: Annotated[
        int | None, typer.Option("--tenant", min=1, max=MAX_ID, help="For this tenant alone.  [default: all]")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="On for this share of all tenants, such as 0.25.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="tenant:ID", help="On for this tenant; can be repeated.")
    ] = None,
    default: Annotated[
        Rest | None, typer.Option(help="For tenants that --share and --allow do not reach.  [default: environment]")
    ] = None,
    tripwire: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[:MINUTES[:MINIMUM]]",
            help="Back to off when it refuses more than SHARE of at least MINIMUM requests over MINUTES (5 and 50).",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a flag on or off: for all tenants without an override of their own, some of them, or one.

    Replaces the override there was. All processes follow within two seconds.
    """
    try:
        target = _target(value, share, allow or [], default)
        override = Override(flag, tenant, target, None if tripwire is None else _parse_tripwire(tripwire))
    except ValueError as error:
        raise CommandError(str(error)) from None

    async def change() -> Override | None:
        async with _transaction() as tx:
            await _require_tenants(tx, {*target.allow.get(TENANT, ()), *([] if tenant is None else [tenant])})
            return await overrides.put(tx, override, None)

    before = asyncio.run(change())
    if as_json:
        typer.echo(json.dumps({**_fields(override), "before": before and overrides.as_json(before)}))
        return
    was = describe(before.target) if before else "without an override"
    whose = "" if tenant is None else f" for tenant {tenant}"
    typer.echo(f"{flag} is {describe(target)}{whose}; it was {was}. All processes follow within two seconds.")


@app.command("history")
def history(
    flag: AnyFlag = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Show at most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show who changed what, the latest change first."""

    async def ask() -> list[Change]:
        async with _transaction() as tx:
            return await overrides.history(tx, flag, limit)

    changes = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps([asdict(change) | {"at": change.at.isoformat()} for change in changes]))
        return
    table = Table("when", Column("flag", overflow="fold"), "tenant", "what", "by", "before", "after")
    for change in changes:
        by = "tripwire" if change.action == "flag_tripped" else "command line"
        table.add_row(
            f"{change.at:%Y-%m-%d %H:%M:%S}",
            change.flag,
            _whose(change.tenant_id),
            change.action.removeprefix("flag_"),
            by if change.actor_id is None else f"user {change.actor_id}",
            _describe_json(change.before),
            _describe_json(change.after),
        )
    Console().print(table)


@app.command("rollback")
def rollback(
    flag: AnyFlag = None,
    tenant: TenantId = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Clear all overrides at once, so that the environment decides again."""

    if not yes:
        _confirm([each for each in asyncio.run(_read()).overrides.values() if _is_meant(each, flag, tenant)])

    async def clear() -> tuple[list[Override], Rollout]:
        async with _transaction() as tx:
            cleared = await overrides.clear(tx, flag, tenant)
            return cleared, await _rollout(tx)

    cleared, rollout = asyncio.run(clear())
    flags = [row for row in _values(rollout, tenant) if flag in (None, row["flag"])]
    if as_json:
        typer.echo(json.dumps({"cleared": [_fields(each) for each in cleared], "flags": flags}))
        return
    if not cleared:
        typer.echo("There was no override to clear.")
    else:
        _show(cleared)
        typer.echo("These overrides are cleared. All processes follow within two seconds.")
    for row in flags:
        by = "the environment" if row["origin"] == Origin.ENVIRONMENT else f"an override ({row['origin']})"
        typer.echo(f"{row['flag']} is now {_WORD[row['enabled']]}, as {by} says.")


def describe(target: Target) -> str:
    """A target in words, such as `on for 25% of tenants, else as in the environment`."""
    reached = [f"tenant {tenant_id}" for tenant_id in sorted(target.allow.get(TENANT, ()))]
    if target.share is not None:
        reached.append(f"{100 * target.share:g}% of tenants")
    rest = _WORD[target.default]
    return f"on for {', '.join(reached)}, else {rest}" if reached else rest


async def rollout_of(settings: DatabaseSettings, flags: FlagSettings) -> Rollout:
    """How far the rollout has come, for services that `flags` are the environment of."""
    async with _transaction(settings) as tx:
        return Rollout.of(flags_of(flags), await overrides.all_of(tx))


def _target(value: Switch, share: float | None, allow: Sequence[str], default: Rest | None) -> Target:
    """Raises ValueError when the options contradict each other."""
    if share is None and not allow:
        if default is not None:
            raise ValueError("--default is for tenants that --share and --allow do not reach; give one of these.")
        return Target(value is Switch.ON)
    if value is Switch.OFF:
        raise ValueError("--share and --allow tell whom a flag is on for; use them with on.")
    named = frozenset(map(_parse_allowed, allow))
    return Target(_DEFAULT[default or Rest.ENVIRONMENT], share, {TENANT: named} if named else {})


def _parse_allowed(text: str) -> int:
    kind, _, number = text.partition(":")
    if kind != TENANT or not (number.isascii() and number.isdecimal()) or not 0 < int(number) <= MAX_ID:
        raise ValueError("--allow names a tenant, such as tenant:3.")
    return int(number)


def _parse_tripwire(text: str) -> Tripwire:
    """`0.1`, `0.1:5` or `0.1:5:50`."""
    share, *rest = text.split(":")
    try:
        if len(rest) > 2:
            raise ValueError
        return Tripwire(float(share), *map(int, rest))
    except ValueError:
        raise ValueError(
            "--tripwire is a share from 0 to below 1, then minutes from 1 to 60, then a least number of requests,"
            " such as 0.1:5:50."
        ) from None


async def _require_tenants(tx: Transaction, ids: Collection[int]) -> None:
    found = (await tx.execute(select(tenants.c.id).where(tenants.c.id.in_(ids)))).scalars().all()
    if unknown := sorted(set(ids) - set(found)):
        raise CommandError(f"There is no tenant {unknown[0]}.")


async def _read() -> Rollout:
    async with _transaction() as tx:
        return await _rollout(tx)


async def _rollout(tx: Transaction) -> Rollout:
    return Rollout.of(flags_of(home.flag_settings()), await overrides.all_of(tx))


def _is_meant(override: Override, flag: Flag | None, tenant_id: int | None) -> bool:
    return flag in (None, override.flag) and tenant_id in (None, override.tenant_id)


def _confirm(meant: Sequence[Override]) -> None:
    if meant:
        _show(meant, Console(stderr=True))
        typer.confirm("Clear these overrides?", abort=True, err=True)


def _values(rollout: Rollout, tenant_id: int | None) -> list[dict[str, Any]]:
    rows = []
    for flag in Flag:
        value = rollout.value(flag, tenant_id)
        environment = rollout.environment[flag]
        rows.append({"flag": flag, "enabled": value.enabled, "origin": value.origin, "environment": environment})
    return rows


def _fields(override: Override) -> dict[str, Any]:
    return {"flag": override.flag, "tenant_id": override.tenant_id, **overrides.as_json(override)}


def _show(listed: Iterable[Override], console: Console | None = None) -> None:
    table = Table("override of", "for", "says", "tripwire")
    for override in listed:
        wire = override.tripwire
        told = f"{wire.share:g} of {wire.minimum} or more in {wire.minutes} min" if wire else ""
        table.add_row(override.flag, _whose(override.tenant_id), describe(override.target), told)
    (console or Console()).print(table)


def _whose(tenant_id: int | None) -> str:
    return "all tenants" if tenant_id is None else f"tenant {tenant_id}"


def _describe_json(override: dict[str, Any] | None) -> str:
    return describe(Target.of_json(override["target"])) if override else "none"


@asynccontextmanager
async def _transaction(settings: DatabaseSettings | None = None) -> AsyncIterator[Transaction]:
    """A transaction in the database of `settings`, or else of this command's own."""
    async with (
        opened(settings or home.settings(DatabaseSettings)) as database,
        transaction(database, Silence()) as tx,
    ):
        yield tx
