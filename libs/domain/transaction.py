"""One transaction, and what follows once it is committed.

Whoever writes rows says in the same breath who is to be woken; nobody is woken for rows that were
rolled back, and nobody is told of success before the rows are durable.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from sqlalchemy import CursorResult, Executable
from sqlalchemy.ext.asyncio import AsyncConnection

from libs.domain.db import Database
from libs.domain.jobs import Job
from libs.guardrails import Refused


class Bell(Protocol):
    """Wakes whoever is concerned by committed rows. It may fail to, and never raises or waits: the rows are
    found anyway."""

    def ring(self, job: Job) -> None:
        """There is a job to do."""

    def changed(self, conversation_id: int) -> None:
        """Something of a conversation, or of its session, is not as it was."""

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        """A participant began to write, or stopped. Nothing stores this."""


class Transaction:
    """A transaction that begins with its first statement, so that a request which is refused before
    it needs the database never holds a connection."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: AsyncConnection | None = None
        self._rings: dict[Job, None] = {}
        self._changed: dict[int, None] = {}
        self._typing: dict[tuple[int, int], bool] = {}
        self._after: list[Callable[[], None]] = []

    async def connection(self) -> AsyncConnection:
        if self._connection is None:
            self._connection = await self._database.connect()
        return self._connection

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> CursorResult[Any]:
        connection = await self.connection()
        result: CursorResult[Any] = await connection.execute(statement, parameters)
        return result

    def ring(self, job: Job) -> None:
        """Wakes the worker for `job` once the transaction is committed."""
        self._rings[job] = None

    def changed(self, conversation_id: int) -> None:
        """Wakes whoever watches the conversation once the transaction is committed."""
        self._changed[conversation_id] = None

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        """Tells whoever watches the conversation that the user began or stopped writing, after the commit."""
        self._typing[conversation_id, user_id] = on

    def after_commit(self, tell: Callable[[], None]) -> None:
        """Counts or logs what is true once the transaction is committed."""
        self._after.append(tell)

    async def commit(self, bell: Bell) -> None:
        if self._connection is not None:
            await self._connection.commit()
        for tell in self._after:
            tell()
        for job in self._rings:
            bell.ring(job)
        for conversation_id in self._changed:
            bell.changed(conversation_id)
        for (conversation_id, user_id), on in self._typing.items():
            bell.typing(conversation_id, user_id, on=on)

    async def close(self) -> None:
        """Rolls back what was not committed and returns the connection."""
        if self._connection is not None:
            await self._connection.close()


@asynccontextmanager
async def transaction(database: Database, bell: Bell) -> AsyncIterator[Transaction]:
    """Commits when the block ends well, or with a `Refused` that says `keep`; else rolls back."""
    tx = Transaction(database)
    try:
        try:
            yield tx
        except Refused as refused:
            if refused.keep:
                await tx.commit(bell)
            raise
        await tx.commit(bell)
    finally:
        await tx.close()
