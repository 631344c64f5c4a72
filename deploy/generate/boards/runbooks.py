"""Which runbooks a panel leads to: those of the alerts on the metrics that it shows."""

import re
from collections.abc import Iterable
from itertools import chain
from typing import Final

from deploy.generate.alerts import ALERTS
from deploy.generate.objectives import OBJECTIVES

SITE: Final = "https://docs.example.com/sessiongate"
"""Where docs/ can be read. Change it to where you publish it."""

INDEX: Final = f"{SITE}/runbooks/README.md"

_WATCHED: Final = (
    *((alert.metric, alert.runbook) for alert in chain(*ALERTS.values())),
    *((objective.metric, objective.runbook) for objective in OBJECTIVES),
)


def runbooks(expressions: Iterable[str]) -> dict[str, str]:
    """The addresses of the pages, by their titles."""
    names = set(re.findall(r"\w+", " ".join(expressions)))
    names |= {re.sub("_(bucket|sum|count)$", "", name) for name in names}
    pages = sorted({page for metric, page in _WATCHED if metric in names})
    return {f"Runbook: {_title(page)}": f"{SITE}/{page.removeprefix('docs/')}" for page in pages}


def _title(page: str) -> str:
    return page.rpartition("/")[2].removesuffix(".md").replace("-", " ")
