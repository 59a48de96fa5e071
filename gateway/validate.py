"""From the bytes of a request to something a worker can be given, or to a 400 that names the field."""

import re
from typing import Any, Final, TypeVar

import msgspec

from gateway.parameters import refuse_unsupported, unknown_names
from gateway.schemas import ChatRequest, Message
from protocol.config import GatewayConfig
from protocol.data import ChatMessage, ChatOptions, Sampling
from protocol.errors import LmxError

_ROLES: Final = frozenset({"system", "developer", "user", "assistant"})
_UNSUPPORTED_ROLES: Final = frozenset({"tool", "function"})
_INT64: Final = 2**63
_MAX_STOPS: Final = 4
_MAX_STOP_CHARS: Final = 1024
_MAX_NAME_CHARS: Final = 256
#: msgspec puts the path of the offending field at the end of its message.
_PATH: Final = re.compile(r"^(?P<text>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING: Final = re.compile(r"missing required field `(?P<field>\w+)`")

_CHAT: Final = msgspec.json.Decoder(ChatRequest)
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
T = TypeVar("T")


class ChatCall(msgspec.Struct):
    """A chat completion request that has passed every check."""

    model: str
    messages: list[ChatMessage]
    sampling: Sampling
    stream: bool
    include_usage: bool
    n: int
    options: ChatOptions | None
    #: Names of fields that nobody here knows, for the `X-LMX-Ignored` header.
    ignored: list[str]


def parse_chat(body: bytes, config: GatewayConfig) -> ChatCall:
    """Return the call in `body`; raise `LmxError` with a 400 code for anything that is not one."""
    _check_utf8(body)
    fields = _decode(_FIELDS, body)
    request = _decode(_CHAT, body)
    if not request.model:
        raise _bad("model", "must not be empty")
    refuse_unsupported(fields)
    stream = request.stream or False
    options = request.stream_options
    if options is not None and not stream:
        raise _bad("stream_options", "is only allowed with 'stream': true")
    return ChatCall(
        model=request.model,
        messages=_messages(request.messages, config.max_messages),
        sampling=_sampling(request, config),
        stream=stream,
        include_usage=options is not None and options.include_usage is True,
        n=1,
        options=None,
        ignored=unknown_names(fields),
    )


def _sampling(request: ChatRequest, config: GatewayConfig) -> Sampling:
    temperature = config.default_temperature if request.temperature is None else request.temperature
    if not 0 <= temperature <= 2:
        raise _bad("temperature", "must be between 0 and 2")
    top_p = 1.0 if request.top_p is None else request.top_p
    if not 0 < top_p <= 1:
        raise _bad("top_p", "must be above 0 and at most 1")
    if request.seed is not None and not -_INT64 <= request.seed < _INT64:
        raise _bad("seed", "must fit into 64 bits")
    return Sampling(
        max_tokens=_max_tokens(request, config.max_tokens_limit),
        temperature=temperature,
        top_p=top_p,
        seed=request.seed,
        stop=_stops(request.stop),
    )


def _max_tokens(request: ChatRequest, limit: int) -> int | None:
    given = {
        name: value
        for name, value in (
            ("max_tokens", request.max_tokens),
            ("max_completion_tokens", request.max_completion_tokens),
        )
        if value is not None
    }
    for name, value in given.items():
        if not 1 <= value <= limit:
            raise _bad(name, f"must be between 1 and {limit}")
    if len(set(given.values())) > 1:
        raise _bad("max_tokens", "differs from 'max_completion_tokens', which replaces it; send one of them")
    return next(iter(given.values()), None)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > _MAX_STOPS:
        raise _bad("stop", f"may hold at most {_MAX_STOPS} strings")
    for index, text in enumerate(stops):
        name = "stop" if isinstance(stop, str) else f"stop[{index}]"
        if not 1 <= len(text) <= _MAX_STOP_CHARS:
            raise _bad(name, f"must have 1 to {_MAX_STOP_CHARS} characters")
    return stops


def _messages(messages: list[Message], limit: int) -> list[ChatMessage]:
    if not messages:
        raise _bad("messages", "must not be empty")
    if len(messages) > limit:
        raise _bad("messages", f"may hold at most {limit} messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, where: str) -> ChatMessage:
    if message.role in _UNSUPPORTED_ROLES:
        raise _unsupported(f"{where}.role", f"The role '{message.role}' is not supported by this server.")
    if message.role not in _ROLES:
        raise _bad(f"{where}.role", "must be system, developer, user or assistant")
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise _unsupported(f"{where}.{name}", f"'{name}' in a message is not supported by this server.")
    if message.name is not None and len(message.name) > _MAX_NAME_CHARS:
        raise _bad(f"{where}.name", f"must have at most {_MAX_NAME_CHARS} characters")
    return ChatMessage(role=message.role, content=_content(message, where), name=message.name)


def _content(message: Message, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return ""
        raise LmxError("missing_field", f"'{where}.content' is missing.", param=f"{where}.content")
    texts: list[str] = []
    for index, part in enumerate(content):
        at = f"{where}.content[{index}]"
        if part.type != "text":
            raise _unsupported(f"{at}.type", "Only content parts of type 'text' are supported by this server.")
        if part.text is None:
            raise LmxError("missing_field", f"'{at}.text' is missing.", param=f"{at}.text")
        texts.append(part.text)
    return "".join(texts)


def _check_utf8(body: bytes) -> None:
    """Refuse other bytes also where no decoder would look: msgspec skips what it does not need."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise LmxError("invalid_json", f"The body is not UTF-8: see byte {error.start}.") from None


def _decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
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


def _from_validation(text: str) -> LmxError:
    found = _PATH.match(text)
    assert found is not None, "the pattern matches every text"
    reason, path = found["text"], found["path"]
    missing = _MISSING.search(reason)
    if missing:
        param = f"{path}.{missing['field']}" if path else missing["field"]
        return LmxError("missing_field", f"'{param}' is missing.", param=param)
    code = "invalid_value" if "out of range" in reason else "invalid_type"
    subject = f"'{path}'" if path else "The body"
    return LmxError(code, f"{subject}: {reason}.", param=path or None)


def _bad(param: str, rule: str) -> LmxError:
    return LmxError("invalid_value", f"'{param}' {rule}.", param=param)


def _unsupported(param: str, text: str) -> LmxError:
    return LmxError("unsupported_parameter", text, param=param)


def shorten(value: Any, limit: int = 100) -> str:
    """Return a client's name for something, safe to repeat in a message or a log."""
    text = str(value)
    text = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"
