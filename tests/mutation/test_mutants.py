"""A guard that nobody would miss is none: for everything that keeps people out, some test goes red without it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import pytest

from tests.guardrails import test_decisions
from tests.guardrails.promises import ALL_FLAGS, PROMISES, SUBJECTS
from tests.mutation.mutants import ROOT, Mutant, everything_changed, mutants_of
from tests.mutation.subjects import GUARDS

DECISION: Final = mutants_of(
    "libs/guardrails/decision.py",
    {
        *("PARKED_RETRY_AFTER", "_CAN_STILL_START"),
        *("decide", "_takes_part", "_by_state", "_with_session", "_without_session"),
    },
    everything_changed,
)


def decision_tests() -> Iterator[Callable[[], Any]]:
    """The tests of the pure decision, in the order in which they are done with the mutants soonest."""
    yield test_decisions.test_a_client_that_must_use_the_session_is_told_which
    for waiting in test_decisions.WAITING:
        yield partial(test_decisions.test_a_client_that_must_wait_is_told_how_long, *waiting)
    for flags in ALL_FLAGS:
        yield partial(test_decisions.test_billing_by_appointment_hangs_on_the_flag_of_billing, flags)
    for operation in ("view_session", *PROMISES):
        for subject in SUBJECTS:
            yield partial(test_decisions.test_every_decision_is_the_promised_one, operation, subject)


def is_red(test: Callable[[], Any]) -> bool:
    try:
        test()
    except Exception:
        return True
    return False


def test_no_check_of_the_decision_goes_unmissed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(DECISION) > 40
    decisions = {}
    for mutant in DECISION:
        module: dict[str, Any] = {"__name__": "mutant"}
        exec(compile(mutant.source, mutant.path, "exec"), module)
        decisions[mutant] = module["decide"]
    alive = DECISION
    for test in decision_tests():
        survivors = []
        for mutant in alive:
            monkeypatch.setattr(test_decisions, "decide", decisions[mutant])
            if not is_red(test):
                survivors.append(mutant)
        if not (alive := survivors):
            break
    assert not alive, "\n".join(map(str, alive))


PROCESSES: Final = 2


def copy_of_the_project(folder: Path) -> Path:
    for room in ("libs", "services", "migrations", "tests"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def goes_red(project: Path, mutant: Mutant, selection: tuple[str, ...]) -> bool:
    """Whether some of the selected tests fails while the mutant is in the place of its module."""
    module = project / mutant.path
    original = module.read_text()
    module.write_text(mutant.source)
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selection]
        environment = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    finally:
        module.write_text(original)
    assert ran.returncode in (0, 1), f"{mutant}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    return ran.returncode == 1


@pytest.mark.timeout(7200)
def test_no_guard_goes_unmissed(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if request.config.getoption("--storm") != "full":
        pytest.skip("runs tests for every guard that it removes; `make storm` does")
    projects: SimpleQueue[Path] = SimpleQueue()
    for number in range(PROCESSES):
        projects.put(copy_of_the_project(tmp_path / str(number)))

    def is_missed(mutant: Mutant, selection: tuple[str, ...]) -> bool:
        project = projects.get()
        try:
            return goes_red(project, mutant, selection)
        finally:
            projects.put(project)

    module = "libs/guardrails/decision.py"
    nothing = Mutant(module, 0, "as it is", (ROOT / module).read_text())
    selections = sorted({selection for _, selection in GUARDS})
    with ThreadPoolExecutor(PROCESSES) as pool:
        assert not any(pool.map(is_missed, [nothing] * len(selections), selections)), "Red without a mutant."
        missed = list(pool.map(is_missed, *zip(*GUARDS, strict=True)))
    survivors = [mutant for (mutant, _), red in zip(GUARDS, missed, strict=True) if not red]
    assert not survivors, "\n".join(map(str, survivors))
