"""`sessiongate audit`: whether everything that must always be true of the database is."""

import asyncio
import json

import typer
from rich.console import Console
from rich.table import Column, Table

from libs.domain import invariants
from libs.domain.invariants import Audit
from libs.domain.settings import Settings
from services.cli import home
from services.cli.database import opened
from services.cli.options import AsJson
from services.cli.progress import progress_bar


def audit(as_json: AsJson = False) -> None:
    """Prove every invariant of the database, as of one moment. Exits with 1 if one is violated."""
    settings = home.settings(Settings)

    async def check() -> Audit:
        async with opened(settings) as database:
            with progress_bar("checking") as show:
                async with invariants.snapshot(database, settings.audit_timeout_seconds) as connection:
                    return await invariants.audit(connection, show)

    result = asyncio.run(check())
    if as_json:
        typer.echo(json.dumps(result.fields()))
    else:
        _show(result)
    raise typer.Exit(1 if result.violated else 0)


def _show(result: Audit) -> None:
    table = Table(Column("invariant", overflow="fold"), "", Column("violations", justify="right"), "first examples")
    for finding in result.findings:
        table.add_row(
            finding.invariant.name,
            finding.invariant.sentence,
            f"{finding.violations:,}",
            ", ".join(finding.examples),
            style="red" if finding.violations else None,
        )
    console = Console()
    console.print(table)
    verdict = f"{len(result.violated)} of {len(result.findings)} are violated" if result.violated else "All are kept"
    console.print(f"{verdict}, as of {result.checked_at:%Y-%m-%d %H:%M:%S} UTC.")
