"""From a conversation to prompt tokens, with every check a request has to pass before it may wait for a slot."""

import contextlib
from typing import Any, Final

import jinja2

from protocol.data import ChatMessage, Kind, Sampling, Submit
from protocol.errors import LmxError
from worker.detok import AnswerText, StopStrings, TokenText
from worker.jobs import Prepared
from worker.vocabulary import fast_decode, special_ids

MAX_STOPS: Final = 4
#: A stop string is searched for in each piece of text, so its length is bounded.
MAX_STOP_CHARS: Final = 1024
#: What an HF tokenizer says when it knows no limit is 10^30.
_BELIEVABLE_CONTEXT: Final = 2**31
DEFAULT_CONTEXT: Final = 4096


class PromptMaker:
    """Turns `Submit`s into tokens with one model's tokenizer (an `mlx_lm` TokenizerWrapper). IO thread only.

    A model without a chat template gets the turns as `role: text` lines and an open `assistant:` line: a base model
    continues a transcript best.
    """

    def __init__(self, tokenizer: Any, *, max_model_len: int, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._special = eos | special_ids(tokenizer)
        self._decode = fast_decode(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self._longest_token = max((len(token) for token in vocabulary), default=1)
        self._last_token = max(vocabulary.values(), default=0)
        template = getattr(tokenizer, "chat_template", None)
        self._knows_developer = "developer" in str(template)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says itself how a conversation is written."""
        return bool(self._tokenizer.has_chat_template)

    def warm_up(self) -> None:
        """Compile the template, so that the first request does not pay for it."""
        probe = Submit(0, 0, Kind.CHAT, [ChatMessage("user", "hi")], Sampling(), 1.0)
        with contextlib.suppress(LmxError):  # a template may want more than this conversation has
            self.prepare(probe)

    def prepare(self, submit: Submit) -> Prepared:
        """Return the request ready for the engine; raise `LmxError` with words for the client."""
        sampling = submit.sampling
        stops = check_stops(sampling.stop)
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise LmxError("invalid_value", "max_tokens must be at least 1", param="max_tokens")
        if not submit.messages:
            raise LmxError("invalid_value", "messages must not be empty", param="messages")
        # Text this long cannot fit whatever it says; tokenizing it would only hold up everyone else's tokens.
        at_least = sum(len(message.content) for message in submit.messages) // self._longest_token
        self._check_fits(at_least, f"at least {at_least}")
        prompt = self._encode(submit.messages)
        self._check_fits(len(prompt), str(len(prompt)))
        room = self._max_model_len - len(prompt)
        limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if submit.resume is not None and not 0 <= max(submit.resume.token_ids, default=0) <= self._last_token:
            # An id past the end would be read from memory that is not ours.
            raise LmxError("internal_error", "The answer was begun by another model and cannot be continued")
        answer = AnswerText(TokenText(self._decode, self._special), StopStrings(stops))
        return Prepared(prompt=prompt, max_tokens=limit, answer=answer)

    def tokens(self, submit: Submit) -> list[int]:
        """Return the prompt that the conversation comes to, of any length; raise `LmxError`."""
        return self._encode(submit.messages)

    def _check_fits(self, tokens: int, words: str) -> None:
        if tokens >= self._max_model_len:
            msg = (
                f"The prompt has {words} tokens; this model's context is {self._max_model_len} tokens, of which the "
                "answer needs at least 1. Shorten the messages."
            )
            raise LmxError("context_length_exceeded", msg, param="messages")

    def _encode(self, messages: list[ChatMessage]) -> list[int]:
        try:
            if self.has_chat_template:
                turns = [self._turn(message) for message in messages]
                tokens = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True)
            else:
                tokens = self._tokenizer.encode(_transcript(messages))
        # Templates are programs of the model's author and fail in any way; their words may quote the conversation.
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            msg = "The model's chat template does not accept these messages: check the roles and their order"
            raise LmxError("invalid_value", msg, param="messages") from error
        if not tokens:
            raise LmxError("invalid_value", "The messages come to an empty prompt", param="messages")
        return list(tokens)

    def _turn(self, message: ChatMessage) -> dict[str, str]:
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        turn = {"role": role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        return turn


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


def _transcript(messages: list[ChatMessage]) -> str:
    lines = [f"{message.role}: {message.content}" for message in messages]
    return "\n".join([*lines, "assistant:"])
