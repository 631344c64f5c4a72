"""Whatever arrives, on whatever route: a refusal that repeats nothing of it, and nothing stored."""

import asyncio
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any
from urllib.parse import quote

from libs.domain.db import Database
from tests.api.calls import CANARY, Call, Owner, harmless
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.running import Api, token_of

JSON = {"Content-Type": "application/json"}

BAD_IDS = (
    *("0", "-1", "1.5", "x", "", "1e3", "0x1", "NaN", "None", "null", "true", "1;1", "1'--", CANARY),
    *(str(2**63), str(2**64), "9" * 400, "9" * 5000),
    *("+7", "-0", "07", "7.0", "1_0", " 7", "7 "),
    *("%00", "1%00", "%ED%A0%80", "%FF", "%EF%BC%97", "%D9%A7", "1%0A2"),
)
BAD_MOMENTS = (
    *("now", "", CANARY, "1893456000", "2030-01-01", "2030-01-01T00:00:00", "2030-01-01T00:00:00 Z", "00:00:00Z"),
    *("2030-06-30T23:59:60Z", "2030-02-29T00:00:00Z", "2030-13-01T00:00:00Z", "2030-01-01T24:00:00Z"),
    *("9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00", "0000-01-01T00:00:00Z", "10000-01-01T00:00:00Z"),
    *(
        "2030-01-01T00:00:00+25:00",
        "-2030-01-01T00:00:00Z",
        "２０３０-01-01T00:00:00Z",
        f"2030-01-01T00:00:00Z{CANARY}",
    ),
)
# As they are spelled in JSON, or in what some take for JSON. None of them is good for any field.
BAD_VALUES = (
    *(f'{{"{CANARY}": 1}}', f'["{CANARY}"]', "[]", "{}", "[[[]]]", "-0.5", "1e-400", "1e999", "-1", "-" + "9" * 400),
    *("NaN", "Infinity", "-Infinity", "9" * 5000),
    *(f'"{CANARY}\\u0000"', f'"{CANARY}\\ud800"', f'"\\udfff{CANARY}"', f'"{CANARY}' + "x" * 5000 + '"'),
)


async def test_no_path_leads_to_what_is_no_id(api: Api, clinic: Clinic, owner: Owner) -> None:
    async with harmless(api, clinic, owner) as calls:
        for call in calls:
            for name, schema in call.parameters("path"):
                if name == "emoji":
                    for value in ("x" * 33, "%00", "x%00", "👍" * 33):
                        body = await call.refused(api, call.path(emoji=value))
                        assert [error["pointer"] for error in body["errors"]] == ["/emoji"], value
                    continue
                if name == "flag":
                    for value in ("FLY", "enforce_session_gated_chat", "%00", CANARY):
                        body = await call.refused(api, call.path(flag=value))
                        assert [error["pointer"] for error in body["errors"]] == ["/flag"], value
                    continue
                for value in filter(None, BAD_IDS):
                    sent = value if "%" in value else quote(value)
                    for spoiled in (sent,) if schema["type"] == "integer" else (f"text_session:{sent}", f"call:{sent}"):
                        body = await call.refused(api, call.path(**{name: spoiled}))
                        expected = "VALIDATION_FAILED" if schema["type"] == "integer" else "SESSION_CONTEXT_INVALID"
                        assert body["code"] == expected, spoiled


async def test_no_query_is_read_as_something_else(api: Api, clinic: Clinic, owner: Owner) -> None:
    async with harmless(api, clinic, owner) as calls:
        for call in calls:
            for name, _ in call.parameters("query"):
                for value in BAD_IDS:
                    if name.endswith("_seq") and value == "0":
                        continue  # Before the first message; no id.
                    if name == "component" and value in ("x", "null", "true"):
                        continue  # May be called anything.
                    sent = value if "%" in value else quote(value)
                    body = await call.refused(api, f"{call.path()}?{name}={sent}")
                    assert [error["pointer"] for error in body["errors"]] == [f"/{name}"], value
                await call.refused(api, f"{call.path()}?{name}=1&{name}={CANARY}")


