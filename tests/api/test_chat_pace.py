"""Sixty messages a minute from each participant, counted in the statement that sends."""

import asyncio
from datetime import timedelta

from httpx2 import Response

from libs.guardrails import Principal
from tests.api.expect import found, problem
from tests.clinic import Clinic, LiveSession
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import Api


async def say(api: Api, caller: Principal, live: LiveSession, number: int) -> Response:
    new = {"client_message_id": f"{caller.user_id} {number}", "body": "Hello"}
    return await api.as_(caller).post(f"/chat/{live.context}/messages", json=new)


async def test_a_minutes_worth_may_come_at_once_and_then_one_by_one(
    make_api: MakeApi, clinic: Clinic, clock: Clock
) -> None:
    api = await make_api(chat_messages_per_minute=6)
    live = await clinic.session()
    for number in range(6):
        found(await say(api, live.patient, live, number), 201)
    refused = problem(await say(api, live.patient, live, 6), 429, "RATE_LIMITED")
    assert 8 <= refused["retry_after"] <= 10
    # Nothing was stored, so no number is missing; the other party has a pace of its own.
    assert await clinic.fetchval("SELECT last_seq FROM conversations") == 6
    assert found(await say(api, live.doctor, live, 0), 201)["seq"] == 7
    # What was stored before is answered whatever the pace.
    found(await say(api, live.patient, live, 5), 200)
    await clock.advance(timedelta(seconds=refused["retry_after"]))
    found(await say(api, live.patient, live, 6), 201)
    problem(await say(api, live.patient, live, 7), 429, "RATE_LIMITED")
    await clock.advance(timedelta(minutes=1))
    for number in range(7, 13):
        found(await say(api, live.patient, live, number), 201)
    problem(await say(api, live.patient, live, 13), 429, "RATE_LIMITED")


async def test_many_at_once_do_not_outrun_the_pace(make_api: MakeApi, clinic: Clinic) -> None:
    one, two = await make_api(chat_messages_per_minute=6), await make_api(chat_messages_per_minute=6)
    live = await clinic.session()
    answers = await asyncio.gather(*(say(api, live.patient, live, n) for n in range(15) for api in (one, two)))
    assert sum(answer.status_code == 201 for answer in answers) == 6
    assert {answer.status_code for answer in answers} <= {200, 201, 429}
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 6


async def test_replies_and_the_legacy_way_share_the_pace(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(chat_messages_per_minute=2)
    live = await clinic.session()
    first = found(await say(api, live.patient, live, 1), 201)
    new = {"client_message_id": "2", "body": "And this"}
    by_appointment = f"/chat/{live.appointment_id}/messages"
    found(await api.as_(live.patient).post(by_appointment, json=new), 201)
    another = {"client_message_id": "3", "body": "And that"}
    replies = f"/chat/{live.context}/messages/{first['id']}/replies"
    for url in (replies, by_appointment):
        problem(await api.as_(live.patient).post(url, json=another), 429, "RATE_LIMITED")


async def test_the_refusals_of_the_guard_come_before_the_pace(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(chat_messages_per_minute=1)
    live = await clinic.session()
    found(await say(api, live.patient, live, 1), 201)
    problem(await say(api, live.patient, live, 2), 429, "RATE_LIMITED")
    found(await api.as_(live.doctor).post(f"/sessions/{live.context}/end"))
    problem(await say(api, live.patient, live, 2), 409, "SESSION_NOT_ACTIVE")
