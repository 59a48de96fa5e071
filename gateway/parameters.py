"""What happens to each chat parameter of the OpenAI reference that LMX does not implement. No parameter is ignored in
silence: it is refused by name, or known to have no effect here, or named in the `X-LMX-Ignored` header.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from gateway.schemas import ChatRequest
from protocol.errors import LmxError

#: Parameter -> the values that ask for nothing; null always does. Any other value is refused.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "modalities": (["text"],),
        "n": (1,),
        "prediction": (),
        "presence_penalty": (0,),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)

#: Accepted: they steer OpenAI's bookkeeping, not the answer.
WITHOUT_EFFECT: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

_SUPPORTED: Final = frozenset(ChatRequest.__struct_fields__)
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_NAMES: Final = 16
_NUMBER: Final = (int, float)


def refuse_unsupported(fields: Mapping[str, msgspec.Raw]) -> None:
    """Raise `unsupported_parameter` for the first parameter of `fields` that asks for what LMX cannot do."""
    for name in fields.keys() & NEUTRAL_VALUES.keys():
        value = msgspec.json.decode(fields[name])
        if value is None or any(_same(value, neutral) for neutral in NEUTRAL_VALUES[name]):
            continue
        raise LmxError("unsupported_parameter", _refusal(name, value), param=name)


def unknown_names(names: Iterable[str]) -> list[str]:
    """Return the names that no table here knows, in the order given."""
    return [n for n in names if n not in _SUPPORTED and n not in NEUTRAL_VALUES and n not in WITHOUT_EFFECT]


def ignored_header(unknown: Sequence[str]) -> bytes:
    """Return the value of `X-LMX-Ignored`: at most 16 names; one that is unsafe in a header is a question mark."""
    names = [name if _SAFE_NAME.fullmatch(name) else "?" for name in unknown[:_MAX_NAMES]]
    if len(unknown) > _MAX_NAMES:
        names.append("...")
    return ", ".join(names).encode("ascii")


def _same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does: `true` is not 1, but 1.0 is."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    if isinstance(value, _NUMBER) and isinstance(neutral, _NUMBER):
        return value == neutral
    return type(value) is type(neutral) and bool(value == neutral)


def _refusal(name: str, value: Any) -> str:
    if name == "response_format" and isinstance(value, dict) and value.get("type") in {"json_schema", "json_object"}:
        # LangChain recognises this sentence and falls back to prompting.
        return f"'response_format' of type '{value['type']}' is not supported with this model."
    return f"'{name}' is not supported by this server; leave it out."
