"""The header `Idempotency-Key`: what a POST under a key answered is what it answers again."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

from fastapi import Header, Request, Response

from libs.domain import idempotency
from libs.domain.idempotency import Answer
from libs.domain.transaction import Transaction

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=idempotency.KEY_MAX_LENGTH,
        description="Yours to choose. Sent again within 24 hours, the request has no second effect and gets the"
        " first answer, with `Idempotent-Replayed: true`.",
    ),
]


class Replayed(Exception):
    """The request was answered before, with `response`."""

    def __init__(self, answer: Answer) -> None:
        headers = {"Idempotent-Replayed": "true"}
        self.response = Response(answer.body, answer.status, headers, media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Claimed:
    tx: Transaction
    request: idempotency.Request


async def claim(request: Request, tx: Transaction, key: str) -> None:
    """Makes this the only request under its key until the transaction ends. Raises `Replayed` if it has been
    answered before."""
    body = await request.body()
    sent = b"\n".join((request.scope["raw_path"], request.scope["query_string"], body))
    operation = request.scope["endpoint"].__name__  # the operation id, which is unique
    wanted = idempotency.Request(request.state.principal, operation, key, hashlib.sha256(sent).digest())
    answer = await idempotency.claim(tx, wanted)
    if answer is not None:
        raise Replayed(answer)
    request.state.claimed = _Claimed(tx, wanted)


async def keep(request: Request, response: Response) -> None:
    """Stores the answer, in the transaction of its effect, if the request has claimed a key."""
    claimed: _Claimed | None = getattr(request.state, "claimed", None)
    if claimed is not None:
        await idempotency.store(claimed.tx, claimed.request, Answer(response.status_code, bytes(response.body)))
