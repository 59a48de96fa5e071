"""What happens to each parameter of each endpoint. None is ignored in silence: it is supported, or refused by name, or
known to have no effect here, or named in the `X-LMX-Ignored` header. `docs/api.md` is generated from these tables.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, get_args

import msgspec

from gateway.decode import Fields, fields_of, objects, unsupported
from gateway.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
)
from protocol.errors import LmxError

Neutral = Mapping[str, tuple[Any, ...]]
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_NAMES: Final = 16
_NUMBER: Final = (int, float)
Nested = Mapping[str, type[msgspec.Struct]]


class Parameters(NamedTuple):
    """Of one endpoint. `neutral`: refused, but for the values that ask for nothing, and null, which always does."""

    request: type[msgspec.Struct]
    neutral: Neutral
    #: Accepted: they steer bookkeeping, not the answer.
    without_effect: frozenset[str]

    @property
    def supported(self) -> tuple[str, ...]:
        """Names of the parameters that do something."""
        return self.request.__struct_fields__


_BOOKKEEPING: Final = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

CHAT: Final = Parameters(
    ChatRequest,
    MappingProxyType(
        {
            "audio": (),
            "chat_template": (),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "modalities": (["text"],),
            "moderation": (),
            "prediction": (),
            "verbosity": ("medium",),
            "web_search_options": (),
        }
    ),
    _BOOKKEEPING,
)
COMPLETION: Final = Parameters(CompletionRequest, MappingProxyType({"suffix": ("",)}), _BOOKKEEPING)
TOKENIZE: Final = Parameters(
    TokenizeRequest,
    MappingProxyType(
        {
            "add_generation_prompt": (True,),
            "add_special_tokens": (True,),
            "chat_template": (),
            "continue_final_message": (False,),
            "return_token_strs": (False,),
        }
    ),
    frozenset(),
)
DETOKENIZE: Final = Parameters(DetokenizeRequest, MappingProxyType({}), frozenset())
EMBEDDING: Final = Parameters(EmbeddingRequest, MappingProxyType({}), frozenset({"user"}))
RERANK: Final = Parameters(
    RerankRequest,
    MappingProxyType({"max_chunks_per_doc": (), "max_tokens_per_doc": (), "rank_fields": ([],)}),
    frozenset(),
)

#: What to use in place of something that is refused.
_INSTEAD: Final[Mapping[str, str]] = MappingProxyType(
    {
        "functions": "use 'tools' instead",
        "function_call": "use 'tool_choice' instead",
        "chat_template": "the model's own is used; 'chat_template_kwargs' sets its variables",
    }
)


def settle(parameters: Parameters, fields: Fields, *, strict: bool) -> list[str]:
    """Refuse what an endpoint cannot do; return the names of the fields that nobody here knows, nested ones with dots.

    With `strict` those are refused too. Raises `LmxError`.
    """
    for name in fields.keys() & parameters.neutral.keys():
        value = msgspec.json.decode(fields[name])
        if value is not None and not any(_same(value, neutral) for neutral in parameters.neutral[name]):
            text = f"'{name}' is not supported by this server; {_INSTEAD.get(name, 'leave it out')}."
            raise unsupported(name, text)
    passed = parameters.neutral.keys() | parameters.without_effect
    names = list(dict.fromkeys(name for name in _unknown(parameters.request, fields) if name not in passed))
    if strict and names:
        shown = names[0] if _SAFE_NAME.fullmatch(names[0]) else "?"
        text = f"'{shown}' is not a parameter that this server knows; leave it out."
        raise LmxError("unsupported_parameter", text, param=shown)
    return names


def ignored_header(unknown: Sequence[str]) -> bytes:
    """Return the value of `X-LMX-Ignored`: at most 16 names; one that is unsafe in a header is a question mark."""
    names = [name if _SAFE_NAME.fullmatch(name) else "?" for name in unknown[:_MAX_NAMES]]
    if len(unknown) > _MAX_NAMES:
        names.append("...")
    return ", ".join(names).encode("ascii")


def _unknown(kind: type[msgspec.Struct], fields: Fields, prefix: str = "") -> Iterator[str]:
    nested = _NESTED[kind]
    for name, raw in fields.items():
        if name in nested:
            for inner in objects(raw) or (fields_of(raw),):
                yield from _unknown(nested[name], inner, f"{prefix}{name}.")
        elif name not in kind.__struct_fields__:
            yield prefix + name


def _structs_in(annotation: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        yield annotation
    for inner in get_args(annotation):
        yield from _structs_in(inner)


def _nested(kinds: Sequence[type[msgspec.Struct]]) -> Mapping[type[msgspec.Struct], Nested]:
    """Return, for each struct and all that it is made of, which of its fields hold structs."""
    found: dict[type[msgspec.Struct], Nested] = {}
    todo = list(kinds)
    while todo:
        kind = todo.pop()
        if kind not in found:
            inner = {field.name: struct for field in msgspec.structs.fields(kind) for struct in _structs_in(field.type)}
            found[kind] = inner
            todo += inner.values()
    return MappingProxyType(found)


_NESTED: Final = _nested(
    [CHAT.request, COMPLETION.request, TOKENIZE.request, DETOKENIZE.request, EMBEDDING.request, RERANK.request]
)


def _same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does: `true` is not 1, but 1.0 is."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    if isinstance(value, _NUMBER) and isinstance(neutral, _NUMBER):
        return value == neutral
    return type(value) is type(neutral) and bool(value == neutral)
