"""The rules of the house, checked on its source; and that each check can fail."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from fastapi.routing import iter_route_contexts
from starlette.middleware.base import BaseHTTPMiddleware  # noqa: TID251

from libs.domain.catalogue import CATALOGUE
from libs.domain.jobs import JOBS
from libs.domain.outbox.append import append
from libs.domain.outbox.events import UNTOLD, Consumer, EventName
from libs.domain.transaction import transaction
from libs.guardrails import OPERATIONS, Family, Operation, Reason
from libs.observability.catalogue import OWN, MetricSpec
from libs.observability.registry import Metrics
from services.worker.runner import functions
from tests.clinic import Clinic
from tests.running import Api

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOUSE = ("services", "libs", "migrations")
LONGEST_MODULE = 450

Found = tuple[str, int, str]
"""File, line and what is there."""


def sources(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def everywhere(look: Callable[[ast.AST], str | None], *rooms: str) -> list[Found]:
    """Where in the source `look` sees something."""
    return [
        (path, getattr(node, "lineno", 0), seen)
        for path, tree in sources(*(rooms or HOUSE))
        for node in ast.walk(tree)
        if (seen := look(node)) is not None
    ]


def sees(look: Callable[[ast.AST], str | None], code: str) -> bool:
    return any(look(node) is not None for node in ast.walk(ast.parse(code)))


# Who may make a SessionContext


def breaks_the_seal(node: ast.AST) -> str | None:
    """Names the seal in whatever way, or calls the class."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) if name in ("SEAL", "_Seal"):
            return name
        case ast.Constant(value=str(name)) if name in ("SEAL", "_Seal"):
            return name
        case ast.Call(func=ast.Subscript(value=called) | called) if ast.unparse(called).endswith("SessionContext"):
            return ast.unparse(node)
    return None


@pytest.mark.parametrize(
    "code",
    [
        "from libs.guardrails.context import SEAL",
        "from libs.guardrails.context import _Seal as S",
        "context.SEAL",
        "getattr(context, 'SEAL')",
        "SessionContext(seal, claim, facts)",
        "SessionContext[SendMessage](seal, claim, facts)",
        "guardrails.SessionContext(*arguments)",
        "object.__new__(guardrails.SessionContext[SendMessage])",
    ],
)
def test_a_context_made_by_hand_would_be_noticed(code: str) -> None:
    assert sees(breaks_the_seal, code) or sees(makes_objects_without_init, code)


def makes_objects_without_init(node: ast.AST) -> str | None:
    return "__new__" if isinstance(node, ast.Attribute) and node.attr == "__new__" else None


def test_only_the_guard_makes_contexts() -> None:
    assert {path for path, _, _ in everywhere(breaks_the_seal)} == {
        "libs/guardrails/context.py",
        "libs/guardrails/guard.py",
    }
    assert {path for path, _, _ in everywhere(makes_objects_without_init)} == {"libs/guardrails/reasons.py"}


# What the linters forbid


def ruff(code: str, path: str) -> list[str]:
    """The rules that ruff sees broken by `code` in the file `path`, which need not exist."""
    command = [str(BIN / "ruff"), "check", "--no-cache", "--output-format=concise", "--stdin-filename", path, "-"]
    checked = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode in (0, 1), checked.stderr
    return re.findall(r"^\S+: ([A-Z]+\d+) ", checked.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "code",
    [
        "from fastapi import APIRouter\n\nrouter = APIRouter()\n",
        "import fastapi\n\nrouter = fastapi.APIRouter()\n",
        "from starlette.middleware.base import BaseHTTPMiddleware\n\nclass Own(BaseHTTPMiddleware): ...\n",
        "from starlette.middleware import base\n\n\nclass Own(base.BaseHTTPMiddleware): ...\n",
    ],
)
def test_the_linter_refuses_bare_routers_and_middleware_that_leaks(code: str) -> None:
    for path in ("services/api/x.py", "services/api/chat/routes.py", "services/worker/x.py"):
        assert "TID251" in ruff(code, path), path


@pytest.mark.parametrize("path", ["services/api/guards.py", "services/api/public.py", "services/api/internal.py"])
def test_the_makers_of_routers_may_make_them(path: str) -> None:
    assert ruff("from fastapi import APIRouter\n\nrouter = APIRouter()\n", path) == []


def test_the_linter_has_nothing_against_what_rooms_do() -> None:
    code = 'from services.api.guards import guarded_router\n\nrouter = guarded_router("/x", tag="x")\n'
    assert ruff(code, "services/api/x.py") == []


def test_nobody_else_makes_routers_by_any_name() -> None:
    def routers(node: ast.AST) -> str | None:
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) if name in ("APIRouter", "Router"):
                return name
        return None

    assert sees(routers, "from fastapi.routing import APIRouter as R")
    assert {path for path, _, _ in everywhere(routers)} == {
        "services/api/guards.py",
        "services/api/public.py",
        "services/api/internal.py",
    }


