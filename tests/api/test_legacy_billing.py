from tests.api.expect import found, problem
from tests.clinic import MINUTE, Clinic
from tests.running import Api
from tests.conftest import MakeApi


async def test_try(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api()
    patient = await clinic.patient()
    a = await clinic.appointment(patient=patient, starts_in=-12 * MINUTE)
    c = api.as_(patient)
    print(found(await c.post(f"{api.url}/api/appointments/{a}/end-session")))
    print(found(await c.post(f"{api.url}/api/appointments/{a}/end-session")))
    print(found(await c.post(f"{api.url}/api/text-appointments/process-deduction", json={"appointment_id": a, "sessions_to_deduct": 5, "reason": "manual_end"}, headers={"Idempotency-Key": "a"})))
    print([dict(r) for r in await clinic.fetch("SELECT name, payload FROM outbox_events")])
    r = await c.post(f"{api.url}/api/appointments/0/end-session")
    print(r.text)
    r = await c.post(f"{api.url}/api/appointments/777777/end-session")
    problem(r, 404, "APPOINTMENT_NOT_FOUND")
    assert 0
