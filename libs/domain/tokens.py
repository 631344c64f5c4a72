"""Bearer tokens: what they must claim, and issuing one where this project holds the secret itself."""

from datetime import UTC, datetime, timedelta
from typing import Final

import jwt

from libs.guardrails import Principal

AUDIENCE: Final = "sessiongate"
SECRET_ALGORITHM: Final = "HS256"  # noqa: S105 (a name, no secret)
DEVELOPMENT_LIFETIME: Final = timedelta(hours=12)


def issue(principal: Principal, secret: str, *, issuer: str, lifetime: timedelta = DEVELOPMENT_LIFETIME) -> str:
    """A signed token for `principal`; for development and for installations without an identity provider."""
    now = datetime.now(UTC)
    claims = {
        "sub": str(principal.user_id),
        "tenant": principal.tenant_id,
        "role": principal.role.value,
        "iss": issuer,
        "aud": AUDIENCE,
        "iat": now,
        "exp": now + lifetime,
    }
    return jwt.encode(claims, secret, algorithm=SECRET_ALGORITHM)
