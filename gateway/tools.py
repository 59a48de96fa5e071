"""What shapes an answer besides its tokens: tools, a format, thinking, the variables of the chat template."""

from typing import Final

from gateway.decode import Fields, bad, fields_of, missing, unsupported, whole
from gateway.schemas import ChatRequest, ChosenTool, Tool
from protocol.config import GatewayConfig
from protocol.data import ChatOptions, ToolChoice
from protocol.errors import LmxError
from protocol.rules import MAX_TEMPLATE_ARGS_BYTES, MAX_TOOLS, RESERVED_ARGS, TOOL_NAME

#: Coding agents send a tenth of that.
MAX_TOOLS_BYTES: Final = 1024 * 1024
MAX_SCHEMA_BYTES: Final = 256 * 1024
NAME_RULE: Final = "must have 1 to 64 letters, digits, dashes or underscores"
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh")
TRUNCATIONS: Final = ("none", "oldest")
CHOICES: Final = ("none", "auto", "required")


def options(request: ChatRequest, fields: Fields, config: GatewayConfig) -> ChatOptions:
    """Return what shapes the answer; raise `LmxError` that names the field."""
    choice, name = _choice(request.tool_choice, request.tools or [])
    json_object, schema = _format(request)
    return ChatOptions(
        tools=definitions(request.tools, fields),
        tool_choice=choice,
        tool_name=name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        json_object=json_object,
        json_schema=schema,
        template_args=template_args(fields),
        reasoning=request.enable_thinking,
        reasoning_effort=_effort(request),
        truncate_oldest=_truncation(request.truncation, config) == "oldest",
    )


def definitions(tools: list[Tool] | None, fields: Fields) -> bytes:
    """Return the tools as they stand in the body, checked."""
    if not tools:
        return b""
    if len(tools) > MAX_TOOLS:
        raise bad("tools", f"may hold at most {MAX_TOOLS} tools")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        at = f"tools[{index}]"
        if tool.type != "function":
            raise unsupported(f"{at}.type", "Only tools of type 'function' are supported by this server.")
        if tool.function is None:
            raise missing(f"{at}.function")
        if not TOOL_NAME.fullmatch(tool.function.name):
            raise bad(f"{at}.function.name", NAME_RULE)
        if tool.function.name in names:
            raise bad(f"{at}.function.name", "is the name of another tool too")
        names.add(tool.function.name)
    return whole(fields["tools"], "tools", MAX_TOOLS_BYTES)


def template_args(fields: Fields) -> bytes:
    """Return the variables for the chat template."""
    given = fields_of(fields.get("chat_template_kwargs"))
    for name in given:
        if name in RESERVED_ARGS:
            text = f"'{name}' cannot be set through 'chat_template_kwargs'."
            raise unsupported(f"chat_template_kwargs.{name}", text)
    if not given:
        return b""
    return whole(fields["chat_template_kwargs"], "chat_template_kwargs", MAX_TEMPLATE_ARGS_BYTES)


def _choice(choice: str | ChosenTool | None, tools: list[Tool]) -> tuple[ToolChoice, str]:
    if choice is None:
        return ToolChoice.AUTO, ""
    if isinstance(choice, str):
        if choice not in CHOICES:
            raise bad("tool_choice", "must be none, auto, required, or name a function")
        if choice == "required" and not tools:
            raise bad("tool_choice", "must not be 'required' without 'tools'")
        return ToolChoice[choice.upper()], ""
    if choice.type != "function":
        raise unsupported("tool_choice.type", "Only a tool_choice of type 'function' is supported by this server.")
    if choice.function is None:
        raise missing("tool_choice.function")
    name = choice.function.name
    if not any(tool.function is not None and tool.function.name == name for tool in tools):
        raise bad("tool_choice.function.name", "must be the name of one of 'tools'")
    return ToolChoice.NAMED, name


def _format(request: ChatRequest) -> tuple[bool, bytes]:
    """Return whether the answer is any object, and the schema that it has to follow."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return False, b""
    if wanted.type == "json_object":
        return True, b""
    if wanted.type != "json_schema":
        raise unsupported("response_format.type", "'response_format' must be of type text, json_object or json_schema.")
    given = wanted.json_schema
    if given is None:
        raise missing("response_format.json_schema")
    if not TOOL_NAME.fullmatch(given.name):
        raise bad("response_format.json_schema.name", NAME_RULE)
    at = "response_format.json_schema.schema"
    if bytes(given.schema) in {b"", b"null"}:
        return True, b""
    if not bytes(given.schema).startswith(b"{"):
        raise LmxError("invalid_type", f"'{at}' must be an object.", param=at)
    return False, whole(given.schema, at, MAX_SCHEMA_BYTES)


def _effort(request: ChatRequest) -> str:
    """Return how much the model should think; the worker knows what its template can say."""
    effort = request.reasoning_effort
    if effort is None:
        return ""
    if effort not in EFFORTS:
        raise bad("reasoning_effort", f"must be {', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}")
    if request.enable_thinking is not None and request.enable_thinking is (effort == "none"):
        raise bad("enable_thinking", "contradicts 'reasoning_effort'; send one of them")
    return effort


def _truncation(given: str | None, config: GatewayConfig) -> str:
    if given is None:
        return config.truncation
    if given not in TRUNCATIONS:
        raise bad("truncation", f"must be {' or '.join(TRUNCATIONS)}")
    return given
