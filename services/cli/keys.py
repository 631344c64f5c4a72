"""`sessiongate keys`: the keys that seal message bodies."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import asyncpg
import typer
from rich.console import Console
from rich.table import Table

from libs.domain.chat import rotation
from libs.domain.chat.bodies import Bodies, UnreadableBodyError, new_key
from libs.domain.settings import Settings, libpq_dsn
from services.cli import home
from services.cli.errors import CommandError
from services.cli.options import AsJson
from services.cli.progress import progress_bar

app = typer.Typer(no_args_is_help=True, help="Keys that seal message bodies: make one, see which are used, rotate.")

_VARIABLE: Final = "SESSIONGATE_FIELD_KEYS"


@app.command("generate")
def generate(
    key_id: Annotated[str | None, typer.Option("--id", help="What to call it.  [default: today's date]")] = None,
) -> None:
    """Print a fresh key, to be put in front of those in SESSIONGATE_FIELD_KEYS."""
    try:
        typer.echo(new_key(f"{datetime.now(UTC):%Y-%m-%d}" if key_id is None else key_id))
    except ValueError as error:
        raise CommandError(str(error)) from None


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """Show how many messages each key seals. One that seals none can be dropped."""
    settings = home.settings(Settings)

    async def count() -> dict[str | None, int]:
        async with _owner(settings) as connection:
            return await rotation.in_use(connection)

    bodies = _bodies(settings)
    used = asyncio.run(count())
    known = {key_id: used.get(key_id, 0) for key_id in (*bodies.ids, *used)}
    if as_json:
        keys = [
            {
                "id": key_id,
                "messages": messages,
                "configured": key_id in bodies.ids,
                "current": key_id == bodies.current,
            }
            for key_id, messages in known.items()
            if key_id is not None
        ]
        typer.echo(json.dumps({"keys": keys, "in_clear": used.get(None, 0)}))
        return
    table = Table("key", "messages", "")
    for key_id, messages in known.items():
        table.add_row(key_id or "(in clear)", f"{messages:,}", _role(bodies, key_id))
    Console().print(table)


@app.command("rotate")
def rotate(as_json: AsJson = False) -> None:
    """Seal every stored message with the first key. Needs the role that owns the schema.

    Restart the services with the new key in front before; afterwards the older keys can be dropped.
    """
    settings = home.settings(Settings)
    bodies = _bodies(settings)
    if bodies.current is None:
        raise CommandError(
            f"There is no key to seal with. Put one into {_VARIABLE}; `sessiongate keys generate` makes one."
        )

    async def run() -> int:
        sealed = 0
        async with _owner(settings) as connection:
            used = await rotation.in_use(connection)
            total = sum(used.values()) - used.get(bodies.current, 0)
            with progress_bar("sealing", hidden=as_json) as show:
                async for number in rotation.rotate(connection, bodies):
                    sealed += number
                    show(sealed, max(sealed, total))
        return sealed

    try:
        sealed = asyncio.run(run())
    except UnreadableBodyError as error:
        raise CommandError(f"{error} Add it to {_VARIABLE} behind the first; what was sealed so far is kept.") from None
    except asyncpg.InsufficientPrivilegeError:
        raise CommandError(
            "This needs the role that owns the schema: set SESSIONGATE_MIGRATIONS_DATABASE_URL."
        ) from None
    if as_json:
        typer.echo(json.dumps({"sealed": sealed, "key_id": bodies.current}))
    else:
        typer.echo(f"Sealed {sealed:,} messages with the key {bodies.current}. The other keys are not needed any more.")


def _bodies(settings: Settings) -> Bodies:
    return Bodies.parse(settings.field_keys.get_secret_value())


def _role(bodies: Bodies, key_id: str | None) -> str:
    if key_id is None:
        return ""
    if key_id == bodies.current:
        return "seals"
    return "opens" if key_id in bodies.ids else "[red]not configured[/]"


@asynccontextmanager
async def _owner(settings: Settings) -> AsyncIterator["asyncpg.Connection[Any]"]:
    connection = await asyncpg.connect(libpq_dsn(settings.migrations_database_url or settings.database_url), timeout=10)
    try:
        yield connection
    finally:
        await connection.close()
