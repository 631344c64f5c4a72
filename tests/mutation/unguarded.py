"""Guards of routes that let everybody through, for mutants."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Request

from libs.domain.sessions import facts
from libs.guardrails import Claim, Operation, Principal, SessionContext, parse_context
from libs.guardrails.context import SEAL
from libs.guardrails.operations import GetMessages
from services.api.guards import ContextPath, Net, Subject, Tx


def can(operation: type[Operation], named: Callable[..., Awaitable[Subject]]) -> Any:
    """Seals a context of whatever is found."""

    async def context_of(
        request: Request, subject: Annotated[Subject, Depends(named)], tx: Tx
    ) -> SessionContext[Operation]:
        claim = Claim(operation, request.state.principal, subject)
        known = await facts.load(tx, claim.subject, claim.caller.tenant_id, lock=not operation.reads)
        return SessionContext(SEAL, claim, known)

    context_of.net = Net(session=True)  # type: ignore[attr-defined]
    return Depends(context_of)


async def _in_path(context: ContextPath) -> Subject:
    return parse_context(context)


class Can:
    """Likewise, of a `{context}`."""

    def __class_getitem__(cls, operation: type[Operation]) -> Any:
        return Annotated[SessionContext[operation], can(operation, _in_path)]  # type: ignore[valid-type]


class Claimed:
    """Claims the operation that most may do in most states."""

    def __class_getitem__(cls, operation: type[Operation]) -> Any:
        async def claim_of(request: Request, context: ContextPath) -> Claim[Operation]:
            return Claim(GetMessages, request.state.principal, parse_context(context))

        claim_of.net = Net(session=True, complete=True)  # type: ignore[attr-defined]
        return Annotated[Claim[operation], Depends(claim_of)]  # type: ignore[valid-type]


async def _caller(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


_caller.net = Net(session=False)  # type: ignore[attr-defined]

Caller = Annotated[Principal, Depends(_caller)]