async def test_no_middleware_is_of_the_kind_that_leaks(api: Api) -> None:
    kinds: list[Any] = [each.cls for each in api.app.user_middleware]
    assert kinds
    assert [kind for kind in kinds if issubclass(kind, BaseHTTPMiddleware)] == []


# Who may import whom

OFFENCES: dict[str, dict[str, list[str]]] = {
    "The house has layers": {
        "libs/observability/x.py": ["libs.guardrails", "libs.domain"],
        "libs/guardrails/x.py": ["libs.domain"],
        "libs/domain/x.py": ["services.api", "services.worker"],
        "services/api/x.py": ["services.worker", "services.cli"],
        "services/worker/x.py": ["services.api"],
    },
    "Nothing below services knows the web framework": {
        "libs/domain/y.py": ["fastapi", "starlette"],
        "migrations/y.py": ["fastapi"],
    },
    "The guard and the telemetry know no SQL": {
        "libs/guardrails/y.py": ["sqlalchemy"],
        "libs/observability/y.py": ["asyncpg"],
    },
    "Only the telemetry library knows the Prometheus client": {
        "libs/domain/z.py": ["prometheus_client"],
        "libs/guardrails/z.py": ["prometheus_client"],
        "services/api/z.py": ["prometheus_client"],
    },
    "arq is a doorbell behind one door": {
        "services/worker/z.py": ["arq"],
        "services/api/y.py": ["arq"],
        "libs/domain/outbox/y.py": ["arq"],
    },
    "Migrations know the domain and nothing else of ours": {
        "migrations/z.py": ["services", "libs.guardrails", "libs.observability"],
    },
}


