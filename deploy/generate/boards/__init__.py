"""The Grafana boards, one module each: what whoever is on call asks, and the panels that answer."""

from typing import Final

from deploy.generate.boards import alerts, billing, chat, conversion, guardrails, outbox, processes, slo
from deploy.generate.boards.panels import TAG, render

BOARDS: Final = (
    slo.BOARD,
    conversion.BOARD,
    guardrails.BOARD,
    chat.BOARD,
    billing.BOARD,
    outbox.BOARD,
    processes.BOARD,
    alerts.BOARD,
)


def files() -> dict[str, str]:
    """The boards as Grafana reads them, by their paths below the root of the repository."""
    return {
        f"deploy/grafana/dashboards/{(board.uid or '').removeprefix(f'{TAG}-')}.json": render(board) for board in BOARDS
    }
