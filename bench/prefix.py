"""What the prefix cache saves: the time to the first token of a second turn, warm and after a crash.

`python bench/prefix.py`: a real LMX with the default model. Each round has a conversation of its own: a first turn over
a history of so many tokens, a second turn, then the model's process gets SIGABRT, and the second turn is asked with
another question of the process that follows. Ratios are within a round, so that a noisy machine disturbs both sides.
The table goes to stdout, progress to stderr.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import httpx

from bench.options import at_least_one, end_cleanly
from bench.recovery import AT_ONCE
from tests.harness import Lmx, deadline
from tests.modelkit import WORDS, default_model

MODEL: Final = "bench"
#: What is allowed, as shares of the first turn.
WARM: Final = 0.15
RESTARTED: Final = 0.30
_ANSWER_TOKENS: Final = 16
_SETTLE_S: Final = 60.0
_QUIET_S: Final = 1.0


class Turn(NamedTuple):
    """One answer: seconds to its first text, tokens of its prompt, and how many of those came from a cache."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    text: str


def ask(http: httpx.Client, messages: list[dict[str, str]]) -> Turn:
    """Return a streamed greedy answer."""
    body = {
        "model": MODEL,
        "messages": messages,
        "temperature": 0,
        "max_tokens": _ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, text, usage = 0.0, "", dict[str, Any]()
    at = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data:"))
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if piece and not first:
                first = time.perf_counter() - at
            text += piece
            usage = chunk.get("usage") or usage
    return Turn(first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], text)


def history(seed: int, tokens: int) -> str:
    """Return a text of about so many tokens that no other round begins with."""
    chooser = random.Random(seed)
    return f"Story {seed}. " + " ".join(chooser.choice(WORDS) for _ in range(int(tokens * 0.97)))


def written(lmx: Lmx) -> int:
    """Return how many files of prefixes there are, once that has not changed for a moment."""
    files, since = -1, time.monotonic()
    for _ in deadline(_SETTLE_S):
        now = sum(1 for _ in (lmx.home / "cache").glob("*/*/*.kv"))
        if now != files:
            files, since = now, time.monotonic()
        elif time.monotonic() - since > _QUIET_S:
            break
    return files


def one_round(lmx: Lmx, number: int, tokens: int) -> tuple[Turn, Turn, Turn]:
    """Return the first turn, the second, and a second one in the next process."""
    begin = [{"role": "user", "content": history(number, tokens) + " What is this story about?"}]
    with httpx.Client(base_url=lmx.url, timeout=600) as http:
        first = ask(http, begin)
        so_far = [*begin, {"role": "assistant", "content": first.text}]
        second = ask(http, [*so_far, {"role": "user", "content": "Who is in it?"}])
        written(lmx)
        pid = lmx.wait_model(MODEL)
        old = int(lmx.model(MODEL)["incarnation"])
        os.kill(pid, signal.SIGABRT)
        lmx.wait_model(MODEL, other_than=old, within_s=120)
        third = ask(http, [*so_far, {"role": "user", "content": "Where does it happen?"}])
    return first, second, third


def table(rounds: list[tuple[Turn, Turn, Turn]]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| round | prompt tokens | first turn, ms | second turn, ms (cached) | after SIGABRT, ms (cached) | ratios |",
        "|---|---|---|---|---|---|",
    ]
    for number, (first, second, third) in enumerate(rounds, 1):
        cells = [f"{turn.ttft_s * 1000:.0f} ({turn.cached_tokens})" for turn in (second, third)]
        ratios = " · ".join(f"{turn.ttft_s / first.ttft_s:.3f}" for turn in (second, third))
        lines.append(
            f"| {number} | {first.prompt_tokens} | {first.ttft_s * 1000:.0f} | {cells[0]} | {cells[1]} | {ratios} |"
        )
    warm, restarted = ratios_of(rounds)
    words = (
        f"The second turn takes **{warm:.3f}** of the first (median of {len(rounds)}; allowed: {WARM}), "
        f"after SIGABRT and restart **{restarted:.3f}** (allowed: {RESTARTED})."
    )
    return "\n".join([*lines, "", words])


def ratios_of(rounds: list[tuple[Turn, Turn, Turn]]) -> tuple[float, float]:
    """Return the medians of second by first, and of restarted by first."""
    warm = median(second.ttft_s / first.ttft_s for first, second, _ in rounds)
    return warm, median(third.ttft_s / first.ttft_s for first, _, third in rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time to the first token with the prefix cache, as ratios.")
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: the default model)")
    parser.add_argument("--tokens", type=at_least_one, default=2000, help="of the history (default: 2000)")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="default: 3")
    parser.add_argument("--check", action="store_true", help="exit 1 unless the ratios are what they should be")
    args = parser.parse_args()
    end_cleanly()
    lmx = Lmx(**AT_ONCE)
    rounds = []
    try:
        lmx.start()
        lmx.load(args.model or default_model(None), MODEL)
        with httpx.Client(base_url=lmx.url, timeout=600) as http:
            ask(http, [{"role": "user", "content": "Hello"}])
        for number in range(args.rounds):
            print(f"round {number + 1}/{args.rounds}", file=sys.stderr)
            rounds.append(one_round(lmx, number, args.tokens))
    finally:
        lmx.close()
    print(table(rounds))
    warm, restarted = ratios_of(rounds)
    return int(args.check and not (warm <= WARM and restarted <= RESTARTED))


if __name__ == "__main__":
    sys.exit(main())
