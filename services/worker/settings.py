"""The settings of the worker."""

import os
import socket
from typing import Annotated

from pydantic import Field

from libs.domain.settings import Settings


class WorkerSettings(Settings):
    """What the worker needs beyond `Settings`."""

    worker_metrics_host: str = "127.0.0.1"
    """The address that serves the worker's metrics."""
    worker_metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9101
    """The port that serves the worker's metrics."""
    worker_name: str = Field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    """The name of this worker in logs and metrics; no two workers may share one. Default: host and process id."""
    audit_interval_seconds: Annotated[int, Field(ge=0)] = 300
    """About how often the worker audits the database, in seconds; 0 is never. At most a tenth of the time is spent
    on it, however short the interval."""
