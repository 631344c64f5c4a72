"""Bodies sealed with field keys: nothing readable in the database, everything readable over HTTP, and rotation."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from libs.domain.chat.bodies import Bodies, StoredBody
from libs.domain.sealing import FieldKeys, UnreadableFieldError, new_key
from tests.api.expect import found, problem
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic, LiveSession
from tests.conftest import MakeApi, Urls
from tests.running import Api

OLD, NEW = new_key("old"), new_key("new")
SECRET = "a rash on the left arm"


async def send(api: Api, live: LiveSession, text: str = SECRET, at: object = None) -> Any:
    new = {"client_message_id": text, "body": text}
    return await api.as_(live.patient).post(f"/chat/{at or live.context}/messages", json=new)


async def bodies_of(api: Api, live: LiveSession) -> list[str]:
    page = found(await api.as_(live.doctor).get(f"/chat/{live.context}/messages"))
    return [item["body"] for item in page["items"]]


async def test_a_sealed_message_is_read_as_any_other_and_is_nowhere_in_the_database(
    make_api: MakeApi, clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    api = await make_api(field_keys=OLD, ALLOW_LEGACY_APPOINTMENT_CHAT=True)
    live = await clinic.session()
    first = found(await send(api, live), 201)
    assert found(await send(api, live), 200) == first
    problem(
        await api.as_(live.patient).post(
            f"/chat/{live.context}/messages", json={"client_message_id": SECRET, "body": "Nothing"}
        ),
        409,
        "IDEMPOTENCY_CONFLICT",
    )
    found(await send(api, live, f"By appointment: {SECRET}", at=live.appointment_id), 201)
    new = {"client_message_id": "reply", "body": f"Show me {SECRET}"}
    reply = found(
        await api.as_(live.doctor).post(f"/chat/{live.context}/messages/{first['id']}/replies", json=new), 201
    )
    assert reply["reply_to"]["excerpt"] == SECRET
    assert await bodies_of(api, live) == [SECRET, f"By appointment: {SECRET}", f"Show me {SECRET}"]
    rows = await owner.fetch("SELECT body, sealed_body, key_id FROM messages ORDER BY seq")
    assert [(row["body"], row["key_id"]) for row in rows] == [(None, "old")] * 3
    assert all(SECRET.encode() not in row["sealed_body"] for row in rows)


async def test_a_message_that_has_no_place_to_be_sealed_for_is_refused_as_any_other(
    make_api: MakeApi, clinic: Clinic
) -> None:
    api = await make_api(field_keys=OLD)
    live, elsewhere = await clinic.session(), await Clinic.open(clinic.database, "Elsewhere")
    theirs = await elsewhere.session()
    for context in ("text_session:999999", theirs.context):
        problem(await send(api, live, at=context), 404, "SESSION_NOT_FOUND")
    await clinic.fetch("UPDATE users SET active = false WHERE id = $1", live.patient.user_id)
    problem(await send(api, live, at="text_session:999999"), 401, "UNAUTHENTICATED")
    assert await clinic.fetchval("SELECT count(*) FROM messages") == 0


async def test_a_row_moved_elsewhere_or_changed_cannot_be_opened() -> None:
    bodies = Bodies(FieldKeys.parse(OLD))
    sealed = bodies.seal(1, "a", SECRET)
    assert sealed.sealed_body is not None
    assert bodies.open(1, "a", sealed) == SECRET
    changed = sealed.sealed_body[:-1] + bytes([sealed.sealed_body[-1] ^ 1])
    for place, stored in (
        ((2, "a"), sealed),
        ((1, "b"), sealed),
        ((1, "a"), StoredBody(None, changed, "old")),
        ((1, "a"), StoredBody(None, sealed.sealed_body, "older")),
    ):
        with pytest.raises(UnreadableFieldError):
            bodies.open(*place, stored)
    assert bodies.seal(1, "a", SECRET) != sealed, "The same body is sealed differently each time."


@pytest.mark.parametrize(
    "listed",
    ["key", "a:", ":" + OLD[4:], "a:AAAA", f"{OLD},{OLD}", "a b" + OLD[3:], OLD + "="],
    ids=["no key", "empty", "no id", "too short", "twice", "id with a space", "no base64"],
)
def test_keys_that_are_none_are_refused_and_not_repeated(listed: str) -> None:
    with pytest.raises(ValueError, match="each key 32 bytes") as refused:
        FieldKeys.parse(listed)
    assert OLD[4:] not in str(refused.value)


async def test_keys_are_rotated_while_messages_are_sent(
    make_api: MakeApi, clinic: Clinic, urls: Urls, tmp_path: Path, owner: "asyncpg.Connection[Any]"
) -> None:
    live = await clinic.session()
    clear, old = await make_api(), await make_api(field_keys=OLD)
    found(await send(clear, live, "in clear"), 201)
    found(await send(old, live, "with the old key"), 201)
    new = await make_api(field_keys=f"{NEW},{OLD}")
    env = {
        "SESSIONGATE_DATABASE_URL": urls.app,
        "SESSIONGATE_REDIS_URL": urls.redis,
        "SESSIONGATE_FIELD_KEYS": f"{NEW},{OLD}",
    }
    refused = await asyncio.to_thread(sessiongate, tmp_path, "keys", "rotate", env=env)
    assert refused.returncode == 1
    assert "SESSIONGATE_MIGRATIONS_DATABASE_URL" in refused.stderr

    env["SESSIONGATE_MIGRATIONS_DATABASE_URL"] = urls.owner
    rotating = asyncio.create_task(asyncio.to_thread(sessiongate, tmp_path, "keys", "rotate", "--json", env=env))
    sent = [found(await send(new, live, f"meanwhile {number}"), 201) for number in range(20)]
    rotated = await rotating
    assert (rotated.returncode, rotated.stderr) == (0, "")
    assert json.loads(rotated.stdout) == {"sealed": 2, "key_id": "new"}
    again = await asyncio.to_thread(sessiongate, tmp_path, "keys", "rotate", "--json", env=env)
    assert json.loads(again.stdout)["sealed"] == 0

    listed = json.loads((await asyncio.to_thread(sessiongate, tmp_path, "keys", "list", "--json", env=env)).stdout)
    assert listed == {
        "keys": [
            {"id": "new", "messages": 22, "webhook_secrets": 0, "configured": True, "current": True},
            {"id": "old", "messages": 0, "webhook_secrets": 0, "configured": True, "current": False},
        ],
        "in_clear": 0,
    }
    only_new = await make_api(field_keys=NEW)
    texts = ["in clear", "with the old key", *(message["body"] for message in sent)]
    assert await bodies_of(only_new, live) == texts


async def test_rotation_without_the_old_key_says_so_and_changes_nothing(
    make_api: MakeApi, clinic: Clinic, urls: Urls, tmp_path: Path, owner: "asyncpg.Connection[Any]"
) -> None:
    live = await clinic.session()
    found(await send(await make_api(field_keys=OLD), live), 201)
    env = {"SESSIONGATE_DATABASE_URL": urls.owner, "SESSIONGATE_REDIS_URL": urls.redis, "SESSIONGATE_FIELD_KEYS": NEW}
    refused = await asyncio.to_thread(sessiongate, tmp_path, "keys", "rotate", env=env)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "'old' is not configured" in refused.stderr
    assert await owner.fetchval("SELECT key_id FROM messages") == "old"
    env["SESSIONGATE_FIELD_KEYS"] = ""
    refused = await asyncio.to_thread(sessiongate, tmp_path, "keys", "rotate", env=env)
    assert "sessiongate keys generate" in refused.stderr


def test_a_generated_key_is_one(tmp_path: Path) -> None:
    made = sessiongate(tmp_path, "keys", "generate", "--id", "2026-11")
    assert FieldKeys.parse(made.stdout.strip()).current == "2026-11"
    assert sessiongate(tmp_path, "keys", "generate", "--id", "no spaces").returncode == 1
