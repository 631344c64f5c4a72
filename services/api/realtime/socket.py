"""One socket: it enters a room, catches up, and then acts for its client, one frame after the other."""

import asyncio
from contextlib import suppress
from typing import Final, TypeVar

from starlette.websockets import WebSocket, WebSocketDisconnect

from libs.domain import people
from libs.domain.chat import conversations, presence, reactions, reading
from libs.domain.chat.sending import NewMessage
from libs.domain.runtime import Runtime
from libs.domain.transaction import Transaction
from libs.guardrails import Claim, Operation, Reason, Refused, SessionContext
from libs.guardrails import operations as op
from libs.observability.context import bind, correlation_id, new_correlation_id, note
from libs.observability.tracing import span
from services.api import security
from services.api.chat.schemas import MessageOut
from services.api.errors import STATUS, document, refusal
from services.api.realtime import frames
from services.api.realtime.rooms import OVER, REPLAY_LIMIT, SIGNED_OUT, Member, Rooms
from services.api.realtime.wire import Wire
from services.api.sessions.schemas import SessionOut

Op = TypeVar("Op", bound=Operation)

HELLO_SECONDS: Final = 3.0
"""How long a client may take to say what it has got; after that it gets what is new."""

FAULT: Final = 1011
TRY_AGAIN: Final = 1013

# Of `chat_message_errors_total{reason}`; everything else is the guard's.
_ERRORS: Final = {
    Reason.VALIDATION_FAILED: "validation",
    Reason.RATE_LIMITED: "rate_limited",
    Reason.OVERLOADED: "timeout",
    Reason.INTERNAL_ERROR: "system",
}


