"""When somebody has to look, room by room."""

from typing import Final

from deploy.generate.alerts.conversion import CONVERSION
from deploy.generate.alerts.delivery import DELIVERY
from deploy.generate.alerts.guardrails import GUARDRAILS
from deploy.generate.alerts.platform import PLATFORM
from deploy.generate.alerts.requests_and_chat import REQUESTS_AND_CHAT

ALERTS: Final = {
    "conversion": CONVERSION,
    "guardrails": GUARDRAILS,
    "requests-and-chat": REQUESTS_AND_CHAT,
    "delivery": DELIVERY,
    "platform": PLATFORM,
}
"""By the name of their group."""
