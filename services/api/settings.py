"""The settings of the API."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from libs.domain.settings import LongSecret, Positive, Settings


def _origins(listed: str) -> str:
    if not all(re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin) for origin in origins_of(listed)):
        raise ValueError("must be origins such as https://app.example.org, separated by commas")
    return listed


def origins_of(listed: str) -> frozenset[str]:
    return frozenset(filter(None, map(str.strip, listed.split(","))))


class ApiSettings(Settings):
    """What the API needs beyond `Settings`."""

    api_host: str = "127.0.0.1"
    """The address to listen on."""
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port to listen on; 0 lets the system choose."""
    docs_enabled: bool = True
    """Whether /docs and /openapi.json are served."""
    request_body_limit: Positive = 65536
    """The longest request body accepted, in bytes."""
    request_deadline_seconds: Annotated[float, Field(gt=0)] = 10
    """How long a client may take to send its request body, in seconds."""
    allowed_origins: Annotated[str, AfterValidator(_origins)] = ""
    """Origins of the web pages that may open sockets, separated by commas; programs, which have none, always may."""
    sockets_per_user: Positive = 5
    """How many sockets a user may have open at once, over all processes."""
    alerts_token: LongSecret | None = None
    """The bearer token with which Alertmanager sends alerts, at least 32 bytes long. Default: none are accepted."""
