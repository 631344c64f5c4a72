"""The guards around the decision, and which tests are to miss each of them."""

from typing import Final, TypeAlias

from tests.mutation.mutants import (
    ROOT,
    Mutant,
    checks_removed,
    mutants_of,
    policies_dropped,
    replaced,
    roles_widened,
    unguarded_routes,
)

Selection: TypeAlias = tuple[str, ...]

_PURE: Final = ("tests/guardrails/test_decisions.py",)
_MATRIX: Final = ("tests/api/test_nobody_gets_in.py",)
_STRANGERS: Final = (
    "tests/architecture/test_strangers.py",
    *_MATRIX,
    "tests/api/test_identity.py",
    "tests/api/test_chat_matrix.py::test_refusals_come_in_the_promised_order",
)
_PERMISSIONS: Final = (*_MATRIX, "tests/guardrails/test_reasons_and_permissions.py")
_CHAT: Final = (
    *_MATRIX,
    "tests/architecture/test_strangers.py",
    *(
        f"tests/api/test_chat_{part}.py"
        for part in ("active", "sending", "together", "operations", "pace", "races", "matrix")
    ),
)

_WITHOUT_USER: Final = "LEFT JOIN participants p ON p.conversation_id = c.id"

_SOCKET_TESTS: Final = (*(f"tests/api/test_socket_{part}.py" for part in ("handshake", "bounds")), *_MATRIX)

SEND_STATEMENT: Final = replaced(
    "libs/domain/chat/send_statement.py",
    {
        # The caller.
        "WHERE tenant_id = $2 AND id = $3": "WHERE id = $3",
        "AND role = $4 AND active": "AND $4::text IS NOT NULL AND active",
        "AND role = $4 AND active)": "AND role = $4)",
        " AND caller.caller_active": "",
        # The session.
        "AND s.kind = $14 AND": "AND $14::text IS NOT NULL AND",
        " AND s.tenant_id = $2": "",
        "FOR NO KEY UPDATE OF s\n": "\n",
        "t.session_status = ANY ($15::text[]) AND": "$15::text[] IS NOT NULL AND",
        " AND NOT t.overdue": "",
        # Taking part in its conversation.
        "LEFT JOIN participants p ON p.conversation_id = c.id AND p.user_id = $3": _WITHOUT_USER,
        "c JOIN participants p ON p.conversation_id = c.id AND p.user_id = $3": "c " + _WITHOUT_USER,
        "p.user_id = t.participant_id AND": "",
        # The message.
        "AND NOT EXISTS (SELECT FROM duplicate)": "",
        " AND ($11::bigint IS NULL OR EXISTS (SELECT FROM original))": "",
        "ON m.conversation_id = t.conversation_id WHERE m.id = $11": "ON m.id = $11",
        "<= clock() + $13::interval": "> '-infinity' AND $13::interval IS NOT NULL",
        # The same, of many messages at once; constraints see to tenants and repetitions as well.
        " AND u.role = new.role AND u.active": " AND u.active",
        "u.role = new.role AND u.active": "u.role = new.role",
        " AND s.kind = new.ref_kind": "",
        "s.status = ANY ($14::text[]) AND NOT": "$14::text[] IS NOT NULL AND NOT",
        " AND NOT {OVERDUE}": "",
        " AND NOT (s.kind = 'text' AND s.status = 'waiting')": "",
        "ON p.conversation_id = c.id AND p.user_id = new.user_id": "ON p.conversation_id = c.id",
        "              AND {_IN_PACE}\n": "",
        "FOR NO KEY UPDATE OF s, p, c SKIP LOCKED": "",
    },
)

