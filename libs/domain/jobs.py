"""What can be asked of the worker, as types. A job carries ids, never facts: it is only a hint that
rows in the database are waiting, and loses nothing when it gets lost."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


class Job:
    """Base of all jobs; `name` is the arq function and the `task` label of its metrics."""

    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        JOBS[name] = cls

    def payload(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload,no-any-return]


JOBS: dict[str, type[Job]] = {}
"""Every job by name. The worker refuses to start when one of them has no handler."""


@dataclass(frozen=True)
class ConvertDue(Job, name="convert_due"):
    """Something became due just now: an appointment, or something about a session, which may keep one waiting."""


@dataclass(frozen=True)
class DispatchOutbox(Job, name="dispatch_outbox"):
    """Outbox rows were committed."""
