"""Errors as OpenAI's API shapes them: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from miaobi.errors import brief

TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
         503: "server_error"}  # fmt: skip
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class APIError(Exception):
    """An answer that is no success."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As an answer."""
        return json_response(self.body, self.status, self.headers)


def refused(message: str, param: str | None, code: str = "invalid_value") -> APIError:
    """The client's mistake in a field."""
    return APIError(400, message, code, param)


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8; where a text has half a character (a lone surrogate), in ASCII."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(json_bytes(value), status, headers, "application/json")


def of_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """Of what pydantic found wrong: the mistake that lies deepest, where alternatives were tried."""
    if any(error["type"] == "json_invalid" for error in errors):
        return APIError(400, "the body is not JSON: " + str(errors[0].get("ctx", {}).get("error", ""))[:200],
                        "invalid_json")  # fmt: skip
    error = max(errors, key=lambda e: (len(path_in_body(e["loc"], body)), not e["type"].endswith("_type")))
    where, kind = path_in_body(error["loc"], body), error["type"]
    param = ".".join(map(str, where)) or None
    if not where and kind != "missing":
        return APIError(400, "the body must be a JSON object, sent with Content-Type: application/json", "invalid_type")
    if kind == "missing":
        return refused(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    is_type = kind.endswith(("_type", "_parsing")) or kind == "int_from_float"
    value = brief(error.get("input"))
    return refused(f"Invalid {'type' if is_type else 'value'} for '{param}': {error['msg']}, but it is {value}.", param,
                   "invalid_type" if is_type else "invalid_value")  # fmt: skip


def path_in_body(loc: Sequence[str | int], body: Any) -> list[str | int]:
    """The steps of pydantic's location that lead through the body; names of alternatives are none."""
    found: list[str | int] = []
    for step in loc[1:] if loc[:1] == ("body",) else loc:
        is_key = isinstance(body, dict) and isinstance(step, str) and step in body
        is_index = isinstance(body, list) and isinstance(step, int) and step < len(body)
        if is_key or is_index:
            found.append(step)
            body = body[step]
        elif isinstance(body, dict) and step == loc[-1] and isinstance(step, str):
            found.append(step)  # it is missing
    return found


async def on_api_error(_: Request, error: APIError) -> Response:
    """Handler."""
    return error.response()


async def on_http_error(_: Request, error: HTTPException) -> Response:
    """Handler: paths and methods that there are not, bodies that cannot be parsed."""
    code = CODES.get(error.status_code, "invalid_request")
    return APIError(error.status_code, str(error.detail), code, headers=error.headers).response()
