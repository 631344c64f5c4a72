"""`sessiongate token` and `sessiongate tenants` on a real database; their tokens open a real API."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.running import SECRET, Api


@pytest.fixture
def known(urls: Urls) -> dict[str, str]:
    return {
        "SESSIONGATE_DATABASE_URL": urls.app,
        "SESSIONGATE_REDIS_URL": urls.redis,
        "SESSIONGATE_JWT_SECRET": SECRET,
    }


async def test_a_token_is_one_line_that_opens_the_door(
    api: Api, clinic: Clinic, known: dict[str, str], tmp_path: Path
) -> None:
    doctor = await clinic.doctor()
    issued = sessiongate(tmp_path, "token", "--user", str(doctor.user_id), env=known)
    assert (issued.returncode, issued.stderr, issued.stdout.count("\n")) == (0, "", 1)
    me = await api.anonymous.get("/api/v1/me", headers={"Authorization": f"Bearer {issued.stdout.strip()}"})
    assert (me.json()["id"], me.json()["role"]) == (doctor.user_id, "doctor")


@pytest.mark.parametrize("arguments", [("--user", "987654"), ("--user", "0"), ("--user", "Ruth"), ()])
def test_a_token_for_nobody_is_not_issued(known: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused = sessiongate(tmp_path, "token", *arguments, env=known)
    assert refused.returncode in (1, 2)
    assert refused.stdout == ""
    assert refused.stderr


def test_where_another_party_issues_tokens_this_one_does_not(
    clinic: Clinic, known: dict[str, str], tmp_path: Path
) -> None:
    env = {**known, "SESSIONGATE_JWT_SECRET": "", "SESSIONGATE_JWT_JWKS": "keys.json"}
    refused = sessiongate(tmp_path, "token", "--user", str(clinic.operator.user_id), env=env)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Tokens are issued by your identity provider")


async def test_a_new_tenant_has_an_operator_who_can_fill_it_and_sees_no_other(
    api: Api, clinic: Clinic, known: dict[str, str], tmp_path: Path
) -> None:
    await clinic.doctor()
    made = sessiongate(tmp_path, "tenants", "create", "Riverside", "--json", env=known)
    told = json.loads(made.stdout)
    headers = {"Authorization": f"Bearer {told['operator']['token']}"}
    me = (await api.anonymous.get("/api/v1/me", headers=headers)).json()
    assert (me["id"], me["tenant_id"], me["role"]) == (told["operator"]["id"], told["tenant_id"], "operator")
    doctor = {"role": "doctor", "name": "Dr New", "country": "MW"}
    added = await api.anonymous.post("/api/v1/admin/users", headers=headers, json=doctor)
    assert added.status_code == 201
    doctors = (await api.anonymous.get("/api/v1/doctors", headers=headers)).json()["items"]
    assert [each["id"] for each in doctors] == [added.json()["id"]]


async def test_a_tenant_can_be_created_where_another_party_issues_tokens(
    clinic: Clinic, known: dict[str, str], tmp_path: Path
) -> None:
    env = {**known, "SESSIONGATE_JWT_SECRET": "", "SESSIONGATE_JWT_JWKS": "keys.json"}
    told = json.loads(sessiongate(tmp_path, "tenants", "create", "Riverside", "--json", env=env).stdout)
    assert told["operator"]["token"] is None
    shown = sessiongate(tmp_path, "tenants", "create", "Hillside", env=env | {"COLUMNS": "200"})
    assert "Have a token issued for sub" in shown.stdout
    assert await clinic.fetchval("SELECT count(*) FROM users WHERE role = 'operator'") == 3


async def test_a_tenant_needs_a_name(clinic: Clinic, known: dict[str, str], tmp_path: Path) -> None:
    refused = sessiongate(tmp_path, "tenants", "create", "  ", env=known)
    assert (refused.returncode, refused.stderr) == (1, "A tenant needs a name.\n")
    assert await clinic.fetchval("SELECT count(*) FROM tenants") == 1
