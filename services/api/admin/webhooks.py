"""Where an operator's tenant is told what happens: docs/webhooks.md is for those who receive it."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias
from uuid import UUID

from fastapi import Query, Request
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from libs.domain.webhooks import deliveries, endpoints
from libs.domain.webhooks.deliveries import DeliveryStatus
from libs.domain.webhooks.destinations import LONGEST_URL, Destinations, ForbiddenDestinationError
from libs.domain.webhooks.endpoints import DisabledReason
from libs.guardrails import Permission, Principal, Reason, Refused
from services.api.guards import Tx, acting, guarded_router, runtime_of
from services.api.schemas import DEFAULT_LIMIT, Cursor, IdPath, In, Limit, Out, PageOut, SafeStr, page_out, refusals

# Stored under an idempotency key, an answer would keep its secret where nothing seals it.
router = guarded_router("/admin/webhooks", tag="webhooks", replays=False)

Administrator = Annotated[Principal, acting(Permission.ADMINISTER_WEBHOOKS)]

if TYPE_CHECKING:
    EventType: TypeAlias = str
else:
    EventType = Literal[tuple(name.value for name in endpoints.AVAILABLE)]


def _each_once(events: list[str]) -> list[str]:
    if len(set(events)) < len(events):
        raise PydanticCustomError("unique", "Must name each event once.")
    return events


Events = Annotated[
    list[EventType],
    Field(min_length=1, max_length=len(endpoints.AVAILABLE), description="The events that it gets."),
    AfterValidator(_each_once),
]
Description = Annotated[SafeStr, Field(max_length=200)]


class RegisterWebhook(In):
    """Without `events` the endpoint gets those of sessions and of billing that there are today."""

    url: Annotated[SafeStr, Field(min_length=1, max_length=LONGEST_URL, examples=["https://example.org/webhooks"])]
    description: Description | None = None
    events: Annotated[Events, Field(default_factory=lambda: list(endpoints.DEFAULT))]


class ChangeWebhook(In):
    """What is not given stays as it is; a `description` of null is none."""

    enabled: Annotated[bool, Field(strict=True)] | None = None
    description: Description | None = None
    events: Events | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError("change", "Must change something.")
        return self


class WebhookOut(Out):
    """`disabled_reason` is `gone` when the receiver answered 410."""

    id: int
    url: str
    description: str | None
    events: list[str]
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: DisabledReason | None
    created_at: datetime


class RegisteredWebhookOut(WebhookOut):
    """`secret` is shown here and never again."""

    secret: str


class RotatedSecretOut(Out):
    """`secret` is shown here and never again; the one before signs as well until `old_secret_expires_at`."""

    secret: str
    old_secret_expires_at: datetime


class WebhookDeliveryOut(Out):
    """An event for the endpoint. `event_id` is its `webhook-id`; `response_status` and `last_error` are of the last
    attempt that had them."""

    id: int
    event_id: UUID
    type: str
    status: DeliveryStatus
    attempts: int
    response_status: int | None
    last_error: str | None
    occurred_at: datetime
    next_attempt_at: datetime | None
    delivered_at: datetime | None
    dead_at: datetime | None


@router.post("", status_code=201, responses=refusals())
async def register_webhook(
    caller: Administrator, tx: Tx, request: Request, new: RegisterWebhook
) -> RegisteredWebhookOut:
    """Registers an endpoint of your tenant. Its address must be another than that of your other endpoints."""
    runtime = runtime_of(request)
    settings = runtime.settings
    try:
        Destinations.parse(settings.webhook_ports, settings.webhook_allow_networks).check_url(new.url)
    except ForbiddenDestinationError as error:
        raise Refused(
            Reason.VALIDATION_FAILED, errors=[{"pointer": "/url", "in": "body", "detail": str(error)}]
        ) from None
    endpoint, secret = await endpoints.register(tx, caller, runtime.field_keys, **new.model_dump())
    return RegisteredWebhookOut(**WebhookOut.model_validate(endpoint).model_dump(), secret=secret)


@router.get("", responses=refusals())
async def list_webhooks(
    caller: Administrator, tx: Tx, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> PageOut[WebhookOut]:
    """The endpoints of your tenant."""
    return page_out(await endpoints.listed(tx, caller, cursor, limit), WebhookOut.model_validate)


@router.get("/{webhook_id}", responses=refusals(Reason.NOT_FOUND))
async def get_webhook(webhook_id: IdPath, caller: Administrator, tx: Tx) -> WebhookOut:
    """An endpoint as it stands."""
    return WebhookOut.model_validate(await endpoints.get(tx, caller, webhook_id))


@router.patch("/{webhook_id}", responses=refusals(Reason.NOT_FOUND))
async def change_webhook(webhook_id: IdPath, caller: Administrator, tx: Tx, change: ChangeWebhook) -> WebhookOut:
    """Enables or disables an endpoint, describes it, or chooses its events. Disabled, it gets none, and what waits for
    it is given up."""
    changes = change.model_dump(exclude_unset=True)
    return WebhookOut.model_validate(await endpoints.change(tx, caller, webhook_id, **changes))


@router.delete("/{webhook_id}", status_code=204, responses=refusals(Reason.NOT_FOUND))
async def remove_webhook(webhook_id: IdPath, caller: Administrator, tx: Tx) -> None:
    """Forgets an endpoint and what it has not got yet."""
    await endpoints.remove(tx, caller, webhook_id)


@router.post("/{webhook_id}/rotate-secret", responses=refusals(Reason.NOT_FOUND))
async def rotate_webhook_secret(
    webhook_id: IdPath, caller: Administrator, tx: Tx, request: Request
) -> RotatedSecretOut:
    """Makes a new secret. For 24 hours events are signed with the old one as well."""
    secret, expires_at = await endpoints.rotate_secret(tx, caller, runtime_of(request).field_keys, webhook_id)
    return RotatedSecretOut(secret=secret, old_secret_expires_at=expires_at)


@router.get("/{webhook_id}/deliveries", responses=refusals(Reason.NOT_FOUND))
async def list_webhook_deliveries(
    webhook_id: IdPath,
    caller: Administrator,
    tx: Tx,
    status: Annotated[DeliveryStatus | None, Query()] = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[WebhookDeliveryOut]:
    """What the endpoint got, is to get, or did not get after six attempts."""
    page = await deliveries.listed(tx, caller, webhook_id, status, cursor, limit)
    return page_out(page, WebhookDeliveryOut.model_validate)


@router.post("/{webhook_id}/deliveries/{delivery_id}/redeliver", responses=refusals(Reason.NOT_FOUND))
async def redeliver_to_webhook(
    webhook_id: IdPath, delivery_id: IdPath, caller: Administrator, tx: Tx
) -> WebhookDeliveryOut:
    """Delivers an event again, under the same `webhook-id`, whatever became of it."""
    return WebhookDeliveryOut.model_validate(await deliveries.redeliver(tx, caller, webhook_id, delivery_id))


@router.post("/{webhook_id}/test", status_code=201, responses=refusals(Reason.NOT_FOUND))
async def test_webhook(webhook_id: IdPath, caller: Administrator, tx: Tx) -> WebhookDeliveryOut:
    """Sends the endpoint the event `ping`; its deliveries tell how that went."""
    return WebhookDeliveryOut.model_validate(await deliveries.ping(tx, caller, webhook_id))
