"""`sessiongate demo`: the story of one consultation, told by real requests to what is running.

It makes people of its own, so it can be told again at any time and disturbs nobody.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import httpx2
import typer
from rich.console import Console

from libs.domain.settings import Settings
from services.cli import home
from services.cli.errors import CommandError, explain
from services.cli.home import Home, Whereabouts
from services.cli.options import AsJson
from services.cli.people import token_of

LEAD_SECONDS: Final = 3.0
"""The appointment of the story is so near; long enough to chat too early."""

PATIENCE_SECONDS: Final = 10.0


class UnexpectedError(Exception):
    """A step had another outcome than the story has."""


def demo(
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Go on after a step that went wrong.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell the story of one consultation by real requests; exits with 0 only if every step went well."""
    place = Home.locate()
    running = place.read()
    if running is None:
        raise CommandError(f"Sessiongate is not running (home {place.path}). Start it with `sessiongate up`.")
    console = Console(quiet=as_json)
    told: list[dict[str, Any]] = []
    settings = home.settings(Settings)

    def issue(user_id: int) -> str:
        return asyncio.run(token_of(settings, user_id))

    with httpx2.Client(timeout=10.0) as client:
        for title, step in Story(client, running, issue).steps():
            began = time.monotonic()
            try:
                outcome, ok = step(), True
            except (UnexpectedError, CommandError, httpx2.HTTPError) as error:
                outcome, ok = str(error) or type(error).__name__, False
            except Exception as error:
                sentence = explain(error)
                if sentence is None:
                    raise
                outcome, ok = sentence, False
            took_ms = round((time.monotonic() - began) * 1000)
            told.append({"step": title, "ok": ok, "outcome": outcome, "ms": took_ms})
            console.print(f"[{'green' if ok else 'red'}]{'✓' if ok else '✗'}[/] {title}", highlight=False)
            console.print(f"    {outcome}", style="dim", highlight=False, markup=False)
            if not ok and not keep_going:
                break
    all_well = all(step["ok"] for step in told)
    if as_json:
        typer.echo(json.dumps({"ok": all_well, "steps": told}))
    raise typer.Exit(0 if all_well else 1)


@dataclass(frozen=True)
class Person:
    id: int
    token: str


