"""The rooms of this process: who follows which conversation here, and what they are told.

What is told comes from PostgreSQL. News, of this process or of another, only say which rooms to look after; all
rooms are looked after every other second without any. A room and each of its members know up to which message
and which change of a reaction they have been told, so that everyone is told everything once and in order.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Final

from libs.domain.chat import messages, watching
from libs.domain.chat.bodies import Bodies
from libs.domain.chat.messages import Message
from libs.domain.chat.watching import ChangedReaction, State
from libs.domain.db import Database, is_transient
from libs.domain.doorbell import Doorbell
from libs.domain.news import listen
from libs.domain.runtime import Runtime
from libs.domain.sessions.sessions import Session
from libs.domain.telemetry import logger
from libs.observability.registry import Metrics
from services.api.chat.schemas import MessageOut
from services.api.realtime import frames
from services.api.realtime.wire import Wire
from services.api.sessions.schemas import SessionOut

_log: Final = logger("realtime")

POLL_SECONDS: Final = 2.0
TYPING_SECONDS: Final = 10.0
PAGE: Final = 100
"""How much of one conversation is read at once; less than a client's queue holds."""

REPLAY_LIMIT: Final = 1000
"""How many messages a client that was away gets over the socket."""

SIGNED_OUT: Final = 4401
OVER: Final = 4409


class Member:
    """One socket in a room. `seq` and `revision` say up to where it has been told; until it is `live` it is told
    nothing that happens. `since` is the last look of the rooms that began before it was welcomed."""

    def __init__(self, user_id: int, wire: Wire, state: State, since: int) -> None:
        self.user_id: Final = user_id
        self.wire: Final = wire
        self.seq = state.last_seq
        self.revision = state.revision
        self.session = state.session
        self.since: Final = since
        self.live = False


