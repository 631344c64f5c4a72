from datetime import datetime
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from libs.guardrails import Role
from services.api.schemas import Count, Id, In, Out, SafeStr, Timestamp


class CreateUser(In):
    role: Role
    name: Annotated[SafeStr, Field(min_length=1, max_length=200)]
    country: Annotated[str, Field(pattern=r"^[A-Z]{2}$", description="ISO 3166 code of two letters.")]
    active: Annotated[bool, Field(strict=True)] = True


class ChangeUser(In):
    active: Annotated[bool, Field(strict=True)]


class CreateSubscription(In):
    patient_id: Id
    plan: Annotated[SafeStr, Field(min_length=1, max_length=200)]
    starts_at: Timestamp
    ends_at: Timestamp
    text_sessions_remaining: Count
    voice_calls_remaining: Count
    video_calls_remaining: Count

    @model_validator(mode="after")
    def _ends_after_start(self) -> Self:
        if self.ends_at <= self.starts_at:
            raise PydanticCustomError("period", "ends_at must be after starts_at.")
        return self


class SubscriptionOut(Out):
    id: int
    patient_id: int
    plan: str
    starts_at: datetime
    ends_at: datetime
    text_sessions_remaining: int
    voice_calls_remaining: int
    video_calls_remaining: int
