"""A small clinic to look at, made once in an empty database."""

from datetime import timedelta
from typing import Final

from sqlalchemy import exists, select

from libs.domain import tokens
from libs.domain.appointments import appointments
from libs.domain.db import Database
from libs.domain.jobs import Job
from libs.domain.people import NewSubscription, create_tenant, create_user, subscribe
from libs.domain.settings import libpq_dsn
from libs.domain.tables import tenants, users
from libs.domain.transaction import Transaction, transaction
from libs.guardrails import Principal, Role
from services.cli.home import Person

_COUNTRIES: Final = ("MW", "KE")

# Free for whoever tries things out; the last patient never bought a subscription.
_DOCTORS: Final = ("Dr Thoko Banda", "Dr Wanjiru Kamau")
_PATIENTS: Final = ("Chikondi Phiri", "Achieng Otieno", "Mphatso Mwale", "Kiprono Cheruiyot")

# With appointments of their own, due in so many seconds.
_SOON: Final = (
    ("Dr Limbani Gondwe", "Tadala Nkhoma", "text", 20),
    ("Dr Naliaka Wekesa", "Makena Njoroge", "video", 35),
    ("Dr Yamikani Chirwa", "Atieno Ouma", "voice", 50),
)


class Silence:
    """Wakes nobody: the worker is not running yet, or finds the rows by itself."""

    def ring(self, job: Job) -> None:
        pass

    def changed(self, conversation_id: int) -> None:
        pass

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        pass


async def seed(database_url: str) -> None:
    """Makes the clinic unless there is a tenant already."""
    database = Database(libpq_dsn(database_url), application="sessiongate-seed", pool_size=1)
    try:
        async with transaction(database, Silence()) as tx:
            if (await tx.execute(select(exists().where(tenants.c.id.is_not(None))))).scalar_one():
                return
            await _clinic(tx)
    finally:
        await database.close()


async def people(database_url: str, secret: str, issuer: str) -> list[Person]:
    """Everybody who is active in the first tenant, each with a token of 12 hours."""
    database = Database(libpq_dsn(database_url), application="sessiongate-seed", pool_size=1)
    try:
        async with database.begin() as connection:
            first = select(tenants.c.id).order_by(tenants.c.id).limit(1).scalar_subquery()
            listed = select(users).where(users.c.tenant_id == first, users.c.active).order_by(users.c.id).limit(50)
            rows = (await connection.execute(listed)).all()
    finally:
        await database.close()
    return [
        Person(
            id=row.id,
            role=row.role,
            name=row.name,
            token=tokens.issue(Principal(row.id, row.tenant_id, Role(row.role)), secret, issuer=issuer),
        )
        for row in rows
    ]


async def _clinic(tx: Transaction) -> None:
    tenant = await create_tenant(tx, "Lakeside Clinic")

    async def add(role: Role, name: str, number: int) -> int:
        country = _COUNTRIES[number % len(_COUNTRIES)]
        return (await create_user(tx, tenant, role=role, name=name, country=country)).id

    operator = Principal(await add(Role.OPERATOR, "Ruth Kaunda", 0), tenant, Role.OPERATOR)
    for number, name in enumerate(_DOCTORS):
        await add(Role.DOCTOR, name, number)
    patients = [await add(Role.PATIENT, name, number) for number, name in enumerate(_PATIENTS)]
    for patient in patients[:-1]:
        await _subscribe(tx, tenant, patient)
    for number, (doctor_name, patient_name, modality, due_in) in enumerate(_SOON):
        doctor = await add(Role.DOCTOR, doctor_name, number)
        patient = await add(Role.PATIENT, patient_name, number)
        await _subscribe(tx, tenant, patient)
        new = appointments.NewAppointment(
            patient_id=patient,
            doctor_id=doctor,
            modality=modality,
            starts_at=await appointments.now(tx) + timedelta(seconds=due_in),
            duration=timedelta(minutes=30),
            reason="First visit",
        )
        booked = await appointments.book(tx, operator, new)
        await appointments.confirm(tx, operator, booked.id)


async def _subscribe(tx: Transaction, tenant: int, patient: int) -> None:
    present = await appointments.now(tx)
    await subscribe(
        tx,
        tenant,
        NewSubscription(
            patient_id=patient,
            plan="basic",
            starts_at=present,
            ends_at=present + timedelta(days=30),
            text_sessions_remaining=10,
            voice_calls_remaining=10,
            video_calls_remaining=10,
        ),
    )
