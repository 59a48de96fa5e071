"""How long a long prompt makes running streams wait: the time between their tokens beside it and without it.

Some streams run; once they all do, a prompt of 6,000 tokens comes. What counts is the 99th percentile of the time
between two tokens of a stream while that prompt is processed, against the same without it: allowed is three times as
much plus one chunk of prefill, whose time is that of the long prompt alone divided by its chunks. All of it in one run
on one LMX. The table goes to stdout. `python bench/interleave.py --help`.
"""

import argparse
import json
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from tests.chaos.clients import Call
from tests.harness import Lmx, chat

MODEL: Final = "bench"
_CHUNK: Final = 512
_PATIENCE_S: Final = 600.0
_ALLOWED: Final = 3.0


def gaps(calls: list[Call], since: float, until: float) -> list[float]:
    """Return the seconds between two tokens of each stream within that time."""
    found = []
    for call in calls:
        inside = [at for at in call.chunks_at if since <= at <= until]
        found += [later - earlier for earlier, later in pairwise(inside)]
    return sorted(found)


def p99(values: list[float]) -> float:
    return values[min(len(values) - 1, int(len(values) * 0.99))] if values else 0.0


def wait(calls: list[Call]) -> None:
    for call in calls:
        call.wait(_PATIENCE_S)
        if not call.whole:
            raise SystemExit(f"interleave: not a whole answer: {call!r}")


def measure(lmx: Lmx, streams: int, tokens: int, words: str, eos: int) -> dict[str, float]:
    """Return seconds: `chunk`, and the 99th percentiles `without` and `beside` the long prompt."""

    def ask(text: str, tokens: int) -> Call:
        more: dict[str, Any] = {"logit_bias": {str(eos): -100}, "stream_options": {"include_usage": True}}
        return Call(lmx.url, chat(MODEL, max_tokens=tokens, stream=True, text=text, **more), {})

    sys.stderr.write("the long prompt alone\n")
    alone = ask(words + " One.", 1)
    wait([alone])
    assert alone.usage is not None
    chunks = alone.usage["prompt_tokens"] / _CHUNK
    chunk_s = (alone.chunks_at[0] - alone.sent_at) / chunks
    sys.stderr.write("streams without it\n")
    story = "Tell a very long story about a river, and never end it."
    calls = [ask(f"{story} {number}", tokens) for number in range(streams)]
    for call in calls:
        call.wait_chunks(1, _PATIENCE_S)
    began = time.time()
    wait(calls)
    without = gaps(calls, began, min(call.chunks_at[-1] for call in calls))
    sys.stderr.write("streams beside it\n")
    calls = [ask(f"{story} {number}", tokens) for number in range(streams)]
    for call in calls:
        call.wait_chunks(3, _PATIENCE_S)
    began = time.time()
    long = ask(words + " Two.", 2)
    long.wait_chunks(1, _PATIENCE_S)
    beside = gaps(calls, began, long.chunks_at[0])
    wait([*calls, long])
    return {"chunk": chunk_s, "without": p99(without), "beside": p99(beside), "gaps": len(beside)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an MLX model folder with a context of 8,192 tokens")
    parser.add_argument("--streams", type=int, default=4, help="streams that run (default: 4)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each (default: 200)")
    parser.add_argument("--words", type=int, default=5900, help="words of the long prompt (default: 5900)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    eos = json.loads((args.model / "config.json").read_text())["eos_token_id"]
    lmx = Lmx(LMX_LIFECYCLE__PREFILL_S="300", LMX_LIFECYCLE__DECODE_S="300")
    try:
        lmx.start()
        lmx.load(args.model, MODEL)
        words = " ".join(["river", "stone", "light", "and", "the", "water"] * (args.words // 6))
        found = measure(lmx, args.streams, args.tokens, words, eos)
    finally:
        lmx.close()
    allowed = _ALLOWED * found["without"] + found["chunk"]
    print("| streams | p99 without, ms | one chunk, ms | p99 beside, ms | allowed, ms | gaps |")
    print("|---|---|---|---|---|---|")
    figures = (found["without"], found["chunk"], found["beside"], allowed)
    print(f"| {args.streams} | {' | '.join(f'{each * 1000:.0f}' for each in figures)} | {found['gaps']:.0f} |")
    return found["beside"] > allowed


if __name__ == "__main__":
    sys.exit(main())
