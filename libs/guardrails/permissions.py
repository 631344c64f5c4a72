"""Who the caller is, and the one table that says which role may do what outside of sessions."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    PATIENT = "patient"
    DOCTOR = "doctor"
    OPERATOR = "operator"
    SERVICE = "service"


class Permission(StrEnum):
    """What a route that concerns no session asks for; `ROLES` grants it."""

    SEE_ONESELF = "see_oneself"
    SEE_DOCTORS = "see_doctors"
    SEE_NOTIFICATIONS = "see_notifications"
    SEE_APPOINTMENTS = "see_appointments"
    SEE_SESSIONS = "see_sessions"
    START_SESSIONS = "start_sessions"
    OPEN_SOCKETS = "open_sockets"
    BOOK_APPOINTMENTS = "book_appointments"
    CONFIRM_APPOINTMENTS = "confirm_appointments"
    CANCEL_APPOINTMENTS = "cancel_appointments"
    PROPOSE_NEW_TIMES = "propose_new_times"
    ANSWER_PROPOSALS = "answer_proposals"
    REPORT_PRESENCE = "report_presence"
    SEE_BALANCE = "see_balance"
    REFUND_CHARGES = "refund_charges"
    ADMINISTER_PEOPLE = "administer_people"
    ADMINISTER_FLAGS = "administer_flags"
    ADMINISTER_WEBHOOKS = "administer_webhooks"
    REPLAY_DELIVERIES = "replay_deliveries"
    SEE_OPERATIONS = "see_operations"


_EVERYBODY = frozenset({Role.PATIENT, Role.DOCTOR, Role.OPERATOR})

# A service may do nothing until a room says so.
ROLES: dict[Permission, frozenset[Role]] = {
    Permission.SEE_ONESELF: _EVERYBODY,
    Permission.SEE_DOCTORS: _EVERYBODY,
    Permission.SEE_NOTIFICATIONS: _EVERYBODY,
    Permission.SEE_APPOINTMENTS: _EVERYBODY,
    Permission.SEE_SESSIONS: _EVERYBODY,
    Permission.START_SESSIONS: frozenset({Role.PATIENT}),
    Permission.OPEN_SOCKETS: frozenset({Role.PATIENT, Role.DOCTOR}),
    Permission.BOOK_APPOINTMENTS: frozenset({Role.PATIENT, Role.OPERATOR}),
    Permission.CONFIRM_APPOINTMENTS: frozenset({Role.DOCTOR, Role.OPERATOR}),
    Permission.CANCEL_APPOINTMENTS: _EVERYBODY,
    Permission.PROPOSE_NEW_TIMES: frozenset({Role.DOCTOR, Role.OPERATOR}),
    Permission.ANSWER_PROPOSALS: frozenset({Role.PATIENT}),
    Permission.REPORT_PRESENCE: frozenset({Role.PATIENT, Role.DOCTOR}),
    Permission.SEE_BALANCE: frozenset({Role.PATIENT, Role.DOCTOR}),
    Permission.REFUND_CHARGES: frozenset({Role.OPERATOR}),
    Permission.ADMINISTER_PEOPLE: frozenset({Role.OPERATOR}),
    Permission.ADMINISTER_FLAGS: frozenset({Role.OPERATOR}),
    Permission.ADMINISTER_WEBHOOKS: frozenset({Role.OPERATOR}),
    Permission.REPLAY_DELIVERIES: frozenset({Role.OPERATOR}),
    Permission.SEE_OPERATIONS: frozenset({Role.OPERATOR}),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """The authenticated caller: a user of one tenant in one role."""

    user_id: int
    tenant_id: int
    role: Role

    def may(self, permission: Permission) -> bool:
        return self.role in ROLES[permission]
