"""What is told of an exception, and what is not."""

import gc
import weakref
from collections.abc import Callable

import pytest

from libs.observability.stacks import FRAMES, LINKS, Stack

ROW = "I feel unwell"


class Refusal(Exception):
    """Says in its first line what is wrong, and quotes in others."""

    def __init__(self) -> None:
        super().__init__(f"violates a check\nDETAIL: Failing row contains ({ROW}).\n[SQL: INSERT …]")
        self.add_note(f"while storing {ROW}")


def refuse() -> None:
    raise Refusal


def wrapped() -> None:
    try:
        refuse()
    except Refusal as error:
        raise LookupError(f"not stored\n{ROW}") from error


def while_handling() -> None:
    try:
        refuse()
    except Refusal:
        raise LookupError("not stored") from ExceptionGroup("many", [Refusal(), KeyError("key")])


def deep(depth: int = 100) -> None:
    if depth:
        deep(depth - 1)
    refuse()


def again_and_again(times: int = 50) -> None:
    try:
        refuse()
    except Refusal:
        if times:
            again_and_again(times - 1)
        raise LookupError("again") from None


def stack_of(broken: Callable[[], None]) -> str:
    with pytest.raises(Exception) as raised:
        broken()
    return str(Stack(raised.value))


@pytest.mark.parametrize("broken", [refuse, wrapped, while_handling, deep, again_and_again])
def test_a_stack_tells_no_more_than_the_first_line_of_what_exceptions_say(broken: Callable[[], None]) -> None:
    told = stack_of(broken)
    assert ROW not in told
    assert "SQL" not in told


def test_a_stack_tells_what_led_to_an_exception_and_where() -> None:
    told = stack_of(wrapped)
    cause, _, result = told.partition("test_stacks.Refusal: violates a check\n")
    assert "in refuse\n    raise Refusal\n" in cause
    assert "in wrapped\n    raise LookupError" in result
    assert result.endswith("LookupError: not stored")


def test_a_stack_tells_the_members_of_groups_and_not_what_was_hidden_on_purpose() -> None:
    told = stack_of(while_handling)
    for said in ("ExceptionGroup: many (2 sub-exceptions)", "KeyError: 'key'", "Refusal: violates a check"):
        assert told.count(said) == 1
    assert "Refusal" not in stack_of(again_and_again)


def test_a_stack_has_bounds() -> None:
    assert stack_of(deep).count("  File ") == FRAMES
    assert stack_of(deep).endswith("Refusal: violates a check")
    error: Exception | None = None
    for number in range(2 * LINKS):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    assert error is not None
    assert str(Stack(error)).count("ValueError") == LINKS


def test_a_circle_of_exceptions_is_gone_around_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert str(Stack(first)) == "ValueError: second\nValueError: first"


def test_a_stack_keeps_no_variables_alive() -> None:
    class Large:
        pass

    def broken() -> None:
        large = Large()
        seen.append(weakref.ref(large))
        raise ValueError

    seen: list[weakref.ref[Large]] = []
    stack = None
    try:
        broken()
    except ValueError as error:
        stack = Stack(error)
    gc.collect()
    assert seen[0]() is None
    assert "in broken" in str(stack)
