"""The settings of the API."""

from typing import Annotated

from pydantic import Field

from libs.domain.settings import Positive, Settings


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
