"""For each alert when it must fire and when it must not, room by room."""

from typing import Final

from tests.deploy.cases.conversion import CONVERSION
from tests.deploy.cases.delivery import DELIVERY
from tests.deploy.cases.guardrails import GUARDRAILS
from tests.deploy.cases.platform import PLATFORM
from tests.deploy.cases.requests_and_chat import REQUESTS_AND_CHAT

CASES: Final = (*CONVERSION, *GUARDRAILS, *REQUESTS_AND_CHAT, *DELIVERY, *PLATFORM)
