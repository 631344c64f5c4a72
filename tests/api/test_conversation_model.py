"""Whatever two people do with a conversation, in whatever order: the API answers what the model answers."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import pytest
from httpx2 import Response
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from libs.guardrails import Principal
from tests.api.conversation import Answer, Conversation
from tests.clinic import Clinic
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import Api
from tests.sockets import opened

T = TypeVar("T")

# What makes a conversation go on is likelier than what is refused.
CALLERS = st.sampled_from([*["patient", "doctor"] * 5, "operator", "stranger"])
SPELLINGS = st.sampled_from(["session", "legacy", "appointment"])
MESSAGE_IDS = st.sampled_from([*[None] * 6, "a", "b"])
"""None for one that was not used before."""
BODIES = st.sampled_from(["Good morning", "Yes"])
EMOJIS = st.sampled_from(["👍", "❤️"])
LIMITS = st.integers(1, 5)
NUMBERS = st.integers(0, 99)
"""Of a message, counted round and round from the one that is not there yet."""
ENDS = st.sampled_from(["after", "before", None])
MINUTES = st.sampled_from([1, 2, 5, 30])
NOBODYS = 2**63 - 1
FOR_EVER = 365 * 24 * 3600
"""In seconds: what ends a session that runs is told by another model."""


@dataclass
class World:
    """What the machine acts on, from outside of the event loop in which it runs."""

    api: Api
    clinic: Clinic
    clock: Clock
    stranger: Principal
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)


class Talk(RuleBasedStateMachine):
    """One appointment of a patient and a doctor, from before its session to after its end."""

    world: ClassVar[World]

    @initialize(started=st.sampled_from([True, True, False]), said=st.integers(0, 3))
    def book(self, started: bool, said: int) -> None:
        clinic, run = self.world.clinic, self.world.run
        self.model = Conversation()
        self.people = {
            "patient": run(clinic.patient(units=100_000)),
            "doctor": run(clinic.doctor()),
            "operator": clinic.operator,
            "stranger": self.world.stranger,
        }
        self.roles = {person.user_id: role for role, person in self.people.items()}
        self.appointment_id = run(clinic.appointment(self.people["doctor"], self.people["patient"]))
        self.session_id: int | None = None
        self.message_ids: list[int] = []
        self.asked = 0
        if started:
            self.start()
        for _ in range(said):
            self.send("patient", "appointment", None, "Good evening")

    def ask(self, caller: str, method: str, path: str, **request: Any) -> Response:
        return self.world.run(self.world.api.as_(self.people[caller]).request(method, path, **request))

    def chat(self, caller: str, by: str, method: str, path: str, **request: Any) -> Response:
        return self.ask(caller, method, f"/chat/{self.identifier(by)}{path}", **request)

    def identifier(self, by: str) -> object:
        spelled = {"session": f"text_session:{self.session_id}", "legacy": f"text_session_{self.session_id}"}
        return spelled.get(self.way(by), self.appointment_id)

    def way(self, by: str) -> str:
        """There is no session to address before it has started."""
        return by if self.session_id else "appointment"

    def shown(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message of the API as the model shows it."""
        original = message["reply_to"]
        assert message["id"] == self.message_ids[message["seq"] - 1]
        return {
            "seq": message["seq"],
            "client_message_id": message["client_message_id"],
            "sender": self.roles[message["sender"]["id"]],
            "body": message["body"],
            "reply_to": (original["seq"], original["excerpt"]) if original else None,
            "reactions": [
                (one["emoji"], [self.roles[user] for user in one["user_ids"]]) for one in message["reactions"]
            ],
        }

    def check(self, response: Response, expected: Answer) -> None:
        body: Any = response.json() if response.content else None
        match body:
            case {"code": code}:
                body = code
            case {"seq": _, "id": new}:
                if response.status_code == 201:
                    self.message_ids.append(new)
                body = self.shown(body)
            case {"items": items}:
                body = body | {"items": [self.shown(item) for item in items]}
            case {"already_ended": already_ended}:
                body = {"already_ended": already_ended}
        assert (response.status_code, body) == expected

    def id_of(self, seq: int) -> int:
        return self.message_ids[seq - 1] if seq <= len(self.message_ids) else NOBODYS

    def seq(self, number: int) -> int:
        return len(self.message_ids) + 1 - number % (len(self.message_ids) + 1)

    def fresh_id(self) -> str:
        self.asked += 1
        return str(self.asked)

    @rule(caller=CALLERS, by=SPELLINGS, message_id=MESSAGE_IDS, body=BODIES)
    def send(self, caller: str, by: str, message_id: str | None, body: str) -> None:
        new = {"client_message_id": message_id or self.fresh_id(), "body": body}
        expected = self.model.send(caller, self.way(by), new["client_message_id"], body)
        self.check(self.chat(caller, by, "POST", "/messages", json=new), expected)

    @rule(caller=CALLERS, by=SPELLINGS, message_id=MESSAGE_IDS, body=BODIES, number=NUMBERS)
    def reply(self, caller: str, by: str, message_id: str | None, body: str, number: int) -> None:
        new, seq = {"client_message_id": message_id or self.fresh_id(), "body": body}, self.seq(number)
        expected = self.model.send(caller, self.way(by), new["client_message_id"], body, seq)
        self.check(self.chat(caller, by, "POST", f"/messages/{self.id_of(seq)}/replies", json=new), expected)

    @precondition(lambda self: self.model.messages)
    @rule(by=SPELLINGS, data=st.data())
    def send_again(self, by: str, data: st.DataObject) -> None:
        stored = data.draw(st.sampled_from(self.model.messages))
        new = {"client_message_id": stored.client_message_id, "body": stored.body}
        original = stored.reply_to.seq if stored.reply_to else None
        expected = self.model.send(stored.sender, self.way(by), stored.client_message_id, stored.body, original)
        path = f"/messages/{self.id_of(original)}/replies" if original else "/messages"
        self.check(self.chat(stored.sender, by, "POST", path, json=new), expected)

    @rule(caller=CALLERS, by=SPELLINGS, number=NUMBERS, emoji=EMOJIS, on=st.booleans())
    def react(self, caller: str, by: str, number: int, emoji: str, on: bool) -> None:
        seq = self.seq(number)
        expected = self.model.react(caller, self.way(by), seq, emoji, on=on)
        path = f"/messages/{self.id_of(seq)}/reactions/{emoji}"
        self.check(self.chat(caller, by, "PUT" if on else "DELETE", path), expected)

    @rule(caller=CALLERS, by=SPELLINGS, on=st.booleans())
    def type(self, caller: str, by: str, on: bool) -> None:
        expected = self.model.type(caller, self.way(by))
        self.check(self.chat(caller, by, "PUT" if on else "DELETE", "/typing"), expected)

    @rule(caller=CALLERS, by=SPELLINGS, numbers=st.lists(NUMBERS, min_size=1, max_size=3))
    def read(self, caller: str, by: str, numbers: list[int]) -> None:
        for seq in map(self.seq, numbers):
            expected = self.model.read(caller, self.way(by), seq)
            self.check(self.chat(caller, by, "PUT", "/read", json={"seq": seq}), expected)

    @rule(caller=CALLERS, by=SPELLINGS, limit=LIMITS, number=NUMBERS, end=ENDS)
    def page(self, caller: str, by: str, limit: int, number: int, end: str | None) -> None:
        seq = self.seq(number)
        expected = self.model.page(caller, self.way(by), limit, **({end: seq} if end else {}))
        query = {"limit": limit} | ({f"{end}_seq": seq} if end else {})
        self.check(self.chat(caller, by, "GET", "/messages", params=query), expected)

    @rule(caller=CALLERS, by=SPELLINGS, number=NUMBERS)
    def reconnect(self, caller: str, by: str, number: int) -> None:
        seq = self.seq(number) - 1

        async def missed() -> Answer:
            async with opened(self.world.api, self.people[caller], self.identifier(by)) as socket:
                await socket.send(type="hello", after_seq=seq)
                last = await socket.next("caught_up", "refused")
            if last["type"] == "refused":
                return last["status"], last["code"]
            return 101, [self.shown(frame["message"]) for frame in socket.of("message")]

        assert self.world.run(missed()) == self.model.follow(caller, self.way(by), seq)

    @precondition(lambda self: not self.session_id)
    @rule()
    def start(self) -> None:
        self.world.run(self.world.clinic.convert())
        find = "SELECT session_id FROM appointments WHERE id = $1"
        self.session_id = self.world.run(self.world.clinic.fetchval(find, self.appointment_id))
        assert self.session_id
        self.model.start()

    @rule(minutes=MINUTES)
    def pass_time(self, minutes: int) -> None:
        self.world.run(self.world.clock.advance(timedelta(minutes=minutes)))
        self.model.pass_time(minutes)

    @precondition(lambda self: self.session_id and len(self.message_ids) > 5)
    @rule(caller=CALLERS)
    def end(self, caller: str) -> None:
        self.check(self.ask(caller, "POST", f"/sessions/text_session:{self.session_id}/end"), self.model.end(caller))

    def teardown(self) -> None:
        """Reads the whole, page by page, as somebody does who comes back."""
        if not hasattr(self, "model"):
            return
        read = 0
        while read < len(self.model.messages):
            query = {"after_seq": read, "limit": 2}
            expected = self.model.page("patient", "appointment", 2, after=read)
            self.check(self.chat("patient", "appointment", "GET", "/messages", params=query), expected)
            read += 2


@pytest.fixture
async def world(make_api: MakeApi, clinic: Clinic, clock: Clock) -> World:
    api = await make_api(
        ALLOW_LEGACY_APPOINTMENT_CHAT=True,
        chat_messages_per_minute=100_000,
        text_inactivity_seconds=FOR_EVER,
        log_level="ERROR",
    )
    return World(api, clinic, clock, await clinic.patient(), asyncio.get_running_loop())


@pytest.mark.timeout(1800)
def test_a_conversation_is_what_the_model_says(request: pytest.FixtureRequest, world: World) -> None:
    full = request.config.getoption("--storm") == "full"
    machine = type("TalkInThisWorld", (Talk,), {"world": world})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=400 if full else 40,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
