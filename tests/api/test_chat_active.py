"""In a session that is under way, where a message is judged and stored at once."""

from dataclasses import replace
from typing import Any

import pytest

from libs.guardrails import Role
from tests.api.expect import found, problem
from tests.clinic import Clinic, LiveSession
from tests.conftest import MakeApi
from tests.running import Api

DEACTIVATED = "UPDATE users SET active = false WHERE id = $1"
ENDED = "UPDATE sessions SET status = 'ended', ended_at = clock(), ended_seq = 1 WHERE id = $1"
OVERDUE = "UPDATE sessions SET expires_at = clock() WHERE id = $1"
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


@pytest.mark.parametrize("claims", [{"role": Role.DOCTOR}, {"role": Role.OPERATOR}, {"tenant_id": 999}])
async def test_a_token_that_says_another_role_or_tenant_stores_nothing(
    api: Api, clinic: Clinic, live: LiveSession, claims: dict[str, Any]
) -> None:
    problem(await say(api, replace(live.patient, **claims), live, "as somebody else"), 401, "UNAUTHENTICATED")
    assert await clinic.fetchval(MESSAGES, live.ref.id) == 1


async def test_nothing_is_stored_after_the_end(api: Api, clinic: Clinic, live: LiveSession) -> None:
    await clinic.fetch(ENDED, live.ref.id)
    problem(await say(api, live.patient, live, "one more thing"), 409, "SESSION_NOT_ACTIVE")
    assert await clinic.fetchval(MESSAGES, live.ref.id) == 1


async def test_nothing_is_stored_once_it_should_have_ended(api: Api, clinic: Clinic, live: LiveSession) -> None:
    """Though nobody has noticed so far."""
    await clinic.fetch(OVERDUE, live.ref.id)
    problem(await say(api, live.patient, live, "one more thing"), 409, "SESSION_NOT_ACTIVE")
    assert await clinic.fetchval(MESSAGES, live.ref.id) == 1
    assert await clinic.fetchval("SELECT status FROM sessions WHERE id = $1", live.ref.id) == "ended"


async def test_each_keeps_a_pace_of_their_own(api: Api, clinic: Clinic, live: LiveSession) -> None:
    before = dict(await clinic.fetch(PACES, live.ref.id))
    found(await say(api, live.patient, live, "hello"), 201)
    after = dict(await clinic.fetch(PACES, live.ref.id))
    assert before[live.doctor.user_id] == after[live.doctor.user_id] is not None
    assert before[live.patient.user_id] is None is not after[live.patient.user_id]


async def test_nothing_is_stored_beyond_the_pace(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(chat_messages_per_minute=3)
    live = await clinic.session("voice")
    for number in range(3):
        found(await say(api, live.patient, live, str(number)), 201)
    problem(await say(api, live.patient, live, "4"), 429, "RATE_LIMITED")
    assert await clinic.fetchval(MESSAGES, live.ref.id) == 3
