"""What is told of an exception, in logs and in spans alike: where it was raised, and the first line of what it says.

Further lines quote the rows and the inputs that it stumbled over, and so do its notes.
"""

import linecache
import traceback
from collections.abc import Sequence
from types import CodeType
from typing import Final

from libs.observability.redaction import scrub_error

FRAMES: Final = 25
"""Innermost frames of an exception that are told."""
LINKS: Final = 8
"""Exceptions that are told of those that led to one."""

Place = tuple[CodeType, int]


def places_of(error: BaseException) -> list[Place]:
    """The code and the line of each frame that an exception went through, the one that raised it last."""
    return [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def type_of(error: BaseException) -> str:
    """Such as `ValueError` or `asyncpg.exceptions.CheckViolationError`."""
    module, name = type(error).__module__, type(error).__qualname__
    return name if module == "builtins" else f"{module}.{name}"


class Stack:
    """An exception and what led to it, as text for whoever asks for it later: to format it takes the event loop long.
    Keeps neither the exceptions nor their frames, whose variables would stay alive with them."""

    __slots__ = ("_links",)

    def __init__(self, error: BaseException) -> None:
        self._links: Final = [
            (places_of(each)[-FRAMES:], f"{type_of(each)}: {scrub_error(each)}") for each in _chain(error)
        ]

    def __str__(self) -> str:
        return "\n".join("".join(map(_frame, places)) + said for places, said in self._links)


def _chain(error: BaseException) -> Sequence[BaseException]:
    """What led to an exception, the members of groups among it, and at last itself."""
    found: list[BaseException] = []
    ahead = [error]
    while ahead and len(found) < LINKS:
        each = ahead.pop()
        if any(each is known for known in found):
            continue
        found.append(each)
        if isinstance(each, BaseExceptionGroup):
            ahead.extend(each.exceptions)
        led = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        if led is not None:
            ahead.append(led)
    return found[::-1]


def _frame(place: Place) -> str:
    code, line = place
    source = linecache.getline(code.co_filename, line).strip()
    shown = code.co_filename.rpartition("site-packages/")[2]  # or the stack would be too long to be exported whole
    return f'  File "{shown}", line {line}, in {code.co_name}\n    {source}\n'
