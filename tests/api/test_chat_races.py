"""Many at once: numbers stay gapless, repetitions stay one message, and nothing follows the end."""

import asyncio
from typing import Any
from uuid import uuid4

from libs.domain.conversion import statement
from libs.domain.db import Database
from tests.api.expect import found, problem
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.conftest import MakeApi
from tests.processes import until
from tests.running import Api

WRITERS = 20


async def write(api: Api, live: LiveSession, number: int, message_id: str | None = None) -> Any:
    caller = live.doctor if number % 2 and message_id is None else live.patient
    new = {"client_message_id": message_id or str(number), "body": "the same" if message_id else f"message {number}"}
    return await api.as_(caller).post(f"/chat/{live.context}/messages", json=new)


async def stored(clinic: Clinic) -> list[int]:
    return [row["seq"] for row in await clinic.fetch("SELECT seq FROM messages ORDER BY seq")]


async def test_twenty_writers_at_once_are_numbered_without_a_gap(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    answers = await asyncio.gather(*(write(api, live, number) for number in range(WRITERS)))
    assert sorted(found(answer, 201)["seq"] for answer in answers) == list(range(1, WRITERS + 1))
    assert await stored(clinic) == list(range(1, WRITERS + 1))
    assert await clinic.fetchval("SELECT last_seq FROM conversations") == WRITERS
    session = await clinic.fetchrow("SELECT status, activated_at IS NOT NULL FROM sessions")
    assert tuple(session) == ("active", True)


async def test_twenty_sends_of_one_message_at_once_store_it_once(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    answers = await asyncio.gather(*(write(api, live, number, "the id") for number in range(WRITERS)))
    assert sorted(answer.status_code for answer in answers) == [200] * (WRITERS - 1) + [201]
    assert len({str(answer.json()) for answer in answers}) == 1
    assert await stored(clinic) == [1]
    assert found(await write(api, live, 1), 201)["seq"] == 2


async def test_no_message_follows_the_end(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(chat_messages_per_minute=1_000_000)
    live = await clinic.session()
    ending = api.as_(live.doctor)

    async def end_in_the_middle() -> Any:
        # As soon as the first message is stored, so that the rest race with the end.
        while not await clinic.fetchval("SELECT last_seq FROM conversations"):
            await asyncio.sleep(0)
        return found(await ending.post(f"/sessions/{live.context}/end"))

    async def write_until_refused(number: int) -> list[Any]:
        answers: list[Any] = []
        while not answers or answers[-1].status_code == 201:
            answers.append(await write(api, live, number * 1000 + len(answers)))
        return answers

    ended, *talks = await asyncio.gather(end_in_the_middle(), *(write_until_refused(n) for n in range(WRITERS)))

    assert ended["already_ended"] is False
    accepted = [answer.json()["seq"] for talk in talks for answer in talk[:-1]]
    for talk in talks:
        problem(talk[-1], 409, "SESSION_NOT_ACTIVE")
    ended_seq = await clinic.fetchval("SELECT ended_seq FROM sessions")
    assert sorted(accepted) == await stored(clinic) == list(range(1, ended_seq + 1))
    assert ended_seq > 0


async def test_of_many_who_end_a_session_at_once_one_does(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    callers = [live.patient, live.doctor, clinic.operator] * 4
    answers = await asyncio.gather(*(api.as_(who).post(f"/sessions/{live.context}/end") for who in callers))
    assert sorted(found(answer)["already_ended"] for answer in answers) == [False, *[True] * 11]
    assert await clinic.fetchval("SELECT count(*) FROM outbox_events WHERE name = 'session_ended'") == 1


async def test_a_message_by_appointment_id_that_meets_the_conversion_is_told_of_the_session(
    api: Api, clinic: Clinic, database: Database
) -> None:
    doctor, patient = await clinic.doctor(), await clinic.patient()
    appointment_id = await clinic.appointment(doctor, patient)
    async with database.autocommit() as connection, connection.transaction():
        await connection.fetch(statement.CONVERT_ONE, uuid4(), appointment_id)
        new = {"client_message_id": "1", "body": "Hello"}
        sending = asyncio.create_task(api.as_(patient).post(f"/chat/{appointment_id}/messages", json=new))
        await until(lambda: clinic.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
    session_id = await clinic.fetchval("SELECT session_id FROM appointments")
    refused = problem(await sending, 400, "SESSION_CONTEXT_REQUIRED")
    assert refused["session_context"] == f"text_session:{session_id}"


async def test_whoever_is_no_longer_active_does_not_send_by_appointment_id_either(
    make_api: MakeApi, clinic: Clinic
) -> None:
    api = await make_api(ALLOW_LEGACY_APPOINTMENT_CHAT=True)
    doctor, patient = await clinic.doctor(), await clinic.patient()
    appointment_id = await clinic.appointment(doctor, patient, starts_in=MINUTE)
    chat = f"/chat/{appointment_id}/messages"
    first, second = ({"client_message_id": message_id, "body": "Hello"} for message_id in ("1", "2"))
    found(await api.as_(patient).post(chat, json=first), 201)
    await clinic.fetch("UPDATE users SET active = false WHERE id = $1", patient.user_id)
    for new in (first, second):
        problem(await api.as_(patient).post(chat, json=new), 401, "UNAUTHENTICATED")
    assert await stored(clinic) == [1]
