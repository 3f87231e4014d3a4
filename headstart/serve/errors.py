"""Errors that clients get, in OpenAI's form: never a path, never a stack trace."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteError
from starlette.responses import Response

logger = logging.getLogger("headstart.serve")

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error", 500: "server_error",
    503: "service_unavailable_error",
}  # fmt: skip
_LONGEST = 1000  # characters of a message
_PATH = re.compile(r"(?<![\w/])/(?:[\w.@+-]+/)+[\w.@+-]*")


class ApiError(HTTPException):
    """What a client is told.

    status: of HTTP.
    message: one sentence.
    param: the field of the request that is wrong; None: no one field is.
    code: for programs, such as "context_length_exceeded".
    retry_after: seconds; None: the client is not told when to try again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = _PATH.sub("(a path)", self.message)[:_LONGEST]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer. ASCII, since what a client sent may hold half of a surrogate pair."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(json.dumps(self.body), self.status, headers, "application/json")


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """The error for a field of a request that cannot be honoured."""
    return ApiError(400, message, param, code)


INTERNAL = ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error. Those that are no fault of the client go to the log, without what they say."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StarletteError):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return of_validation(error)
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed: %s\n%s", type(error).__name__, frames)
    return INTERNAL


async def answer_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of exceptions."""
    return as_api_error(error).response()


def of_validation(error: RequestValidationError) -> ApiError:
    """The error for a body that is no request, naming a field that is wrong: of alternatives the one that came furthest."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON")
    fields = [_field(one["loc"][1:], error.body, str(one["type"])) for one in errors]
    deepest = max(range(len(errors)), key=lambda number: fields[number].count(".") + fields[number].count("["))
    first, param, kind = errors[deepest], fields[deepest] or None, str(errors[deepest]["type"])
    if kind == "extra_forbidden":
        return ApiError(400, f"{param} is not a field that this server knows; leave it out", param, "unknown_field")
    message = str(first["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        message = "it is missing"
    return ApiError(400, f"{param}: {message}" if param else f"the body: {message}; send a JSON object", param)


def _field(where: Sequence[str | int], value: Any, kind: str) -> str:
    """The name of a field, such as messages[0].content. What pydantic adds for alternatives of a type is left out."""
    name = ""
    for part in where:
        if isinstance(value, Mapping) and part in value:
            value, name = value[part], f"{name}.{part}"
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(part, int) and part < len(value):
            value, name = value[part], f"{name}[{part}]"
        elif kind == "missing" and part == where[-1]:
            name = f"{name}.{part}"
    return name.removeprefix(".")[:200]