OTHER_STATEMENTS: Final = [
    *replaced(
        "libs/domain/sessions/facts.py",
        {
            " AND s.tenant_id = :tenant_id": " AND :tenant_id > 0",
            "AND s.kind = :kind": "AND :kind <> ''",
            " AND a.tenant_id = :tenant_id": " AND :tenant_id > 0",
            '_BY_SESSION + " FOR NO KEY UPDATE OF s"': "_BY_SESSION",
            "least(s.response_deadline, s.expires_at) <= clock()": "false",
        },
    ),
    *replaced("libs/domain/chat/reactions.py", {" AND m.conversation_id = :conversation_id": ""}),
    *replaced(
        "libs/domain/people.py", {"return bool((await tx.execute(statement)).scalar_one_or_none())": "return True"}
    ),
    *replaced(
        "libs/domain/appointments/appointments.py",
        {
            "select(*_COLUMNS).where(appointments.c.tenant_id == caller.tenant_id)": "select(*_COLUMNS)",
            "return statement.where(appointments.c.patient_id == caller.user_id)": "return statement",
            "return statement.where(appointments.c.doctor_id == caller.user_id)": "return statement",
        },
    ),
    *replaced(
        "libs/domain/sessions/sessions.py",
        {
            "select(*_COLUMNS).where(sessions.c.tenant_id == caller.tenant_id)": "select(*_COLUMNS)",
            "statement = statement.where(sessions.c.patient_id == caller.user_id)": "pass",
            "statement = statement.where(sessions.c.doctor_id == caller.user_id)": "pass",
        },
    ),
]

CHECKS: Final = [
    *mutants_of("libs/guardrails/guard.py", {"open"}, checks_removed),
    *mutants_of("services/api/guards.py", {"_claim", "permitted", "_require_active"}, checks_removed),
    *replaced(
        "services/api/guards.py",
        {
            "if not statement_decides:": "if False:",
            "if statement_decides and _came_before_the_statement(error):": "if False:",
        },
    ),
    *replaced(
        "services/api/identity.py",
        {
            'if scheme.lower() != "bearer" or not token:': "if False:",
            " or verified.key is not key": "",
            " or verified.until <= time.time()": "",
        },
    ),
    *mutants_of("services/api/identity.py", {"_principal"}, checks_removed),
    *replaced("libs/domain/appointments/appointments.py", {"if not caller.may(permission):": "if False:"}),
]

SOCKETS: Final = [
    *mutants_of("services/api/realtime/handshake.py", {"admit", "_authenticate"}, checks_removed),
    *mutants_of("services/api/realtime/socket.py", {"_open"}, checks_removed),
    *replaced(
        "services/api/guards.py",
        {"await _require_active(websocket, websocket.app.state.identity, principal)": "pass"},
    ),
]

POLICIES: Final = mutants_of(
    "libs/guardrails/operations.py",
    {
        *("LIVE", "_PARTIES", "SendMessage", "GetMessages", "ReplyToMessage", "AddReaction", "RemoveReaction"),
        *("StartTyping", "StopTyping", "MarkAsRead", "Join", "ViewSession", "CompleteSession"),
        *("EndSession", "ProcessPayment", "ProcessDeduction"),
    },
    policies_dropped,
)
PERMISSIONS: Final = mutants_of("libs/guardrails/permissions.py", {"ROLES"}, roles_widened)
ROUTES: Final = [
    mutant
    for path in sorted((ROOT / "services/api").rglob("*.py"))
    if "router = guarded_router(" in path.read_text()
    for mutant in unguarded_routes(str(path.relative_to(ROOT)))
]

GUARDS: Final[list[tuple[Mutant, Selection]]] = [
    *((mutant, _CHAT) for mutant in SEND_STATEMENT),
    *((mutant, _CHAT) for mutant in OTHER_STATEMENTS),
    *((mutant, _STRANGERS) for mutant in CHECKS),
    *((mutant, _SOCKET_TESTS) for mutant in SOCKETS),
    *((mutant, _PURE) for mutant in POLICIES),
    *((mutant, _PERMISSIONS) for mutant in PERMISSIONS),
    *((mutant, _MATRIX) for mutant in ROUTES),
]
