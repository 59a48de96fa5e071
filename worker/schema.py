"""What a JSON schema may be before a grammar is made of it: bounds on everything that the making could spend.

llguidance compiles with bounds of its own, but a chain of a thousand references overflows its stack and ends the
process, and a handful of patterns that apply to one string take seconds. Pure.
"""

import math
from typing import Any, Final

import msgspec

from protocol.errors import LmxError

MAX_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 64
#: Objects and arrays in the schema, each of which becomes at least one rule.
MAX_NODES: Final = 4_000
MAX_PROPERTIES: Final = 400
MAX_REFERENCES: Final = 200
MAX_ENUM_VALUES: Final = 2_000
#: A value of enum or const as JSON, in characters.
MAX_LITERAL_CHARS: Final = 4_096
MAX_PATTERN_CHARS: Final = 256
MAX_PATTERNS: Final = 64
#: Patterns where several may apply to one string, which is an intersection of automata.
MAX_JOINED_PATTERNS: Final = 4
#: The significant digits of all multipleOf as whole numbers, added up; where several may apply to one number,
#: multiplied: as many states has the automaton.
MAX_MULTIPLES: Final = 10_000

_JOINED_KEYS: Final = ("pattern", "patternProperties", "multipleOf")


def check_schema(schema: bytes, param: str) -> dict[str, Any]:
    """Return the schema as an object; raise `LmxError` that says which bound it passes. True is any value."""
    if len(schema) > MAX_BYTES:
        raise _refused(f"is larger than {MAX_BYTES // 1024} KiB", param)
    try:
        decoded = msgspec.json.decode(schema)
    except (msgspec.DecodeError, RecursionError):
        raise _refused(f"is no JSON, or nested more than {MAX_DEPTH} levels deep", param) from None
    if decoded is True:
        return {}
    if not isinstance(decoded, dict):
        raise _refused("must be an object", param)
    _Census(param).take(decoded)
    return decoded


def _refused(why: str, param: str) -> LmxError:
    return LmxError("invalid_value", f"The JSON schema {why}", param=param)


class _Census:
    """Counts what is in a schema. Keywords and names of properties are not told apart: a bound is a bound."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._nodes = self._references = self._patterns = self._enums = 0
        self._multiples: list[int] = []
        self._joins = False

    def take(self, schema: dict[str, Any]) -> None:
        """Raise `LmxError` for the first bound that is passed."""
        level: list[Any] = [schema]
        depth = 0
        while level:
            depth += 1
            self._bound(depth, MAX_DEPTH, "levels of nesting")
            below: list[Any] = []
            for node in level:
                self._nodes += 1
                self._bound(self._nodes, MAX_NODES, "objects and lists")
                if isinstance(node, dict):
                    self._take_object(node)
                values = _inner(node)
                below += [value for value in values if isinstance(value, dict | list)]
            level = below
        self._bound(self._patterns, MAX_PATTERNS, "patterns")
        if self._joins:
            self._bound(self._patterns, MAX_JOINED_PATTERNS, "patterns beside allOf, $ref or patternProperties")
        together = math.prod(self._multiples) if self._joins else sum(self._multiples)
        self._bound(together, MAX_MULTIPLES, "as the digits of multipleOf together")

    def _take_object(self, node: dict[str, Any]) -> None:
        properties = node.get("properties")
        if isinstance(properties, dict):
            self._bound(len(properties), MAX_PROPERTIES, "properties of one object")
        self._take_literals(node)
        reference = node.get("$ref")
        if isinstance(reference, str):
            self._references += 1
            self._bound(self._references, MAX_REFERENCES, "references")
            if not reference.startswith("#"):
                raise _refused(
                    "refers to another document; only references within it ('#/…') are followed", self._param
                )
            self._joins |= any(key in node for key in _JOINED_KEYS)
        self._take_patterns(node)
        multiple = node.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            digits = f"{abs(multiple):.12f}".rstrip("0").replace(".", "").lstrip("0")
            self._multiples.append(int(digits or 1))

    def _take_literals(self, node: dict[str, Any]) -> None:
        values = node.get("enum")
        literals = list(values) if isinstance(values, list) else []
        if "const" in node:
            literals.append(node["const"])
        self._enums += len(literals)
        self._bound(self._enums, MAX_ENUM_VALUES, "values in enum and const")
        for literal in literals:
            self._bound(
                len(msgspec.json.encode(literal)), MAX_LITERAL_CHARS, "characters in one value of enum or const"
            )

    def _take_patterns(self, node: dict[str, Any]) -> None:
        patterns = [node["pattern"]] if isinstance(node.get("pattern"), str) else []
        by_pattern = node.get("patternProperties")
        if isinstance(by_pattern, dict):
            patterns += by_pattern
            self._joins |= len(by_pattern) > 1
        self._patterns += len(patterns)
        for pattern in patterns:
            self._bound(len(pattern), MAX_PATTERN_CHARS, "characters in one pattern")
        self._joins |= "allOf" in node

    def _bound(self, number: int, most: int, what: str) -> None:
        if number > most:
            raise _refused(f"is too complex: at most {most:,} {what}", self._param)


def _inner(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node
