"""A consultation as it is promised, in memory: booked, begun, charged, ended, billed the legacy way, refunded.

Times are in seconds. Answers are a status and what the body says: the code of a refusal, or what was charged.
"""

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

Answer: TypeAlias = tuple[int, Any]

UNIT: Final = 600
LASTS: Final = 1800
RESPONSE: Final = 300
RINGS: Final = 90
LIVE: Final = {"waiting", "connecting", "active"}


def refused(status: int, code: str) -> Answer:
    return status, code


SESSION_NOT_ACTIVE: Final = refused(409, "SESSION_NOT_ACTIVE")
SESSION_NOT_CONNECTED: Final = refused(409, "SESSION_NOT_CONNECTED")
INVALID_TRANSITION: Final = refused(409, "INVALID_TRANSITION")


@dataclass
class Consultation:
    """`left` is what the patient has in units, `session` the state of the session, None before there is one."""

    modality: str
    left: int
    starts_at: int
    now: int = 0
    appointment: str = "PENDING"
    session: str | None = None
    deadline: int | None = None
    expires_at: int = 0
    rung_by: str | None = None
    begun_at: int | None = None
    allowance: int = 0
    charges: dict[int, bool] = field(default_factory=dict)
    """Units charged for the session, and whether each was taken back; `legacy` likewise without a session."""
    legacy: dict[int, bool] = field(default_factory=dict)
    legacy_ended: bool = False
    """Whether somebody ended it that had no session."""

    @property
    def paid(self) -> int:
        """Units that the doctor was paid and may keep."""
        return sum(not taken_back for taken_back in (*self.charges.values(), *self.legacy.values()))

    @property
    def over(self) -> bool:
        """Whether time has ended the session, stored or not."""
        if self.session == "active":
            return self.now >= self.expires_at
        due = min(self.expires_at, self.deadline if self.deadline is not None else self.expires_at)
        return self.session in LIVE and self.now >= due

    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    def confirm(self) -> Answer:
        if self.appointment != "PENDING" or self.now >= self.starts_at:
            return INVALID_TRANSITION
        self.appointment = "CONFIRMED"
        return 200, "CONFIRMED"

    def convert(self) -> None:
        """What a worker's beat does: settle, give up requests that nobody confirmed, convert."""
        self.tick()
        if self.appointment == "PENDING" and self.now >= self.starts_at:
            self.appointment = "EXPIRED"
        if self.appointment == "CONFIRMED" and self.now >= self.starts_at and self.left > 0:
            self.appointment = "IN_PROGRESS"
            self.session = "waiting" if self.modality == "text" else "connecting"
            self.expires_at = max(self.starts_at + LASTS, self.now + LASTS)

    def tick(self) -> None:
        if self.session in LIVE and self.over:
            self._finish()
        elif self.session == "active":
            self._charge(extra=0)

    def _units(self) -> int:
        assert self.begun_at is not None
        return (min(self.now, self.expires_at) - self.begun_at) // UNIT

    def _charge(self, extra: int) -> int:
        if self.begun_at is None:
            return 0
        wanted = min(self.allowance, self._units() + extra)
        added = 0
        while len(self.charges) < wanted and self.left > 0:
            self.charges[len(self.charges) + 1] = False
            self.left -= 1
            added += 1
        return added

    def _finish(self, verb: str | None = None) -> int:
        """Ends the session because of its time, or because somebody asks for it; answers what that charged."""
        by_itself = self.over
        added = self._charge(extra=0 if by_itself else 1) if verb != "decline" else 0
        if by_itself and self.session != "active":
            self.session = "expired" if self.modality == "text" else "missed"
        else:
            self.session = "declined" if verb == "decline" and not by_itself else "ended"
        self.appointment = "COMPLETED" if self.session == "ended" else "NO_SHOW"
        return added

    def _enter(self) -> Answer | None:
        """The refusal of what needs a live session; one that is found to be over is ended on the spot."""
        if self.over:
            self._finish()
        return None if self.session in LIVE else SESSION_NOT_ACTIVE

    def say(self, by: str) -> Answer:
        if answer := self._enter():
            return answer
        if self.session == "waiting":
            if by == "doctor":
                self._activate()
                self._begin()
            elif self.deadline is None:
                self.deadline = self.now + RESPONSE
        return 201, None

    def _activate(self) -> None:
        self.session = "active"

    def _begin(self) -> None:
        self.begun_at, self.allowance = self.now, self.left
        self.expires_at = self.now + self.allowance * UNIT

    def ring(self, by: str) -> Answer:
        if answer := self._enter():
            return answer
        if self.session == "connecting" and self.rung_by is None:
            self.rung_by, self.deadline = by, self.now + RINGS
        return 200, self.session

    def answer(self, by: str) -> Answer:
        if answer := self._enter():
            return answer
        if self.session == "connecting":
            if self.rung_by in (None, by):
                return INVALID_TRANSITION
            self._activate()
        return 200, self.session

    def connect(self) -> Answer:
        if answer := self._enter():
            return answer
        if self.session == "connecting":
            return INVALID_TRANSITION
        if self.begun_at is None:
            self._begin()
        return 200, self.session

    def decline(self) -> Answer:
        if self.over:
            self._finish()
        if self.session == "declined":
            return 200, self.session
        if self.session != "connecting":
            return SESSION_NOT_ACTIVE
        self._finish("decline")
        return 200, self.session

    def deduct(self) -> Answer:
        if answer := self._enter():
            return answer
        if self.begun_at is None:
            return SESSION_NOT_CONNECTED
        added = self._charge(extra=0)
        return 200, (len(self.charges), added)

    def end(self) -> Answer:
        already = self.over or self.session not in LIVE
        added = self._finish("end") if self.session in LIVE else 0
        return 200, (already, len(self.charges), added)

    def bill(self, how: str, asked: int = 1) -> Answer:
        """A legacy call: `end`, `pay`, or a deduction for the reason `interval`, `manual_end` or `no_activity`."""
        if self.session is not None:
            return self._bill_session(how)
        if self.appointment == "CONFIRMED" and self.now >= self.starts_at:
            self.appointment = "COMPLETED"
        elif self.appointment != "COMPLETED":
            return INVALID_TRANSITION
        wanted = max(1, len(self.legacy))
        if how in ("interval", "manual_end", "no_activity"):
            elapsed = (min(self.now, self.starts_at + LASTS) - self.starts_at) // UNIT + (how == "manual_end")
            wanted = min(len(self.legacy) + asked, elapsed)
        added = 0
        while len(self.legacy) < wanted and self.left > 0 and not self.legacy_ended:
            self.legacy[len(self.legacy) + 1] = False
            self.left -= 1
            added += 1
        self.legacy_ended = self.legacy_ended or how in ("end", "pay", "manual_end")
        return 200, (self.appointment, len(self.legacy), added)

    def _bill_session(self, how: str) -> Answer:
        if self.begun_at is None:
            return SESSION_NOT_CONNECTED
        added = 0
        if self.session in LIVE:
            added = self._finish("end") if how in ("end", "manual_end") or self.over else self._charge(extra=0)
        return 200, (self.appointment, len(self.charges), added)

    def refund(self, *, by_appointment: bool, unit: int | None) -> Answer:
        charged = self.legacy if by_appointment else self.charges
        wanted = [number for number, back in charged.items() if not back and unit in (None, number)]
        for number in wanted:
            charged[number] = True
            self.left += 1
        return (201, len(wanted)) if wanted else refused(409, "NOTHING_TO_REFUND")
