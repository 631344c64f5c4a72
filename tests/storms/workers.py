"""Worker processes by the dozen, so that a storm can kill several of them a second and still have some that work."""

import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from libs.domain.conversion import statement
from services.worker import main
from tests.storms.forked import PROCESSES


def start(settings: Mapping[str, str], log: Path, *, reckless: bool = False) -> BaseProcess:
    """A worker as `python -m services.worker` would be; a reckless one without its locks."""
    process = PROCESSES.Process(target=_work, args=(dict(settings), log, reckless), daemon=True)
    process.start()
    return process


def has_started(log: Path) -> bool:
    return log.exists() and b'"worker_started"' in log.read_bytes()


def _work(settings: Mapping[str, str], log: Path, reckless: bool) -> None:
    os.environ.update(settings, SESSIONGATE_LOG_FILE=str(log))
    if reckless:
        statement.LOCK_KEY = os.getpid()  # type: ignore[misc]
        statement.CONVERT_DUE = _without_lock(statement.CONVERT_DUE)  # type: ignore[misc]
    main.main()


def _without_lock(sql: str) -> str:
    lock = "FOR UPDATE SKIP LOCKED"
    assert lock in sql
    return sql.replace(lock, "")
