"""The `sessiongate` command."""

import sys
from importlib import import_module
from typing import Final

import typer

from services.cli.errors import CommandError, explain

COMMANDS: Final = {
    "up": "services.cli.up:up",
    "migrate": "services.cli.migrate:migrate",
    "settings": "services.cli.settings_command:settings",
    "token": "services.cli.people:token",
    "tenants": "services.cli.people:tenants",
    "appointments": "services.cli.appointments:app",
    "billing": "services.cli.billing:app",
    "keys": "services.cli.keys:app",
    "flags": "services.cli.flags:app",
    "outbox": "services.cli.outbox:app",
    "alerts": "services.cli.alerts:app",
    "logs": "services.cli.logs:app",
    "explain": "services.cli.explain:explain",
    "audit": "services.cli.audit:audit",
    "demo": "services.cli.demo:demo",
}
"""Where each command is: a function, or a `typer.Typer` with commands of its own."""

app = typer.Typer(name="sessiongate", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def sessiongate() -> None:
    """A consultation platform in which nothing live happens without a real session."""


def main() -> None:
    try:
        # Only the command that is called is imported; whoever asks what there is waits for all of them.
        for name in COMMANDS.keys() & sys.argv[1:2] or COMMANDS:
            _add(name)
        app()
    except CommandError as error:
        sys.exit(str(error))
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        sys.exit(sentence)
    except KeyboardInterrupt:
        sys.exit(130)


def _add(name: str) -> None:
    module, _, attribute = COMMANDS[name].partition(":")
    command = getattr(import_module(module), attribute)
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)
