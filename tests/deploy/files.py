"""The files of deploy/, read as what runs them reads them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from jsonschema import Draft202012Validator

from services.api.settings import ApiSettings
from services.cli.settings_command import list_settings
from services.worker.settings import WorkerSettings

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
SCHEMAS: Final = Path(__file__).with_name("schemas")
API_PORT: Final[int] = ApiSettings.model_fields["api_port"].default
WORKER_PORT: Final[int] = WorkerSettings.model_fields["worker_metrics_port"].default


def documents(path: Path) -> list[Any]:
    """The YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def faults(document: Any, schema: str) -> list[str]:
    """What is wrong with a document by `schemas/{schema}.json`, which knows what is used here and nothing else."""
    validator = Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def known_variables() -> set[str]:
    """The environment variables that the program reads."""
    return {setting.name for setting in list_settings()}


def texts(value: Any) -> Iterator[str]:
    """Every string in a document, keys apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def is_pinned(image: str) -> bool:
    """Whether an image is named with a whole version."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return re.fullmatch(r"v?\d+\.\d+(\.\d+)*(-[a-z0-9]+)*", tag) is not None
