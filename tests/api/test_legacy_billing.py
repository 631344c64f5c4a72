"""Billing by appointment: how much, and never twice, in whatever order and mixture."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import permutations
from typing import Any, Final, TypeAlias

import pytest
from httpx2 import Response

from libs.guardrails import Principal
from tests.api.expect import faults, found, problem, strangers
from tests.api.legacy import ENDS, WAYS, Ask, at, deduction, ledger_of, paid
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import Api


@pytest.fixture
async def lenient(make_api: MakeApi) -> Api:
    """An API by which appointments with a session may be billed."""
    return await make_api()


COSTS: Final = [
    *((minutes, at(way), 1) for minutes in (0, 8, 25, 300) for way in ("end-session", "process-payment")),
    # The whole units that have run, of those that somebody asks for; an appointment lasts half an hour.
    *((minutes, deduction("interval", 9), minutes // 10) for minutes in (0, 9, 10, 25, 30)),
    *((300, deduction(reason, 9), 3) for reason in ("interval", "no_activity")),
    *((25, deduction(reason, 1), 1) for reason in ("interval", "no_activity", "manual_end")),
    # For an end also the one that has begun.
    *((minutes, deduction("manual_end", 9), minutes // 10 + 1) for minutes in (0, 8, 10, 12, 25)),
]


@pytest.mark.parametrize(("minutes", "ask", "units"), COSTS)
async def test_what_an_appointment_without_a_session_costs(
    api: Api, clinic: Clinic, minutes: int, ask: Ask, units: int
) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=-minutes * MINUTE)

    assert found(await ask(api, patient, appointment_id)) == {
        "appointment_id": appointment_id,
        "status": "COMPLETED",
        "units_charged": units,
        "units_added": units,
        "session_context": None,
    }

    assert await ledger_of(clinic, appointment_id) == paid(units)
    assert await clinic.convert() == {}, "What was billed can never get a session."
    charged = await clinic.fetch("SELECT payload FROM outbox_events WHERE name = 'legacy_charged'")
    assert [row["payload"]["units_added"] for row in charged] == ([units] if units else [])
    await clinic.dispatch()
    assert await clinic.fetch("SELECT FROM notifications") == [], "What it costs is no news for its parties."


@pytest.mark.parametrize(
    ("minute", "end", "units"),
    [
        (5, at("end-session"), 1),
        (5, at("process-payment"), 1),
        (8, deduction("manual_end", 1), 1),
        (25, deduction("manual_end", 9), 3),
    ],
)
async def test_once_it_was_ended_nothing_is_charged_any_more(
    api: Api, clinic: Clinic, clock: Clock, minute: int, end: Ask, units: int
) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=-minute * MINUTE, lasts=60 * MINUTE)
    assert found(await end(api, patient, appointment_id))["units_charged"] == units
    for later in (5, 30, 60):
        await clock.advance(later * MINUTE)
        for ask in (end, *(ask for _, ask in WAYS.values())):
            bill = found(await ask(api, patient, appointment_id))
            assert (bill["units_charged"], bill["units_added"]) == (units, 0)
    assert await ledger_of(clinic, appointment_id) == paid(units)


async def test_until_somebody_ends_it_intervals_are_charged_as_they_pass(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=-MINUTE, lasts=60 * MINUTE)
    charged = []
    for _ in range(3):
        await clock.advance(10 * MINUTE)
        charged.append(found(await deduction("interval", 1)(api, patient, appointment_id))["units_charged"])
    await clock.advance(4 * MINUTE)
    for ask in (deduction("manual_end", 1), deduction("interval", 9), at("end-session")):
        charged.append(found(await ask(api, patient, appointment_id))["units_charged"])
    assert charged == [1, 2, 3, 4, 4, 4]
    assert await ledger_of(clinic, appointment_id) == paid(4)


async def test_deductions_add_up_to_what_has_run_and_to_no_more(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=-25 * MINUTE)
    asked = [deduction("interval", 1)] * 3 + [deduction("manual_end", 1)] * 2 + [deduction("interval", 9)]
    bills = [found(await ask(api, patient, appointment_id)) for ask in asked]
    assert [bill["units_charged"] for bill in bills] == [1, 2, 2, 3, 3, 3]


async def test_who_has_no_units_pays_nothing_and_nobody_is_paid(api: Api, clinic: Clinic) -> None:
    for units in (0, None):
        patient = await clinic.patient(units=units)
        for ask in (at("end-session"), deduction("manual_end", 9)):
            appointment_id = await clinic.appointment(patient=patient, starts_in=-25 * MINUTE)
            bill = found(await ask(api, patient, appointment_id))
            assert (bill["status"], bill["units_charged"]) == ("COMPLETED", 0)
            assert await ledger_of(clinic, appointment_id) == []
    patient = await clinic.patient(units=2)
    appointment_id = await clinic.appointment(patient=patient, starts_in=-25 * MINUTE)
    assert found(await deduction("manual_end", 9)(api, patient, appointment_id))["units_charged"] == 2
    assert await ledger_of(clinic, appointment_id) == paid(2)


async def test_whoever_bills_the_patient_is_charged(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    for caller in (patient, doctor, clinic.operator):
        appointment_id = await clinic.appointment(doctor, patient)
        found(await at("process-payment")(api, caller, appointment_id))
        assert await ledger_of(clinic, appointment_id) == paid(1)
    assert found(await api.as_(patient).get("/billing/balance"))["units"]["text"] == 7


async def test_strangers_do_not_learn_that_an_appointment_exists(api: Api, clinic: Clinic) -> None:
    appointment_id = await clinic.appointment()
    for _, ask in WAYS.values():
        for stranger in await strangers(clinic):
            problem(await ask(api, stranger, appointment_id), 404, "APPOINTMENT_NOT_FOUND")
            problem(await ask(api, stranger, 2**63 - 1), 404, "APPOINTMENT_NOT_FOUND")
    assert await clinic.fetchval("SELECT status FROM appointments") == "CONFIRMED"


async def test_refusals_come_in_the_promised_order(api: Api, clinic: Clinic) -> None:
    """Everything is wrong at first; mending the first fault uncovers the next one."""
    live = await clinic.session()
    path = f"{api.url}/api/text-appointments/process-deduction"
    other, patient = api.as_(await clinic.patient()), api.as_(live.patient)
    wanted: dict[str, Any] = {"appointment_id": live.appointment_id, "sessions_to_deduct": 1, "reason": "interval"}
    wrong = wanted | {"reason": "for fun"}

    problem(await api.anonymous.post(path, content=b"{" + b" " * 65_536), 401, "UNAUTHENTICATED")
    problem(await other.post(path, content=b"{" + b" " * 65_536), 413, "PAYLOAD_TOO_LARGE")
    broken = await other.post(path, content=b"{", headers={"Content-Type": "application/json"})
    assert faults(broken, 400) == [""]
    assert faults(await other.post(path, json=wrong)) == ["/reason"]
    problem(await other.post(path, json=wanted), 404, "APPOINTMENT_NOT_FOUND")
    problem(await patient.post(path, json=wanted), 400, "SESSION_BILLING_REQUIRED")  # although it has not begun


async def test_one_idempotency_key_bills_once(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=-25 * MINUTE)
    wanted = {"appointment_id": appointment_id, "sessions_to_deduct": 1, "reason": "interval"}
    paths = {
        f"{api.url}/api/text-appointments/process-deduction": wanted,
        f"{api.url}/api/appointments/{appointment_id}/end-session": None,
        f"{api.url}/api/appointments/{appointment_id}/process-payment": None,
    }
    for path, body in paths.items():
        first, second = [
            await api.as_(patient).post(path, json=body, headers={"Idempotency-Key": "a"}) for _ in range(2)
        ]
        assert found(first) == found(second)
        assert second.headers["idempotent-replayed"] == "true"
    assert await ledger_of(clinic, appointment_id) == paid(1)


class WithoutSession:
    """What an appointment without a session comes to, 25 of its 30 minutes after it began."""

    def __init__(self) -> None:
        self.units = 0
        self.ended = False

    def bill(self, way: str, asked: int) -> int:
        limit = {"end-session": 1, "process-payment": 1}.get(way)
        if limit is None:
            limit = min(self.units + asked, 3 if way == "manual end" else 2)
        if not self.ended:
            self.units = max(self.units, limit)
        self.ended = self.ended or way in ENDS or way == "process-payment"
        return self.units


async def test_no_order_of_the_old_ways_charges_a_unit_twice(api: Api, clinic: Clinic) -> None:
    singly = {way: (WAYS[way][1], 9) for way in WAYS} | {"interval": (deduction("interval", 1), 1)}
    orders = list(permutations(singly))

    async def bill(order: tuple[str, ...]) -> None:
        patient, model = await clinic.patient(), WithoutSession()
        appointment_id = await clinic.appointment(patient=patient, starts_in=-25 * MINUTE)
        for way in order:
            ask, asked = singly[way]
            before = model.units
            bill = found(await ask(api, patient, appointment_id))
            expected = model.bill(way, asked)
            assert (bill["units_charged"], bill["units_added"]) == (expected, expected - before), order
        assert await ledger_of(clinic, appointment_id) == paid(model.units), order

    for begin in range(0, len(orders), 20):
        await asyncio.gather(*(bill(order) for order in orders[begin : begin + 20]))


Do: TypeAlias = Callable[[Api, Clinic, LiveSession], Awaitable[Response | None]]


async def end(api: Api, clinic: Clinic, live: LiveSession) -> Response:
    return await api.as_(live.doctor).post(f"/sessions/{live.context}/end")


async def deduct(api: Api, clinic: Clinic, live: LiveSession) -> Response:
    return await api.as_(live.doctor).post(f"/sessions/{live.context}/deductions")


async def tick(api: Api, clinic: Clinic, live: LiveSession) -> None:
    await clinic.settle()


async def run_commands(api: Api, clinic: Clinic, live: LiveSession) -> None:
    triggers = clinic.triggers()
    await triggers.process_appointment_sessions()
    await triggers.activate_booked_appointments()


def by_appointment(ask: Ask) -> Do:
    async def do(api: Api, clinic: Clinic, live: LiveSession) -> Response:
        return await ask(api, live.patient, live.appointment_id)

    return do


MIXTURE: Final[dict[str, Do]] = {way: by_appointment(ask) for way, (_, ask) in WAYS.items()} | {
    "sessions end": end,
    "deductions": deduct,
    "tick": tick,
    "commands": run_commands,
}


async def test_no_order_of_old_and_new_ways_charges_a_unit_twice(
    lenient: Api, clinic: Clinic, pytestconfig: pytest.Config
) -> None:
    """Two or three in each order, and all of them in some, on sessions whose units have run for 25 minutes."""
    chance = random.Random(7)
    length = 3 if pytestconfig.getoption("storm") == "full" else 2
    orders = [*permutations(MIXTURE, length), *(chance.sample(list(MIXTURE), len(MIXTURE)) for _ in range(20))]

    async def bill(order: Sequence[str], live: LiveSession) -> None:
        units, over = 0, False
        for name in order:
            response = await MIXTURE[name](lenient, clinic, live)
            if not over and name not in ("tick", "commands"):  # those may come late, after those of another order
                over = name in ENDS or name == "sessions end"
                units = 3 if over else 2
            if response is None:
                continue
            if over and name == "deductions":
                problem(response, 409, "SESSION_NOT_ACTIVE")
                continue
            body = found(response)
            assert body.get("billing", body)["units_charged"] == units, order
        assert len(await ledger_of(clinic, live.appointment_id)) >= units, order
        await MIXTURE["sessions end"](lenient, clinic, live)
        assert await ledger_of(clinic, live.appointment_id) == paid(3), order

    for begin in range(0, len(orders), 20):
        lives = [await clinic.session() for _ in orders[begin : begin + 20]]
        for live in lives:
            await clinic.begin(live, ago=25 * MINUTE)
        await asyncio.gather(*map(bill, orders[begin : begin + 20], lives))


async def test_twenty_at_once_charge_each_unit_once(lenient: Api, clinic: Clinic) -> None:
    for name in (None, *MIXTURE):
        live = await clinic.session()
        await clinic.begin(live, ago=25 * MINUTE)
        names = [name] * 20 if name else list(MIXTURE) * 2 + ["end-session", "sessions end"]
        await asyncio.gather(*(MIXTURE[each](lenient, clinic, live) for each in names))
        ended = name is None or name in ENDS or name == "sessions end"
        units = 0 if name == "commands" else 3 if ended else 2
        assert await ledger_of(clinic, live.appointment_id) == paid(units), name
    for ask in (*(ask for _, ask in WAYS.values()), None):
        patient = await clinic.patient()
        appointment_id = await clinic.appointment(patient=patient, starts_in=-25 * MINUTE)
        asks = [ask] * 20 if ask else [each for _, each in WAYS.values()] * 4
        bills = [
            found(bill) for bill in await asyncio.gather(*(each(lenient, patient, appointment_id) for each in asks))
        ]
        units = max(bill["units_charged"] for bill in bills)
        assert sum(bill["units_added"] for bill in bills) == units
        assert await ledger_of(clinic, appointment_id) == paid(units)
        assert 1 <= units <= 3


async def test_an_appointment_is_billed_or_converted_and_never_both(lenient: Api, clinic: Clinic) -> None:
    patients: dict[int, Principal] = {}
    for _ in range(20):
        patient = await clinic.patient()
        patients[await clinic.appointment(patient=patient, starts_in=-25 * MINUTE)] = patient
    ways = [ask for _, ask in WAYS.values()]
    asked = [
        ways[number % len(ways)](lenient, patient, each) for number, (each, patient) in enumerate(patients.items())
    ]
    answers, *_ = await asyncio.gather(
        asyncio.gather(*asked), clinic.convert(), clinic.triggers().process_appointment_sessions()
    )
    for appointment_id, response in zip(patients, answers, strict=True):
        row = await clinic.fetchrow("SELECT status, session_id FROM appointments WHERE id = $1", appointment_id)
        if response.status_code == 200:
            assert tuple(row) == ("COMPLETED", None)
            assert response.json()["units_charged"] == len(await ledger_of(clinic, appointment_id)) >= 1
        else:
            problem(response, 409, "SESSION_NOT_CONNECTED")
            assert row["status"] == "IN_PROGRESS"
            assert await ledger_of(clinic, appointment_id) == []
