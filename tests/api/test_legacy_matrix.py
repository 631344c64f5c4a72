"""Billing by appointment and the legacy commands, wherever an appointment may stand, under every combination of flags.

The guard's answers are those of tests/guardrails/promises.py; what is done once the guard has allowed it is
written here.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from httpx2 import Response

from libs.guardrails import FixedFlags, Flag, Flags, Principal
from libs.observability.testing import capture_logs
from tests.api.calls import Owner, rows
from tests.api.expect import found, problem
from tests.api.legacy import ENDS, WAYS, ledger_of, paid
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.conftest import MakeApi
from tests.guardrails.promises import ALL_FLAGS, Case, promised
from tests.running import Api

by_flags = pytest.mark.parametrize("flags", ALL_FLAGS, ids=lambda flags: "".join("01"[flags[flag]] for flag in Flag))

# Appointments without a session: status, when they begin, and whether they may be billed.
UNCONVERTED = [
    ("CONFIRMED", -12 * MINUTE, True),
    ("CONFIRMED", 12 * MINUTE, False),
    # One that was completed elsewhere was paid for there.
    *(
        (status, -12 * MINUTE, False)
        for status in ("RESCHEDULE_PROPOSED", "CANCELLED", "EXPIRED", "NO_SHOW", "COMPLETED")
    ),
    ("PENDING", 12 * MINUTE, False),
]
# Sessions: modality, status, and how long their units have run.
SESSIONS = [
    *(
        ("text", "waiting", None),
        ("text", "active", 12 * MINUTE),
        ("text", "ended", 12 * MINUTE),
        ("text", "ended", None),
    ),
    *(("video", "connecting", None), ("voice", "active", 12 * MINUTE)),
]


@dataclass
class Place:
    """An appointment to bill in one way, with a session in some state (status, overdue, begun) or without any; then
    `billable` tells whether it may be billed itself."""

    way: str
    patient: Principal
    appointment_id: int
    status: str
    billable: bool = True
    live: LiveSession | None = None
    session: tuple[str, bool, bool] | None = None

    def answer(self, flags: Flags) -> str:
        """The promised one."""
        operation, _ = WAYS[self.way]
        appointment = (self.status, False)
        answer, _ = promised(Case(operation, "appointment", "the patient", True, self.session, appointment, flags))
        return "INVALID_TRANSITION" if answer == "allowed" and not self.billable else answer

    async def ask(self, api: Api) -> Response:
        return await WAYS[self.way][1](api, self.patient, self.appointment_id)

    def units(self) -> int:
        """How many there are in all, twelve minutes after they began to run, once this was billed."""
        if self.session:
            return 1 + (self.session[0] == "active" and self.way in ENDS)
        return 2 if self.way == "manual end" else 1


async def places(clinic: Clinic) -> list[Place]:
    made = []
    for way, (modality, status, ran) in product(WAYS, SESSIONS):
        live = await clinic.session(modality)
        if ran is not None:
            await clinic.begin(live, ago=ran)
        await clinic.settle()
        if status == "ended":
            await clinic.fetch(
                "WITH ended AS (UPDATE sessions SET status = 'ended', ended_at = clock(), ended_seq = 0 WHERE id = $1)"
                " UPDATE appointments SET status = 'COMPLETED' WHERE session_id = $1",
                live.ref.id,
            )
        booked = "COMPLETED" if status == "ended" else "IN_PROGRESS"
        session = (status, False, ran is not None)
        made.append(Place(way, live.patient, live.appointment_id, booked, live=live, session=session))
    for way, (status, starts_in, billable) in product(WAYS, UNCONVERTED):
        patient = await clinic.patient()
        appointment_id = await clinic.appointment(patient=patient, status=status, starts_in=starts_in)
        made.append(Place(way, patient, appointment_id, status, billable))
    return made


REFUSALS = {"SESSION_BILLING_REQUIRED": 400, "SESSION_NOT_CONNECTED": 409, "INVALID_TRANSITION": 409}


async def check(clinic: Clinic, place: Place, flags: Flags, response: Response) -> None:
    answer = place.answer(flags)
    if answer in REFUSALS:
        body = problem(response, REFUSALS[answer], answer)
        if answer == "SESSION_BILLING_REQUIRED":
            assert place.live is not None
            assert body["session_context"] == place.live.context
            assert body["next_action"] == {"method": "POST", "href": f"/api/v1/sessions/{place.live.context}/end"}
        elif answer == "INVALID_TRANSITION":
            assert place.status in body["detail"]
            assert "COMPLETED" in body["detail"]
        return
    before = 1 if place.session else 0  # a worker has settled each session
    ended = place.session is None or place.session[0] == "ended" or place.way in ENDS
    assert found(response) == {
        "appointment_id": place.appointment_id,
        "status": "COMPLETED" if ended else "IN_PROGRESS",
        "units_charged": place.units(),
        "units_added": place.units() - before,
        "session_context": place.live.context if place.live else None,
    }
    assert await ledger_of(clinic, place.appointment_id) == paid(place.units())


@by_flags
async def test_billing_by_appointment_is_answered_as_promised(
    make_api: MakeApi, clinic: Clinic, owner: Owner, flags: Flags
) -> None:
    api = await make_api(**{flag.value: flags[flag] for flag in Flag})
    everywhere = await places(clinic)
    refused = [place for place in everywhere if place.answer(flags) in REFUSALS]
    served = [place for place in everywhere if place.answer(flags) not in REFUSALS]
    assert refused
    assert served

    before = await rows(owner)
    answers = await asyncio.gather(*(place.ask(api) for place in refused))
    assert await rows(owner) == before, "A refusal left a trace."
    answers += await asyncio.gather(*(place.ask(api) for place in served))

    for place, response in zip(refused + served, answers, strict=True):
        await check(clinic, place, flags, response)
    blocked: Counter[str] = Counter(
        WAYS[place.way][0] for place in refused if place.answer(flags) == "SESSION_BILLING_REQUIRED"
    )
    assert bool(blocked) == flags.enforce_session_gated_billing
    sample = api.runtime.metrics.sample
    for operation in ("end_session", "process_payment", "process_deduction"):
        counted = sample("billing_blocked_session_context_required_total", endpoint=operation)
        assert counted == blocked[operation]
    added = sum(place.units() - (1 if place.session else 0) for place in served)
    charged = sum(sample("billing_units_charged_total", modality=each) for each in ("text", "voice", "video"))
    assert charged == added
    assert sample("billing_payout_minor_total", currency="MWK") == 350_000 * added


# Appointments that the commands meet: what they are like, and what becomes of them.
MET: dict[str, tuple[dict[str, Any], bool, str]] = {
    "over, nobody came": ({"starts_in": -40 * MINUTE}, False, "CANCELLED"),
    "over, with a session": ({"starts_in": -40 * MINUTE}, True, "IN_PROGRESS"),
    "text, in four minutes": ({"starts_in": 4 * MINUTE}, False, "IN_PROGRESS"),
    "voice, in four minutes": ({"starts_in": 4 * MINUTE, "modality": "voice"}, False, "CONFIRMED"),
    "text, in six minutes": ({"starts_in": 6 * MINUTE}, False, "CONFIRMED"),
}


async def status_of(clinic: Clinic, appointment_id: int) -> str:
    status: str = await clinic.fetchval("SELECT status FROM appointments WHERE id = $1", appointment_id)
    return status


@by_flags
async def test_one_flag_alone_decides_whether_the_commands_do_anything(clinic: Clinic, flags: Flags) -> None:
    ids = {}
    for name, (appointment, has_session, _) in sorted(MET.items(), key=lambda item: not item[1][1]):
        ids[name] = (
            (await clinic.session(**appointment)).appointment_id
            if has_session
            else await clinic.appointment(**appointment)
        )
    before = {name: await status_of(clinic, appointment_id) for name, appointment_id in ids.items()}
    with capture_logs() as logs:
        triggers = clinic.triggers(FixedFlags(flags))
        ran = [await triggers.process_appointment_sessions(), await triggers.activate_booked_appointments()]

        disabled = flags.disable_legacy_appointment_triggers
        assert [run.disabled for run in ran] == [disabled, disabled]
        told = logs.lines("legacy_triggers_disabled")
        assert {line["message"] for line in told} == ({"Legacy appointment triggers disabled"} if disabled else set())
        assert len(logs.lines("legacy_trigger_run")) == (0 if disabled else 2)
    after = {name: await status_of(clinic, appointment_id) for name, appointment_id in ids.items()}
    assert after == (before if disabled else {name: status for name, (_, _, status) in MET.items()})
    for run in ran:
        command = run.command.value
        assert clinic.metrics.sample("legacy_trigger_executions_total", command_name=command) == (not disabled)
        for label in ("true", "false"):
            counted = clinic.metrics.sample(
                "legacy_trigger_appointments_processed_total", command_name=command, has_session=label
            )
            assert counted == (label == "false" and not disabled)
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == 1 + (not disabled)
    assert await clinic.fetchval("SELECT count(*) FROM ledger_transactions") == 0
