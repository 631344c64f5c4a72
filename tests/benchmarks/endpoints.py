"""What a guarded send is compared with: endpoints on the product's own schema that store a message for whoever asks.

`bare` is the limit: FastAPI, an asyncpg pool, one INSERT. `orm` is what a project template would have: a session per
request, add, commit, refresh. Neither knows who sends, judges, or tells anybody. `collector` takes the product's
traces. All are run by uvicorn's own command.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import count
from typing import Annotated, Any

import asyncpg
from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import registry

from libs.domain import tables

# Beyond those of the history.
_numbers = count(1_000)


class NewMessage(BaseModel):
    tenant_id: int
    conversation_id: int
    sender_id: int
    client_message_id: str
    body: str


class StoredMessage(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    seq: int
    client_message_id: str
    body: str
    sent_at: datetime


_INSERT = """
    INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body)
    VALUES ($1, $2, $3, $4, $5, 'text', $6) RETURNING id, seq, sent_at
"""


def bare() -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as app.state.pool:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/messages", status_code=201)
    async def send(new: NewMessage, request: Request) -> StoredMessage:
        pool: asyncpg.Pool[Any] = request.app.state.pool
        row = await pool.fetchrow(
            _INSERT,
            new.tenant_id,
            new.conversation_id,
            next(_numbers),
            new.sender_id,
            new.client_message_id,
            new.body,
        )
        assert row is not None
        return StoredMessage(client_message_id=new.client_message_id, body=new.body, **row)

    return app


class Message:
    """Mapped to the product's table."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def orm() -> FastAPI:
    registry().map_imperatively(Message, tables.messages)
    engine = create_async_engine(os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://"))
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions() as opened:
            yield opened

    app = FastAPI()

    @app.post("/messages", status_code=201, response_model=StoredMessage)
    async def send(new: NewMessage, session: Annotated[AsyncSession, Depends(session)]) -> Any:
        message = Message(**new.model_dump(), kind="text", seq=next(_numbers))
        session.add(message)
        await session.commit()
        await session.refresh(message)
        return message

    return app


def collector() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/traces", status_code=200)
    async def take(request: Request) -> None:
        await request.body()

    return app
