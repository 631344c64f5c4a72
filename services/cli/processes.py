"""Child processes that never outlive their parent unnoticed."""

import asyncio
import ctypes
import os
import pwd
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import psutil

Stopping = Sequence[tuple[signal.Signals, float]]
"""Signals, and how many seconds each gives a process to end."""

_PR_SET_PDEATHSIG: Final = 1


async def start(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    cwd: str | None = None,
    user: pwd.struct_passwd | None = None,
    output: IO[bytes] | None = None,
    when_orphaned: signal.Signals = signal.SIGTERM,
) -> Process:
    """Starts a process in a session of its own, so that a terminal's Ctrl-C reaches only the parent.

    On Linux the process gets the signal `when_orphaned` when the parent dies. `output` takes its standard
    output and error; by default they are the parent's. `user` needs root.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        env=env,
        cwd=cwd,
        stdin=DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=_bound_to_parent(when_orphaned),
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


async def stop(process: Process, steps: Stopping = ()) -> None:
    """Sends the signals one after the other until the process has ended, and at last kills it."""
    for signum, patience in steps:
        if process.returncode is not None:
            return
        process.send_signal(signum)
        try:
            async with asyncio.timeout(patience):
                await process.wait()
        except TimeoutError:
            continue
    if process.returncode is None:
        with suppress(psutil.NoSuchProcess):
            kill(psutil.Process(process.pid))
        await process.wait()


def kill(process: psutil.Process) -> None:
    """Kills a process and all that it has started: children that are frozen would not notice its end.

    Raises `psutil.NoSuchProcess` when it has ended already.
    """
    family = process.children(recursive=True)
    process.kill()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def ending(process: Process) -> str:
    """How a process that has ended did so, in words."""
    code = process.returncode or 0
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _bound_to_parent(signum: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: afterwards little is safe

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signum))
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return bind
