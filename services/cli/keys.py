"""`sessiongate keys`: the keys that seal message bodies and the secrets of webhooks."""

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
from libs.domain.chat.bodies import Bodies
from libs.domain.sealing import FieldKeys, UnreadableFieldError, new_key
from libs.domain.settings import Settings, libpq_dsn
from libs.domain.webhooks import secrets
from services.cli import home
from services.cli.errors import CommandError
from services.cli.options import AsJson
from services.cli.progress import progress_bar

app = typer.Typer(no_args_is_help=True, help="Keys that seal bodies and secrets: make one, see which are used, rotate.")

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
    """Show how much each key seals. One that seals nothing can be dropped."""
    settings = home.settings(Settings)

    async def count() -> tuple[dict[str | None, int], dict[str | None, int]]:
        async with _owner(settings) as connection:
            return await rotation.in_use(connection), await secrets.in_use(connection)

    keys = _keys(settings)
    messages, webhook_secrets = asyncio.run(count())
    known = {
        key_id: (messages.get(key_id, 0), webhook_secrets.get(key_id, 0))
        for key_id in (*keys.ids, *messages, *webhook_secrets)
    }
    if as_json:
        listed = [
            {
                "id": key_id,
                "messages": sealed_messages,
                "webhook_secrets": sealed_secrets,
                "configured": key_id in keys.ids,
                "current": key_id == keys.current,
            }
            for key_id, (sealed_messages, sealed_secrets) in known.items()
            if key_id is not None
        ]
        typer.echo(json.dumps({"keys": listed, "in_clear": sum(known.get(None, (0, 0)))}))
        return
    table = Table("key", "messages", "secrets of webhooks", "")
    for key_id, numbers in known.items():
        table.add_row(key_id or "(in clear)", *(f"{number:,}" for number in numbers), _role(keys, key_id))
    Console().print(table)


@app.command("rotate")
def rotate(as_json: AsJson = False) -> None:
    """Seal every stored message and secret with the first key. Needs the role that owns the schema.

    Restart the services with the new key in front before; afterwards the older keys can be dropped.
    """
    settings = home.settings(Settings)
    keys = _keys(settings)
    if keys.current is None:
        raise CommandError(
            f"There is no key to seal with. Put one into {_VARIABLE}; `sessiongate keys generate` makes one."
        )

    async def run() -> int:
        sealed = 0
        async with _owner(settings) as connection:
            sealed += await secrets.rotate(connection, keys)
            used = await rotation.in_use(connection)
            total = sealed + sum(used.values()) - used.get(keys.current, 0)
            with progress_bar("sealing", hidden=as_json) as show:
                async for number in rotation.rotate(connection, Bodies(keys)):
                    sealed += number
                    show(sealed, max(sealed, total))
        return sealed

    try:
        sealed = asyncio.run(run())
    except UnreadableFieldError as error:
        raise CommandError(f"{error} Add it to {_VARIABLE} behind the first; what was sealed so far is kept.") from None
    except asyncpg.InsufficientPrivilegeError:
        raise CommandError(
            "This needs the role that owns the schema: set SESSIONGATE_MIGRATIONS_DATABASE_URL."
        ) from None
    if as_json:
        typer.echo(json.dumps({"sealed": sealed, "key_id": keys.current}))
    else:
        typer.echo(f"Sealed {sealed:,} fields with the key {keys.current}. The other keys are not needed any more.")


def _keys(settings: Settings) -> FieldKeys:
    return FieldKeys.parse(settings.field_keys.get_secret_value())


def _role(keys: FieldKeys, key_id: str | None) -> str:
    if key_id is None:
        return ""
    if key_id == keys.current:
        return "seals"
    return "opens" if key_id in keys.ids else "[red]not configured[/]"


@asynccontextmanager
async def _owner(settings: Settings) -> AsyncIterator["asyncpg.Connection[Any]"]:
    connection = await asyncpg.connect(libpq_dsn(settings.migrations_database_url or settings.database_url), timeout=10)
    try:
        yield connection
    finally:
        await connection.close()
