"""Settings: every one is an environment variable `SESSIONGATE_<NAME>`, or a line of an `.env` file in the
working directory (the environment wins). The rollout flags have names of their own."""

import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.domain.sealing import FieldKeys

SECRET_MIN_BYTES: Final = 32
"""An HS256 key shorter than its hash is easier to guess than the signature. Other secrets are no shorter."""

_POSTGRES: Final = ("postgresql://", "postgres://", "postgresql+asyncpg://")
_REDIS: Final = ("redis://", "rediss://", "unix://")


def libpq_dsn(url: str) -> str:
    """The address as libpq and asyncpg spell it; SQLAlchemy's spelling names the driver too."""
    return url.replace("postgresql+asyncpg://", "postgresql://", 1)


def _postgres_url(url: str) -> str:
    if not url.startswith(_POSTGRES):
        raise ValueError("must be an address such as postgresql://user:password@host:5432/name")
    return url


def _redis_url(url: str) -> str:
    if not url.startswith(_REDIS):
        raise ValueError("must be an address such as redis://host:6379/0 or unix:///run/redis.sock")
    return url


def _long_enough(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value().encode()) < SECRET_MIN_BYTES:
        raise ValueError(f"must be at least {SECRET_MIN_BYTES} bytes long")
    return secret


def _field_keys(listed: SecretStr) -> SecretStr:
    FieldKeys.parse(listed.get_secret_value())
    return listed


def _basic_auth(secret: SecretStr) -> SecretStr:
    if not all(secret.get_secret_value().partition(":")):
        raise ValueError("must be of the form user:password")
    return secret


def _networks(listed: str) -> str:
    try:
        for network in filter(None, map(str.strip, listed.split(","))):
            ip_network(network)
    except ValueError:
        raise ValueError("must be networks such as 10.0.0.0/8, separated by commas") from None
    return listed


def _ports(listed: str) -> str:
    ports = [port.strip() for port in listed.split(",")]
    if not all(port.isascii() and port.isdigit() and 0 < int(port) < 65536 for port in ports):
        raise ValueError("must be ports such as 443,8443")
    return listed


