"""Bodies that a client might send: right ones, and random ones of names that mean something."""

import random
from collections.abc import Iterator
from typing import Any

from gateway.parameters import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"prompt": "Once"},
    "/v1/tokenize": {"prompt": "Once"},
    "/v1/detokenize": {"tokens": [1]},
}
NAMES = sorted(
    {name for table in (CHAT, COMPLETION, TOKENIZE, DETOKENIZE) for name in (*table.supported, *table.neutral)}
)
WORDS = ("user", "tool", "function", "json_schema", "required", "oldest", "text", "image_url", "", "x", "\u2028", "\0")


def value(rng: random.Random, depth: int = 0) -> Any:
    """Return some JSON, nested a little, with names that mean something."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(WORDS)
    if kind < 4:
        return rng.choice([0, 1, -1, 2, 16, 17, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5.0])
    if kind < 6:
        return rng.choice([None, True, False, [], {}])
    inner = [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 8:
        return {rng.choice((*NAMES, "role", "content", "type", "name", "arguments", "id", "schema")): v for v in inner}
    return inner


def bodies(path: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield random bodies for an endpoint, the same ones each time."""
    rng = random.Random(path)
    for _ in range(count):
        fields = {rng.choice(NAMES): value(rng) for _ in range(rng.randrange(1, 4))}
        yield {"model": "none", **GOOD[path], **fields}
