"""`sessiongate demo` against a running `sessiongate up`."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.cli.conftest import StartUp, Up, open_folder, sessiongate

ENFORCED = "Chat by appointment id is refused: 400, and names the session context"


@pytest.fixture(scope="module")
def enforcing(start_up: StartUp) -> Iterator[Up]:
    with open_folder() as folder:
        up = start_up(folder)
        up.wait_for("Ctrl-C")
        yield up
        up.end(signal.SIGTERM)


@pytest.fixture
def lenient(start_up: StartUp, folder: Path) -> Iterator[Up]:
    """One in the first phase of the rollout: what the story wants refused is only counted."""
    up = start_up(folder, env={"ENFORCE_SESSION_GATED_CHAT": "false"})
    up.wait_for("Ctrl-C")
    yield up
    up.end(signal.SIGTERM)


def demo(up: Up, *options: str) -> CompletedProcess[str]:
    return sessiongate(up.home.parent, "demo", *options, env={"SESSIONGATE_HOME": str(up.home)})


def steps(told: CompletedProcess[str]) -> dict[str, bool]:
    parsed: dict[str, Any] = json.loads(told.stdout)
    assert parsed["ok"] is (told.returncode == 0)
    return {step["step"]: step["ok"] for step in parsed["steps"]}


def test_the_story_goes_well_and_can_be_told_again(enforcing: Up) -> None:
    first = demo(enforcing)
    assert (first.returncode, first.stdout.count("✓"), first.stdout.count("✗")) == (0, 12, 0)
    again = demo(enforcing, "--json")
    assert again.returncode == 0
    assert len(steps(again)) == 12
    assert all(steps(again).values())


def test_it_stops_at_the_step_that_went_wrong_or_keeps_going(lenient: Up) -> None:
    stopped = steps(demo(lenient, "--json"))
    assert list(stopped)[-1] == ENFORCED
    assert [step for step, ok in stopped.items() if not ok] == [ENFORCED]
    went_on = demo(lenient, "--json", "--keep-going")
    assert went_on.returncode == 1
    assert len(steps(went_on)) == 12
    assert ENFORCED in [step for step, ok in steps(went_on).items() if not ok]


@contextmanager
def whereabouts_of(up: Up, **changes: Any) -> Iterator[None]:
    """Changes what up.json says, for as long as the block lasts."""
    path = up.home / "up.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | changes))
    yield
    path.write_text(kept)


def test_it_needs_no_token_of_up_json_which_may_have_expired(enforcing: Up) -> None:
    users = [user | {"token": "expired"} for user in enforcing.whereabouts()["users"]]
    with whereabouts_of(enforcing, users=users):
        assert demo(enforcing).returncode == 0


def test_an_answer_that_is_no_json_is_a_failed_step(enforcing: Up) -> None:
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"It works!")

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with whereabouts_of(enforcing, api=f"http://127.0.0.1:{server.server_port}"):
            told = demo(enforcing, "--json")
        server.shutdown()
    assert steps(told) == {"The service is ready": False}
    assert told.stderr == ""


def test_where_no_token_can_be_issued_the_step_has_failed(enforcing: Up) -> None:
    env = {"SESSIONGATE_HOME": str(enforcing.home), "SESSIONGATE_JWT_JWKS": "keys.json"}
    told = sessiongate(enforcing.home.parent, "demo", "--json", env=env)
    assert list(steps(told).values()) == [True, False]
    assert told.stderr == ""


def test_with_nothing_running_it_says_what_to_do(tmp_path: Path) -> None:
    refused = sessiongate(tmp_path, "demo", env={"SESSIONGATE_HOME": str(tmp_path)})
    assert refused.returncode == 1
    assert refused.stderr == f"Sessiongate is not running (home {tmp_path}). Start it with `sessiongate up`.\n"
