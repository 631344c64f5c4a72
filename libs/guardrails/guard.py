"""The one door: facts in, a sealed context or a refusal out, and every verdict told once."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from libs.guardrails.context import SEAL, Claim, Facts, SessionContext
from libs.guardrails.decision import Verdict, decide
from libs.guardrails.flags import Flags, FlagSource
from libs.guardrails.operations import Operation
from libs.guardrails.reasons import Refused

Op = TypeVar("Op", bound=Operation)


class Witness(Protocol):
    """Told of every verdict exactly once: the place for counters, log lines and decision records."""

    def saw(self, claim: Claim[Operation], facts: Facts, flags: Flags, verdict: Verdict) -> None: ...


@dataclass(frozen=True, slots=True)
class Guard:
    flags: FlagSource
    witness: Witness

    def open(self, claim: Claim[Op], facts: Facts, *, keep: bool = False) -> SessionContext[Op]:
        """Seals a context for `claim` or raises `Refused`.

        The facts must be those of the moment: read under the lock under which the caller then acts,
        or by the very statement that acted. With `keep` the refusal leaves the transaction's rows in
        place, for when an expiry was stored on the way.
        """
        flags = self.flags.for_tenant(claim.caller.tenant_id)
        verdict = decide(claim, facts, flags)
        self.witness.saw(claim, facts, flags, verdict)
        if verdict.refusal:
            raise Refused(verdict.refusal, keep=keep, **verdict.details)
        return SessionContext(SEAL, claim, facts)