def lint_imports(folder: Path) -> dict[str, str]:
    """What is said of each contract: KEPT, or the report of its breach."""
    command = [str(BIN / "lint-imports"), "--no-cache"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    verdicts, _, reports = said.partition("Broken contracts")
    contracts = dict(re.findall(r"^(.+?) (KEPT|BROKEN)\b.*$", verdicts, re.MULTILINE))
    # Each report stands under the underlined name of its contract.
    headed = re.split(r"^(.+)\n-+\n", reports, flags=re.MULTILINE)
    return contracts | dict(zip(headed[1::2], headed[2::2], strict=True))


@pytest.fixture
def copy_of_the_house(tmp_path: Path) -> Path:
    for room in HOUSE:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_in_the_wrong_direction_break_the_contract_that_forbids_them(copy_of_the_house: Path) -> None:
    assert lint_imports(copy_of_the_house) == dict.fromkeys(OFFENCES, "KEPT")

    for offences in OFFENCES.values():
        for path, imported in offences.items():
            (copy_of_the_house / path).write_text("".join(f"import {module}\n" for module in imported))
    reports = lint_imports(copy_of_the_house)

    for contract, offences in OFFENCES.items():
        for path, imported in offences.items():
            importer = path.removesuffix(".py").replace("/", ".")
            for module in imported:
                assert re.search(rf"{importer} -> {module}\b", reports[contract]), f"{contract}: {path} {module}"


# What must be there for each of a kind


def uses_of(enum: str) -> Callable[[ast.AST], str | None]:
    """Sees `Enum.MEMBER` and answers the member."""

    def look(node: ast.AST) -> str | None:
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name == enum and attribute.isupper():
                return attribute
        return None

    return look


def test_every_job_has_a_handler_and_a_worker_without_one_does_not_start() -> None:
    metrics = Metrics(CATALOGUE, version="0", service="test")
    handlers: dict[Any, Callable[[], None]] = dict.fromkeys(JOBS.values(), lambda: None)
    assert {function.name for function in functions(handlers, metrics)} == set(JOBS)
    for name, job in JOBS.items():
        with pytest.raises(LookupError, match=name):
            functions({each: handler for each, handler in handlers.items() if each is not job}, metrics)
    mentioned = {
        node.id for _, tree in sources("services/worker") for node in ast.walk(tree) if isinstance(node, ast.Name)
    }
    assert {job.__name__ for job in JOBS.values()} <= mentioned


async def test_every_event_finds_its_way_to_both_parties(clinic: Clinic) -> None:
    doctor, patient = await clinic.doctor(), await clinic.patient()
    payload = {"patient_id": patient.user_id, "doctor_id": doctor.user_id}
    happening = set(EventName) - {EventName.PING}
    for name in happening:
        async with transaction(clinic.database, clinic.bell) as tx:
            await append(tx, name, tenant_id=clinic.tenant_id, aggregate=f"test:{name}", payload=payload)
    assert await clinic.dispatch() == len(happening - UNTOLD)
    told = await clinic.fetch("SELECT user_id, kind FROM notifications")
    assert {(row["user_id"], row["kind"]) for row in told} == {
        (party.user_id, name.value) for party in (doctor, patient) for name in happening - UNTOLD
    }


def test_every_event_happens_somewhere_and_every_consumer_is_served_by_the_worker() -> None:
    assert {seen for _, _, seen in everywhere(uses_of("EventName"))} == set(EventName.__members__)
    assert {seen for _, _, seen in everywhere(uses_of("Consumer"), "services/worker")} == set(Consumer.__members__)


# What any request can meet, whichever operation it is for.
OF_EVERY_REQUEST = {"NOT_FOUND", "METHOD_NOT_ALLOWED", "REQUEST_TIMEOUT", "INTERNAL_ERROR"}


async def test_every_refusal_has_a_page_and_is_documented_where_it_occurs(api: Api) -> None:
    for reason in Reason:
        page = await api.anonymous.get(f"/problems/{reason.code}")
        assert page.status_code == 200
        assert reason.code in page.text
    paths = (await api.anonymous.get("/openapi.json")).json()["paths"]
    # OpenAPI knows no sockets.
    documented = set(re.findall(r"`([A-Z_]+)`", str(paths) + (ROOT / "docs/socket.md").read_text()))
    raised = {seen for _, _, seen in everywhere(uses_of("Reason"), "libs/domain", "libs/guardrails", "services/api")}
    expected = raised - OF_EVERY_REQUEST
    if not any(operation.family is Family.BILLING and operation.by_appointment for operation in OPERATIONS.values()):
        expected.discard("SESSION_BILLING_REQUIRED")
    assert len(expected) > 10
    assert expected <= documented <= set(Reason.__members__)


async def test_operations_are_named_as_their_endpoints_and_those_of_chat_as_what_the_guard_allows(api: Api) -> None:
    endpoints = {
        (route.path, method.lower()): route.endpoint
        for route in iter_route_contexts(api.app.routes)
        for method in route.methods or ()
    }
    operations = {
        operation["operationId"]: endpoints[path, method]
        for path, methods in api.app.openapi()["paths"].items()
        for method, operation in methods.items()
    }
    assert len(operations) == sum(map(len, api.app.openapi()["paths"].values()))
    for name, endpoint in operations.items():
        assert endpoint is not None
        assert endpoint.__name__ == name
        if endpoint.__module__ == "services.api.chat.routes":
            assert operations_of(endpoint) == [OPERATIONS[name]]
    chat = {name for name, operation in OPERATIONS.items() if operation.family is Family.CHAT}
    assert chat - {"join"} <= set(operations)


def operations_of(endpoint: Callable[..., Any]) -> list[type[Operation]]:
    """The operations for which an endpoint asks for a context or a claim."""
    hints = get_type_hints(endpoint)
    return [
        argument
        for hint in hints.values()
        for argument in get_args(hint)
        if isinstance(argument, type) and issubclass(argument, Operation)
    ]


# What is counted

SPECS: dict[str, MetricSpec] = {spec.name: spec for spec in (*OWN, *CATALOGUE)}


def counts(node: ast.AST) -> str | None:
    """Sees `metrics.counter("name", …)` and the like."""
    match node:
        case ast.Call(func=ast.Attribute(attr="counter" | "gauge" | "histogram"), args=[ast.Constant(), *_]):
            return ast.unparse(node)
    return None


def test_whatever_is_counted_is_in_the_catalogue_with_that_kind_and_those_labels() -> None:
    counted = everywhere(counts)
    assert len(counted) > 30
    for path, line, code in counted:
        call = ast.parse(code).body[0].value  # type: ignore[attr-defined]
        name = call.args[0].value
        assert name in SPECS, f"{path}:{line} {name}"
        assert call.func.attr == SPECS[name].kind, f"{path}:{line} {name}"
        assert len(call.args) - 1 == len(SPECS[name].labels), f"{path}:{line} {name}"


def test_whatever_is_in_the_catalogue_is_counted_somewhere() -> None:
    def names(node: ast.AST) -> str | None:
        return node.value if isinstance(node, ast.Constant) and node.value in SPECS else None

    named = {name for path, _, name in everywhere(names) if not path.endswith("catalogue.py")}
    assert set(SPECS) - named == set()


# How modules look


def test_no_module_is_too_long() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path, _ in sources("services", "libs", "tests")}
    assert len(lengths) > 100
    too_long = {path: length for path, length in lengths.items() if length > LONGEST_MODULE}
    # Lists, which are read by looking things up.
    assert too_long.keys() <= {"libs/domain/tables.py", "tests/architecture/test_contract.py"}


def test_every_module_of_the_libraries_says_what_it_is_for() -> None:
    silent = [path for path, tree in sources("libs") if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def test_every_public_class_of_the_telemetry_says_what_it_is_for() -> None:
    classes = [
        (path, node)
        for path, tree in sources("libs/observability")
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(classes) > 10
    assert [(path, node.name) for path, node in classes if not ast.get_docstring(node)] == []
