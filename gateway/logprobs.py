"""Log probabilities in the two shapes that OpenAI's endpoints give them."""

import codecs
import math
from collections.abc import Sequence
from typing import Final

from gateway.requests import Extras
from gateway.responses import ChoiceLogprobs, LegacyLogprobs, TokenLogprob, TopLogprob
from protocol import data

#: OpenAI's number for a token that is as good as impossible; JSON has no infinity.
LEAST: Final = -9999.0


def chat_logprobs(found: Sequence[data.TokenLogprob]) -> ChoiceLogprobs:
    """Return the shape of `/v1/chat/completions`."""
    return ChoiceLogprobs(
        [
            TokenLogprob(
                one.token,
                finite(one.logprob),
                list(one.bytes),
                [TopLogprob(top.token, finite(top.logprob), list(top.bytes)) for top in one.top],
            )
            for one in found
        ]
    )


class Shown:
    """Holds log probabilities back until the text shows some of their token: a stop string may yet cut it off.

    One per choice. Where the tokens are not the text (special ones, thoughts, calls) nothing is held.
    """

    def __init__(self) -> None:
        self._held: list[data.TokenLogprob] = []
        #: What the tokens so far say beyond the text so far.
        self._ahead = b""
        self._loose = False

    def __bool__(self) -> bool:
        return bool(self._held)

    def take(self, extras: Extras, text: str, finish: data.Finish | None) -> list[data.TokenLogprob]:
        """Return what may be shown now that there is this text and more of these; with a `finish` the rest."""
        raw, found = text.encode(), self._held + extras.logprobs
        self._ahead += b"".join(one.bytes for one in extras.logprobs)
        if extras.reasoning or extras.tool_calls or not self._ahead.startswith(raw):
            self._loose = True
        if self._loose or finish not in {None, data.Finish.STOP}:
            self._held = []
            self._ahead = b""
            return found
        self._ahead = self._ahead[len(raw) :]
        left = sum(len(one.bytes) for one in found) - len(self._ahead)
        count = 0
        while count < len(found) and left > 0:
            left -= len(found[count].bytes)
            count += 1
        self._held = found[count:] if finish is None else []
        return found[:count]


class LegacyWriter:
    """Makes the shape of `/v1/completions`. One per choice: it knows how long the text is so far."""

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def shape(self, found: Sequence[data.TokenLogprob]) -> LegacyLogprobs:
        """Return the lists for the tokens that come next."""
        made = LegacyLogprobs([], [], [], [])
        for one in found:
            name = token_name(one.token, one.bytes)
            made.tokens.append(name)
            made.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(one.bytes))
            if one.logprob is None:
                made.token_logprobs.append(None)
                made.top_logprobs.append(None)
                continue
            made.token_logprobs.append(finite(one.logprob))
            # Two tokens can have one name; the likelier counts, as the maximum of these is what people look for.
            tops: dict[str, float] = {}
            for top in (*one.top, data.TopLogprob(one.token, one.logprob, one.bytes)):
                key = token_name(top.token, top.bytes)
                tops[key] = max(finite(top.logprob), tops.get(key, LEAST))
            made.top_logprobs.append(tops)
        return made


def token_name(token: str, raw: bytes) -> str:
    """Return the text of a token, or `bytes:\\xe2\\x80` for one that is only a part of a character."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return token


def mean(found: Sequence[data.TokenLogprob]) -> float:
    """Return the mean log probability of a token: what `best_of` goes by. Nothing at all is the worst."""
    known = [finite(one.logprob) for one in found if one.logprob is not None]
    return sum(known) / len(known) if known else LEAST


def finite(logprob: float | None) -> float:
    """Return a number that JSON has."""
    return LEAST if logprob is None or not math.isfinite(logprob) else max(logprob, LEAST)
