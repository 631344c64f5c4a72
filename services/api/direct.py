"""The short way to an endpoint, for the busiest operations.

FastAPI solves dependencies, and opens and closes what they might need, whatever a route asks for. One that asks for
a claim, a body and nothing else is called directly here: pydantic's own parser reads the body, and what it cannot
read takes FastAPI's way, which knows how to refuse it. To a client the two ways are one.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

_JSON: Final = "application/json"


def takes_claim_and_body(dependant: Dependant) -> bool:
    """Whether an endpoint, one of whose dependencies is a claim, takes nothing else but a body; the request and
    the response may be among its parameters."""
    values = (dependant.path_params, dependant.query_params, dependant.header_params, dependant.cookie_params)
    more = any(values) or dependant.background_tasks_param_name
    return not more and len(dependant.dependencies) == len(dependant.body_params) == 1


def directly(route: APIRoute, handle: Handler) -> Handler:
    """The handler of a route whose endpoint takes a claim and a body, around FastAPI's own. The claim is made once the
    body is known to be good: until then the other way decides which refusal comes first."""
    dependant = route.dependant
    (claim,), (body,) = dependant.dependencies, dependant.body_params
    endpoint, claim_of = dependant.call, claim.call
    assert endpoint is not None
    assert claim_of is not None
    read: TypeAdapter[Any] = TypeAdapter(body.field_info.rebuild_annotation())
    write: TypeAdapter[Any] = TypeAdapter(route.response_model)

    async def handled(request: Request) -> Response:
        if request.headers.get("content-type") != _JSON:
            return await handle(request)
        try:
            values = {body.name: read.validate_json(await request.body())}
        except (ValidationError, ClientDisconnect):
            return await handle(request)
        values[str(claim.name)] = await claim_of(request, **request.path_params)
        response = Response(status_code=route.status_code or 200, media_type=_JSON)
        if dependant.request_param_name:
            values[dependant.request_param_name] = request
        if dependant.response_param_name:
            values[dependant.response_param_name] = response
        response.body = write.dump_json(await endpoint(**values), by_alias=True)
        response.headers["content-length"] = str(len(response.body))
        return response

    return handled
