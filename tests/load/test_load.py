"""A few seconds of the load, so that `make load` works when it is needed."""

from tests.load.run import BUDGETS, run


async def test_every_operation_of_the_load_is_done_and_none_fails() -> None:
    measured = await run(3)
    assert measured.keys() == BUDGETS.keys()
    for name, found in measured.items():
        assert found.count > 0, name
        assert found.errors == 0, name
        assert 0 < found.p50 <= found.p95 <= found.p99, name