class Socket:
    """A socket whose handshake is done."""

    def __init__(self, websocket: WebSocket, runtime: Runtime, rooms: Rooms, claim: Claim[op.Join]) -> None:
        self._websocket = websocket
        self._wire = Wire.of(websocket)
        self._runtime = runtime
        self._rooms = rooms
        self._caller = claim.caller
        self._subject = claim.subject
        self._correlation_id = correlation_id()

    async def enter(self) -> int:
        """The conversation that may be followed. Raises `Refused`."""
        async with self._runtime.begin() as tx:
            context = await self._open(tx, op.Join)
            conversation_id = await conversations.enter(tx, context)
        note(connection_id=self._correlation_id, session_id=context.session.id if context.session else None)
        return conversation_id

    async def follow(self, conversation_id: int) -> None:
        """From the welcome to the end."""
        try:
            state = await self._rooms.state_of(conversation_id)
            session = None if state.session is None else SessionOut.model_validate(state.session)
            self._send(frames.Welcome(session=session, last_seq=state.last_seq, revision=state.revision))
            with self._rooms.joined(self._caller.user_id, self._wire, state) as member:
                await self._begin(conversation_id, member)
                while True:
                    await self._handle(await self._receive(), conversation_id, member)
        except WebSocketDisconnect:
            pass
        except Exception as error:
            dismiss(self._websocket, refusal(error))

    async def _receive(self) -> str:
        """The text of the next frame; none in one that is binary. Raises `WebSocketDisconnect`."""
        received = await self._websocket.receive()
        if self._wire.ended:
            raise WebSocketDisconnect(self._wire.closed_with)
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received["code"])
        return received.get("text") or ""

    async def _begin(self, conversation_id: int, member: Member) -> None:
        """Replays what the client says that it missed. Whatever else it says first is handled afterwards."""
        text = None
        with suppress(TimeoutError):
            async with asyncio.timeout(HELLO_SECONDS):
                text = await self._receive()
        hello = frames.hello_in(text)
        if hello is not None:
            self._go_back(member, hello)
        await self._rooms.catch_up(conversation_id, member)
        if text is not None and hello is None:
            await self._handle(text, conversation_id, member)

    def _go_back(self, member: Member, hello: frames.Hello) -> None:
        """Puts the member where the client is, or as near to it as is replayed."""
        last_seq = member.seq
        if hello.after_seq:
            self._runtime.metrics.counter("chat_reconnections_total").inc()
        if hello.after_seq is not None:
            member.seq = max(min(hello.after_seq, last_seq), last_seq - REPLAY_LIMIT)
            if member.seq > hello.after_seq and last_seq > hello.after_seq:
                self._send(frames.Gap(from_seq=hello.after_seq + 1, to_seq=member.seq))
        if hello.after_revision is not None:
            member.revision = min(hello.after_revision, member.revision)

    async def _handle(self, text: str, conversation_id: int, member: Member) -> None:
        with bind(correlation_id=new_correlation_id(), causation_id=self._correlation_id):
            frame = None
            try:
                frame = frames.parse(text)
                with span("chat.frame", root=True, frame_type=frame.type):
                    await self._act(frame)
            except Exception as error:
                refused = refusal(error)
                await self._runtime.recorder.room()
                self._runtime.metrics.counter("chat_message_errors_total", _ERRORS.get(refused.reason, "blocked")).inc()
                security.notice(refused, self._websocket, self._runtime.metrics)
                refuse(self._websocket, refused, frames.client_message_id_of(frame))
                if refused.reason is Reason.UNAUTHENTICATED:
                    self._wire.end(SIGNED_OUT)
                elif refused.reason is Reason.SESSION_NOT_ACTIVE and member.session is None:
                    self._wire.end(OVER)
                elif refused.reason is Reason.SESSION_NOT_ACTIVE:
                    self._rooms.changed(conversation_id)  # It shows the session, and closes.

    async def _act(self, frame: frames.ClientFrame) -> None:
        match frame:
            case frames.SendMessage():
                new = NewMessage(frame.client_message_id, frame.body, frame.kind, frame.media_url)
                await self._store(self._claim(op.SendMessage), new)
            case frames.Reply():
                new = NewMessage(frame.client_message_id, frame.body, reply_to=frame.message_id)
                await self._store(self._claim(op.ReplyToMessage), new)
            case frames.React(on=True):
                async with self._runtime.begin() as tx:
                    await reactions.react(tx, await self._open(tx, op.AddReaction), frame.message_id, frame.emoji)
            case frames.React():
                async with self._runtime.begin() as tx:
                    await reactions.react(tx, await self._open(tx, op.RemoveReaction), frame.message_id, frame.emoji)
            case frames.Type(on=True):
                async with self._runtime.begin() as tx:
                    await presence.typing(tx, await self._open(tx, op.StartTyping))
            case frames.Type():
                async with self._runtime.begin() as tx:
                    await presence.typing(tx, await self._open(tx, op.StopTyping))
            case frames.Read():
                async with self._runtime.begin() as tx:
                    await reading.mark_as_read(tx, await self._open(tx, op.MarkAsRead), frame.seq)
            case frames.Ping():
                self._send(frames.Pong())
            case frames.Hello():
                errors = [{"pointer": "/type", "in": "frame", "detail": "Only the first frame says hello."}]
                raise Refused(Reason.VALIDATION_FAILED, errors=errors)

    async def _store(self, claim: Claim[op.SendMessage] | Claim[op.ReplyToMessage], new: NewMessage) -> None:
        with span("chat.send"):
            sent = await self._runtime.chat.send(claim, new)
        self._send(frames.Ack(client_message_id=new.client_message_id, message=MessageOut.of(sent.message)))

    def _claim(self, operation: type[Op]) -> Claim[Op]:
        return Claim(operation, self._caller, self._subject)

    async def _open(self, tx: Transaction, operation: type[Op]) -> SessionContext[Op]:
        if not await people.is_active(tx, self._caller):
            raise Refused(Reason.UNAUTHENTICATED)
        return await self._runtime.door.open(tx, self._claim(operation))

    def _send(self, frame: frames.ServerFrame) -> None:
        self._wire.write(frames.encode(frame))


def refuse(websocket: WebSocket, refused: Refused, client_message_id: str | None = None) -> None:
    """Tells the client why something was refused."""
    Wire.of(websocket).write(frames.encode_refusal(document(refused, websocket), client_message_id))


def dismiss(websocket: WebSocket, refused: Refused) -> None:
    """Ends the socket for a reason, which is its last frame."""
    refuse(websocket, refused)
    Wire.of(websocket).end(_close_code(refused.reason))


def _close_code(reason: Reason) -> int:
    """4000 and the HTTP status, where the client can do something about it."""
    match reason:
        case Reason.SESSION_NOT_READY:
            return OVER  # To a socket this is a matter of the session's state like any other.
        case Reason.OVERLOADED:
            return TRY_AGAIN
        case Reason.INTERNAL_ERROR:
            return FAULT
        case _:
            return 4000 + STATUS[reason.kind]