def bad_values(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """JSON that is wrong for a field with this schema."""
    options = [
        definitions[one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in schema.get("anyOf", [schema])
    ]
    types = {option.get("type") for option in options}
    yield from BAD_VALUES
    if "null" not in types:
        yield "null"
    if "integer" in types:
        yield from ('"7"', "7.0", "7.5", "true", '""', str(2**63), str(2**64), "9" * 400, f'"{CANARY}"')
    else:
        yield from ("7", "0", str(2**63), "9" * 400, "7.5")
    if "boolean" in types:
        yield from ('"true"', '"false"', "1", '""')
    else:
        yield from ("true", "false")
    for option in options:
        if option.get("format") == "date-time":
            yield from map(json.dumps, BAD_MOMENTS)
        if "enum" in option or "pattern" in option:
            yield from (f'"{CANARY}"', '""')
        if "minLength" in option:
            yield '""'
        if "maxLength" in option:
            yield json.dumps(CANARY + "x" * option["maxLength"])


async def test_no_field_takes_what_it_is_not_made_for(api: Api, clinic: Clinic, owner: Owner) -> None:
    definitions = api.app.openapi()["components"]["schemas"]
    async with harmless(api, clinic, owner) as calls:
        for call in filter(lambda call: call.takes_body, calls):
            schema = call.described["requestBody"]["content"]["application/json"]["schema"]
            name = next(one["$ref"] for one in schema.get("anyOf", [schema]) if "$ref" in one).rpartition("/")[2]
            properties = definitions[name]["properties"]
            assert properties.keys() == call.body.keys(), "Each field needs a good value here."
            for field_name, field_schema in properties.items():
                for value in bad_values(field_schema, definitions):
                    content = json.dumps(call.body | {field_name: "@"}).replace('"@"', value)
                    body = await call.refused(api, content=content, headers=JSON)
                    if field_name == "context" and body["code"] == "SESSION_CONTEXT_INVALID":
                        continue  # A text, and judged as one in an address would be.
                    pointers = {error["pointer"][1:].partition("/")[0] for error in body["errors"]}
                    assert pointers == ({field_name} if body["status"] == 422 else {""}), content
                    # The last of two counts.
                    twice = json.dumps(call.body)[:-1] + f', "{field_name}": {value}}}'
                    await call.refused(api, content=twice, headers=JSON)
            for required in definitions[name].get("required", ()):
                body = {key: value for key, value in call.body.items() if key != required}
                assert (await call.refused(api, json=body))["errors"][0]["pointer"] == f"/{required}"
            for unknown in (CANARY, "id", "tenant_id", "status", "__proto__", ""):
                assert (await call.refused(api, json=call.body | {unknown: CANARY}))["errors"][0]["pointer"] == ""


async def test_no_body_passes_that_is_no_json_object(api: Api, clinic: Clinic, owner: Owner) -> None:
    async with harmless(api, clinic, owner) as calls:
        for call in filter(lambda call: call.takes_body, calls):
            good = json.dumps(call.body).encode()
            unreadable = [
                *(b"{", b"]", good[:-1], good + good, good + b"\x00", b"\x00", good.replace(b'"', b"'")),
                *(b"\xff" + good, good.replace(b'"', b'"\xff', 1), gzip.compress(good)),
                *(b"[" * 30_000 + b"]" * 30_000, b"[" * 60_000, b'{"a":' * 12_000, b'{"reason": ' + b"[" * 50_000),
                *(b"9" * 60_000, CANARY.encode(), f"{{{CANARY}: 1}}".encode()),
            ]
            for content in filter(lambda content: content != good, unreadable):
                body = await call.refused(api, content=content, headers=JSON)
                assert (body["status"], body["code"]) == (400, "VALIDATION_FAILED"), content[:50]
            others = [
                b"[]",
                b"7",
                b"true",
                b"NaN",
                b"[" + good + b"]",
                f'"{CANARY}"'.encode(),
                f'["{CANARY}"]'.encode(),
            ]
            if call.needs_body:
                others += [b"", b"null", b"{}"]
            for content in others:
                body = await call.refused(api, content=content, headers=JSON)
                assert (body["status"], body["code"]) == (422, "VALIDATION_FAILED"), content
            for content_type in (
                "text/plain",
                "application/x-www-form-urlencoded",
                "application/xml",
                "multipart/form-data",
                "",
                CANARY,
            ):
                assert (await call.refused(api, content=good, headers={"Content-Type": content_type}))["status"] == 422


async def test_the_ids_of_another_tenant_lead_nowhere(
    api: Api, clinic: Clinic, owner: Owner, database: Database
) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    theirs, their_call = await elsewhere.session(), await elsewhere.session("voice")
    operator = api.as_(elsewhere.operator)
    registered = await operator.post("/admin/webhooks", json={"url": "https://example.org/"})
    webhook_id = str(registered.json()["id"])
    tested = await operator.post(f"/admin/webhooks/{webhook_id}/test")
    ids: dict[str, Any] = {
        "webhook_id": webhook_id,
        "delivery_id": str(tested.json()["id"]),
        "appointment_id": theirs.appointment_id,
        "context": theirs.context,
        "message_id": str(await elsewhere.message(theirs)),
        "user_id": str(theirs.doctor.user_id),
        "doctor_id": theirs.doctor.user_id,
        "patient_id": theirs.patient.user_id,
    }
    async with harmless(api, clinic, owner) as calls:
        for call in calls:
            of_a_call = call.values.get("context", "").startswith("call_session")
            ids["context"] = (their_call if of_a_call else theirs).context
            for name, _ in call.parameters("path"):
                if name in ids:
                    assert (await call.refused(api, call.path(**{name: str(ids[name])})))["status"] == 404
            for name in ids.keys() & call.body.keys():
                body = await call.refused(api, json=call.body | {name: ids[name]})
                if name in ("context", "appointment_id"):
                    assert body["status"] == 404
                    continue
                assert [error["pointer"] for error in body["errors"]] == [f"/{name}"]


async def by_hand(api: Api, call: Call, *headers: str, chunks: Iterable[bytes] = ()) -> tuple[int, str, int]:
    """Status and body that answer a request, and how many bytes of its chunks were sent until then."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def answer() -> tuple[int, str]:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: ([0-9]+)", head)
        assert length, head
        return int(head.split()[1]), (await reader.readexactly(int(length[1]))).decode()

    identified = (f"Authorization: Bearer {token_of(call.caller)}", "Host: test", "Content-Type: application/json")
    writer.write("\r\n".join((f"{call.method} {call.path()} HTTP/1.1", *identified, *headers, "\r\n")).encode())
    answered = asyncio.create_task(answer())
    sent = 0
    async with asyncio.timeout(10):
        for chunk in chunks:
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
            await asyncio.sleep(0)
            if answered.done():
                break
            sent += len(chunk)
        status, body = await answered
    writer.close()
    return status, body, sent


async def test_a_body_of_200_megabytes_is_refused_before_it_is_read(api: Api, clinic: Clinic, owner: Owner) -> None:
    async with harmless(api, clinic, owner) as calls:
        for call in filter(lambda call: call.takes_body, calls):
            for headers in (["Content-Length: 200000000"], ["Content-Length: 65537", "Expect: 100-continue"]):
                status, body, _ = await by_hand(api, call, *headers)
                assert (status, json.loads(body)["code"]) == (413, "PAYLOAD_TOO_LARGE")
            for length in ("-1", "+7", "7x", "1,2", "9" * 5000):
                assert (await by_hand(api, call, f"Content-Length: {length}"))[0] == 400


async def test_an_endless_body_is_refused_as_soon_as_it_is_too_long(api: Api, clinic: Clinic, owner: Owner) -> None:
    async with harmless(api, clinic, owner) as calls:
        for call in filter(lambda call: call.takes_body, calls):
            chunks = repeat(b" " * 16_384, 200_000_000 // 16_384)
            status, body, sent = await by_hand(api, call, "Transfer-Encoding: chunked", chunks=chunks)
            assert (status, json.loads(body)["code"]) == (413, "PAYLOAD_TOO_LARGE")
            assert sent < 20_000_000, "No more than the buffers in between hold."


async def test_a_body_may_be_as_long_as_the_limit(api: Api, clinic: Clinic, owner: Owner) -> None:
    async with harmless(api, clinic, owner) as calls:
        call = next(call for call in calls if call.template.endswith("/end"))
        body = json.dumps(call.body).ljust(65_537)
        assert (await call.refused(api, content=body, headers=JSON))["status"] == 413
    assert (await call.send(api, content=body[:-1], headers=JSON)).status_code == 200


async def test_a_body_that_dawdles_is_not_waited_for(make_api: MakeApi, clinic: Clinic, owner: Owner) -> None:
    api = await make_api(request_deadline_seconds=0.1)
    async with harmless(api, clinic, owner) as calls:
        for call in filter(lambda call: call.takes_body, calls):
            status, body, _ = await by_hand(api, call, "Content-Length: 100")
            assert (status, json.loads(body)["code"]) == (408, "REQUEST_TIMEOUT")


async def test_a_deep_body_is_refused_even_where_long_ones_are_allowed(
    make_api: MakeApi, clinic: Clinic, owner: Owner
) -> None:
    api = await make_api(request_body_limit=10_000_000)
    deep = b"[" * 100_000 + b"]" * 100_000
    async with harmless(api, clinic, owner) as calls:
        for call in filter(lambda call: call.takes_body, calls):
            for content in (deep, b'{"reason": ' + deep + b"}", b'{"a":' * 100_000, b"9" * 1_000_000):
                assert (await call.refused(api, content=content, headers=JSON))["status"] == 400
