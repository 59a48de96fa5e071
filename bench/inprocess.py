"""The limit: `mlx_lm.generate.BatchGenerator` with nothing around it: `python -m bench.inprocess FOLDER`.

Reads one JSON line per measurement on stdin (`streams`, `tokens`, `requests`) and answers with one on stdout. Prompts,
batch sizes and what a stream does are those of `bench.load`; tokens are counted and thrown away.
"""

import gc
import json
import os
import sys
import time
from typing import Any, Final

from mlx_lm import load
from mlx_lm.generate import BatchGenerator

from bench.load import question
from protocol.config import ModelsConfig
from worker.batch import neutralise_wired_limit

#: As in worker/batch.py.
_PREFILL_BATCH: Final = 8


class Limit:
    """One model and one generator, kept over all measurements as a worker keeps them."""

    def __init__(self, folder: str) -> None:
        neutralise_wired_limit()
        model, self._tokenizer = load(folder)[:2]
        settings = ModelsConfig()
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in sorted(self._tokenizer.eos_token_ids)],
            completion_batch_size=settings.max_concurrent_requests,
            prefill_batch_size=min(_PREFILL_BATCH, settings.max_concurrent_requests),
            prefill_step_size=settings.prefill_step_tokens,
        )

    def measure(self, streams: int, tokens: int, requests: int) -> dict[str, Any]:
        """Run `streams` streams of `requests` requests each, the next one when the last has ended."""
        waiting = [[self._prompt(stream, request) for request in range(requests)][::-1] for stream in range(streams)]
        inserted_at: dict[int, float] = {}
        stream_of: dict[int, int] = {}
        ttft_s: list[float] = []
        done = 0

        def insert(stream: int) -> None:
            now = time.perf_counter()
            (uid,) = self._generator.insert([waiting[stream].pop()], [tokens])
            inserted_at[uid] = now
            stream_of[uid] = stream

        started = time.perf_counter()
        for stream in range(streams):
            insert(stream)
        while stream_of:
            responses = self._generator.next()[1]
            done += len(responses)
            if inserted_at:
                now = time.perf_counter()
                ttft_s += [now - inserted_at.pop(r.uid) for r in responses if r.uid in inserted_at]
            for response in responses:
                if response.finish_reason is not None:
                    stream = stream_of.pop(response.uid)
                    if waiting[stream]:
                        insert(stream)
        return {"seconds": time.perf_counter() - started, "tokens": done, "ttft_s": ttft_s}

    def _prompt(self, stream: int, request: int) -> list[int]:
        text = question(stream, request)
        if not self._tokenizer.has_chat_template:
            return list(self._tokenizer.encode(f"user: {text}\nassistant:"))
        turns = [{"role": "user", "content": text}]
        return list(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True))


def main() -> None:
    # As in worker/process.py: the compiler that mx.compile starts must not get our matrix library.
    os.environ.pop("LD_PRELOAD", None)
    limit = Limit(sys.argv[1])
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(limit.measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
