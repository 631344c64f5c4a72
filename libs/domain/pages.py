"""Keyset pages, newest first: no offsets to drift and no totals to count."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Column, Row, Select

from libs.domain.transaction import Transaction

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """`next_cursor` is the id below which the next page begins, None on the last page."""

    items: list[T]
    next_cursor: int | None

    @property
    def has_more(self) -> bool:
        return self.next_cursor is not None


async def page_of(
    tx: Transaction,
    statement: Select[Any],
    key: Column[int],
    cursor: int | None,
    limit: int,
    read: Callable[[Row[Any]], T],
) -> Page[T]:
    """The page of `statement` below `cursor`, in falling order of `key`, which the rows have as `id`."""
    if cursor is not None:
        statement = statement.where(key < cursor)
    rows = (await tx.execute(statement.order_by(key.desc()).limit(limit + 1))).all()
    shown = rows[:limit]
    return Page([read(row) for row in shown], shown[-1].id if len(rows) > limit else None)
