"""`sessiongate token` and `sessiongate tenants`: who may do something, and proof of it."""

import asyncio
import json
from typing import Annotated, TypedDict

import typer
from rich import print as say
from sqlalchemy import select

from libs.domain import tokens
from libs.domain.db import Database
from libs.domain.people import create_tenant, create_user
from libs.domain.settings import Settings, libpq_dsn
from libs.domain.tables import users
from libs.domain.transaction import transaction
from libs.guardrails import Principal, Role
from services.cli import home
from services.cli.errors import CommandError
from services.cli.options import AsJson
from services.cli.seed import Silence


class Operator(TypedDict):
    """`token` is null where an identity provider issues tokens."""

    id: int
    token: str | None


class Created(TypedDict):
    """What `tenants create --json` prints."""

    tenant_id: int
    operator: Operator


tenants = typer.Typer(no_args_is_help=True, help="Tenants: whose people never see each other.")


def token(user: Annotated[int, typer.Option("--user", min=1, help="The id of the user.")]) -> None:
    """Print a bearer token of 12 hours for a user. For development."""
    settings = home.settings(Settings)
    # Alone on its line and undecorated, so that it can be used in $(…).
    typer.echo(asyncio.run(token_of(settings, user)))


@tenants.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the tenant is called.")],
    as_json: AsJson = False,
) -> None:
    """Create a tenant with its first operator, and print that operator's token where it is ours to issue."""
    if not name.strip():
        raise CommandError("A tenant needs a name.")
    settings = home.settings(Settings)
    created = asyncio.run(_create(settings, name.strip()))
    if as_json:
        typer.echo(json.dumps(created))
        return
    tenant_id, operator = created["tenant_id"], created["operator"]
    made = f"Tenant [bold]{tenant_id}[/bold] with operator [bold]{operator['id']}[/bold]"
    if operator["token"] is None:
        say(f"{made}. Have a token issued for sub {operator['id']}, tenant {tenant_id}, role operator.")
    else:
        say(f"{made}, whose token is")
        typer.echo(operator["token"])


async def token_of(settings: Settings, user_id: int) -> str:
    """A token for a user. Raises `CommandError` when there is none, or none to be had."""
    database = _database(settings)
    try:
        async with database.begin() as connection:
            row = (await connection.execute(select(users).where(users.c.id == user_id))).one_or_none()
    finally:
        await database.close()
    if row is None:
        raise CommandError(f"There is no user {user_id}. `GET /api/v1/doctors` and up.json name some.")
    return _issue(settings, Principal(row.id, row.tenant_id, Role(row.role)))


async def _create(settings: Settings, name: str) -> Created:
    database = _database(settings)
    try:
        async with transaction(database, Silence()) as tx:
            tenant_id = await create_tenant(tx, name)
            operator = await create_user(tx, tenant_id, role=Role.OPERATOR, name=f"Operator of {name}", country="MW")
            principal = Principal(operator.id, tenant_id, Role.OPERATOR)
            issued = None if settings.jwt_secret is None else _issue(settings, principal)
    finally:
        await database.close()
    return Created(tenant_id=tenant_id, operator=Operator(id=operator.id, token=issued))


def _issue(settings: Settings, principal: Principal) -> str:
    """A token signed with this installation's secret. Raises `CommandError` when it has none."""
    if settings.jwt_secret is None:
        raise CommandError(
            "Tokens are issued by your identity provider: this installation has a key set and no secret"
            " (SESSIONGATE_JWT_SECRET)."
        )
    return tokens.issue(principal, settings.jwt_secret.get_secret_value(), issuer=settings.jwt_issuer)


def _database(settings: Settings) -> Database:
    return Database(libpq_dsn(settings.database_url), application="sessiongate-cli", pool_size=1)
