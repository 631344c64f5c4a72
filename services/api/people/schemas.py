from libs.guardrails import Role
from services.api.schemas import Out


class UserOut(Out):
    id: int
    tenant_id: int
    role: Role
    name: str
    country: str
    active: bool


class DoctorOut(Out):
    id: int
    name: str
    country: str
