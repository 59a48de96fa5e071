"""From a conversation to prompt tokens, with every check a request has to pass before it may wait for a slot."""

import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from protocol.data import ChatMessage, Kind, Sampling, Submit, ToolChoice
from protocol.errors import LmxError
from protocol.logs import exception_event
from protocol.rules import MAX_STOP_CHARS, MAX_STOPS
from worker.detok import AnswerText, StopStrings, TokenText
from worker.intake import SHORT_CHARS
from worker.jobs import Constraint, Pace, Prepared
from worker.options import Wanted, read_options
from worker.reasoning import Reasoning
from worker.splitting import Plain, Splitter
from worker.template import ChatTemplate
from worker.toolcalls import Calls, ForcedCall
from worker.truncation import drop_oldest, keep_last
from worker.vocabulary import fast_decode, special_ids

if TYPE_CHECKING:
    from worker.grammar import Grammars, Thinking

#: What an HF tokenizer says when it knows no limit is 10^30.
_BELIEVABLE_CONTEXT: Final = 2**31
DEFAULT_CONTEXT: Final = 4096
#: Room for an answer of unknown length, in tokens, when turns are dropped to make some.
_ROOM: Final = 1_024


class PromptMaker:
    """Turns `Submit`s into tokens with one model's tokenizer (an `mlx_lm` TokenizerWrapper). Any thread but the main.

    A model without a chat template gets the turns as `role: text` lines and an open `assistant:` line: a base model
    continues a transcript best.
    """

    def __init__(self, tokenizer: Any, *, max_model_len: int, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._eos = eos
        self._special = eos | special_ids(tokenizer)
        self._decode = fast_decode(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self._longest_token = max((len(token) for token in vocabulary), default=1)
        self._last_token = max(vocabulary.values(), default=0)
        self._template = ChatTemplate(tokenizer)
        self._lock = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says itself how a conversation is written."""
        return self._template.exists

    def warm_up(self) -> None:
        """Compile the template and make the tokenizer of grammars, so that no request pays for it."""
        probe = Submit(0, 0, Kind.CHAT, [ChatMessage("user", "hi")], Sampling(), 1.0)
        with contextlib.suppress(LmxError):  # a template may want more than this conversation has
            self.prepare(probe)
        with self._lock:
            self._grammars  # noqa: B018 - made now

    def pace(self, submit: Submit) -> Pace:
        """Return how long `prepare` will take."""
        options = submit.options
        chars = sum(len(message.content) for message in submit.messages)
        if options is not None:
            forced = options.tool_choice in {ToolChoice.REQUIRED, ToolChoice.NAMED}
            if options.json_object or options.json_schema or (options.tools and forced):
                return Pace.GRAMMAR
            chars += len(options.tools)
        return Pace.QUICK if chars <= SHORT_CHARS else Pace.LONG_TEXT

    def prepare(self, submit: Submit) -> Prepared:
        """Return the request ready for the engine; raise `LmxError` with words for the client."""
        sampling = submit.sampling
        stops = check_stops(sampling.stop)
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise LmxError("invalid_value", "max_tokens must be at least 1", param="max_tokens")
        if not submit.messages:
            raise LmxError("invalid_value", "messages must not be empty", param="messages")
        wanted = read_options(submit.options)
        prompt, thinking_open = self._encode(submit.messages, wanted, sampling.max_tokens)
        room = self._max_model_len - len(prompt)
        limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if submit.resume is not None and not 0 <= max(submit.resume.token_ids, default=0) <= self._last_token:
            # An id past the end would be read from memory that is not ours.
            raise LmxError("internal_error", "The answer was begun by another model and cannot be continued")
        constraint = self._constrain(wanted, is_open=thinking_open)
        splitter, markers = self._splitter(wanted, is_open=thinking_open)
        answer = AnswerText(
            TokenText(self._decode, self._special),
            # A call cut short is of no use to anyone, so a stop string within its arguments does not count.
            StopStrings(() if wanted.forced else stops),
            splitter,
            markers=self._special & markers,
            ends=self._eos,
            constraint=constraint,
        )
        return Prepared(prompt=prompt, max_tokens=limit, answer=answer, constraint=constraint)

    def tokens(self, submit: Submit) -> list[int]:
        """Return the prompt that the conversation comes to, of any length; raise `LmxError`."""
        wanted = read_options(submit.options)
        text = self._template.render(submit.messages, wanted, self._template.arguments(wanted))
        return list(self._tokenizer.encode(text, add_special_tokens=not self._template.exists))

    def _check_fits(self, tokens: int, words: str) -> None:
        if tokens >= self._max_model_len:
            msg = (
                f"The prompt has {words} tokens; this model's context is {self._max_model_len} tokens, of which the "
                "answer needs at least 1. Shorten the messages."
            )
            raise LmxError("context_length_exceeded", msg, param="messages")

    def _encode(self, messages: list[ChatMessage], wanted: Wanted, max_tokens: int | None) -> tuple[list[int], bool]:
        """Return the prompt and whether it ends inside a block of thinking."""
        arguments = self._template.arguments(wanted)

        def encode(kept: list[ChatMessage]) -> tuple[list[int], bool]:
            # Text this long cannot fit whatever it says; tokenizing it would only hold up everyone else's tokens.
            at_least = sum(len(message.content) for message in kept) // self._longest_token
            self._check_fits(at_least, f"at least {at_least}")
            text = self._template.render(kept, wanted, arguments)
            tokens = self._tokenizer.encode(text, add_special_tokens=not self._template.exists)
            if not tokens:
                raise LmxError("invalid_value", "The messages come to an empty prompt", param="messages")
            self._check_fits(len(tokens), str(len(tokens)))
            start = self._tokenizer.think_start
            return list(tokens), bool(start) and text.rstrip().endswith(start)

        if not wanted.truncate:
            return encode(messages)
        room = min(max_tokens or _ROOM, self._max_model_len // 2 if max_tokens else self._max_model_len // 4)

        def fit(kept: list[ChatMessage]) -> tuple[list[int], bool] | None:
            try:
                encoded = encode(kept)
            except LmxError as error:
                if error.code != "context_length_exceeded":
                    raise
                return None
            return encoded if len(encoded[0]) + room <= self._max_model_len else None

        return drop_oldest(messages, fit) or encode(keep_last(messages))

    def _constrain(self, wanted: Wanted, *, is_open: bool) -> Constraint | None:
        if wanted.schema is None and not wanted.forced:
            return None
        thinking = self._thinking(wanted, is_open=is_open)
        with self._lock:
            grammars = self._grammars
        if grammars is None:
            raise _unconstrained(wanted)
        if wanted.forced:
            return grammars.for_call(wanted.forced, thinking)
        return grammars.for_schema(wanted.schema or b"", thinking)

    @functools.cached_property
    def _grammars(self) -> "Grammars | None":
        if not self._eos:
            return None
        from worker.grammar import Grammars  # noqa: PLC0415 - the tests' models mostly do without

        try:
            return Grammars(self._tokenizer, self._eos)
        except Exception as error:  # noqa: BLE001 - a tokenizer may be of any kind; the model still serves
            exception_event("grammar_tokenizer_refused", error)
            return None

    def _thinking(self, wanted: Wanted, *, is_open: bool) -> "Thinking | None":
        from worker.grammar import Thinking  # noqa: PLC0415

        tokenizer = self._tokenizer
        if not tokenizer.has_thinking or (wanted.reasoning is False and not is_open):
            return None
        start = tokenizer.think_start_tokens
        return Thinking(start[0] if len(start) == 1 else None, tuple(tokenizer.think_end_tokens), is_open)

    def _splitter(self, wanted: Wanted, *, is_open: bool) -> tuple[Splitter | None, set[int]]:
        """Return what takes the answer apart, and the tokens of its markers."""
        tokenizer = self._tokenizer
        splitter: Splitter = Plain()
        markers: Sequence[str] = ()
        if wanted.forced:
            splitter = ForcedCall()
        elif wanted.tools:
            syntax = self._template.calls
            splitter = Calls(syntax, wanted.tools, parallel=wanted.parallel)
            markers = (syntax.start, syntax.end)
        if tokenizer.has_thinking:
            splitter = Reasoning(tokenizer.think_start, tokenizer.think_end, splitter, is_open=is_open)
            markers = (*markers, tokenizer.think_start, tokenizer.think_end)
        elif isinstance(splitter, Plain):
            return None, set()
        encoded = [tokenizer.encode(marker, add_special_tokens=False) for marker in markers if marker]
        return splitter, {token for tokens in encoded for token in tokens}


def _unconstrained(wanted: Wanted) -> LmxError:
    """Return why a model cannot be held to anything. LangChain knows what to do by this very sentence."""
    if wanted.forced:
        words = "This model's tokenizer cannot be held to a call: set 'tool_choice' to auto or none"
        return LmxError("unsupported_parameter", words, param="tool_choice")
    kind = "json_schema" if wanted.schema else "json_object"
    words = f"Invalid parameter: 'response_format' of type '{kind}' is not supported with this model"
    return LmxError("unsupported_parameter", words, param="response_format")


def check_stops(stops: tuple[str, ...]) -> tuple[str, ...]:
    """Return the stop strings without duplicates and empty ones; raise `LmxError` for too many or too long."""
    wanted = tuple(dict.fromkeys(stop for stop in stops if stop))
    if len(wanted) > MAX_STOPS:
        raise LmxError("invalid_value", f"stop takes at most {MAX_STOPS} strings", param="stop")
    if any(len(stop) > MAX_STOP_CHARS for stop in wanted):
        raise LmxError("invalid_value", f"a stop string has at most {MAX_STOP_CHARS} characters", param="stop")
    return wanted


def find_context(max_model_len: int | None, tokenizer: Any) -> int:
    """Return the longest context in tokens: what config.json says, else the tokenizer, else 4096."""
    if max_model_len is not None:
        return max_model_len
    told = getattr(tokenizer, "model_max_length", None)
    return int(told) if isinstance(told, int | float) and 0 < told < _BELIEVABLE_CONTEXT else DEFAULT_CONTEXT
