"""Answers that must follow a grammar: schemas compiled by llguidance, masks for the engine.

Compiling happens on a thread of its own with a deadline and a deep stack; `Grammars` may be called by any thread but
the main one. The masks are made on the main thread, at most about 15 ms each however the grammar was meant.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from typing import Any, Final, NamedTuple

import mlx.core as mx
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from protocol.errors import LmxError
from worker.schema import MAX_BYTES, check_schema

#: Longest wait for a compilation, in seconds. What takes longer goes on unattended until llguidance's bounds end it.
COMPILE_S: Final = 1.5
#: Compilations at once, those that nobody waits for any more included.
_MAX_COMPILING: Final = 2
#: A chain of references is followed recursively, some 8 KiB for each step. Address space, not memory.
_STACK_BYTES: Final = 256 * 1024 * 1024
_MAX_CACHED: Final = 16
#: Steps that a fresh grammar is tried for: most that is too complex is so from its second token on.
_TRIED_TOKENS: Final = 4

#: Small models would go on with white space for ever. `lenient` would ignore unknown keywords in silence.
_OPTIONS: Final = {
    "whitespace_pattern": r"[ \n]{0,8}",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
_ANY_OBJECT: Final = {"type": "object"}


def _limits() -> Any:
    # Fuel is spent at about 14 thousand a millisecond in a step. Grammar pieces never get into error texts.
    return LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=60_000,
        step_max_items=30_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class Thinking(NamedTuple):
    """Where a grammar has to wait for a model that thinks first. `start` None: it cannot begin to by itself."""

    start: int | None
    end: tuple[int, ...]
    is_open: bool


class GrammarConstraint:
    """One answer's way through its grammar. `worker.jobs.Constraint`."""

    def __init__(self, matcher: Any, eos: frozenset[int], thinking: Thinking | None) -> None:
        self._matcher = matcher
        self._eos = sorted(eos)
        self._thinking = thinking
        self._thinks = thinking is not None and thinking.is_open
        self._taken = 0
        self._tail: tuple[int, ...] = ()
        self.failed: LmxError | None = None

    def __call__(self, said: Sequence[int], logits: Any) -> Any:
        """Return the logits (1, vocabulary) with every token that may not come after `said` at -inf.

        `said` grows from call to call; what came before the first is gone through then. Tokens behind the end, which
        the engine asks about before it notices it, change nothing.
        """
        for token in said[self._taken :]:
            self._take(int(token))
        self._taken = len(said)
        return mx.where(self._allowed(logits.shape[-1]), logits, mx.array(-float("inf"), dtype=logits.dtype))

    def _take(self, token: int) -> None:
        thinking = self._thinking
        if self._thinks:
            assert thinking is not None
            self._tail = (*self._tail, token)[-len(thinking.end) :]
            self._thinks = self._tail != thinking.end
        elif thinking is not None and self._taken == 0 and token == thinking.start:
            self._thinks = True
        elif self.failed is None and not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            self._fail()
        self._taken += 1

    def _allowed(self, width: int) -> Any:
        if self._thinks:
            return self._among(width, self._eos, inverted=True)
        if self.failed is None and not self._matcher.is_stopped():
            bits = self._matcher.compute_bitmask()
            if not self._matcher.is_error():
                return self._widen(bits, width)
            self._fail()
        return self._among(width, self._eos, inverted=False)

    def _widen(self, bits: bytes, width: int) -> Any:
        """Return a bit mask as booleans of the width of the logits, which may be padded beyond the vocabulary."""
        octets = mx.array(memoryview(bits))  # type: ignore[arg-type]
        allowed = ((octets[:, None] >> mx.arange(8, dtype=mx.uint8)) & 1).reshape(-1).astype(mx.bool_)
        if allowed.size < width:
            allowed = mx.concatenate([allowed, mx.zeros(width - allowed.size, dtype=mx.bool_)])
        allowed = allowed[:width]
        if self._thinking is not None and self._taken == 0 and self._thinking.start is not None:
            allowed[self._thinking.start] = True
        return allowed

    def _among(self, width: int, tokens: list[int], *, inverted: bool) -> Any:
        row = mx.full((width,), inverted, dtype=mx.bool_)
        row[mx.array([token for token in tokens if token < width])] = not inverted
        return row

    def _fail(self) -> None:
        self.failed = LmxError(
            "invalid_value", "The grammar became too complex while the answer was written: simplify the schema"
        )


