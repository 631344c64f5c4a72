from typing import Annotated, Any

from fastapi import Request

from libs.domain import audit, people
from libs.domain.conversion import monitor
from libs.domain.runtime import thresholds_of
from libs.guardrails import Permission, Principal, Reason, Role
from services.api.admin.schemas import ChangeUser, CreateSubscription, CreateUser, SubscriptionOut
from services.api.guards import Tx, acting, guarded_router, runtime_of
from services.api.people.schemas import UserOut
from services.api.schemas import IdPath, creating, refusals

router = guarded_router("/admin", tag="operators")

Administrator = Annotated[Principal, acting(Permission.ADMINISTER_PEOPLE)]


@router.post("/users", status_code=201, responses=creating())
async def create_user(caller: Administrator, tx: Tx, new: CreateUser) -> UserOut:
    """Adds a person to your tenant."""
    user = await people.create_user(
        tx, caller.tenant_id, role=new.role, name=new.name, country=new.country, active=new.active
    )
    await audit.record(tx, caller, "user_created", f"user:{user.id}", role=user.role)
    return UserOut.model_validate(user)


@router.patch("/users/{user_id}", responses=refusals(Reason.NOT_FOUND))
async def change_user(user_id: IdPath, caller: Administrator, tx: Tx, change: ChangeUser) -> UserOut:
    """Activates or deactivates a person."""
    return UserOut.model_validate(await people.set_active(tx, caller, user_id, active=change.active))


@router.post("/subscriptions", status_code=201, responses=creating())
async def create_subscription(caller: Administrator, tx: Tx, new: CreateSubscription) -> SubscriptionOut:
    """Gives a patient units to consume."""
    await people.require(tx, caller.tenant_id, Role.PATIENT, new.patient_id, "/patient_id")
    created = await people.subscribe(tx, caller.tenant_id, people.NewSubscription(**new.model_dump()))
    await audit.record(tx, caller, "subscription_created", f"user:{new.patient_id}", subscription_id=created)
    return SubscriptionOut(id=created, **new.model_dump())


@router.get("/conversions", responses=refusals())
async def get_conversions(
    caller: Annotated[Principal, acting(Permission.SEE_OPERATIONS)], request: Request
) -> dict[str, Any]:
    """How the conversion of your tenant's appointments is doing."""
    runtime = runtime_of(request)
    report = await monitor.report(runtime.database, thresholds_of(runtime.settings), caller.tenant_id)
    return report.fields()
