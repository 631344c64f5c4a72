"""How long the body of a request may take: what is there already sets no timer, and what is not has one deadline."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from services.api.middleware import BoundedBody

SECONDS = 0.2


async def read(receive: Receive) -> bytes:
    """The body that an application finds behind the middleware."""
    parts = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message["more_body"]

    async def send(message: Message) -> None:
        raise AssertionError(message)

    bounded = BoundedBody(app, limit=100, longer={}, seconds=SECONDS)
    await bounded({"type": "http", "path": "/", "headers": []}, receive, send)
    return b"".join(parts)


def arriving(*pauses: float) -> Receive:
    """A body of one letter after each pause."""
    left = list(pauses)

    async def receive() -> Message:
        await asyncio.sleep(left.pop(0))
        # A receiver may wait more than once for a message.
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x", "more_body": bool(left)}

    return receive


async def test_a_body_that_is_there_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"x", "more_body": False}

    def none(when: float) -> Callable[..., None]:
        raise AssertionError("A timer is set.")

    monkeypatch.setattr(asyncio, "timeout_at", none)
    assert await read(receive) == b"x"


async def test_a_body_may_arrive_piece_by_piece() -> None:
    assert await read(arriving(0, SECONDS / 4, SECONDS / 4)) == b"xxx"


async def test_all_pieces_have_one_deadline() -> None:
    with pytest.raises(HTTPException) as refused:
        await read(arriving(*[SECONDS / 4] * 8))
    assert refused.value.status_code == 408


async def test_whoever_receives_is_told_that_it_is_over() -> None:
    told: list[BaseException] = []

    async def receive() -> Message:
        try:
            await asyncio.sleep(60)
        except BaseException as error:
            told.append(error)
            raise
        raise AssertionError

    with pytest.raises(HTTPException):
        await read(receive)
    assert [type(error) for error in told] == [asyncio.CancelledError]


async def test_a_receiver_may_answer_at_the_last_moment() -> None:
    async def receive() -> Message:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"x", "more_body": False}

    assert await read(receive) == b"x"


async def test_a_receiver_that_cleans_up_may_be_told_again() -> None:
    told: list[str] = []

    async def receive() -> Message:
        try:
            await asyncio.sleep(60)
        finally:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                told.append("again")
                raise
        raise AssertionError

    reading = asyncio.create_task(read(receive))
    await asyncio.sleep(SECONDS * 2)
    assert not reading.done()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert told == ["again"]
