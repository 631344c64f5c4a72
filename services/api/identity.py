"""From a bearer token to a principal."""

import asyncio
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import httpx2
import jwt
from starlette.requests import HTTPConnection

from libs.domain.settings import Settings
from libs.domain.telemetry import logger
from libs.domain.tokens import AUDIENCE, SECRET_ALGORITHM
from libs.guardrails import Principal, Reason, Refused, Role
from libs.guardrails.context import MAX_ID
from libs.observability.registry import Metrics
from services.api import security

_log: Final = logger("identity")

REQUIRED_CLAIMS: Final = ["exp", "iat", "sub", "aud", "iss", "tenant", "role"]
LEEWAY_SECONDS: Final = 60
REMEMBERED_TOKENS: Final = 10_000
JWKS_ALGORITHMS: Final = ["RS256", "ES256"]
JWKS_REFRESH_SECONDS: Final = 60
JWKS_LIFETIME_SECONDS: Final = 600
JWKS_TIMEOUT_SECONDS: Final = 5.0


class Keys(Protocol):
    """Who knows the key of a token. The algorithms are fixed by the kind of key, never by the token."""

    @property
    def algorithms(self) -> list[str]: ...

    async def key_for(self, token: str) -> Any: ...


class SharedSecret:
    """One HS256 secret, as the embedded mode generates it."""

    algorithms: Final = [SECRET_ALGORITHM]

    def __init__(self, secret: str) -> None:
        self._secret = secret

    async def key_for(self, token: str) -> str:
        return self._secret


class JsonWebKeySet:
    """RS256 and ES256 keys from a file or an https address, found by an allow-listed `kid`.

    An unknown `kid` reloads the set, at most once a minute, so that rotated keys are picked up and a
    stranger cannot make this process fetch at will. Known keys are looked up again after ten minutes,
    so that withdrawn ones are dropped; they stay while the set cannot be read.
    """

    algorithms: Final = JWKS_ALGORITHMS

    def __init__(self, location: str, allowed_kids: frozenset[str]) -> None:
        self._location = location
        self._allowed = allowed_kids
        self._keys: dict[str, jwt.PyJWK] = {}
        self._loaded_at = float("-inf")
        self._loading = asyncio.Lock()

    async def load(self) -> None:
        """Reads the key set. Raises ValueError when there is none to be had, and keeps the one it has."""
        async with self._loading:
            self._loaded_at = time.monotonic()
            try:
                keys = jwt.PyJWKSet.from_json(await self._read()).keys
            except Exception as error:
                raise ValueError(f"SESSIONGATE_JWT_JWKS: no key set can be read ({type(error).__name__})") from error
            allowed = {key.key_id: key for key in keys if key.key_id and self._is_allowed(key.key_id)}
            if not allowed:
                raise ValueError("SESSIONGATE_JWT_JWKS: the key set holds no key with an allowed kid")
            self._keys = allowed

    async def _read(self) -> str:
        if not self._location.startswith(("https://", "http://")):
            return await asyncio.to_thread(Path(self._location).read_text)
        async with httpx2.AsyncClient(timeout=JWKS_TIMEOUT_SECONDS) as client:
            response = await client.get(self._location)
            return response.raise_for_status().text

    async def key_for(self, token: str) -> jwt.PyJWK:
        kid = jwt.get_unverified_header(token).get("kid")
        if not isinstance(kid, str) or not self._is_allowed(kid):
            raise jwt.InvalidKeyError("no allowed kid")
        if time.monotonic() - self._loaded_at > (JWKS_LIFETIME_SECONDS if kid in self._keys else JWKS_REFRESH_SECONDS):
            try:
                await self.load()
            except ValueError:
                _log.warning("jwks_reload_failed", exc_info=True)
        elif kid not in self._keys:
            async with self._loading:
                pass  # Another request may be loading it at this moment.
        if kid not in self._keys:
            raise jwt.InvalidKeyError("unknown kid")
        return self._keys[kid]

    def _is_allowed(self, kid: str) -> bool:
        return not self._allowed or kid in self._allowed


@dataclass(frozen=True, slots=True)
class Token:
    """What a good token says: who calls, and for how many seconds it will still be accepted."""

    principal: Principal
    seconds_left: float


@dataclass(frozen=True, slots=True)
class _Verified:
    """A token that was verified with `key`, and until when it holds, in Unix time."""

    key: Any
    principal: Principal
    until: float


class Identity:
    """Authenticates requests. Raises `Refused(UNAUTHENTICATED)`, and says why only to operators.

    A token is verified once for as long as it and its key hold, and remembered by its hash.
    """

    def __init__(self, keys: Keys, issuer: str, metrics: Metrics) -> None:
        self._keys = keys
        self._issuer = issuer
        self._metrics = metrics
        self._verified: dict[bytes, _Verified] = {}
        self._failures = security.Failures()

    async def authenticate(self, connection: HTTPConnection) -> Token:
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise self.refuse(connection, "bad_credentials")
        try:
            key = await self._keys.key_for(token)
            digest = hashlib.sha256(token.encode()).digest()
            verified = self._verified.get(digest)
            if verified is None or verified.key is not key or verified.until <= time.time():
                verified = self._verify(token, key)
                if len(self._verified) >= REMEMBERED_TOKENS:
                    self._verified.clear()
                self._verified[digest] = verified
            return Token(verified.principal, verified.until - time.time())
        except jwt.ExpiredSignatureError:
            raise self.refuse(connection, "expired") from None
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
            security.report("signature", connection, self._metrics)
            raise self.refuse(connection, "invalid_token") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise self.refuse(connection, "invalid_token") from None

    def _verify(self, token: str, key: Any) -> _Verified:
        claims = jwt.decode(
            token,
            key,
            algorithms=self._keys.algorithms,
            audience=AUDIENCE,
            issuer=self._issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": REQUIRED_CLAIMS},
        )
        return _Verified(key, _principal(claims), int(claims["exp"]) + LEEWAY_SECONDS)

    def refuse(self, connection: HTTPConnection, reason: str) -> Refused:
        """The refusal, counted and logged; `reason` is a label value of `auth_failures_total`."""
        self._metrics.counter("auth_failures_total", reason).inc()
        address = security.address_of(connection)
        _log.info("auth_failed", reason=reason, client_ip=address)
        if self._failures.add(address):
            security.report("suspicious_ip", connection, self._metrics)
        return Refused(Reason.UNAUTHENTICATED)


def _principal(claims: dict[str, Any]) -> Principal:
    user_id, tenant_id = int(claims["sub"]), claims["tenant"]
    if type(tenant_id) is not int or not (0 < user_id <= MAX_ID and 0 < tenant_id <= MAX_ID):
        raise ValueError("not an id")
    return Principal(user_id, tenant_id, Role(claims["role"]))


async def identity_of(settings: Settings, metrics: Metrics) -> Identity:
    """The identity that the settings describe. Raises ValueError with a sentence for the operator."""
    if settings.jwt_jwks:
        kids = frozenset(kid.strip() for kid in settings.jwt_kids.split(",") if kid.strip())
        keys = JsonWebKeySet(settings.jwt_jwks, kids)
        await keys.load()
        return Identity(keys, settings.jwt_issuer, metrics)
    if settings.jwt_secret is None:
        raise ValueError("set SESSIONGATE_JWT_SECRET, or SESSIONGATE_JWT_JWKS to a key set")
    return Identity(SharedSecret(settings.jwt_secret.get_secret_value()), settings.jwt_issuer, metrics)
