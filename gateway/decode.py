"""From the bytes of a request to a struct, or to a 400 that names the field."""

import re
from typing import Any, Final, TypeVar

import msgspec

from gateway.weight import check_weight
from protocol.errors import LmxError

#: msgspec puts the path of the offending field at the end of its message.
_PATH: Final = re.compile(r"^(?P<text>.*?)(?: - at `(?:key` in `)?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING: Final = re.compile(r"missing required field `(?P<field>\w+)`")

#: The fields of a body, unread.
Fields = dict[str, msgspec.Raw]
_FIELDS: Final = msgspec.json.Decoder(Fields)
_LIST: Final = msgspec.json.Decoder(list[msgspec.Raw])
_ANYTHING: Final = msgspec.json.Decoder()
T = TypeVar("T")


def read(body: bytes, decoder: "msgspec.json.Decoder[T]") -> tuple[Fields, T]:
    """Return the fields of a body, and what `decoder` makes of it. Raises `LmxError` with a 400 code."""
    check_weight(body)
    _check_utf8(body)
    fields = decode(_FIELDS, body)
    return fields, decode(decoder, body)


def objects(raw: msgspec.Raw | None) -> list[Fields]:
    """Return the fields of each object in a list that has been read before; nothing if it is something else."""
    listed = _LIST.decode(raw) if raw is not None and memoryview(raw)[:1].tobytes() == b"[" else []
    return [fields for item in listed if (fields := fields_of(item))]


def fields_of(raw: msgspec.Raw | None) -> Fields:
    """Return the fields of an object that has been read before; nothing if it is something else."""
    return _FIELDS.decode(raw) if raw is not None and memoryview(raw)[:1].tobytes() == b"{" else {}


def whole(raw: msgspec.Raw, param: str, max_bytes: int) -> bytes:
    """Return a part of a body as it stands, after reading it to the end. Raises `LmxError` with a 400 code."""
    data = bytes(raw)
    if len(data) > max_bytes:
        raise bad(param, f"may have at most {max_bytes} bytes")
    try:
        _ANYTHING.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise bad(param, "is nested too deeply, or holds a number that is out of range") from None
    return data


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Return what `decoder` makes of a body. Raises `LmxError` with a 400 code."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _from_validation(str(error)) from None
    except msgspec.DecodeError as error:
        # msgspec's texts name positions and kinds, never content.
        reason = "it ends too early, or holds half a surrogate pair" if "truncated" in str(error) else str(error)
        raise LmxError("invalid_json", f"The body is not valid JSON: {reason}.") from None
    except RecursionError:
        raise LmxError("invalid_json", "The body is nested too deeply.") from None


def bad(param: str, rule: str) -> LmxError:
    """Return the error for a value that breaks a rule; `rule` begins with a verb."""
    return LmxError("invalid_value", f"'{param}' {rule}.", param=param)


def missing(param: str) -> LmxError:
    """Return the error for a field that has to be there."""
    return LmxError("missing_field", f"'{param}' is missing.", param=param)


def unsupported(param: str, text: str) -> LmxError:
    """Return the error for what LMX cannot do."""
    return LmxError("unsupported_parameter", text, param=param)


def shorten(value: Any, limit: int = 100) -> str:
    """Return a client's name for something, safe to repeat in a message or a log."""
    text = str(value)
    text = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"


def _check_utf8(body: bytes) -> None:
    """Refuse other bytes also where no decoder would look: msgspec skips what it does not need."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise LmxError("invalid_json", f"The body is not UTF-8: see byte {error.start}.") from None


def _from_validation(text: str) -> LmxError:
    found = _PATH.match(text)
    assert found is not None, "the pattern matches every text"
    reason, path = found["text"], (found["path"] or "").replace("[...]", "")
    absent = _MISSING.search(reason)
    if absent:
        return missing(f"{path}.{absent['field']}" if path else absent["field"])
    code = "invalid_value" if "out of range" in reason else "invalid_type"
    subject = f"'{path}'" if path else "The body"
    return LmxError(code, f"{subject}: {reason}.", param=path or None)
