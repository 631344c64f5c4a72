"""`sessiongate logs`: lines of the log that are kept in the database, of all processes and tenants."""

import asyncio
import json
from dataclasses import asdict
from datetime import UTC
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncConnection

from libs.domain.decisions.rollout import since_of
from libs.domain.logs import search as kept
from libs.domain.logs.search import Count, Moment, Wanted
from libs.domain.settings import DatabaseSettings
from libs.guardrails.context import MAX_ID
from libs.observability.events import EVERY_LINE, Category, Level
from services.cli import home
from services.cli.database import opened
from services.cli.errors import CommandError
from services.cli.options import AsJson

app = typer.Typer(
    no_args_is_help=True,
    help="Search and count lines of the log; they are kept where SESSIONGATE_LOG_SEARCH_HOURS is set.",
)

_WHEN: Final = "90m, 24h or 7d ago, or a timestamp with an offset"
Since = Annotated[str | None, typer.Option("--since", help=f"Since when: {_WHEN}.")]
Until = Annotated[str | None, typer.Option("--until", help=f"Until when: {_WHEN}.")]
OneId = Annotated[int | None, typer.Option(min=1, max=MAX_ID)]


@app.command("search")
def search(
    since: Since = None,
    until: Until = None,
    level: Annotated[Level | None, typer.Option(help="This one or a worse one.")] = None,
    component: Annotated[str | None, typer.Option(help="Such as chat or outbox.")] = None,
    category: Annotated[Category | None, typer.Option()] = None,
    event: Annotated[str | None, typer.Option(help="Such as outbox_failed.")] = None,
    correlation_id: Annotated[str | None, typer.Option(help="As the answer to a request names it.")] = None,
    user: OneId = None,
    session: OneId = None,
    tenant: OneId = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the newest.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show the newest lines that agree in all that is asked for, the newest last."""
    wanted = Wanted(
        since=_moment("--since", since),
        until=_moment("--until", until),
        level=level,
        component=component,
        category=category,
        event=event,
        correlation_id=correlation_id,
        user_id=user,
        session_id=session,
        tenant_id=tenant,
    )
    settings = home.settings(DatabaseSettings)

    async def ask() -> list[str]:
        async with opened(settings) as database, database.begin() as connection:
            lines = await kept.search(connection, wanted, limit=limit)
            if not lines:
                await _say_what_is_kept(connection)
            return lines

    lines = asyncio.run(ask())
    if as_json:
        typer.echo(f"[{','.join(lines)}]")
    else:
        _show([json.loads(line) for line in lines])


@app.command("stats")
def stats(since: Since = None, until: Until = None, as_json: AsJson = False) -> None:
    """Count the lines that are kept by level and event."""
    wanted = Wanted(since=_moment("--since", since), until=_moment("--until", until))
    settings = home.settings(DatabaseSettings)

    async def ask() -> list[Count]:
        async with opened(settings) as database, database.begin() as connection:
            counts = await kept.count(connection, wanted)
            if not counts:
                await _say_what_is_kept(connection)
            return counts

    counts = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in counts]))
    else:
        table = Table("level", "event", "category", "lines")
        for each in counts:
            table.add_row(each.level, each.event, each.category or "", str(each.lines))
        Console().print(table)


async def _say_what_is_kept(connection: AsyncConnection) -> None:
    """On standard error, where it does not mix with lines: whether anything could have been found at all."""
    since = await kept.kept_since(connection)
    if since is None:
        typer.echo("No lines are kept: set SESSIONGATE_LOG_SEARCH_HOURS where API and worker run.", err=True)
    else:
        typer.echo(f"Nothing found. Lines are kept since {since.astimezone(UTC):%Y-%m-%d %H:%M} UTC.", err=True)


def _moment(option: str, given: str | None) -> Moment | None:
    try:
        return None if given is None else since_of(given)
    except ValueError:
        raise CommandError(f"{option} is a span such as 90m, 24h or 7d, or a timestamp with an offset.") from None


_COLOURS: Final = {"warning": "yellow", "error": "red", "critical": "bold red"}


def _show(lines: list[dict[str, Any]]) -> None:
    """One line for each, however long, of what it has to say."""
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        shown = Text(f"{line['timestamp'][:23].replace('T', ' ')} ")
        shown.append(f"{line['level']:<8}", _COLOURS.get(line["level"]))
        shown.append(f"{line.get('component', '')} {line.get('event', '')}", "bold")
        for name, value in line.items():
            if name not in EVERY_LINE and value is not None:
                shown.append(f" {name}=", "dim")
                shown.append(_printable(value if isinstance(value, str) else json.dumps(value)))
        console.print(shown)


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
