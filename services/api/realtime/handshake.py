"""The handshake of a socket: from where it is opened, by whom, and whether the client speaks the protocol.

Credentials come in the `Authorization` header or, from browsers, as a ticket among the subprotocols; never in the
address, which is logged everywhere.
"""

from typing import Final

from starlette.websockets import WebSocket

from libs.domain import tickets
from libs.domain.db import Database
from libs.domain.telemetry import logger
from libs.guardrails import Reason, Refused, parse_context
from libs.observability.registry import Metrics
from services.api import security
from services.api.errors import problem
from services.api.identity import Identity, Token
from services.api.realtime.connections import Connections
from services.api.realtime.socket import dismiss

_log: Final = logger("realtime")

PROTOCOL: Final = "sessiongate.v1"
"""The subprotocol that clients offer, and the only one that is named in return."""

_TICKET: Final = "ticket."

# What a denied handshake counts as.
_FAILURES: Final = {
    Reason.UNAUTHENTICATED: "auth",
    Reason.ORIGIN_NOT_ALLOWED: "upgrade",
    Reason.VALIDATION_FAILED: "upgrade",
}


class Handshake:
    """`origins` are those of the web pages that may open sockets; programs have none and always may."""

    def __init__(
        self,
        identity: Identity,
        database: Database,
        connections: Connections,
        metrics: Metrics,
        *,
        origins: frozenset[str],
    ) -> None:
        self._identity = identity
        self._metrics = metrics
        self._database = database
        self._connections = connections
        self._origins = origins

    async def admit(self, websocket: WebSocket) -> Token:
        """Whose socket it is. Raises `Refused`."""
        origin = websocket.headers.get("origin")
        if origin is not None and origin not in self._origins:
            raise Refused(Reason.ORIGIN_NOT_ALLOWED)
        token = await self._authenticate(websocket)
        if PROTOCOL not in websocket.scope["subprotocols"]:
            errors = [{"pointer": "/sec-websocket-protocol", "in": "header", "detail": f"Must offer {PROTOCOL}."}]
            raise Refused(Reason.VALIDATION_FAILED, status=400, errors=errors)
        return token

    async def _authenticate(self, websocket: WebSocket) -> Token:
        offered = websocket.scope["subprotocols"]
        value = next((each.removeprefix(_TICKET) for each in offered if each.startswith(_TICKET)), None)
        if value is None or "authorization" in websocket.headers:
            return await self._identity.authenticate(websocket)
        try:
            subject = parse_context(websocket.path_params["context"])
        except Refused:
            raise self._identity.refuse(websocket, "bad_credentials") from None
        async with self._database.autocommit() as connection:
            redeemed = await tickets.redeem(connection, value, subject)
        if redeemed is None:
            raise self._identity.refuse(websocket, "bad_credentials")
        return Token(*redeemed)

    async def deny(self, websocket: WebSocket, refused: Refused) -> None:
        """Answers the handshake with a problem instead of a socket."""
        self._connections.failed(_FAILURES.get(refused.reason, "other"))
        self._tell(refused, websocket)
        await websocket.send_denial_response(problem(refused, websocket))

    def refuse(self, websocket: WebSocket, refused: Refused) -> None:
        """Ends a socket that was opened with a good handshake, for a context that is not for this caller."""
        self._tell(refused, websocket)
        dismiss(websocket, refused)

    def _tell(self, refused: Refused, websocket: WebSocket) -> None:
        _log.info("chat_connection_refused", error_code=refused.reason.code)
        security.notice(refused, websocket, self._metrics)
