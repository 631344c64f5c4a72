from libs.domain.db import Database
from libs.guardrails import Role
from tests.api.expect import found, problem
from tests.clinic import Clinic
from tests.running import Api


async def test_everybody_sees_who_the_token_says_they_are(api: Api, clinic: Clinic) -> None:
    for role in (Role.PATIENT, Role.DOCTOR, Role.OPERATOR):
        person = await clinic.person(role, country="ZM")
        assert found(await api.as_(person).get("/me")) == {
            "id": person.user_id,
            "tenant_id": clinic.tenant_id,
            "role": role.value,
            "name": f"A {role}",
            "country": "ZM",
            "active": True,
        }


async def test_doctors_are_the_active_ones_of_the_own_tenant(api: Api, clinic: Clinic, database: Database) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    await elsewhere.doctor()
    first, second = await clinic.doctor(country="ZM"), await clinic.doctor()
    await clinic.doctor(active=False)
    for caller in (await clinic.patient(), first, clinic.operator):
        page = found(await api.as_(caller).get("/doctors"))
        assert page == {
            "items": [
                {"id": second.user_id, "name": "A doctor", "country": "MW"},
                {"id": first.user_id, "name": "A doctor", "country": "ZM"},
            ],
            "next_cursor": None,
            "has_more": False,
        }


async def test_a_service_sees_no_people(api: Api, clinic: Clinic) -> None:
    service = await clinic.person(Role.SERVICE)
    for path in ("/me", "/doctors", "/notifications", "/sessions"):
        problem(await api.as_(service).get(path), 403, "ROLE_NOT_ALLOWED")
