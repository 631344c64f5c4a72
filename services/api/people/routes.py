from typing import Annotated

from libs.domain import people
from libs.guardrails import Permission, Principal
from services.api.guards import Tx, acting, guarded_router
from services.api.people.schemas import DoctorOut, UserOut
from services.api.schemas import DEFAULT_LIMIT, Cursor, Limit, PageOut, page_out, refusals

router = guarded_router("", tag="people")


@router.get("/me", responses=refusals())
async def get_me(caller: Annotated[Principal, acting(Permission.SEE_ONESELF)], tx: Tx) -> UserOut:
    """Who the token says you are."""
    return UserOut.model_validate(await people.get(tx, caller.tenant_id, caller.user_id))


@router.get("/doctors", responses=refusals())
async def list_doctors(
    caller: Annotated[Principal, acting(Permission.SEE_DOCTORS)],
    tx: Tx,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[DoctorOut]:
    """The active doctors of your tenant."""
    return page_out(await people.doctors(tx, caller.tenant_id, cursor, limit), DoctorOut.model_validate)
