"""What machines of the platform itself have to say, who are no users: alerts, told by Alertmanager.

Such a route is not for clients: it is in no OpenAPI document, and opens to a token of its own before the body is read.
"""

import math
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from hmac import compare_digest
from itertools import islice
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from libs.domain import alerts
from libs.domain.alerts import Severity
from libs.domain.telemetry import logger
from libs.guardrails import Reason, Refused
from services.api.errors import validation_errors
from services.api.guards import runtime_of
from services.api.identity import Identity
from services.api.schemas import SafeStr, Timestamp

_log: Final = logger("alerts")

BODY_LIMITS: Final = {"/internal/alerts": 2 * 1024 * 1024}
"""How long a body may be that is longer than those of clients, in bytes, by path: here of some 2,000 alerts."""

SOURCE: Final = "alertmanager"
ALERTS_LIMIT: Final = 10_000
"""How many alerts a payload may have: more than fit into it, however short."""
FAULTS_SHOWN: Final = 20
PAIRS_KEPT: Final = 50
TEXT_KEPT: Final = 1000
"""How many labels, and how many annotations, are kept of an alert, and how many characters of each."""

_SEVERITIES: Final = {"low": Severity.INFO, "medium": Severity.WARNING, **{each.value: each for each in Severity}}


def _named(labels: dict[str, str]) -> dict[str, str]:
    if not labels.get("alertname"):
        raise PydanticCustomError("alertname", "Must have the label alertname.")
    return labels


def _known(moment: datetime) -> datetime:
    if moment == datetime.min.replace(tzinfo=UTC):
        raise PydanticCustomError("timestamp", "Must be known.")
    return moment


class ReportedAlert(BaseModel):
    """One alert of a payload. `endsAt` means something only when it is resolved."""

    model_config = ConfigDict(alias_generator=to_camel)

    fingerprint: Annotated[SafeStr, Field(min_length=1, max_length=100)]
    status: alerts.Status
    starts_at: Annotated[Timestamp, AfterValidator(_known)]
    ends_at: Timestamp
    labels: Annotated[dict[str, str], AfterValidator(_named)]
    annotations: dict[str, str]

    def told(self) -> alerts.Told:
        """The same in our own words. What they have no column for is found among the labels and annotations."""
        labels, annotations = _kept(self.labels), _kept(self.annotations)
        said = annotations | labels
        return alerts.Told(
            fingerprint=self.fingerprint,
            name=said["alertname"],
            # Whatever a severity of others means, it is not to be overlooked.
            severity=_SEVERITIES.get(said.get("severity", ""), Severity.WARNING),
            component=said.get("component"),
            metric=said.get("metric"),
            value=_number(said.get("value")),
            threshold=_number(said.get("threshold")),
            labels=labels,
            annotations=annotations,
            started_at=self.starts_at,
            resolved_at=max(self.starts_at, self.ends_at) if self.status == "resolved" else None,
        )


class Payload(BaseModel):
    """What Alertmanager sends to a webhook, as far as it is needed here. Each alert is judged on its own."""

    version: Literal["4"]
    alerts: Annotated[list[Any], Field(max_length=ALERTS_LIMIT)]


class AlertsRoute(APIRoute):
    """A route for whoever knows `SESSIONGATE_ALERTS_TOKEN`; without the setting it is not there."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def authorized(request: Request) -> Response:
            token: SecretStr | None = request.app.state.alerts_token
            if token is None:
                raise Refused(Reason.NOT_FOUND, "Alerts are accepted once SESSIONGATE_ALERTS_TOKEN is set.")
            scheme, _, offered = request.headers.get("authorization", "").partition(" ")
            fits = compare_digest(offered.encode("latin-1"), token.get_secret_value().encode())
            if not (fits and scheme.lower() == "bearer"):
                identity: Identity = request.app.state.identity
                raise identity.refuse(request, "bad_credentials")
            return await handle(request)

        return authorized


router = APIRouter(prefix="/internal", route_class=AlertsRoute, include_in_schema=False)


@router.post("/alerts", status_code=204)
async def receive_alerts(payload: Payload, request: Request) -> None:
    """Keeps the alerts of a payload (version 4), and only then refuses those that it does not understand: Alertmanager
    repeats nothing that was answered with 4xx, so none may be lost for another's sake."""
    understood: list[alerts.Told] = []
    faults: list[Any] = []
    for index, reported in enumerate(payload.alerts):
        try:
            understood.append(ReportedAlert.model_validate(reported).told())
        except ValidationError as error:
            faults += ({**fault, "loc": ("body", "alerts", index, *fault["loc"])} for fault in error.errors())
    runtime = runtime_of(request)
    await alerts.keep(runtime.database, runtime.metrics, SOURCE, understood)
    if faults:
        _log.warning("alerts_not_understood", number=len(payload.alerts) - len(understood), kept=len(understood))
        raise validation_errors(faults[:FAULTS_SHOWN])


def _kept(pairs: Mapping[str, str]) -> dict[str, str]:
    """As much of labels or annotations as is kept, without what PostgreSQL cannot store."""
    # Not to be cut off, should there be too many.
    first = sorted(pairs, key=lambda name: name not in ("alertname", "severity"))
    return {_storable(name): _storable(pairs[name]) for name in islice(first, PAIRS_KEPT)}


def _storable(text: str) -> str:
    return text.encode(errors="replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")[:TEXT_KEPT]


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
