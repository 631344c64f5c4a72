"""The frames of the protocol `sessiongate.v1`: JSON objects that say by `type` what they are."""

from contextlib import suppress
from typing import Annotated, Any, Final, Literal, TypeAlias

import orjson
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from libs.guardrails import Refused
from libs.guardrails.context import MAX_ID
from services.api.chat.schemas import MessageOut, ReplyIn, SendMessageIn
from services.api.errors import validation_errors
from services.api.realtime.wire import framed
from services.api.schemas import Id, In, SafeStr
from services.api.sessions.schemas import SessionOut

Number = Annotated[int, Field(strict=True, ge=0, le=MAX_ID)]
Switch = Annotated[bool, Field(strict=True)]


# What clients send


class Hello(In):
    """First of all: what the client has got. Without `after_seq` it gets what is new from now on."""

    type: Literal["hello"]
    after_seq: Number | None = None
    after_revision: Number | None = None


class SendMessage(SendMessageIn):
    type: Literal["message"]


class Reply(ReplyIn):
    type: Literal["reply"]
    message_id: Id


class React(In):
    type: Literal["reaction"]
    message_id: Id
    emoji: Annotated[SafeStr, Field(min_length=1, max_length=32)]
    on: Switch


class Type(In):
    type: Literal["typing"]
    on: Switch


class Read(In):
    type: Literal["read"]
    seq: Number


class Ping(In):
    type: Literal["ping"]


ClientFrame: TypeAlias = Hello | SendMessage | Reply | React | Type | Read | Ping

_CLIENT_FRAME: Final[TypeAdapter[ClientFrame]] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="type")])


def parse(text: str) -> ClientFrame:
    """Raises `Refused(VALIDATION_FAILED)`."""
    try:
        return _CLIENT_FRAME.validate_json(text)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        # The first part of a location is the type of the frame, if it has one.
        raise validation_errors({**fault, "loc": ("frame", *fault["loc"][1:])} for fault in faults) from None


def hello_in(text: str | None) -> Hello | None:
    """The hello, if it is one."""
    with suppress(Refused):
        if text is not None and isinstance(frame := parse(text), Hello):
            return frame
    return None


# What the server sends


class Welcome(BaseModel):
    """First of all: how the session stands, and the numbers of the last message and of the last change of a
    reaction. `session` is null while the appointment has none."""

    type: Literal["welcome"] = "welcome"
    session: SessionOut | None
    last_seq: int
    revision: int


class Message(BaseModel):
    """The next message of the conversation."""

    type: Literal["message"] = "message"
    message: MessageOut


class Gap(BaseModel):
    """Messages that are too many to replay; they are had over HTTP."""

    type: Literal["gap"] = "gap"
    from_seq: int
    to_seq: int


class CaughtUp(BaseModel):
    """All that was missed has been sent; what follows is live."""

    type: Literal["caught_up"] = "caught_up"


class Ack(BaseModel):
    """The client's message is stored."""

    type: Literal["ack"] = "ack"
    client_message_id: str
    message: MessageOut


class Reaction(BaseModel):
    """How a reaction stands from now on; `revision` numbers the changes."""

    type: Literal["reaction"] = "reaction"
    message_id: int
    user_id: int
    emoji: str
    on: bool
    revision: int


class Typing(BaseModel):
    type: Literal["typing"] = "typing"
    user_id: int
    on: bool


class ReadMark(BaseModel):
    """How far a participant has read."""

    type: Literal["read"] = "read"
    user_id: int
    seq: int


class SessionChanged(BaseModel):
    type: Literal["session"] = "session"
    session: SessionOut | None


class Pong(BaseModel):
    type: Literal["pong"] = "pong"


ServerFrame: TypeAlias = Welcome | Message | Gap | CaughtUp | Ack | Reaction | Typing | ReadMark | SessionChanged | Pong


def encode(frame: ServerFrame) -> bytes:
    """The frame as it goes over the wire, to one client or to many."""
    return framed(frame.model_dump_json().encode())


def encode_refusal(document: dict[str, Any], client_message_id: str | None) -> bytes:
    """A problem document as a frame, of which `type` is the frame's."""
    said = document | {"type": "refused"}
    if client_message_id is not None:
        said["client_message_id"] = client_message_id
    return framed(orjson.dumps(said))


def client_message_id_of(frame: ClientFrame | None) -> str | None:
    """The id that an answer repeats, so that the client knows what was answered."""
    return frame.client_message_id if isinstance(frame, SendMessage | Reply) else None
