"""What is asked, of everyone alike: prompts from a fixed seed, how many at a time, how long the answers are."""

import random
from typing import Final, Literal

import msgspec

SEED: Final = 20_260
#: Short words that most tokenizers know whole, so that a prompt of n words has about n tokens.
_WORDS: Final = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
""".split()  # noqa: SIM905


class Workload(msgspec.Struct, frozen=True):
    """`streams` clients at once, each sending `requests` requests one after the other, `tokens` tokens an answer.

    `prompt_words` 0 asks a short question; otherwise the prompt is random words, about a token each.
    """

    name: str
    streams: int
    tokens: int
    requests: int = 1
    prompt_words: int = 0
    kind: Literal["chat", "embeddings"] = "chat"
    #: Another number asks other prompts: whoever keeps caches of prompts would only be measured once.
    variant: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens of all answers."""
        return self.streams * self.requests * self.tokens


def prompt(workload: Workload, stream: int, request: int) -> str:
    """Return the text of a prompt; no two of a run begin alike, so that no prefix cache helps anyone."""
    place = f"{workload.variant}.{stream}.{request}"
    question = f"Question {place}: what did people find near the river, and how long did it take?"
    if not workload.prompt_words:
        return question
    words = random.Random(f"{SEED} {workload.name} {place}").choices(_WORDS, k=workload.prompt_words)
    return f"{place} {' '.join(words)}. {question}"


def decode(streams: int, tokens: int, total: int) -> Workload:
    """Return streams that ask short questions until about `total` tokens are generated; fewer, the slower that is."""
    wanted = total / 2 if streams < 8 else total
    return Workload(f"{streams} streams", streams, tokens, max(1, round(wanted / tokens / streams)))


def standard(streams: list[int], tokens: int, total: int, *, long_prompts: bool = True) -> list[Workload]:
    """Return the workloads of a comparison, about `total` tokens each."""
    found = [decode(number, tokens, total) for number in streams]
    if long_prompts:
        found.append(Workload("4 prompts of 2,000 tokens", 4, 16, 1, prompt_words=1950))
    found.append(Workload("burst of 32, 8 tokens each", 32, 8, 1))
    found.append(Workload("many requests of 4 tokens", 8, 4, max(2, total // 160)))
    return found
