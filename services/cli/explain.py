"""`sessiongate explain`: the story of one appointment or session."""

import asyncio
import json
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text

from libs.domain.explain import Event, story
from libs.domain.settings import Settings
from libs.guardrails import Refused, parse_context
from services.cli import home
from services.cli.database import opened
from services.cli.errors import CommandError
from services.cli.options import AsJson

Facts = dict[str, Any]


def explain(
    reference: Annotated[
        str, typer.Argument(help="An appointment id such as 12, or text_session:7, or call_session:7.")
    ],
    as_json: AsJson = False,
) -> None:
    """Tell what happened to an appointment or a session, in order, and what was refused and why."""
    try:
        wanted = parse_context(reference)
    except Refused:
        raise CommandError("Name an appointment such as 12, or a session such as text_session:7.") from None
    settings = home.settings(Settings)

    async def ask() -> list[Event] | None:
        async with opened(settings) as database:
            return await story(database, wanted)

    events = asyncio.run(ask())
    if events is None:
        kind = "session" if ":" in str(wanted) else "appointment"
        raise CommandError(f"There is no {kind} {wanted}.")
    if as_json:
        typer.echo(json.dumps([event.fields() for event in events]))
    else:
        _show(events)


def _show(events: list[Event]) -> None:
    """One line for each, however long: a code that is cut off cannot be searched for."""
    console = Console(soft_wrap=True, highlight=False)
    for event in events:
        what, who, why = _told(event)
        line = Text(f"{event.at:%Y-%m-%d %H:%M:%S.%f}"[:-3] + "  ")
        line.append(what, _COLOURS.get(event.kind))
        if who:
            line.append(f" · {who}", "dim")
        if why:
            line.append(f" · {why}")
        console.print(line)


_COLOURS: Final = {"refused": "red", "conversion_failed": "red", "parked": "red", "warned": "yellow"}

_WHAT: Final = {
    "booked": "{modality} appointment {appointment_id} booked for {starts_at}",
    "appointment_confirmed": "confirmed for {starts_at}",
    "appointment_cancelled": "cancelled",
    "appointment_expired": "expired: nobody confirmed it in time",
    "reschedule_proposed": "a new time proposed",
    "reschedule_accepted": "moved to {starts_at}",
    "reschedule_rejected": "the new time rejected; it stays at {starts_at}",
    "conversion_created": "converted, attempt {attempt}",
    "conversion_skipped": "conversion skipped, attempt {attempt}",
    "conversion_failed": "conversion failed, attempt {attempt}",
    "parked": "parked until an operator acts",
    "session_created": "{session_context} created",
    "first_message": "first message of the {role}",
    "rang": "rung for the other party",
    "unit_charged": "unit {unit} charged to subscription {subscription_id}, {modality}",
    "legacy_billed": "unit {unit} billed by a legacy path to subscription {subscription_id}, {modality}",
    "unit_refunded": "unit {unit} given back to subscription {subscription_id}, {modality}",
    "paid_out": "{amount_minor} {currency} in minor units paid for unit {unit}",
    "payout_taken_back": "{amount_minor} {currency} in minor units taken back for unit {unit}",
    "ending_soon": "both warned that the time is nearly up",
    "earlier_decisions": "{number} earlier decisions, not listed",
    "refused": "{operation} on {identifier} refused",
    "warned": "{operation} on {identifier} allowed with a warning",
    "notified": "notified of {notification}",
}
"""What is not said here says itself."""


def _told(event: Event) -> tuple[str, str, str]:
    """What happened, who did it or was concerned, and why."""
    what = _WHAT[event.kind].format_map(event.facts) if event.kind in _WHAT else event.kind.replace("_", " ")
    return what, _who(event.facts), _why(event.facts)


def _who(facts: Facts) -> str:
    if "patient_id" in facts:
        return f"patient {facts['patient_id']}, doctor {facts['doctor_id']}"
    user = facts.get("user_id", facts.get("ended_by"))
    if user is None:
        return ""
    said = f"{facts.get('role', 'user')} {user}"
    return f"{said} with {facts['client']}" if "client" in facts else said


def _why(facts: Facts) -> str:
    words = [facts.get("reason"), facts.get("error_message")]
    if "flag" in facts:
        words.append(f"by {facts['flag']}")
    return " ".join(filter(None, words))
