"""The turns of a conversation, reduced to what a chat template takes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.decode import bad, missing, unsupported
from gateway.schemas import ContentPart, Message, MessageToolCall
from protocol.data import ChatMessage, ToolCall

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_MAX_NAME_CHARS: Final = 256
_MAX_CALLS: Final = 128
#: Kind of a content part -> what it is, for the words of the refusal.
_MEDIA: Final[Mapping[str, str]] = MappingProxyType(
    {
        "image_url": "Images are",
        "input_image": "Images are",
        "input_audio": "Audio is",
        "video_url": "Videos are",
        "file": "Files are",
        "input_file": "Files are",
    }
)


def conversation(messages: list[Message], limit: int) -> list[ChatMessage]:
    """Return the turns; raise `LmxError` that names the field."""
    if not messages:
        raise bad("messages", "must not be empty")
    if len(messages) > limit:
        raise bad("messages", f"may hold at most {limit} messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, where: str) -> ChatMessage:
    role = message.role
    if role == "function":
        raise unsupported(f"{where}.role", "The role 'function' is not supported by this server; use 'tool'.")
    if role not in ROLES:
        raise bad(f"{where}.role", "must be system, developer, user, assistant or tool")
    if message.function_call is not None:
        text = "'function_call' in a message is not supported by this server; use 'tool_calls'."
        raise unsupported(f"{where}.function_call", text)
    if message.audio is not None:
        raise unsupported(f"{where}.audio", "Audio is not supported by this server.")
    for name, value in (("name", message.name), ("tool_call_id", message.tool_call_id)):
        if value is not None and len(value) > _MAX_NAME_CHARS:
            raise bad(f"{where}.{name}", f"must have at most {_MAX_NAME_CHARS} characters")
    if role == "tool" and not message.tool_call_id:
        raise missing(f"{where}.tool_call_id")
    if role != "assistant" and message.tool_calls:
        raise bad(f"{where}.tool_calls", "is only allowed in a message of the assistant")
    is_assistant = role == "assistant"
    return ChatMessage(
        role=role,
        content=_content(message, where),
        name=message.name,
        tool_calls=tuple(_calls(message.tool_calls or [], f"{where}.tool_calls")),
        tool_call_id=message.tool_call_id if role == "tool" else None,
        reasoning=(message.reasoning_content or message.reasoning) if is_assistant else None,
    )


def _calls(calls: list[MessageToolCall], where: str) -> list[ToolCall]:
    if len(calls) > _MAX_CALLS:
        raise bad(where, f"may hold at most {_MAX_CALLS} calls")
    found = []
    for index, call in enumerate(calls):
        at = f"{where}[{index}]"
        if call.type != "function":
            raise unsupported(f"{at}.type", "Only calls of type 'function' are supported by this server.")
        if call.function is None:
            raise missing(f"{at}.function")
        if not 1 <= len(call.function.name) <= _MAX_NAME_CHARS:
            raise bad(f"{at}.function.name", f"must have 1 to {_MAX_NAME_CHARS} characters")
        found.append(ToolCall(call.id, call.function.name, call.function.arguments))
    return found


def _content(message: Message, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return message.refusal or ""
        raise missing(f"{where}.content")
    return "".join(_part(part, message.role, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: ContentPart, role: str, where: str) -> str:
    if part.type == "text":
        if part.text is None:
            raise missing(f"{where}.text")
        return part.text
    if part.type == "refusal" and role == "assistant":
        if part.refusal is None:
            raise missing(f"{where}.refusal")
        return part.refusal
    what = _MEDIA.get(part.type)
    if what is not None:
        raise unsupported(f"{where}.type", f"{what} not supported by this model; content parts must be of type 'text'.")
    raise unsupported(f"{where}.type", "Only content parts of type 'text' are supported by this server.")
