from string import Formatter

import pytest

from libs.guardrails import OPERATIONS, ROLES, Family, Permission, Principal, Reason, Refused, Role
from libs.guardrails.operations import Operation

FACTS = {"appointment_id", "session_id", "session_context", "retry_after"}
"""What a refusal may know, so that an address can be made of it."""


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_complete(reason: Reason) -> None:
    assert reason.code == reason.name == reason.value
    assert reason.title.strip()
    assert not reason.title.endswith(".")
    assert reason.help.strip().endswith(".")


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.next_action])
def test_every_next_action_is_an_address_made_of_facts(reason: Reason) -> None:
    assert reason.next_action
    method, address = reason.next_action
    assert method in {"GET", "POST", "PUT", "PATCH", "DELETE"}
    assert address.startswith("/api/v1/")
    assert {name for _, name, _, _ in Formatter().parse(address) if name is not None} <= FACTS


def test_codes_are_unique() -> None:
    assert len({reason.code for reason in Reason}) == len(Reason.__members__) == len(Reason)


def test_a_refusal_says_its_code_and_nothing_else() -> None:
    refused = Refused(Reason.SESSION_CONTEXT_INVALID, "A sentence.", secret="hidden")
    assert str(refused) == "SESSION_CONTEXT_INVALID"


def test_every_permission_is_granted_to_somebody() -> None:
    assert set(ROLES) == set(Permission)
    assert all(ROLES[permission] for permission in Permission)


def test_a_service_may_do_nothing() -> None:
    service = Principal(1, 1, Role.SERVICE)
    assert not any(service.may(permission) for permission in Permission)
    assert not any(Role.SERVICE in operation.roles for operation in OPERATIONS.values())


GRANTED = {
    Role.PATIENT: {
        *("see_oneself", "see_doctors", "see_notifications", "see_appointments", "see_sessions"),
        *("book_appointments", "cancel_appointments", "answer_proposals", "report_presence", "start_sessions"),
        *("open_sockets", "see_balance"),
    },
    Role.DOCTOR: {
        *("see_oneself", "see_doctors", "see_notifications", "see_appointments", "see_sessions"),
        *("confirm_appointments", "cancel_appointments", "propose_new_times", "report_presence"),
        *("open_sockets", "see_balance"),
    },
    Role.OPERATOR: {
        *("see_oneself", "see_doctors", "see_notifications", "see_appointments", "see_sessions"),
        *("book_appointments", "confirm_appointments", "cancel_appointments", "propose_new_times"),
        *("administer_people", "administer_flags", "see_operations", "refund_charges"),
        *("administer_webhooks", "replay_deliveries"),
    },
    Role.SERVICE: set(),
}


@pytest.mark.parametrize("role", Role)
def test_a_role_has_exactly_its_permissions(role: Role) -> None:
    principal = Principal(1, 1, role)
    assert {permission.value for permission in Permission if principal.may(permission)} == GRANTED[role]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_every_operation_has_a_whole_policy(operation: type[Operation]) -> None:
    assert OPERATIONS[operation.name] is operation
    assert operation.roles
    assert operation.passes
    assert operation.__doc__
    # The rollout flags have no column for the life of a session.
    assert not (operation.by_appointment and operation.family is Family.LIFECYCLE)