class Grammars:
    """Compiles for one tokenizer. Keeps the 16 grammars used last, so that a schema asked for again costs nothing.

    Making it takes some 0.3 s in which no other thread runs. Raises anything for a tokenizer that it cannot use.
    """

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        self._tokenizer = LLTokenizer(backend.to_str(), eos_token=sorted(eos))
        self._eos = eos
        self._lock = threading.Lock()
        self._compiling = threading.BoundedSemaphore(_MAX_COMPILING)
        self._cache: OrderedDict[str, Any] = OrderedDict()

    def for_schema(self, schema: bytes, thinking: Thinking | None) -> GrammarConstraint:
        """Return a constraint to a JSON schema, or for no bytes to any object; raise `LmxError` for what cannot be."""
        param = "response_format"
        checked = check_schema(schema, param) if schema else _ANY_OBJECT
        return self._constraint("start: j\nj: %json " + _with_options(checked), param, thinking)

    def for_call(self, tools: Sequence[dict[str, Any]], thinking: Thinking | None) -> GrammarConstraint:
        """Return a constraint to one call of one of the tools, as `worker.toolcalls.ForcedCall` reads it."""
        rules = ["start: " + " | ".join(f"c{number}" for number in range(len(tools)))]
        for number, tool in enumerate(tools):
            function = tool["function"]
            parameters = function.get("parameters") or {}
            checked = check_schema(json.dumps(parameters).encode(), "tools")
            head = json.dumps(f'{{"name": "{function["name"]}", "arguments": ')
            rules.append(f'c{number}: {head} j{number} "}}"')
            # A call without an object of arguments is none, also where the schema leaves it open.
            rules.append(f"j{number}: %json {_with_options(_ANY_OBJECT | checked)}")
        grammar = "\n".join(rules)
        if len(grammar) > 2 * MAX_BYTES:
            words = f"The tools' schemas have together more than {2 * MAX_BYTES // 1024} KiB: name one in tool_choice"
            raise LmxError("invalid_value", words, param="tools")
        return self._constraint(grammar, "tools", thinking)

    def _constraint(self, grammar: str, param: str, thinking: Thinking | None) -> GrammarConstraint:
        with self._lock:
            compiled = self._cache.get(grammar)
            if compiled is not None:
                self._cache.move_to_end(grammar)
        if compiled is None:
            compiled = self._compile(grammar, param)
            with self._lock:
                self._cache[grammar] = compiled
                if len(self._cache) > _MAX_CACHED:
                    self._cache.popitem(last=False)
        return GrammarConstraint(compiled.deep_copy(), self._eos, thinking)

    def _compile(self, grammar: str, param: str) -> Any:
        if not self._compiling.acquire(timeout=COMPILE_S):
            raise LmxError("server_busy", "Other schemas are being compiled. Try again later.")
        done = threading.Event()
        results: list[Any] = []

        def work() -> None:
            try:
                results.append(self._try_out(grammar))
            finally:
                self._compiling.release()
                done.set()

        _start_deep(work)
        if not done.wait(COMPILE_S):
            raise LmxError("invalid_value", "The JSON schema is too complex: it takes too long to compile", param=param)
        (result,) = results or ["panicked"]
        if isinstance(result, str):
            raise _explain(result, param)
        return result

    def _try_out(self, grammar: str) -> Any:
        """Return the matcher, or what is wrong with the grammar."""
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=_limits())
        walker = matcher.deep_copy()
        for _ in range(_TRIED_TOKENS):
            if walker.is_error():
                return walker.get_error()
            if walker.is_stopped():
                break
            allowed = int.from_bytes(walker.compute_bitmask(), "little")
            if walker.is_error() or not allowed:
                continue
            walker.consume_token((allowed & -allowed).bit_length() - 1)
        return walker.get_error() or matcher


def _with_options(schema: dict[str, Any]) -> str:
    return json.dumps(schema | {"x-guidance": _OPTIONS})


def _start_deep(work: Any) -> None:
    before = threading.stack_size(_STACK_BYTES)
    try:
        threading.Thread(target=work, name="grammar", daemon=True).start()
    finally:
        threading.stack_size(before)


def _explain(error: str, param: str) -> LmxError:
    """Return llguidance's words in ours: its own may quote the schema."""
    unknown = re.search(r"Unimplemented keys: \[([^\]]*)\]", error)
    if unknown is not None:
        names = re.findall(r'"([A-Za-z$-]{1,40})"', unknown[1])
        return LmxError("invalid_value", f"The JSON schema uses what is not supported: {', '.join(names)}", param=param)
    if "look-around" in error or "regex" in error:
        words = "has a pattern that cannot be followed: look-around, back references and the like are not supported"
    elif any(word in error for word in ("too ", "limit", "fuel", "Row", "row")):
        words = "is too complex"
    else:
        words = "cannot be followed: check its types and references, and that some value satisfies it"
    return LmxError("invalid_value", f"The JSON schema {words}", param=param)
