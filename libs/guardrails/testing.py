"""Fakes for code that depends on the guard: a flag source to set and a witness to ask."""

from dataclasses import dataclass, field

from libs.guardrails.context import Claim, Facts
from libs.guardrails.decision import Verdict
from libs.guardrails.flags import FixedFlags, Flags
from libs.guardrails.guard import Guard
from libs.guardrails.operations import Operation


@dataclass(slots=True)
class RecordingWitness:
    """Keeps every verdict it is told, as (operation name, word, refusal code or None)."""

    verdicts: list[tuple[str, str, str | None]] = field(default_factory=list)

    def saw(self, claim: Claim[Operation], facts: Facts, flags: Flags, verdict: Verdict) -> None:
        code = verdict.refusal.code if verdict.refusal else None
        self.verdicts.append((claim.operation.name, verdict.word, code))


def guard_with(flags: Flags | None = None, witness: RecordingWitness | None = None) -> Guard:
    """A guard that needs no process around it."""
    return Guard(FixedFlags(flags or Flags()), witness or RecordingWitness())
