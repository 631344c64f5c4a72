"""`sessiongate alerts`: what is wrong with the platform, or was."""

import asyncio
import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from libs.domain import alerts
from libs.domain.pages import Page
from libs.domain.settings import DatabaseSettings
from libs.domain.transaction import transaction
from services.cli import home
from services.cli.database import opened
from services.cli.options import AsJson
from services.cli.seed import Silence

app = typer.Typer(no_args_is_help=True, help="Alerts that the platform was told of: which fire, and which did.")


@app.command("list")
def list_alerts(
    firing: Annotated[bool, typer.Option("--firing", help="Only those that are not resolved.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List alerts, each time that one fired."""
    settings = home.settings(DatabaseSettings)
    wanted = alerts.Wanted(status="firing" if firing else None)

    async def ask() -> Page[alerts.Alert]:
        async with opened(settings) as database, transaction(database, Silence()) as tx:
            return await alerts.listed(tx, wanted, limit=limit)

    page = asyncio.run(ask())
    if as_json:
        listed = [{**asdict(each), "status": each.status} for each in page.items]
        typer.echo(json.dumps(listed, default=_plain))
    elif not page.items:
        typer.echo("No alert fires." if firing else "No alert was told.")
    else:
        _show(page)


def _show(page: Page[alerts.Alert]) -> None:
    wide = [Column(name, overflow="fold") for name in ("alert", "about")]
    table = Table("id", "started", "resolved", "severity", "component", *wide)
    for each in page.items:
        table.add_row(
            str(each.id),
            f"{each.started_at:%Y-%m-%d %H:%M:%S}",
            f"{each.resolved_at:%Y-%m-%d %H:%M:%S}" if each.resolved_at else "",
            each.severity,
            each.component or "",
            each.name,
            each.annotations.get("summary", ""),
        )
    console = Console()
    console.print(table)
    if page.has_more:
        console.print("There are more; --limit shows them.")


def _plain(value: Any) -> str:
    assert isinstance(value, datetime)
    return value.isoformat().replace("+00:00", "Z")
