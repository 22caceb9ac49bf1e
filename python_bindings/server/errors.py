"""Errors in OpenAI's form: a status and {"error": {"message", "type", "param", "code"}}.

>>> from blockffn.server.errors import ApiError
>>> ApiError(400, "n: expected 1 to 8, found 9", param="n").body()["error"]["type"]
'invalid_request_error'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
LONGEST = 120  # characters of a value that a message repeats


class ApiError(Exception):
    """A request that is refused; `retry_after` in seconds becomes the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Return the answer to the client."""
        sent = dict(headers or {})
        if self.retry_after is not None:
            sent["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            sent["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=sent)


def invalid(error: ValidationError) -> ApiError:
    """Return the first finding of pydantic as an error that names the field and what was found there."""
    finding = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in finding["loc"])
    message = finding["msg"]
    if finding["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: unknown field", param=where, code="unknown_field")
    if finding["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {message.partition(': ')[2] or message}", code="invalid_json")
    found = "" if finding["type"] == "missing" else f", found {shortened(finding['input'])}"
    return ApiError(400, f"{where or 'body'}: {message}{found}", param=where or None)


def shortened(value: Any) -> str:
    """Return a value as it may stand in a message."""
    text = repr(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
