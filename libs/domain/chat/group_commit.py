"""Messages that come at the same time, stored by one statement and one commit.

Storing many at once costs the database little more than storing one. Nobody waits for company: a message goes as soon
as there is a free lane, with whatever came in the same turn of the event loop, or while the lanes were busy.
"""

import asyncio
import copy
import time
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import asyncpg

from libs.domain.chat.send_statement import STORE
from libs.domain.db import POOL_TIMEOUT, Database, is_conflict, is_transient
from libs.domain.statements import trace_statement
from libs.guardrails import Principal

LANES: Final = 2
"""How many groups may be on their way at once: while the database works on one, the next is prepared."""

GROUP_LIMIT: Final = 64


@dataclass(slots=True, eq=False)
class _Waiting:
    """A message: its values in the order of the statement's parameters, where its row goes, what ends the waiting for
    its turn, and when the statement ran, in Unix time."""

    session_id: int
    values: tuple[Any, ...]
    row: "asyncio.Future[Any]"
    deadline: asyncio.TimerHandle
    began_ns: int = 0
    ended_ns: int = 0


_Line: TypeAlias = dict[Principal, deque[_Waiting]]


class GroupCommit:
    """Runs `STORE` for whoever comes. `limits` are its parameters that hold for all messages.

    The senders of a session take turns: whoever sends most, or is nobody there, keeps no other waiting.
    """

    def __init__(self, database: Database, *limits: Any) -> None:
        self._database: Final = database
        self._limits: Final = limits
        self._waiting: dict[int, _Line] = {}
        self._under_way: set[int] = set()
        self._lanes: set[asyncio.Task[None]] = set()

    async def store(self, caller: Principal, session_id: int, values: tuple[Any, ...]) -> Any:
        """The row of the stored message, or None when something is in its way.

        Raises TimeoutError when its turn does not come in time, and what keeps the database from its work, such as a
        lost connection: then the message may be stored nevertheless.
        """
        loop = asyncio.get_running_loop()
        row: asyncio.Future[Any] = loop.create_future()
        message = _Waiting(session_id, values, row, loop.call_later(POOL_TIMEOUT, _give_up, row))
        self._waiting.setdefault(session_id, {}).setdefault(caller, deque()).append(message)
        if len(self._lanes) < LANES:
            # In a context of its own: the lane works for many, and may outlast whoever opened it.
            self._lanes.add(loop.create_task(self._serve(), context=Context()))
        failed = None
        try:
            return await row
        except Exception as error:
            failed = error
            raise
        finally:
            message.deadline.cancel()
            if message.ended_ns:
                trace_statement(STORE, message.began_ns, message.ended_ns, failed)

    async def _serve(self) -> None:
        try:
            while group := self._next_group():
                try:
                    rows = await self._store(group)
                except Exception as error:
                    _fail(group, error)
                else:
                    _tell(group, rows)
                finally:
                    self._under_way.difference_update(message.session_id for message in group)
        finally:
            self._lanes.discard(asyncio.current_task())

    def _next_group(self) -> Sequence[_Waiting]:
        """One message of each session of which none is under way."""
        group: list[_Waiting] = []
        for session_id in [each for each in self._waiting if each not in self._under_way]:
            if len(group) == GROUP_LIMIT:
                break
            line = self._waiting.pop(session_id)
            if message := _next_of(line):
                message.deadline.cancel()
                group.append(message)
                self._under_way.add(session_id)
            if line:
                self._waiting[session_id] = line
        return group

    async def _store(self, group: Sequence[_Waiting]) -> Sequence[Any]:
        columns = list(zip(*(message.values for message in group), strict=True))
        parameters = (*columns, *self._limits, len(group))
        async with self._database.autocommit() as connection:
            began_ns = time.time_ns()
            try:
                rows: Sequence[Any] = await connection.fetch(STORE, *parameters)
            except asyncpg.UniqueViolationError:
                # One was stored elsewhere while this statement ran; now that is seen, and left out.
                rows = await connection.fetch(STORE, *parameters)
            finally:
                for message in group:
                    message.began_ns, message.ended_ns = began_ns, time.time_ns()
        return rows


def _next_of(line: _Line) -> _Waiting | None:
    """The next message that is still wanted, by the sender whose turn it is."""
    while line:
        caller = next(iter(line))
        messages = line.pop(caller)
        while messages:
            message = messages.popleft()
            if not message.row.done():
                if messages:
                    line[caller] = messages
                return message
    return None


def _give_up(row: "asyncio.Future[Any]") -> None:
    if not row.done():
        row.set_exception(TimeoutError())


def _tell(group: Sequence[_Waiting], rows: Sequence[Any]) -> None:
    stored = {row["session_id"]: row for row in rows}
    for message in group:
        if not message.row.done():
            message.row.set_result(stored.get(message.session_id))


def _fail(group: Sequence[_Waiting], error: Exception) -> None:
    """Where one message may be at fault, none is stored, and each is left to the statement that stores it alone."""
    for message in group:
        if message.row.done():
            continue
        if is_transient(error) and not is_conflict(error):
            message.row.set_exception(copy.copy(error))  # each of them gets a history of its own
        else:
            message.row.set_result(None)
