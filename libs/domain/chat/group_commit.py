"""Messages that come at the same time, stored by one statement and one commit.

Storing many at once costs the database little more than storing one. Nobody waits for company: a message goes as soon
as there is a free lane, with whatever came in the same turn of the event loop, or while the lanes were busy.
"""

import asyncio
import time
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Final

from libs.domain.chat.send_statement import STORE
from libs.domain.db import Database, is_transient
from libs.domain.statements import trace_statement

LANES: Final = 2
"""How many groups may be on their way at once: while the database works on one, the next is prepared."""

GROUP_LIMIT: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A message: its session, its values in the order of the statement's parameters, and where its row goes."""

    session_id: int
    values: tuple[Any, ...]
    row: "asyncio.Future[Any]"


class GroupCommit:
    """Runs `STORE` for whoever comes. `limits` are its parameters that hold for all messages."""

    def __init__(self, database: Database, *limits: Any) -> None:
        self._database: Final = database
        self._limits: Final = limits
        self._waiting: list[_Waiting] = []
        self._under_way: set[int] = set()
        self._lanes: set[asyncio.Task[None]] = set()
        self._free_lanes = LANES

    async def store(self, session_id: int, values: tuple[Any, ...]) -> Any:
        """The row of the stored message, or None when something is in its way. Raises what keeps the database from
        its work, such as a lost connection; the message may be stored nevertheless."""
        loop = asyncio.get_running_loop()
        message = _Waiting(session_id, values, loop.create_future())
        self._waiting.append(message)
        if self._free_lanes:
            self._free_lanes -= 1
            # In a context of its own: the lane works for many, and may outlast whoever opened it.
            lane = loop.create_task(self._serve(), context=Context())
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)
        began_ns, failed = time.time_ns(), None
        try:
            return await message.row
        except Exception as error:
            failed = error
            raise
        finally:
            trace_statement(STORE, began_ns, time.time_ns(), failed)

    async def _serve(self) -> None:
        try:
            while group := self._next_group():
                try:
                    stored = await self._store(group)
                except Exception as error:
                    _fail(group, error)
                else:
                    _tell(group, stored)
                finally:
                    self._under_way.difference_update(message.session_id for message in group)
        finally:
            self._free_lanes += 1

    def _next_group(self) -> Sequence[_Waiting]:
        """The first message of each session of which none is under way, in the order in which they came."""
        group: list[_Waiting] = []
        left: list[_Waiting] = []
        for message in self._waiting:
            if message.session_id in self._under_way or len(group) == GROUP_LIMIT:
                left.append(message)
            elif not message.row.done():  # or whoever wanted it has gone
                group.append(message)
                self._under_way.add(message.session_id)
        self._waiting = left
        return group

    async def _store(self, group: Sequence[_Waiting]) -> Sequence[Any]:
        columns = zip(*(message.values for message in group), strict=True)
        async with self._database.autocommit() as connection:
            rows: Sequence[Any] = await connection.fetch(STORE, *columns, *self._limits, len(group))
        return rows


def _tell(group: Sequence[_Waiting], rows: Sequence[Any]) -> None:
    stored = {row["session_id"]: row for row in rows}
    for message in group:
        if not message.row.done():
            message.row.set_result(stored.get(message.session_id))


def _fail(group: Sequence[_Waiting], error: Exception) -> None:
    """Where one message is at fault, none is stored: each is left to the statement that stores it alone."""
    for message in group:
        if message.row.done():
            continue
        if is_transient(error):
            message.row.set_exception(error)
        else:
            message.row.set_result(None)
