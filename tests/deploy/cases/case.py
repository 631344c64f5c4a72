"""What an alert must tell, and what it must not: series by the minute, in the notation of promtool. They are those of a
worker where they do not say which `job` they are of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Firing:
    """The alert is there after so many minutes, has the labels that its query keeps, and says this."""

    alert: str
    series: dict[str, str]
    after: int
    says: str
    value: str
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Quiet:
    """The alert is not there, for all that is going on."""

    alert: str
    series: dict[str, str]
    after: int


Case = Firing | Quiet
