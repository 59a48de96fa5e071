"""Log probabilities in the two shapes that OpenAI's endpoints give them."""

import codecs
import math
from collections.abc import Sequence
from typing import Final

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


def shown_logprobs(found: list[data.TokenLogprob], text: str) -> list[data.TokenLogprob]:
    """Return those of the tokens that `text` shows a part of; a stop string cut it, but not what came before.

    Where the tokens are not the text and more (special ones have bytes, and show nothing) all are returned.
    """
    raw, before = text.encode(), 0
    if not b"".join(one.bytes for one in found).startswith(raw):
        return found
    for count, one in enumerate(found):
        if before >= len(raw) and one.bytes:
            return found[:count]
        before += len(one.bytes)
    return found


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
