"""In a session that is under way, where a message is judged and stored at once."""

from typing import Any

import pytest

from tests.api.expect import found, problem
from tests.clinic import Clinic, LiveSession
from tests.running import Api

DEACTIVATED = "UPDATE users SET active = false WHERE id = $1"
ENDED = "UPDATE sessions SET status = 'ended', ended_at = clock(), ended_seq = 1 WHERE id = $1"
MESSAGES = "SELECT count(*) FROM messages WHERE conversation_id = (SELECT id FROM conversations WHERE session_id = $1)"
PACES = """
    SELECT user_id, paced_at FROM participants
    WHERE conversation_id = (SELECT id FROM conversations WHERE session_id = $1)
"""


async def say(api: Api, caller: Any, live: LiveSession, name: str) -> Any:
    new = {"client_message_id": name, "body": name}
    return await api.as_(caller).post(f"/chat/{live.context}/messages", json=new)


@pytest.fixture
async def live(api: Api, clinic: Clinic) -> LiveSession:
    """A session in which the doctor has spoken."""
    session = await clinic.session()
    found(await say(api, session.doctor, session, "first"), 201)
    return session


async def test_nobody_else_gets_in(api: Api, clinic: Clinic, live: LiveSession) -> None:
    for stranger in (await clinic.patient(), await clinic.doctor(), (await clinic.session()).patient):
        problem(await say(api, stranger, live, "me too"), 404, "SESSION_NOT_FOUND")
    assert await clinic.fetchval(MESSAGES, live.ref.id) == 1


async def test_who_was_deactivated_is_no_longer_known(api: Api, clinic: Clinic, live: LiveSession) -> None:
    found(await say(api, live.patient, live, "still here"), 201)
    await clinic.fetch(DEACTIVATED, live.patient.user_id)
    problem(await say(api, live.patient, live, "and now"), 401, "UNAUTHENTICATED")
    assert await clinic.fetchval(MESSAGES, live.ref.id) == 2


async def test_nothing_is_stored_after_the_end(api: Api, clinic: Clinic, live: LiveSession) -> None:
    await clinic.fetch(ENDED, live.ref.id)
    problem(await say(api, live.patient, live, "one more thing"), 409, "SESSION_NOT_ACTIVE")
    assert await clinic.fetchval(MESSAGES, live.ref.id) == 1


async def test_each_keeps_a_pace_of_their_own(api: Api, clinic: Clinic, live: LiveSession) -> None:
    before = dict(await clinic.fetch(PACES, live.ref.id))
    found(await say(api, live.patient, live, "hello"), 201)
    after = dict(await clinic.fetch(PACES, live.ref.id))
    assert before[live.doctor.user_id] == after[live.doctor.user_id] is not None
    assert before[live.patient.user_id] is None is not after[live.patient.user_id]
