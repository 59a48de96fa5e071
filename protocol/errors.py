"""One table of every error a client or operator can meet; HTTP answers, worker refusals and docs are made from it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

#: `Retry-After` is never larger: openai-python ignores values above 120 s.
MAX_RETRY_AFTER_S: Final = 120


class ErrorSpec(msgspec.Struct, frozen=True):
    """One row: `type` is OpenAI's, `title` the same for each occurrence, `retry_after_s` the default header."""

    code: str
    status: int
    type: str
    title: str
    retry_after_s: int | None = None


_INVALID = "invalid_request_error"
_SERVER = "server_error"

_ROWS: Final = (
    ErrorSpec("invalid_json", 400, _INVALID, "The body is not valid JSON"),
    ErrorSpec("invalid_type", 400, _INVALID, "A field has the wrong type"),
    ErrorSpec("invalid_value", 400, _INVALID, "A field has a value that is not allowed"),
    ErrorSpec("missing_field", 400, _INVALID, "A required field is missing"),
    ErrorSpec("unsupported_parameter", 400, _INVALID, "This server does not support that parameter"),
    ErrorSpec("invalid_config", 400, _INVALID, "The configuration cannot be used"),
    ErrorSpec("context_length_exceeded", 400, _INVALID, "The prompt is longer than the model's context"),
    ErrorSpec("request_too_large", 400, _INVALID, "The request needs more memory than the model's process has"),
    ErrorSpec("invalid_api_key", 401, "authentication_error", "The API key is missing or wrong"),
    ErrorSpec("invalid_client_signature", 401, "authentication_error", "The client's signature is not good"),
    ErrorSpec("forbidden", 403, "permission_error", "That needs another key"),
    ErrorSpec("model_not_found", 404, _INVALID, "No such model is loaded"),
    ErrorSpec("not_found", 404, _INVALID, "No such route"),
    ErrorSpec("crash_not_found", 404, _INVALID, "There is no such crash"),
    ErrorSpec("method_not_allowed", 405, _INVALID, "The route has no such method"),
    ErrorSpec("request_timeout", 408, _INVALID, "The request took too long to arrive"),
    ErrorSpec("conflict", 409, _INVALID, "That is not possible in the present state"),
    ErrorSpec("body_too_large", 413, _INVALID, "The body is too large"),
    ErrorSpec("host_not_allowed", 421, _INVALID, "This server does not answer to that host"),
    ErrorSpec("model_unusable", 422, _INVALID, "The model cannot be loaded"),
    ErrorSpec("request_quarantined", 422, _INVALID, "This request ended its model's process more than once"),
    ErrorSpec("rate_limit_exceeded", 429, "rate_limit_error", "Too many requests", 5),
    ErrorSpec("server_busy", 429, "rate_limit_error", "All slots and the queue are taken", 5),
    ErrorSpec("internal_error", 500, _SERVER, "The server failed"),
    ErrorSpec("protocol_error", 502, _SERVER, "The model's process sent something unreadable", 5),
    ErrorSpec("access_check_failed", 503, _SERVER, "Whether the request is allowed cannot be checked", 5),
    ErrorSpec("load_shedding", 503, _SERVER, "The machine is short of memory", 10),
    ErrorSpec("insufficient_memory", 503, _SERVER, "The model does not fit into memory", 60),
    ErrorSpec("model_loading", 503, _SERVER, "The model is being loaded", 5),
    ErrorSpec("model_restarting", 503, _SERVER, "The model's process is being replaced", 5),
    ErrorSpec("model_quarantined", 503, _SERVER, "The model was set aside after repeated failures", 120),
    ErrorSpec("worker_crashed", 503, _SERVER, "The model's process ended before the answer did", 2),
    ErrorSpec("supervisor_unavailable", 503, _SERVER, "The supervisor does not answer", 5),
    ErrorSpec("audit_unavailable", 503, _SERVER, "The record of requests cannot be read", 5),
    ErrorSpec("shutting_down", 503, _SERVER, "The server is stopping", 10),
    ErrorSpec("timeout", 504, _SERVER, "The answer took longer than the limit"),
)

#: Every error by its code.
ERRORS: Final[Mapping[str, ErrorSpec]] = MappingProxyType({row.code: row for row in _ROWS})


class LmxError(Exception):
    """An error a client is told about. `code` is a key of `ERRORS`; the message tells the person what to do.

    Messages are written by us from names, numbers and limits; they never quote a prompt, an answer or a key.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.spec = ERRORS[code]
        self.message = message
        self.param = param
        wait = self.spec.retry_after_s if retry_after_s is None else retry_after_s
        self.retry_after_s = None if wait is None else max(1, min(wait, MAX_RETRY_AFTER_S))

    @property
    def code(self) -> str:
        """The code, as clients see it."""
        return self.spec.code


def from_peer(code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> LmxError:
    """Return the error a peer reported; a code that this version does not know becomes `internal_error`."""
    known = code if code in ERRORS else "internal_error"
    return LmxError(known, message, param=param, retry_after_s=retry_after_s)


def envelope(error: LmxError, request_id: str) -> dict[str, Any]:
    """Return OpenAI's error object, all four keys and the request id."""
    return {
        "error": {
            "message": error.message,
            "type": error.spec.type,
            "param": error.param,
            "code": error.code,
            "request_id": request_id,
        }
    }


def problem(error: LmxError, request_id: str) -> dict[str, Any]:
    """Return RFC 9457 problem details."""
    return {
        "type": f"urn:lmx:error:{error.code}",
        "title": error.spec.title,
        "status": error.spec.status,
        "detail": error.message,
        "code": error.code,
        "param": error.param,
        "request_id": request_id,
    }
