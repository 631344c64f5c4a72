"""`sessiongate settings`: every setting there is, what it is here, and where that comes from."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

import typer
from dotenv import dotenv_values
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.markup import escape

from libs.domain.settings import DatabaseSettings, FlagSettings, Settings, variable
from services.api.settings import ApiSettings
from services.cli.home import HomeSettings
from services.cli.options import AsJson
from services.worker.settings import WorkerSettings

ALL: Final[tuple[type[BaseSettings], ...]] = (
    HomeSettings,
    DatabaseSettings,
    Settings,
    ApiSettings,
    WorkerSettings,
    FlagSettings,
)
"""Every class of settings, the more general first."""

MASK: Final = "********"

Origin = Literal["default", ".env", "environment"]


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    value: str | None
    """None when it is not set and has no default."""
    origin: Origin
    description: str


# OpenTelemetry reads its variables itself, and from the environment only.
_OPENTELEMETRY: Final = (
    ("OTEL_EXPORTER_OTLP_ENDPOINT", None, "Where traces are sent. Default: nowhere."),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "http/protobuf or grpc."),
    ("OTEL_EXPORTER_OTLP_HEADERS", None, "What to send along, such as credentials."),
    ("OTEL_TRACES_SAMPLER_ARG", "0.1", "The share of traces that is kept whatever happens in them."),
)
_SECRETS: Final = {"OTEL_EXPORTER_OTLP_HEADERS"}
_URL_PASSWORD: Final = re.compile(r"(?<=://)([^:@/]*:).*(?=@)|(password=)[^&]*")


def settings(as_json: AsJson = False) -> None:
    """List every setting with its value and where that comes from. Secrets are masked."""
    listed = list_settings()
    if as_json:
        typer.echo(json.dumps([asdict(setting) for setting in listed], indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for setting in listed:
        shown = "" if setting.value is None else escape(setting.value)
        console.print(f"[bold]{setting.name}[/]={shown} [dim]({setting.origin})[/]")
        console.print(f"    [dim]{escape(setting.description)}[/]")


def list_settings() -> list[Setting]:
    dotenv, exported = _named(dotenv_values(".env")), _named(os.environ)
    found: dict[str, Setting] = {}
    for kind in ALL:
        for field, info in kind.model_fields.items():
            name = variable(kind, field)
            default = info.get_default(call_default_factory=True)
            value = exported.get(name) or dotenv.get(name) or (str(default) if default is not None else None)
            if info.is_required() and name not in exported | dotenv:
                value = None
            origin: Origin = "environment" if name in exported else ".env" if name in dotenv else "default"
            found.setdefault(name, Setting(name, _masked(value, info), origin, info.description or ""))
    for name, default, description in _OPENTELEMETRY:
        value = MASK if name in exported.keys() & _SECRETS else exported.get(name, default)
        found[name] = Setting(name, value, "environment" if name in exported else "default", description)
    return list(found.values())


def _named(variables: Mapping[str, str | None]) -> dict[str, str]:
    """Those that count: an empty variable is an unset one, and names are the same in upper and lower case."""
    return {name.upper(): value for name, value in variables.items() if value}


def _masked(value: str | None, info: FieldInfo) -> str | None:
    if value and "SecretStr" in str(info.annotation):
        return MASK
    return _URL_PASSWORD.sub(lambda match: f"{match[1] or match[2]}{MASK}", value) if value else value