class Room:
    """One conversation with whoever follows it here."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.seq = state.last_seq
        self.revision = state.revision
        self.members: set[Member] = set()
        self._typists: dict[int, asyncio.TimerHandle] = {}

    @property
    def live(self) -> list[Member]:
        return [member for member in self.members if member.live]

    def tell_state(self, state: State, look: int) -> None:
        """Tells what else has changed, and ends the sockets of those who have no business here any more. `look`
        numbers the look at the database that found `state`."""
        marks = {party.user_id: party.last_read_seq for party in self.state.parties}
        for party in state.parties:
            if party.last_read_seq > marks.get(party.user_id, 0):
                self._tell(frames.ReadMark(user_id=party.user_id, seq=party.last_read_seq))
        self.state = state
        inactive = {party.user_id for party in state.parties if not party.active}
        for member in self.members:
            if member.user_id in inactive:
                member.wire.end(SIGNED_OUT)
            elif member.live and look > member.since:
                if member.session != state.session:
                    member.session = state.session
                    member.wire.write(_encoded_session(state.session))
                if state.is_over:
                    member.wire.end(OVER)

    def typing(self, user_id: int, *, on: bool) -> None:
        """Whoever began to write stops by himself after a while."""
        timer = self._typists.pop(user_id, None)
        if timer is not None:
            timer.cancel()
        if on:
            stop = partial(self.typing, user_id, on=False)
            self._typists[user_id] = asyncio.get_running_loop().call_later(TYPING_SECONDS, stop)
        if on != (timer is not None):
            self._tell(frames.Typing(user_id=user_id, on=on), but=user_id)

    def greet(self, member: Member) -> None:
        """Makes a member live that knows all messages and reactions the room does."""
        member.live = True
        for party in self.state.parties:
            if party.last_read_seq:
                member.wire.write(frames.encode(frames.ReadMark(user_id=party.user_id, seq=party.last_read_seq)))
        for user_id in self._typists.keys() - {member.user_id}:
            member.wire.write(frames.encode(frames.Typing(user_id=user_id, on=True)))
        member.wire.write(frames.encode(frames.CaughtUp()))

    def close(self) -> None:
        for timer in self._typists.values():
            timer.cancel()

    def _tell(self, frame: frames.ServerFrame, *, but: int | None = None) -> None:
        encoded = frames.encode(frame)
        for member in self.live:
            if member.user_id != but:
                member.wire.write(encoded)


def tell_messages(members: Sequence[Member], page: Iterable[Message]) -> int:
    """Tells the members what they do not know yet; answers how many frames that took."""
    told = [(message.seq, frames.encode(frames.Message(message=MessageOut.of(message)))) for message in page]
    bursts: dict[int, tuple[bytes, int]] = {}  # by what a member knows, which is nearly always the same for all
    sent = 0
    for member in members:
        if member.seq not in bursts:
            unknown = [frame for seq, frame in told if seq > member.seq]
            bursts[member.seq] = b"".join(unknown), len(unknown)
        burst, number = bursts[member.seq]
        if number:
            member.wire.write(burst, number)
            member.seq = told[-1][0]
            sent += number
    return sent


def tell_reactions(members: Sequence[Member], page: Iterable[ChangedReaction]) -> None:
    for changed in page:
        frame = frames.encode(
            frames.Reaction(
                message_id=changed.message_id,
                user_id=changed.user_id,
                emoji=changed.emoji,
                on=changed.on,
                revision=changed.revision,
            )
        )
        for member in members:
            if member.revision < changed.revision:
                member.revision = changed.revision
                member.wire.write(frame)


def _encoded_session(session: Session | None) -> bytes:
    shown = None if session is None else SessionOut.model_validate(session)
    return frames.encode(frames.SessionChanged(session=shown))


class Rooms:
    """All rooms of this process; see `libs.domain.news.Watcher`."""

    def __init__(self, database: Database, bodies: Bodies, metrics: Metrics) -> None:
        self._database = database
        self._bodies = bodies
        self._rooms: dict[int, Room] = {}
        self._news: set[int] = set()
        self._woken = asyncio.Event()
        self._look = 0
        self._sent = metrics.counter("chat_messages_total", "sent")
        self._broadcast = metrics.counter("chat_messages_total", "broadcast")
        self._sending = metrics.histogram("chat_message_processing_duration_seconds", "sent")
        self._broadcasting = metrics.histogram("chat_message_processing_duration_seconds", "broadcast")

    def changed(self, conversation_id: int) -> None:
        if conversation_id in self._rooms:
            self._news.add(conversation_id)
            self._woken.set()

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        if room := self._rooms.get(conversation_id):
            room.typing(user_id, on=on)

    async def state_of(self, conversation_id: int) -> State:
        async with self._database.autocommit() as connection:
            [state] = await watching.states(connection, [conversation_id])
        return state

    @contextmanager
    def joined(self, user_id: int, wire: Wire, state: State) -> Iterator[Member]:
        """A member that was welcomed with `state`, and is told nothing until it has caught up."""
        room = self._rooms.setdefault(state.conversation_id, Room(state))
        member = Member(user_id, wire, state, self._look)
        room.members.add(member)
        try:
            yield member
        finally:
            room.members.discard(member)
            if not room.members:
                room.close()
                del self._rooms[state.conversation_id]

    async def catch_up(self, conversation_id: int, member: Member) -> None:
        """Replays what follows `seq` and `revision` of the member, at the pace at which the client reads; from then
        on it is live."""
        room = self._rooms[conversation_id]
        while member.seq < room.seq or member.revision < room.revision:
            async with self._database.autocommit() as connection:
                if member.seq < room.seq:
                    page = await messages.following(connection, self._bodies, {conversation_id: member.seq}, PAGE)
                    self._sent.inc(tell_messages([member], page))
                else:
                    known = {conversation_id: member.revision}
                    tell_reactions([member], await watching.changed_reactions(connection, known, PAGE))
            await member.wire.drained()
        room.greet(member)
        # Whatever happened since the welcome is told by a look that begins now.
        self.changed(conversation_id)

    async def run(self) -> None:
        """Looks after the rooms until cancelled: those there is news of at once, all of them now and then."""
        poll_at = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(poll_at - time.monotonic()):
                    await self._woken.wait()
            if time.monotonic() >= poll_at:
                poll_at = time.monotonic() + POLL_SECONDS
                self._news.update(self._rooms)
            self._woken.clear()
            news, self._news = self._news, set()
            await self._try_to_look_after(list(news))

    async def _try_to_look_after(self, conversations: Sequence[int]) -> None:
        """One room that cannot be looked after is no reason to neglect the others; its turn comes again."""
        try:
            await self._look_after(conversations)
        except Exception as error:
            if len(conversations) > 1 and not is_transient(error):
                for conversation_id in conversations:
                    await self._try_to_look_after([conversation_id])
            else:
                _log.warning("rooms_failed", exc_info=error, exception_type=type(error).__name__)

    async def _look_after(self, conversations: Sequence[int]) -> None:
        rooms = {each: self._rooms[each] for each in conversations if each in self._rooms}
        if not rooms:
            return
        began = time.perf_counter()
        self._look += 1
        look = self._look
        async with self._database.autocommit() as connection:
            # The state first: whatever it counts is there to be read afterwards.
            states = await watching.states(connection, list(rooms))
            unread = {
                state.conversation_id: room.seq
                for state in states
                if (room := rooms[state.conversation_id]).seq < state.last_seq
            }
            page = await messages.following(connection, self._bodies, unread, PAGE) if unread else []
            unseen = {
                state.conversation_id: room.revision
                for state in states
                if (room := rooms[state.conversation_id]).revision < state.revision
            }
            changes = await watching.changed_reactions(connection, unseen, PAGE) if unseen else []
        for conversation_id, of_room in groupby(page, attrgetter("conversation_id")):
            self._tell_messages(rooms[conversation_id], list(of_room))
        for conversation_id, changed in groupby(changes, attrgetter("conversation_id")):
            room, listed = rooms[conversation_id], list(changed)
            tell_reactions(room.live, listed)
            room.revision = listed[-1].revision
        for state in states:
            room = rooms[state.conversation_id]
            if room.seq < state.last_seq or room.revision < state.revision:
                self.changed(state.conversation_id)  # There was more than a page.
            else:
                room.tell_state(state, look)
        if page:
            self._broadcast.inc(len(page))
            self._broadcasting.observe(time.perf_counter() - began)

    def _tell_messages(self, room: Room, page: Sequence[Message]) -> None:
        began = time.perf_counter()
        self._sent.inc(tell_messages(room.live, page))
        room.seq = page[-1].seq
        self._sending.observe(time.perf_counter() - began)


@asynccontextmanager
async def open_rooms(runtime: Runtime, doorbell: Doorbell) -> AsyncIterator[Rooms]:
    """Rooms that are looked after, and hear the news of this process and of others, for the length of the block."""
    rooms = Rooms(runtime.database, runtime.bodies, runtime.metrics)
    doorbell.near = rooms
    others = listen(runtime.settings.redis_url, rooms, but=doorbell.name)
    tasks = [asyncio.create_task(rooms.run()), asyncio.create_task(others)]
    try:
        yield rooms
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
