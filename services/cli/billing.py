"""`sessiongate billing`: what was charged, taken back."""

import asyncio
import json
from dataclasses import asdict
from typing import Annotated, Final

import typer
from rich import print as say
from rich.table import Table

from libs.domain.billing import ledger
from libs.domain.billing.ledger import Line
from libs.domain.runtime import telemetry
from libs.domain.settings import Settings
from libs.domain.transaction import transaction
from libs.guardrails import AppointmentRef, Reason, Refused, SessionRef, parse_context
from services.cli import home
from services.cli.database import opened
from services.cli.errors import CommandError
from services.cli.options import AsJson
from services.cli.seed import Silence

app = typer.Typer(no_args_is_help=True, help="The ledger: charges that are taken back.")

_TENANT_OF_SESSION: Final = "SELECT tenant_id FROM sessions WHERE id = $1 AND kind = $2"
_TENANT_OF_APPOINTMENT: Final = "SELECT tenant_id FROM appointments WHERE id = $1"


@app.callback()
def billing() -> None:
    """The ledger: charges that are taken back."""


@app.command()
def refund(
    ref: Annotated[
        str, typer.Argument(help="A session such as text_session:7, or an appointment that was billed the legacy way.")
    ],
    unit: Annotated[int | None, typer.Option(min=1, help="Only this unit. Default: all that is not refunded.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the audit log.")] = None,
    as_json: AsJson = False,
) -> None:
    """Give the patient the units back and take the payout back from the doctor, by new transactions."""
    try:
        subject = parse_context(ref)
    except Refused:
        raise CommandError(f"{ref!r} is neither a session such as text_session:7 nor an appointment's id.") from None
    lines = asyncio.run(_refund(home.logging_settings(), subject, unit, reason))
    if as_json:
        items = [asdict(line) | {"created_at": line.created_at.isoformat()} for line in lines]
        typer.echo(json.dumps({"units_refunded": len(lines), "items": items}))
        return
    table = Table("transaction", "reverses", "unit", "account", "amount")
    for line in lines:
        for entry in line.entries:
            owner = entry.subscription_id or entry.doctor_id or ""
            table.add_row(
                str(line.id),
                str(line.reverses),
                str(line.unit),
                f"{entry.account} {owner}".rstrip(),
                f"{entry.amount:+} {entry.commodity}",
            )
    say(table)
    say(f"{len(lines)} unit{'' if len(lines) == 1 else 's'} refunded.")


async def _refund(
    settings: Settings, subject: SessionRef | AppointmentRef, unit: int | None, reason: str | None
) -> list[Line]:
    async with telemetry(settings, "sessiongate-cli"), opened(settings) as database:
        async with database.autocommit() as connection:
            if isinstance(subject, SessionRef):
                tenant_id = await connection.fetchval(_TENANT_OF_SESSION, subject.id, subject.kind.value)
            else:
                tenant_id = await connection.fetchval(_TENANT_OF_APPOINTMENT, subject.id)
        if tenant_id is None:
            raise CommandError(
                f"There is no {subject if isinstance(subject, SessionRef) else f'appointment {subject}'}."
            )
        try:
            async with transaction(database, Silence()) as tx:
                return await ledger.refund(tx, tenant_id, None, subject, unit=unit, reason=reason)
        except Refused as refused:
            if refused.reason is Reason.NOTHING_TO_REFUND:
                raise CommandError("Nothing was charged for this, or all of it was refunded before.") from None
            raise
