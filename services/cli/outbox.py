"""`sessiongate outbox`: deliveries that were given up, of all tenants."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Column, Table

from libs.domain.outbox import dead
from libs.domain.pages import Page
from libs.domain.settings import DatabaseSettings
from libs.domain.transaction import transaction
from libs.guardrails.context import MAX_ID
from services.cli import home
from services.cli.database import opened
from services.cli.errors import CommandError
from services.cli.options import AsJson
from services.cli.seed import Silence

app = typer.Typer(no_args_is_help=True, help="Deliveries that were given up: see why, and have them tried again.")

OfConsumer = Annotated[
    str | None, typer.Option("--consumer", help="Of this consumer alone: notifications, or such as webhook:7.")
]


@app.command("dead")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 50,
    consumer: OfConsumer = None,
    as_json: AsJson = False,
) -> None:
    """List deliveries that were given up, and why."""
    settings = home.settings(DatabaseSettings)

    async def ask() -> Page[dead.DeadDelivery]:
        async with opened(settings) as database, transaction(database, Silence()) as tx:
            return await dead.listed(tx, None, consumer, limit=limit)

    page = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in page.items], default=_plain))
    elif not page.items:
        typer.echo("No delivery was given up.")
    else:
        _show(page)


@app.command("replay")
def replay(
    ids: Annotated[list[int] | None, typer.Argument(min=1, max=MAX_ID, help="Which, as `dead` lists them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All that were given up.")] = False,
    consumer: OfConsumer = None,
    as_json: AsJson = False,
) -> None:
    """Have deliveries tried again, with as many attempts as at first."""
    if bool(ids) == every:
        raise CommandError("Name the deliveries to replay, or say --all.")
    if consumer and not every:
        raise CommandError("--consumer goes with --all.")
    settings = home.settings(DatabaseSettings)

    async def run() -> list[int]:
        async with opened(settings) as database, transaction(database, Silence()) as tx:
            return await dead.replay(tx, None, ids, consumer=consumer)

    replayed = asyncio.run(run())
    if as_json:
        typer.echo(json.dumps({"replayed": replayed}))
    else:
        typer.echo(f"{len(replayed)} will be tried again within a second.")
    _complain_of(sorted(set(ids or ()) - set(replayed)))


def _complain_of(missing: Sequence[int]) -> None:
    if missing:
        raise CommandError(f"No dead delivery has the id {', '.join(map(str, missing))}.")


def _show(page: Page[dead.DeadDelivery]) -> None:
    wide = [Column(name, overflow="fold") for name in ("event", "consumer", "about", "why")]
    table = Table("id", "given up", "tenant", *wide)
    for each in page.items:
        table.add_row(
            str(each.id),
            f"{each.dead_at:%Y-%m-%d %H:%M:%S}",
            str(each.tenant_id),
            each.event_name,
            each.consumer,
            each.aggregate,
            each.last_error or "nobody who took it on lived to tell",
        )
    console = Console()
    console.print(table)
    if page.has_more:
        console.print("There are more; --limit shows them.")


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    assert isinstance(value, UUID)
    return str(value)
