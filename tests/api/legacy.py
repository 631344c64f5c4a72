"""What clients do that bill by appointment."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

from httpx2 import Response

from libs.guardrails import Principal
from tests.clinic import Clinic
from tests.running import Api

Ask: TypeAlias = Callable[[Api, Principal, int], Awaitable[Response]]


def at(way: str) -> Ask:
    """Asks at an address that names the appointment."""

    async def ask(api: Api, caller: Principal, appointment_id: int) -> Response:
        return await api.as_(caller).post(f"{api.url}/api/appointments/{appointment_id}/{way}")

    return ask


def deduction(reason: str, units: int) -> Ask:
    """Asks for a deduction of so many units."""

    async def ask(api: Api, caller: Principal, appointment_id: int) -> Response:
        wanted = {"appointment_id": appointment_id, "sessions_to_deduct": units, "reason": reason}
        return await api.as_(caller).post(f"{api.url}/api/text-appointments/process-deduction", json=wanted)

    return ask


WAYS: Final[dict[str, tuple[str, Ask]]] = {
    "end-session": ("end_session", at("end-session")),
    "process-payment": ("process_payment", at("process-payment")),
    "interval": ("process_deduction", deduction("interval", 9)),
    "manual end": ("process_deduction", deduction("manual_end", 9)),
    "no activity": ("process_deduction", deduction("no_activity", 9)),
}
"""The ways to bill, and the operation that each is to the guard."""

ENDS: Final = {"end-session", "manual end"}
"""Those that also end the session."""

_LEDGER: Final = """
    SELECT t.unit, jsonb_object_agg(e.account, e.amount) AS entries
    FROM ledger_transactions t JOIN ledger_entries e ON e.transaction_id = t.id
    WHERE coalesce(t.appointment_id, (SELECT appointment_id FROM sessions WHERE id = t.session_id)) = $1
    GROUP BY t.id ORDER BY t.unit
"""
PAID: Final = {"subscription": -1, "consumed": 1, "wallet": 350_000, "payable": -350_000}
UNPAID: Final = {"subscription": -1, "consumed": 1}


async def ledger_of(clinic: Clinic, appointment_id: int) -> list[tuple[int, dict[str, Any]]]:
    """Every unit that the appointment or its session was ever charged, with its entries by account."""
    return [(row["unit"], row["entries"]) for row in await clinic.fetch(_LEDGER, appointment_id)]


def paid(units: int) -> list[tuple[int, dict[str, Any]]]:
    """The ledger of so many units that were charged and paid once each."""
    return [(number, PAID) for number in range(1, units + 1)]
