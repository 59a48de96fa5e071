"""From a raw prompt, text or tokens, to a request that passed every check; and which kind of request is made how."""

import math
from collections.abc import Callable
from typing import Final

from protocol.data import Kind, Sampling, Submit
from protocol.errors import LmxError
from protocol.rules import MAX_TOP_LOGPROBS
from worker.detok import AnswerText, StopStrings, TokenText
from worker.jobs import Prepared
from worker.prompt import check_stops
from worker.vocabulary import Words

_MAX_BIAS: Final = 100.0
#: Numbers that come back for one echoed prompt: about 10 MB on the wire, a third of what a frame may have.
MAX_ECHOED_LOGPROBS: Final = 2**18


class CompletionMaker:
    """Turns raw prompts into what the engine needs. IO thread only."""

    def __init__(self, words: Words, *, max_model_len: int, special: frozenset[int], begin: int | None = None) -> None:
        """`begin` is what an empty prompt consists of: the token that a text begins with."""
        self._words = words
        self._max_model_len = max_model_len
        self._special = special
        self._begin = begin

    def prepare(self, submit: Submit) -> Prepared:
        """Return the request ready for the engine; raise `LmxError` with words for the client."""
        sampling = submit.sampling
        stops = check_stops(sampling.stop)
        if sampling.max_tokens is not None and sampling.max_tokens < 0:
            raise LmxError("invalid_value", "max_tokens must be at least 0", param="max_tokens")
        if len(submit.inputs) != 1:
            raise LmxError("invalid_value", "prompt must be one text or one list of token ids", param="prompt")
        (given,) = submit.inputs
        # A prompt that is only to be scored may fill the context.
        answer_room = 0 if sampling.max_tokens == 0 else 1
        prompt = self._read(given, answer_room)
        if (
            submit.echo
            and sampling.logprobs is not None
            and len(prompt) * (1 + sampling.logprobs) > MAX_ECHOED_LOGPROBS
        ):
            msg = (
                f"echo with logprobs={sampling.logprobs} of a prompt of {len(prompt)} tokens is more than "
                f"{MAX_ECHOED_LOGPROBS} numbers. Ask for fewer logprobs or send a shorter prompt."
            )
            raise LmxError("invalid_value", msg, param="logprobs")
        if submit.resume is not None and not self._words.has(submit.resume.token_ids):
            raise LmxError("internal_error", "The answer was begun by another model and cannot be continued")
        room = self._max_model_len - len(prompt)
        return Prepared(
            prompt=prompt,
            max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            answer=AnswerText(TokenText(self._words.decode, self._special), StopStrings(stops)),
            echo="" if not submit.echo else given if isinstance(given, str) else self._words.decode(prompt),
        )

    def _read(self, given: str | list[int], answer_room: int) -> list[int]:
        if isinstance(given, str):
            # Text this long cannot fit whatever it says; tokenizing it would only hold up everyone else's tokens.
            at_least = len(given) // self._words.longest
            self._check_fits(at_least, f"at least {at_least}", answer_room)
            prompt = self._words.encode(given)
        else:
            self._words.check(given, "prompt")
            prompt = list(given)
        if not prompt:
            if self._begin is None:
                raise LmxError("invalid_value", "The prompt is empty", param="prompt")
            prompt = [self._begin]
        self._check_fits(len(prompt), str(len(prompt)), answer_room)
        return prompt

    def _check_fits(self, tokens: int, words: str, answer_room: int) -> None:
        if tokens + answer_room > self._max_model_len:
            need = "" if not answer_room else ", of which the answer needs at least 1"
            msg = (
                f"The prompt has {words} tokens; this model's context is {self._max_model_len} tokens{need}. "
                "Shorten the prompt."
            )
            raise LmxError("context_length_exceeded", msg, param="prompt")


class Kinds:
    """Makes each kind of generation by its own maker, after the checks that all have in common."""

    def __init__(self, chat: Callable[[Submit], Prepared], completion: Callable[[Submit], Prepared], size: int) -> None:
        """`size` is how many tokens the model has."""
        self._makers = {Kind.CHAT: chat, Kind.COMPLETION: completion}
        self._size = size

    def __call__(self, submit: Submit) -> Prepared:
        """Return the request ready for the engine; raise `LmxError` with words for the client."""
        maker = self._makers.get(submit.kind)
        if maker is None:
            raise LmxError("unsupported_parameter", "This model generates text and nothing else", param="model")
        check_sampling(submit.sampling, self._size)
        return maker(submit)


def check_sampling(sampling: Sampling, size: int) -> None:
    """Raise `LmxError` for what would harm the process, or what no choice can be made with."""
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < size:
            # An id past the end would be written to memory that is not ours.
            msg = f"logit_bias: token ids of this model are numbers from 0 to {size - 1}"
            raise LmxError("invalid_value", msg, param="logit_bias")
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise LmxError("invalid_value", "logit_bias takes numbers from -100 to 100", param="logit_bias")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_TOP_LOGPROBS:
        raise LmxError("invalid_value", f"At most {MAX_TOP_LOGPROBS} top logprobs can be given", param="top_logprobs")
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise LmxError("invalid_value", "repetition_penalty must be a number above 0", param="repetition_penalty")
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(sampling, name)):
            raise LmxError("invalid_value", f"{name} must be a finite number", param=name)
