from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from libs.domain.chat import messages
from libs.domain.db import Database
from tests.api.calls import Owner
from tests.api.expect import faults, found
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.population import populate, settle
from tests.running import Api


async def session_of_ten(api: Api, clinic: Clinic) -> LiveSession:
    live = await clinic.session()
    for number in range(1, 11):
        caller = live.doctor if number % 2 else live.patient
        new = {"client_message_id": str(number), "body": f"message {number}"}
        found(await api.as_(caller).post(f"/chat/{live.context}/messages", json=new), 201)
    return live


async def test_history_is_read_from_either_end(api: Api, clinic: Clinic) -> None:
    live = await session_of_ten(api, clinic)

    async def page(**query: int) -> tuple[list[int], bool]:
        history = found(await api.as_(live.patient).get(f"/chat/{live.context}/messages", params=query))
        assert set(history) == {"items", "has_more", "last_seq"}
        assert history["last_seq"] == 10
        return [item["seq"] for item in history["items"]], history["has_more"]

    everything = list(range(1, 11))
    assert await page() == (everything, False)
    assert await page(limit=4) == ([7, 8, 9, 10], True)
    assert await page(limit=10) == (everything, False)
    assert await page(before_seq=7, limit=4) == ([3, 4, 5, 6], True)
    assert await page(before_seq=3, limit=4) == ([1, 2], False)
    assert await page(before_seq=1) == ([], False)
    assert await page(after_seq=0, limit=4) == ([1, 2, 3, 4], True)
    assert await page(after_seq=8, limit=2) == ([9, 10], False)
    assert await page(after_seq=10) == ([], False)
    assert await page(after_seq=2**63 - 1) == ([], False)


async def test_both_ends_at_once_and_impossible_positions_are_pointed_at(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()

    async def refused(**query: Any) -> list[str]:
        return faults(await api.as_(live.patient).get(f"/chat/{live.context}/messages", params=query))

    assert await refused(after_seq=1, before_seq=5) == ["/before_seq"]
    assert await refused(after_seq=-1) == ["/after_seq"]
    assert await refused(before_seq=2**63) == ["/before_seq"]
    assert await refused(limit=0) == ["/limit"]
    assert await refused(limit=101) == ["/limit"]


async def test_a_bad_position_is_told_before_anything_about_the_conversation(api: Api, clinic: Clinic) -> None:
    live, stranger = await clinic.session(), await clinic.patient()
    for context in (live.context, live.appointment_id, 4711):
        path = f"/chat/{context}/messages"
        both = await api.as_(stranger).get(path, params={"after_seq": 1, "before_seq": 5})
        assert faults(both) == ["/before_seq"]
        assert (await api.as_(stranger).get(path, params={"after_seq": 1})).status_code == 404


async def test_an_operator_reads_and_that_is_audited(api: Api, clinic: Clinic) -> None:
    live = await session_of_ten(api, clinic)
    path = f"/chat/{live.context}/messages"
    found(await api.as_(live.patient).get(path))
    found(await api.as_(live.doctor).get(path))
    assert await clinic.fetch("SELECT FROM audit_log") == []

    response = await api.as_(clinic.operator).get(path)
    assert len(found(response)["items"]) == 10
    (entry,) = await clinic.fetch("SELECT actor_id, action, subject, correlation_id, tenant_id FROM audit_log")
    expected = (
        clinic.operator.user_id,
        "chat_history_read",
        live.context,
        response.headers["x-correlation-id"],
        clinic.tenant_id,
    )
    assert tuple(entry) == expected


async def test_history_stays_readable_after_the_end(api: Api, clinic: Clinic) -> None:
    live = await session_of_ten(api, clinic)
    found(await api.as_(live.doctor).post(f"/sessions/{live.context}/end"))
    for caller in (live.patient, live.doctor, clinic.operator):
        assert len(found(await api.as_(caller).get(f"/chat/{live.context}/messages"))["items"]) == 10


async def test_conversations_do_not_mix(api: Api, clinic: Clinic) -> None:
    """A patient and a doctor who talked before start an empty conversation."""
    before = await session_of_ten(api, clinic)
    found(await api.as_(before.doctor).post(f"/sessions/{before.context}/end"))
    call = await clinic.session("video", doctor=before.doctor, patient=before.patient)
    history = found(await api.as_(call.patient).get(f"/chat/{call.context}/messages"))
    assert history == {"items": [], "has_more": False, "last_seq": 0}


async def test_what_follows_a_number_is_found_without_reading_what_precedes_it(
    owner: Owner, database: Database, clinic: Clinic
) -> None:
    await populate(owner, 1000, datetime.now(UTC) - MINUTE)
    await clinic.convert()
    await owner.execute(
        """
        WITH numbered AS (UPDATE conversations SET last_seq = 50 RETURNING *)
        INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body)
        SELECT c.tenant_id, c.id, n, p.user_id, n, 'text', 'Hello'
        FROM numbered c JOIN participants p ON p.conversation_id = c.id AND p.role = 'patient'
        CROSS JOIN generate_series(1, 50) n
        """
    )
    await settle(owner)
    known = [row["id"] for row in await clinic.fetch("SELECT id FROM conversations LIMIT 100")]
    async with database.autocommit() as connection:
        [explained] = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {messages.FOLLOWING}", known, [49] * len(known), 100
        )
    assert explained["Plan"]["Actual Rows"] == len(known)
    assert max(rows_read(explained["Plan"])) == len(known)


def rows_read(node: dict[str, Any]) -> Iterator[float]:
    """How many messages each step of a plan that reads them has met, in all of its loops."""
    if node.get("Relation Name") == "messages":
        yield (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    for step in node.get("Plans", ()):
        yield from rows_read(step)
