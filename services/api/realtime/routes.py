import asyncio
from datetime import datetime
from typing import Annotated

from fastapi import Request
from starlette.websockets import WebSocket

from libs.domain import tickets
from libs.guardrails import Claim, Permission, Principal, parse_context
from libs.guardrails.operations import Join
from services.api.guards import Tx, acting, guarded_router, guarded_websocket, runtime_of
from services.api.identity import Token
from services.api.realtime.connections import Connections
from services.api.realtime.rooms import SIGNED_OUT
from services.api.realtime.socket import Socket
from services.api.realtime.wire import Wire
from services.api.schemas import OF_ANY_IDENTIFIER, In, Out, SafeStr, refusals

router = guarded_router("", tag="chat", replays=False)


class TicketIn(In):
    """`context` is what the socket is going to follow: as in its address."""

    context: SafeStr


class TicketOut(Out):
    """Offer `ticket.` and the ticket as second subprotocol, before `expires_at` and once."""

    ticket: str
    expires_at: datetime


@router.post(
    "/socket-tickets",
    status_code=201,
    responses=refusals(*OF_ANY_IDENTIFIER),
)
async def create_socket_ticket(
    caller: Annotated[Principal, acting(Permission.OPEN_SOCKETS)], tx: Tx, wanted: TicketIn, request: Request
) -> TicketOut:
    """Opens one socket in the place of a token, for browsers, which cannot send headers with a handshake."""
    token: Token = request.state.token
    claim = Claim(Join, caller, parse_context(wanted.context))
    context = await runtime_of(request).door.open(tx, claim)
    ticket = await tickets.issue(tx, context, claim.subject, seconds_left=token.seconds_left)
    return TicketOut(ticket=ticket.value, expires_at=ticket.expires_at)


@guarded_websocket(router, "/chat/{context}/socket", Join)
async def follow_conversation(websocket: WebSocket, claim: Claim[Join], token: Token) -> None:
    """Everything that happens in a conversation, as it happens; see docs/socket.md."""
    connections: Connections = websocket.app.state.connections
    socket = Socket(websocket, runtime_of(websocket), websocket.app.state.rooms, claim)
    conversation_id = await socket.enter()
    wire = Wire.of(websocket)
    async with connections.open(claim.caller, wire):
        expiry = asyncio.get_running_loop().call_later(token.seconds_left, wire.end, SIGNED_OUT)
        try:
            await socket.follow(conversation_id)
        finally:
            expiry.cancel()
