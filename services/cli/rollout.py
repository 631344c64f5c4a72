"""`sessiongate flags report`: whom the rollout flags refuse, or would refuse."""

import asyncio
import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from libs.domain.decisions import rollout
from libs.domain.settings import Settings
from services.cli import home
from services.cli.database import opened
from services.cli.errors import CommandError
from services.cli.options import AsJson


def report(
    since: Annotated[str, typer.Option(help="Since when: 90m, 24h, 7d, or a timestamp with an offset.")] = "24h",
    tenant: Annotated[int | None, typer.Option(min=1, help="Of this tenant alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say, for each rollout flag, who is or would be refused, and whether it is safe to enforce."""
    try:
        reach = rollout.since_of(since)
    except ValueError:
        raise CommandError("--since is a span such as 90m, 24h or 7d, or a timestamp with an offset.") from None
    settings = home.settings(Settings)

    async def ask() -> rollout.Report:
        async with opened(settings) as database:
            return await rollout.report(database, reach, tenant)

    answer = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps(asdict(answer), default=_utc))
    else:
        _show(answer)


def _utc(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _show(answer: rollout.Report) -> None:
    console = Console()
    console.print(f"Since {answer.since:%Y-%m-%d %H:%M:%S} UTC")
    summary = Table(Column("flag", no_wrap=True), "safe to enforce", "why")
    for each in answer.flags:
        name = each.flag.value if each.enforced_when else f"{each.flag.value} (enforced when off)"
        summary.add_row(name, "[green]yes[/]" if each.safe_to_enforce else "[red]no[/]", each.why)
    console.print(summary)
    names = [Column(name, overflow="fold") for name in ("flag", "operation", "client")]
    callers = Table(*names, "would be refused", "refused", "users", "first seen", "last seen")
    for each in answer.flags:
        for caller in each.callers:
            callers.add_row(
                each.flag.value,
                caller.operation,
                caller.client,
                str(caller.would_be_refused),
                str(caller.refused),
                str(caller.users),
                f"{caller.first_seen:%Y-%m-%d %H:%M:%S}",
                f"{caller.last_seen:%Y-%m-%d %H:%M:%S}",
            )
    if callers.row_count:
        console.print(callers)
