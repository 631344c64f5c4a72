"""What the type checker refuses, each beside what it accepts, so that a proof cannot hold for a wrong reason."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GIVEN = """
from libs.domain.chat.bodies import Bodies
from libs.domain.chat.messages import Newest, history
from libs.domain.chat.sending import Chat, NewMessage
from libs.domain.db import Database
from libs.domain.jobs import ConvertDue, Job
from libs.domain.notifications import Notifications
from libs.domain.outbox.append import append
from libs.domain.outbox.dispatch import Dispatcher
from libs.domain.outbox.events import Consumer, EventName
from libs.domain.sessions import sessions
from libs.domain.sessions.settlement import Settlement
from libs.domain.transaction import Transaction
from libs.guardrails import (
    AppointmentRef, Claim, Facts, Family, FixedFlags, Flags, Guard, Operation, Permission, Principal, Reason,
    Refused, Role, SessionContext, SessionKind, SessionRef, parse_context,
)
from libs.guardrails.operations import CompleteSession, GetMessages, SendMessage
from libs.guardrails.testing import RecordingWitness
from libs.observability.registry import Metrics
from services.api.guards import Can, Claimed, Tx, acting
from services.worker.runner import functions

async def given(
    tx: Transaction,
    chat: Chat,
    bodies: Bodies,
    guard: Guard,
    settlement: Settlement,
    caller: Principal,
    facts: Facts,
    database: Database,
    metrics: Metrics,
    to_send: Claim[SendMessage],
    to_read: Claim[GetMessages],
    sending: SessionContext[SendMessage],
    reading: SessionContext[GetMessages],
    ending: SessionContext[CompleteSession],
    anything: SessionContext[Operation],
    appointment_id: int,
) -> None:
    # What there is to work with.
