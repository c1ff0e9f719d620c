"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from runtime.errors import PromptError, SamplingError, ServingError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout",
}
_FIELD = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*): ")


class ApiError(Exception):
    """A request that gets no answer; the message is one line that says what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: ServingError) -> ApiError:
        """Return what the runtime's own errors are over HTTP: 400 where the request is wrong, else 500."""
        message = str(error)
        if not isinstance(error, PromptError | SamplingError):
            return cls(500, message)
        field = _FIELD.match(message)
        return cls(400, message, param=field[1] if field else None)

    @property
    def content(self) -> dict[str, Any]:
        """The body, as JSON has it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The body."""
        return json.dumps(self.content, ensure_ascii=False).encode()

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.content, self.status, self.headers)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is no answer."""

    error: ErrorDetail


async def answer_api_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with an `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer for routes and methods that are not there."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # what FastAPI says of a body that no parser takes
        return ApiError(400, "body: cannot be read, expected JSON in UTF-8").response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Answer for a body that is not what its route takes: the first mistake, by its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    is_field = first["type"] != "json_invalid"  # which tells a place in the text
    param = first.get("ctx", {}).get("field") or (_path(first["loc"]) if is_field else "") or None
    return ApiError(400, f"{param or 'body'}: {_explained(first)}", param=param).response()


def _path(loc: tuple[int | str, ...]) -> str:
    """Return `messages[0].content` of pydantic's `("body", "messages", 0, "content", "str")`."""
    text = ""
    for part in loc[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_]\w*", part) and part not in _UNION_TAGS:
            text += f".{part}" if text else part
    return text


_UNION_TAGS = frozenset({"str", "int", "float", "bool", "list", "dict"})


def _explained(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "is not a field of this route; leave it out"
    if kind == "missing":
        return "is missing"
    if kind == "json_invalid":
        return f"is not JSON at character {error['loc'][-1]}"
    message = str(error["msg"])
    return message[0].lower() + message[1:]
