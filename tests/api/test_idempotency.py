"""What is sent twice under one `Idempotency-Key` has one effect and one answer."""

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from httpx2 import Response

from libs.domain import idempotency
from libs.domain.db import Database
from libs.guardrails import Principal
from tests.api.expect import DAY, ahead, faults, found, problem
from tests.clinic import Clinic
from tests.clock import Clock
from tests.running import Api

COUNTS = "SELECT (SELECT count(*) FROM appointments), (SELECT count(*) FROM idempotency_keys)"


async def wanted(clinic: Clinic, doctor: Principal, by: timedelta = DAY) -> dict[str, Any]:
    return {"doctor_id": doctor.user_id, "modality": "text", "starts_at": await ahead(clinic, by)}


async def post(api: Api, caller: Principal, key: str, new: dict[str, Any], route: str = "/appointments") -> Response:
    return await api.as_(caller).post(route, json=new, headers={"Idempotency-Key": key})


async def test_the_second_request_gets_the_first_answer(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = await wanted(clinic, doctor)

    first, second = [await post(api, patient, "a", new) for _ in range(2)]

    assert (first.status_code, second.status_code) == (201, 201)
    assert first.content == second.content
    assert first.headers["content-type"] == second.headers["content-type"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["x-correlation-id"] != first.headers["x-correlation-id"]
    assert tuple(await clinic.fetchrow(COUNTS)) == (1, 1)


async def test_every_creating_post_of_operators_takes_a_key(api: Api, clinic: Clinic) -> None:
    user = {"role": "patient", "name": "Twice", "country": "MW"}
    first, second = [found(await post(api, clinic.operator, "a", user, "/admin/users"), 201) for _ in range(2)]
    assert first == second
    subscription = {
        "patient_id": first["id"],
        "plan": "basic",
        "starts_at": await ahead(clinic, -DAY),
        "ends_at": await ahead(clinic, DAY),
        "text_sessions_remaining": 1,
        "voice_calls_remaining": 1,
        "video_calls_remaining": 1,
    }
    for _ in range(2):
        found(await post(api, clinic.operator, "a", subscription, "/admin/subscriptions"), 201)
    assert await clinic.fetchval("SELECT count(*) FROM users WHERE name = 'Twice'") == 1
    assert await clinic.fetchval("SELECT count(*) FROM subscriptions") == 1


async def test_a_key_belongs_to_one_request(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    found(await post(api, patient, "a", await wanted(clinic, doctor)), 201)
    problem(await post(api, patient, "a", await wanted(clinic, doctor, 2 * DAY)), 422, "IDEMPOTENCY_KEY_REUSED")
    assert tuple(await clinic.fetchrow(COUNTS)) == (1, 1)


async def test_a_key_belongs_to_one_caller(api: Api, clinic: Clinic) -> None:
    doctor = await clinic.doctor()
    for days in (1, 2):
        found(await post(api, await clinic.patient(), "a", await wanted(clinic, doctor, days * DAY)), 201)
    assert tuple(await clinic.fetchrow(COUNTS)) == (2, 2)


async def test_what_was_refused_may_be_tried_again_under_its_key(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = await wanted(clinic, doctor)
    taken = found(await post(api, await clinic.patient(), "other", new), 201)

    problem(await post(api, patient, "a", new), 409, "SLOT_TAKEN")
    found(await api.as_(doctor).post(f"/appointments/{taken['id']}/cancel", json={}))
    assert "idempotent-replayed" not in (await post(api, patient, "a", new)).headers
    assert await clinic.fetchval("SELECT count(*) FROM appointments WHERE status = 'PENDING'") == 1


async def test_fifty_at_once_have_one_effect(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = await wanted(clinic, doctor)

    answers = await asyncio.gather(*(post(api, patient, "a", new) for _ in range(50)))

    made = [answer for answer in answers if answer.status_code == 201]
    for answer in answers:
        if answer.status_code != 201:
            assert problem(answer, 409, "IDEMPOTENCY_IN_FLIGHT")["retry_after"] == 1
    assert len({answer.content for answer in made}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in made) == 1
    assert tuple(await clinic.fetchrow(COUNTS)) == (1, 1)


async def test_neither_effect_nor_answer_is_kept_when_the_answer_cannot_be(
    api: Api, clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = await wanted(clinic, doctor)
    await owner.execute("ALTER TABLE idempotency_keys ADD CONSTRAINT broken CHECK (false) NOT VALID")
    assert (await post(api, patient, "a", new)).status_code == 500
    assert tuple(await clinic.fetchrow(COUNTS)) == (0, 0)

    await owner.execute("ALTER TABLE idempotency_keys DROP CONSTRAINT broken")
    assert "idempotent-replayed" not in (await post(api, patient, "a", new)).headers
    assert tuple(await clinic.fetchrow(COUNTS)) == (1, 1)


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_that_is_none_is_refused(api: Api, clinic: Clinic, key: str) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    assert faults(await post(api, patient, key, await wanted(clinic, doctor))) == ["/idempotency-key"]
    assert tuple(await clinic.fetchrow(COUNTS)) == (0, 0)


async def test_an_answer_is_not_for_those_who_may_no_longer_ask(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new = await wanted(clinic, doctor)
    found(await post(api, patient, "a", new), 201)
    await clinic.fetch("UPDATE users SET active = false WHERE id = $1", patient.user_id)
    problem(await post(api, patient, "a", new), 401, "UNAUTHENTICATED")


async def test_keys_are_forgotten_after_a_day(api: Api, clinic: Clinic, clock: Clock, database: Database) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    found(await post(api, patient, "a", await wanted(clinic, doctor, 3 * DAY)), 201)
    await clock.advance(idempotency.KEPT_FOR - timedelta(minutes=1))
    await idempotency.prune(database)
    assert tuple(await clinic.fetchrow(COUNTS)) == (1, 1)
    await clock.advance(timedelta(minutes=2))
    await idempotency.prune(database)
    assert tuple(await clinic.fetchrow(COUNTS)) == (1, 0)
