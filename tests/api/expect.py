"""What answers must look like, and how tests ask for an appointment."""

from datetime import datetime, timedelta
from typing import Any, Final

from httpx2 import Response

from libs.guardrails import Principal, Role
from tests.clinic import Clinic
from tests.running import Api

DAY: Final = timedelta(days=1)


def problem(response: Response, status: int, code: str) -> dict[str, Any]:
    """The body of a refusal, once it is known to be a complete problem document."""
    assert response.status_code == status, f"{response.request.method} {response.request.url}: {response.text}"
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (body["code"], body["status"], body["type"]) == (code, status, f"/problems/{code}"), body
    assert body["title"]
    assert body["detail"]
    assert body["instance"].encode() == response.request.url.raw_path.partition(b"?")[0]
    assert body["correlation_id"] == response.headers["x-correlation-id"]
    if "retry_after" in body:
        assert response.headers["retry-after"] == str(body["retry_after"])
    return body


def faults(response: Response, status: int = 422) -> list[str]:
    """The pointers of a `VALIDATION_FAILED`."""
    return [error["pointer"] for error in problem(response, status, "VALIDATION_FAILED")["errors"]]


def found(response: Response, status: int = 200) -> Any:
    """The body of an answer that is no refusal."""
    assert response.status_code == status, f"{response.request.method} {response.request.url}: {response.text}"
    return response.json()


def moment(text: str) -> datetime:
    """A timestamp of an answer: RFC 3339 in UTC, spelled `Z`."""
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


async def strangers(clinic: Clinic) -> list[Principal]:
    """People of this clinic and of another who take part in nothing."""
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    return [
        await clinic.patient(),
        await clinic.doctor(),
        await clinic.person(Role.SERVICE),
        elsewhere.operator,
        await elsewhere.patient(),
    ]


async def ahead(clinic: Clinic, by: timedelta) -> str:
    """The moment that is `by` after now, as a client writes it."""
    present: datetime = await clinic.fetchval("SELECT clock()")
    return (present + by).isoformat()


async def book(
    api: Api, clinic: Clinic, patient: Principal, doctor: Principal, by: timedelta = DAY, **new: Any
) -> dict[str, Any]:
    """An appointment booked by the patient, `by` from now."""
    starts_at = await ahead(clinic, by)
    wanted = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": starts_at} | new
    booked: dict[str, Any] = found(await api.as_(patient).post("/appointments", json=wanted), 201)
    return booked
