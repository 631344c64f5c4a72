"""The OpenAPI document, with what FastAPI cannot know: how callers sign in, and that refusals are problems."""

from typing import Any, Final

from fastapi import FastAPI

from services.api.errors import MEDIA_TYPE
from services.api.public import PUBLIC

_BEARER: Final = {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
_PROBLEM: Final = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}


class DocumentedApi(FastAPI):
    """The application, whose document is corrected once, when it is first asked for."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _correct(operation, public=path in PUBLIC)
            components = document["components"]
            components["securitySchemes"] = _BEARER
            for unused in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(unused, None)
            self.openapi_schema = document
        return self.openapi_schema


def _correct(operation: dict[str, Any], *, public: bool) -> None:
    responses: dict[str, Any] = operation["responses"]
    for status, response in list(responses.items()):
        content = response.get("content", {})
        if MEDIA_TYPE in content:
            # FastAPI files the model of every response under the media type of the successful one.
            response["content"] = _PROBLEM
        elif status == "422":
            # FastAPI promises its own errors wherever there is a parameter; nothing here answers them.
            del responses[status]
    if not public:
        operation["security"] = [{name: [] for name in _BEARER}]
