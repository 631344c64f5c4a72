"""What the loops of a worker are made with."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from libs.domain.doorbell import Doorbell
from libs.domain.runtime import Runtime, compose
from libs.domain.settings import Settings
from libs.guardrails import Flags
from tests.clinic import Clinic
from tests.conftest import Urls


@pytest.fixture
def runtime(clinic: Clinic, urls: Urls) -> Runtime:
    addresses: Any = {"database_url": urls.app, "redis_url": urls.redis}
    return compose(Settings(**addresses), Flags(), metrics=clinic.metrics, database=clinic.database, bell=clinic.bell)


@pytest.fixture
async def doorbell(clinic: Clinic, urls: Urls) -> AsyncIterator[Doorbell]:
    doorbell = Doorbell(urls.redis, clinic.metrics)
    yield doorbell
    await doorbell.close()