class Story:
    """The steps share what they learn: people, the appointment, the session context."""

    def __init__(self, client: httpx2.Client, running: Whereabouts, issue: Callable[[int], str]) -> None:
        self._client = client
        self._issue = issue
        self._running = running
        self._people: dict[str, Person] = {}
        self._appointment: dict[str, Any] = {}
        self._context = ""
        self._before: dict[str, float] = {}

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Title and action of each step, in order. An action answers what happened, in one line."""
        yield "The service is ready", self._is_ready
        yield "An operator adds a doctor and a subscribed patient", self._add_people
        yield f"The patient books an appointment in {LEAD_SECONDS:.0f} seconds", self._book
        yield "The doctor confirms it", self._confirm
        yield "Chat before it has begun is refused: 403 SESSION_NOT_READY", self._chat_too_early
        yield "The worker turns it into a session when it is due", self._wait_for_session
        yield "Chat by appointment id is refused: 400, and names the session context", self._chat_by_appointment
        yield "The patient writes to the session: 201", self._chat_by_context
        yield "The doctor answers, which makes the session active: 201", self._answer
        yield "Both were notified", self._notified
        yield "The metrics have moved", self._metrics_moved
        yield "The doctor ends the session, and nothing more can be sent", self._end

    def _is_ready(self) -> str:
        ready = self._expect(200, self._client.get(f"{self._running['api']}/readyz"))
        if ready["status"] != "ok":
            raise UnexpectedError(f"It is {ready['status']}: {ready['checks']}.")
        self._before = self._measure()
        return "database, redis and worker are ok"

    def _add_people(self) -> str:
        operator = next((user for user in self._running["users"] if user["role"] == "operator"), None)
        if operator is None:
            raise UnexpectedError("up.json names no operator.")
        self._people["operator"] = self._person(operator)
        for role, name in (("doctor", "Dr Demo"), ("patient", "Demo Patient")):
            made = self._call("operator", "POST", "/admin/users", 201, role=role, name=name, country="MW")
            self._people[role] = self._person(made)
        present = datetime.now(UTC)
        self._call(
            "operator",
            "POST",
            "/admin/subscriptions",
            201,
            patient_id=self._people["patient"].id,
            plan="demo",
            starts_at=present.isoformat(),
            ends_at=(present + timedelta(days=1)).isoformat(),
            text_sessions_remaining=1,
            voice_calls_remaining=0,
            video_calls_remaining=0,
        )
        return f"doctor {self._people['doctor'].id}, patient {self._people['patient'].id} with one text session"

    def _person(self, user: Mapping[str, Any]) -> Person:
        # Afresh for everybody: the token in up.json is as old as the `up`, which may outlive it.
        return Person(user["id"], self._issue(user["id"]))

    def _book(self) -> str:
        self._appointment = self._call(
            "patient",
            "POST",
            "/appointments",
            201,
            doctor_id=self._people["doctor"].id,
            modality="text",
            starts_at=(datetime.now(UTC) + timedelta(seconds=LEAD_SECONDS)).isoformat(),
        )
        return f"appointment {self._appointment['id']} is {self._appointment['status']}"

    def _confirm(self) -> str:
        confirmed = self._call("doctor", "POST", f"/appointments/{self._appointment['id']}/confirm", 200)
        return f"appointment {confirmed['id']} is {confirmed['status']}"

    def _chat_too_early(self) -> str:
        problem = self._send("patient", self._appointment["id"], "Hello?", 403)
        if problem["code"] != "SESSION_NOT_READY":
            raise UnexpectedError(f"The code is {problem['code']}.")
        return f"SESSION_NOT_READY, retry after {problem['retry_after']} s"

    def _wait_for_session(self) -> str:
        due = datetime.fromisoformat(self._appointment["starts_at"])
        deadline = time.monotonic() + LEAD_SECONDS + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            poll = self._call("patient", "GET", f"/appointments/{self._appointment['id']}/session", 200)
            if poll["session_context"]:
                self._context = poll["session_context"]
                session = self._call("patient", "GET", f"/sessions/{self._context}", 200)
                late = datetime.fromisoformat(session["created_at"]) - due
                return f"{self._context} was there {late.total_seconds() * 1000:.0f} ms after the appointment was due"
            time.sleep(0.05)
        raise UnexpectedError(f"There was no session {PATIENCE_SECONDS:.0f} s after it was due.")

    def _chat_by_appointment(self) -> str:
        problem = self._send("patient", self._appointment["id"], "Hello?", 400)
        if problem["code"] != "SESSION_CONTEXT_REQUIRED" or problem.get("session_context") != self._context:
            raise UnexpectedError(f"The code is {problem['code']}, the context {problem.get('session_context')}.")
        return f"SESSION_CONTEXT_REQUIRED, use {problem['session_context']}"

    def _chat_by_context(self) -> str:
        message = self._send("patient", self._context, "Good morning, doctor.", 201)
        return f"message {message['seq']} of the conversation"

    def _answer(self) -> str:
        message = self._send("doctor", self._context, "Good morning. How can I help?", 201)
        session = self._call("patient", "GET", f"/sessions/{self._context}", 200)
        if session["status"] != "active":
            raise UnexpectedError(f"The session is {session['status']}.")
        return f"message {message['seq']} of the conversation; the session is active"

    def _notified(self) -> str:
        wanted = {"appointment_confirmed", "session_started"}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            kinds = {
                who: {item["kind"] for item in self._call(who, "GET", "/notifications", 200)["items"]}
                for who in ("patient", "doctor")
            }
            if all(wanted <= of_one for of_one in kinds.values()):
                return "appointment_confirmed and session_started, to each"
            if time.monotonic() > deadline:
                raise UnexpectedError(f"Only these were delivered: {kinds}.")
            time.sleep(0.1)

    def _metrics_moved(self) -> str:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            now = self._measure()
            still = [name for name, value in now.items() if value <= self._before.get(name, 0.0)]
            if not still:
                return ", ".join(f"{name} +{now[name] - self._before.get(name, 0.0):.0f}" for name in now)
            if time.monotonic() > deadline:
                raise UnexpectedError(f"These have not: {', '.join(still)}.")
            time.sleep(0.1)

    def _end(self) -> str:
        ended = self._call("doctor", "POST", f"/sessions/{self._context}/end", 200)
        problem = self._send("patient", self._context, "One more thing …", 409)
        return f"the session is {ended['session']['status']}; chat answers {problem['code']}"

    def _send(self, who: str, context: object, body: str, status: int) -> Any:
        message = {"client_message_id": f"demo-{time.monotonic_ns()}", "body": body}
        return self._call(who, "POST", f"/chat/{context}/messages", status, **message)

    def _call(self, who: str, method: str, path: str, status: int, **body: Any) -> Any:
        if who not in self._people:
            raise UnexpectedError(f"There is no {who}, since an earlier step went wrong.")
        headers = {"Authorization": f"Bearer {self._people[who].token}"}
        address = f"{self._running['api']}/api/v1{path}"
        return self._expect(status, self._client.request(method, address, headers=headers, json=body or None))

    def _expect(self, status: int, response: httpx2.Response) -> Any:
        if response.status_code != status:
            raise UnexpectedError(f"HTTP {response.status_code} instead of {status}: {response.text[:300]}")
        try:
            return response.json()
        except ValueError:
            raise UnexpectedError(f"The answer is no JSON: {response.text[:300]}") from None

    def _measure(self) -> dict[str, float]:
        api = self._client.get(f"{self._running['api']}/metrics").text
        worker = self._client.get(self._running["worker_metrics"]).text
        return {
            "chat_messages_total": _sum(api, "chat_messages_total"),
            "chat_blocked_session_context_required_total": _sum(api, "chat_blocked_session_context_required_total"),
            "appointment_sessions_created_total": _sum(worker, "appointment_sessions_created_total"),
        }


def _sum(exposition: str, name: str) -> float:
    """The sum of all series of a metric."""
    values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", exposition, re.MULTILINE)
    return sum(map(float, values))