"""


@dataclass(frozen=True)
class Proof:
    """`refused` is a line with an error of that `code`, after what is given; `accepted` is one without."""

    accepted: str
    refused: str
    code: str


READ = "await history(tx, bodies, {}, Newest(), 50)"
SEND = "await chat.send({}, NewMessage('1', 'Hello'))"
OPEN = "opened: SessionContext[{}] = guard.open(to_send, facts)"
NEW = "await append(tx, {}, tenant_id=1, aggregate='session:1', payload={{}})"

PROOFS = {
    "an appointment's id reads nothing": Proof(READ.format("reading"), READ.format("appointment_id"), "arg-type"),
    "a reference to an appointment reads nothing": Proof(
        READ.format("reading"), READ.format("AppointmentRef(appointment_id)"), "arg-type"
    ),
    "a claim is no permission yet": Proof(READ.format("reading"), READ.format("to_read"), "arg-type"),
    "permission to send is none to read": Proof(READ.format("reading"), READ.format("sending"), "arg-type"),
    "permission for something is none to read": Proof(READ.format("reading"), READ.format("anything"), "arg-type"),
    "permission to read is none to end": Proof(
        "await sessions.end(tx, settlement, ending, None)",
        "await sessions.end(tx, settlement, reading, None)",
        "arg-type",
    ),
    "an appointment's id sends nothing": Proof(SEND.format("to_send"), SEND.format("appointment_id"), "arg-type"),
    "a reference to a session sends nothing": Proof(
        SEND.format("to_send"), SEND.format("SessionRef(SessionKind.TEXT, 7)"), "arg-type"
    ),
    "a claim to read sends nothing": Proof(SEND.format("to_send"), SEND.format("to_read"), "arg-type"),
    "a context is opened for what was claimed": Proof(
        OPEN.format("SendMessage"), OPEN.format("GetMessages"), "arg-type"
    ),
    "a context of an operation is one of any, and not the other way round": Proof(
        "wider: SessionContext[Operation] = sending",
        "narrower: SessionContext[SendMessage] = anything",
        "assignment",
    ),
    "a context is not made without the seal": Proof(
        "guard.open(to_send, facts)", "SessionContext(object(), to_send, facts)", "arg-type"
    ),
    "a context is not made from nothing": Proof("guard.open(to_send, facts)", "SessionContext()", "call-arg"),
    "a context has no subclasses": Proof(
        "class Ring(Operation, name='ring', family=Family.LIFECYCLE): ...",
        "class Forged(SessionContext[SendMessage]): ...",
        "misc",
    ),
    "an operation has a name and a family": Proof(
        "class Ring(Operation, name='ring', family=Family.LIFECYCLE): ...",
        "class Ring(Operation): ...",
        "call-arg",
    ),
    "only operations are claimed": Proof(
        "Claim(SendMessage, caller, AppointmentRef(1))", "Claim(int, caller, AppointmentRef(1))", "type-var"
    ),
    "what a client wrote is not taken for a session": Proof(
        "written: SessionRef | AppointmentRef = parse_context('7')",
        "written: SessionRef = parse_context('7')",
        "assignment",
    ),
    "the session of a context may not be there yet": Proof(
        "found = sending.session.id if sending.session else None", "found = sending.session.id", "union-attr"
    ),
    "a claim does not change": Proof("claimed = to_send.operation", "to_send.operation = SendMessage", "misc"),
    "a role is one of the roles": Proof("Principal(1, 1, Role.DOCTOR)", "Principal(1, 1, 'doctor')", "arg-type"),
    "a refusal has one of the reasons": Proof(
        "raise Refused(Reason.SLOT_TAKEN)", "raise Refused('SLOT_TAKEN')", "arg-type"
    ),
    "the guard has a witness": Proof(
        "Guard(FixedFlags(Flags()), RecordingWitness())", "Guard(FixedFlags(Flags()), print)", "arg-type"
    ),
    "the guard asks for the flags of a tenant": Proof(
        "Guard(FixedFlags(Flags()), RecordingWitness())", "Guard(Flags(), RecordingWitness())", "arg-type"
    ),
    "a route reads with what its guard opened": Proof(
        f"async def read(context: Can[GetMessages], tx: Tx) -> None: {READ.format('context')}",
        f"async def read(context: Can[CompleteSession], tx: Tx) -> None: {READ.format('context')}",
        "arg-type",
    ),
    "a route sends with what was claimed": Proof(
        f"async def send(claim: Claimed[SendMessage]) -> None: {SEND.format('claim')}",
        f"async def send(claim: Can[SendMessage]) -> None: {SEND.format('claim')}",
        "arg-type",
    ),
    "a guard is for an operation": Proof(
        "async def read(context: Can[GetMessages]) -> None: ...",
        "async def read(context: Can[Reason]) -> None: ...",
        "type-var",
    ),
    "a caller acts with one of the permissions": Proof(
        "acting(Permission.SEE_DOCTORS)", "acting('see_doctors')", "arg-type"
    ),
    "a job is rung for and not its name": Proof("tx.ring(ConvertDue())", "tx.ring('convert_due')", "arg-type"),
    "a job is rung for and not its type": Proof("tx.ring(ConvertDue())", "tx.ring(ConvertDue)", "arg-type"),
    "a job has a name": Proof("class Tidy(Job, name='tidy'): ...", "class Tidy(Job): ...", "call-arg"),
    "a job is handled by something that can be called": Proof(
        "functions({ConvertDue: lambda: None}, metrics)", "functions({ConvertDue: 'pulse'}, metrics)", "dict-item"
    ),
    "an event is one of the events": Proof(
        NEW.format("EventName.SESSION_ENDED"), NEW.format("'session_ended'"), "arg-type"
    ),
    "an event goes to something that takes events": Proof(
        "Dispatcher(database, {Consumer.NOTIFICATIONS: Notifications(database)}, metrics)",
        "Dispatcher(database, {Consumer.NOTIFICATIONS: print}, metrics)",
        "dict-item",
    ),
}


Errors = dict[str, list[tuple[int, str]]]
"""Line and code of each error, by the name of the file."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """All lines checked in one run, each in a file of its own."""
    folder = tmp_path_factory.mktemp("proofs")
    for number, proof in enumerate(PROOFS.values()):
        (folder / f"accepted_{number}.py").write_text(f"{GIVEN}    {proof.accepted}\n")
        (folder / f"refused_{number}.py").write_text(f"{GIVEN}    {proof.refused}\n")
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=pyproject.toml", "--no-error-summary", str(folder)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    errors: Errors = {}
    for name, line, code in re.findall(r"(\w+)\.py:(\d+): error: .* \[([a-z-]+)\]$", ran.stdout, re.MULTILINE):
        errors.setdefault(name, []).append((int(line), code))
    return errors


@pytest.mark.parametrize("name", PROOFS)
def test_the_type_checker_knows_that(name: str, errors: Errors) -> None:
    number = list(PROOFS).index(name)
    last_line = GIVEN.count("\n") + 1
    assert errors.get(f"accepted_{number}", []) == []
    assert set(errors.get(f"refused_{number}", [])) == {(last_line, PROOFS[name].code)}
