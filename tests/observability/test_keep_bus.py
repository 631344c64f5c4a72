"""Processes tell each other which traces contain an error, as far as what carries that lets them."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from libs.observability import sampling
from libs.observability.registry import Metrics
from libs.observability.sampling import KeepBus, Tail
from tests.processes import until


class Air:
    """A bus within this process. It can be cut, and get stuck."""

    def __init__(self) -> None:
        self.hearing: list[Callable[[bytes], None]] = []
        self.said: list[bytes] = []
        self.fault: Exception | None = None
        self.stuck = asyncio.Event()
        self.stuck.set()

    async def publish(self, message: bytes) -> None:
        await self.stuck.wait()
        if self.fault:
            raise self.fault
        self.said.append(message)
        for hear in self.hearing:
            hear(message)

    async def listen(self, hear: Callable[[bytes], None]) -> None:
        self.hearing.append(hear)
        await asyncio.Event().wait()


class Process:
    """The tail of a process, which notes what it exports."""

    def __init__(self) -> None:
        self.exported: list[str] = []
        self.tail = Tail[str](self.exported.append, Metrics((), version="0", service="test"))

    def trace(self, trace_id: int, name: str, *, fails: bool = False) -> None:
        part = self.tail.begin(trace_id, chosen=False)
        self.tail.ended(part, name, failed=fails)


@pytest.fixture
def air() -> Air:
    return Air()


@pytest.fixture
async def pair(air: Air) -> AsyncIterator[tuple[Process, Process]]:
    here, there = Process(), Process()
    async with KeepBus(here.tail, air).sharing(), KeepBus(there.tail, air).sharing():
        await asyncio.sleep(0)
        yield here, there


async def test_an_error_is_told_to_other_processes(air: Air, pair: tuple[Process, Process]) -> None:
    here, there = pair
    there.trace(1, "there before")
    there.trace(2, "there of another")
    here.trace(1, "here", fails=True)
    here.trace(1, "here again", fails=True)

    async def told() -> bool:
        return bool(there.exported)

    await until(told)
    there.trace(1, "there after")
    await asyncio.to_thread(here.trace, 3, "in a thread", fails=True)

    async def all_told() -> bool:
        return len(air.said) == 2

    await until(all_told)
    assert here.exported == ["here", "here again", "in a thread"]
    assert there.exported == ["there before", "there after"]
    # Whoever is told does not tell it on.
    assert air.said == [(1).to_bytes(16), (3).to_bytes(16)]


async def test_many_verdicts_go_together_and_those_of_the_end_are_not_lost(air: Air) -> None:
    here, there = Process(), Process()
    async with KeepBus(there.tail, air).sharing():
        async with KeepBus(here.tail, air).sharing():
            await asyncio.sleep(0)
            for trace_id in range(1, 101):
                there.trace(trace_id, str(trace_id))
                here.trace(trace_id, "", fails=True)
        assert there.exported == [str(trace_id) for trace_id in range(1, 101)]
    assert len(air.said) == 1
    here.trace(101, "", fails=True)


@pytest.mark.parametrize("stuck", [True, False])
async def test_a_bus_that_fails_loses_the_other_side_and_nothing_else(
    air: Air, pair: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch, stuck: bool
) -> None:
    monkeypatch.setattr(sampling, "PUBLISH_SECONDS", 0.01)
    here, there = pair
    if stuck:
        air.stuck.clear()
    else:
        air.fault = ConnectionError("away")
    there.trace(1, "lost")
    here.trace(1, "kept", fails=True)
    await asyncio.sleep(0.05)
    air.stuck.set()
    air.fault = None
    there.trace(2, "found")
    here.trace(2, "kept", fails=True)

    async def told() -> bool:
        return bool(there.exported)

    await until(told)
    assert (here.exported, there.exported) == (["kept", "kept"], ["found"])


def test_an_error_after_the_end_of_the_loop_is_kept_here() -> None:
    process = Process()

    async def live() -> None:
        async with KeepBus(process.tail, Air()).sharing():
            pass

    asyncio.run(live())
    process.trace(1, "late", fails=True)
    assert process.exported == ["late"]


async def test_a_message_that_is_none_is_harmless(air: Air, pair: tuple[Process, Process]) -> None:
    for message in (b"", b"nonsense", b"x" * 33):
        await air.publish(message)
    assert all(process.exported == [] for process in pair)
