"""The options of a conversation, read from their JSON and checked. IO thread only."""

from typing import Any

import msgspec

from protocol.data import ChatOptions, ToolChoice
from protocol.errors import LmxError
from protocol.rules import MAX_TEMPLATE_ARGS_BYTES, MAX_TOOLS, RESERVED_ARGS, TOOL_NAME


class Wanted(msgspec.Struct, frozen=True):
    """What a request asks for besides sampling. `tools` are those that the model is shown, none for choice `none`."""

    tools: tuple[dict[str, Any], ...] = ()
    #: Those one of which must be called.
    forced: tuple[dict[str, Any], ...] = ()
    parallel: bool = True
    #: None: free text; empty: any object.
    schema: bytes | None = None
    template_args: dict[str, Any] = {}
    reasoning: bool | None = None
    effort: str = ""
    truncate: bool = False


def read_options(options: ChatOptions | None) -> Wanted:
    """Return the options, checked as far as no model is needed; raise `LmxError` by the parameter's name."""
    if options is None:
        return Wanted()
    tools = _read_tools(options.tools)
    forced: tuple[dict[str, Any], ...] = ()
    if options.tool_choice is ToolChoice.NAMED:
        forced = tuple(tool for tool in tools if tool["function"]["name"] == options.tool_name)
        if not forced:
            raise LmxError("invalid_value", "tool_choice names a function that is not in tools", param="tool_choice")
    elif options.tool_choice is ToolChoice.REQUIRED:
        forced = tools
        if not tools:
            raise LmxError("invalid_value", "tool_choice requires a call, but there are no tools", param="tool_choice")
    elif options.tool_choice is ToolChoice.NONE:
        tools = ()
    schema = (options.json_schema or b"") if options.json_object or options.json_schema else None
    if tools and not forced and schema is not None:
        words = "response_format beside tools would forbid every call: set tool_choice to none or required"
        raise LmxError("invalid_value", words, param="response_format")
    return Wanted(
        tools=tools,
        forced=forced,
        parallel=options.parallel_tool_calls,
        schema=None if forced else schema,
        template_args=_read_template_args(options.template_args),
        reasoning=options.reasoning,
        effort=options.reasoning_effort,
        truncate=options.truncate_oldest,
    )


def _read_tools(encoded: bytes) -> tuple[dict[str, Any], ...]:
    if not encoded:
        return ()
    try:
        tools = msgspec.json.decode(encoded, type=list[dict[str, Any]])
    except (msgspec.MsgspecError, RecursionError):
        raise LmxError("invalid_type", "tools must be a list of objects", param="tools") from None
    if len(tools) > MAX_TOOLS:
        raise LmxError("invalid_value", f"tools takes at most {MAX_TOOLS} tools", param="tools")
    names: set[str] = set()
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise LmxError("invalid_value", f"{where} must be of type function", param=where)
        name = function.get("name")
        if not isinstance(name, str) or TOOL_NAME.fullmatch(name) is None:
            words = f"{where}.function.name must be 1 to 64 letters, digits, dashes or underscores"
            raise LmxError("invalid_value", words, param=f"{where}.function.name")
        if name in names:
            raise LmxError("invalid_value", f"{where} has the name of another tool", param=f"{where}.function.name")
        names.add(name)
        if not isinstance(function.get("parameters") or {}, dict):
            words = f"{where}.function.parameters must be a JSON schema"
            raise LmxError("invalid_value", words, param=f"{where}.function.parameters")
    return tuple(tools)


def _read_template_args(encoded: bytes) -> dict[str, Any]:
    param = "chat_template_kwargs"
    if not encoded:
        return {}
    if len(encoded) > MAX_TEMPLATE_ARGS_BYTES:
        raise LmxError("invalid_value", f"{param} has at most {MAX_TEMPLATE_ARGS_BYTES // 1024} KiB", param=param)
    try:
        arguments = msgspec.json.decode(encoded, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise LmxError("invalid_type", f"{param} must be an object", param=param) from None
    for name in arguments:
        if name in RESERVED_ARGS:
            raise LmxError("invalid_value", f"{param} may not set {name}", param=param)
    return arguments