PostgresUrl = Annotated[str, AfterValidator(_postgres_url)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
Positive = Annotated[int, Field(gt=0)]
LongSecret = Annotated[SecretStr, AfterValidator(_long_enough)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]


# Docstrings below the fields are their descriptions; an empty variable counts as unset.
def sources(prefix: str) -> SettingsConfigDict:
    """Where settings whose variables begin with `prefix` come from; for every class of settings the same."""
    return SettingsConfigDict(
        env_prefix=prefix,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )


class DatabaseSettings(BaseSettings):
    """Where the facts are."""

    model_config = sources("SESSIONGATE_")

    database_url: PostgresUrl
    """PostgreSQL, with the login role of the services, which owns nothing."""
    migrations_database_url: PostgresUrl | None = None
    """PostgreSQL, with the role that owns the schema; only migrations use it. Default: the same."""


class Settings(DatabaseSettings):
    """What every process of Sessiongate needs to know."""

    redis_url: RedisUrl
    """Redis, which rings for the worker and holds no facts."""
    pool_size: Positive = 10
    """Database connections per pool; every process has two pools."""

    jwt_secret: LongSecret | None = None
    """The HS256 key of bearer tokens, at least 32 bytes. Not used when there is a key set."""
    jwt_jwks: str | None = None
    """A JSON Web Key Set for RS256 and ES256 tokens: a path or an https address."""
    jwt_kids: str = ""
    """The key ids of the key set that may sign, separated by commas. Default: all."""
    jwt_issuer: str = "sessiongate"
    """The issuer that bearer tokens must name."""

    environment: Literal["development", "production"] = "development"
    """Production refuses what is only good for debugging."""
    log_level: LogLevel = "INFO"
    """The least severe level that is logged."""
    log_file: Path | None = None
    """The file that takes the log, rotated. Default: standard output."""
    log_message_bodies: bool = False
    """Whether the beginnings of chat messages appear in the log."""
    log_unmasked_debug: bool = False
    """Whether debug lines show personal data in clear. Has no effect in production."""
    log_search_hours: Annotated[int, Field(ge=0, le=24 * 366)] = 0
    """How long lines of the log are kept in the database, where `sessiongate logs` finds them, in hours; 0 keeps
    none."""
    log_search_lines: Positive = 200_000
    """How many lines below WARNING are kept there at most; and as many of the others."""
    metrics_basic_auth: Annotated[SecretStr, AfterValidator(_basic_auth)] | None = None
    """user:password that may read the metrics."""
    metrics_allow: Annotated[str, AfterValidator(_networks)] = ""
    """Networks whose clients may read the metrics without a password, such as 10.0.0.0/8, separated by commas."""

    field_keys: Annotated[SecretStr, AfterValidator(_field_keys)] = SecretStr("")
    """Keys that seal message bodies and the secrets of webhooks, id:key,…, each of 32 bytes in base64; the first
    seals, all open."""
    chat_messages_per_minute: Positive = 60
    """How many messages a participant may send in a minute, over HTTP and sockets together."""
    text_session_response_window_seconds: Positive = 300
    """How long a text session waits for the doctor's first answer, in seconds."""
    text_inactivity_seconds: Positive = 900
    """How long a text session stays active while neither party does anything, in seconds."""
    call_ring_timeout_seconds: Positive = 90
    """How long a call rings before it is missed, in seconds."""
    call_inactivity_seconds: Positive = 120
    """How long a call stays active while neither party says that it is connected, in seconds."""
    webhook_ports: Annotated[str, AfterValidator(_ports)] = "443"
    """The ports to which webhooks may be sent, separated by commas."""
    webhook_allow_networks: Annotated[str, AfterValidator(_networks)] = ""
    """Networks of your own, such as 10.1.0.0/16, separated by commas, to which webhooks may be sent as well: at any
    port, without TLS, and by the operators of every tenant. Everything else that is not public is refused."""
    decision_sample_rate: Share = 0.01
    """Share of simply allowed calls that the decision log keeps; what was refused or warned of is all kept."""
    conversion_batch_limit: Positive = 1000
    """How many due appointments one batch, which is one transaction, converts at most."""
    backlog_warning: Positive = 10
    """Unconverted due appointments above which the monitor warns."""
    backlog_critical: Positive = 50
    """Unconverted due appointments above which the monitor is critical."""
    backlog_window_seconds: Positive = 300
    """How long the backlog must last before the monitor speaks, in seconds."""
    error_rate_warning: Rate = 0.02
    """Share of failed conversions above which the monitor warns."""
    error_rate_warning_window_seconds: Positive = 600
    """The time over which that share is taken, in seconds."""
    error_rate_critical: Rate = 0.10
    """Share of failed conversions above which the monitor is critical."""
    error_rate_critical_window_seconds: Positive = 300
    """The time over which that share is taken, in seconds."""
    audit_timeout_seconds: Positive = 3600
    """How long the audit may take over one invariant, in seconds."""

    @model_validator(mode="after")
    def _critical_is_not_below_warning(self) -> Self:
        if self.backlog_critical < self.backlog_warning:
            raise ValueError("SESSIONGATE_BACKLOG_CRITICAL must not be below SESSIONGATE_BACKLOG_WARNING")
        if self.error_rate_critical < self.error_rate_warning:
            raise ValueError("SESSIONGATE_ERROR_RATE_CRITICAL must not be below SESSIONGATE_ERROR_RATE_WARNING")
        return self


class FlagSettings(BaseSettings):
    """The rollout flags: the defaults of a process."""

    model_config = sources("")

    ENFORCE_SESSION_GATED_CHAT: bool = False
    """Chat by appointment id is refused when the appointment has a session; otherwise allowed with a warning."""
    ENFORCE_SESSION_GATED_BILLING: bool = False
    """Billing by appointment id is refused when the appointment has a session; otherwise allowed with a warning."""
    DISABLE_LEGACY_APPOINTMENT_TRIGGERS: bool = False
    """The two legacy commands do nothing and say so."""
    ALLOW_LEGACY_APPOINTMENT_CHAT: bool = False
    """Chat by appointment id works, with a warning, while a confirmed appointment has no session yet."""


S = TypeVar("S", bound=BaseSettings)


def variable(settings: type[BaseSettings], field: str) -> str:
    """The environment variable behind a field."""
    return f"{settings.model_config.get('env_prefix', '')}{field}".upper()


def load(settings: type[S], **overrides: Any) -> S:
    """The settings of this process; `overrides` win over the environment.

    Where a setting is missing or wrong, exits with status 2 and one sentence for each, which names the
    variable and never repeats its value.
    """
    try:
        return settings(**overrides)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            sys.stderr.write(_sentence(settings, fault["loc"], fault["type"], fault["msg"]) + "\n")
        raise SystemExit(2) from None


def _sentence(settings: type[BaseSettings], location: tuple[int | str, ...], kind: str, message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    if not location:
        return f"{message}."
    name = variable(settings, str(location[0]))
    if kind == "missing":
        return f"{name} is not set."
    if kind.startswith("bool"):
        return f"{name} must be true or false."
    return f"{name} {message.split(', unable')[0]}."
