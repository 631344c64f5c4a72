"""`sessiongate up` when its servers do not answer any more, not even to die."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import StartUp, folder, is_alive, start_up

__all__ = ["folder", "start_up"]


def test_it_stops_in_time_even_if_the_servers_have_frozen(
    request: pytest.FixtureRequest, start_up: StartUp, folder: Path
) -> None:
    if request.config.getoption("--storm") != "full":
        pytest.skip("takes as long as stopping may; `make storm` runs it")
    up = start_up(folder)
    up.wait_for("Ctrl-C")
    found = up.whereabouts()["pids"]
    servers = [psutil.Process(found[name]) for name in ("postgres", "redis")]
    frozen = [process for server in servers for process in (server, *server.children(recursive=True))]
    children = up.children()
    for process in frozen:
        process.suspend()
    try:
        assert up.end(signal.SIGINT) == 0  # within STOP_SECONDS
        assert [process for process in (*children, *frozen) if is_alive(process)] == [], up.output
    finally:
        for process in filter(is_alive, frozen):
            process.kill()
