"""The limit: mlx-lm's batch with nothing around it: `python -m bench.inprocess FOLDER plain|lean`.

Reads one `Workload` per line on stdin and answers with one line on stdout. Prompts, batch sizes and what a stream does
are those of `bench.load`; tokens are counted and thrown away. "plain" is `BatchGenerator` as it is, "lean" the batch of
`worker.lean`, which LMX runs.
"""

import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from mlx_lm import load
from mlx_lm.generate import BatchGenerator

from bench.measures import percentile
from bench.options import end_cleanly
from bench.workloads import Workload, prompt
from protocol.config import ModelsConfig
from worker import lean
from worker.batch import neutralise_wired_limit
from worker.sampling import greedy

#: As mlx-lm has it; LMX, and so the lean one, processes as many together as fit into a chunk.
_PREFILL_BATCH: Final = 8


class Limit:
    """One model and one generator, kept over all measurements as a worker keeps them."""

    def __init__(self, folder: str, *, is_lean: bool) -> None:
        neutralise_wired_limit()
        model, self._tokenizer = load(folder)[:2]
        settings = ModelsConfig()
        self._sampler = greedy if is_lean else None
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in sorted(self._tokenizer.eos_token_ids)],
            completion_batch_size=settings.max_concurrent_requests,
            prefill_batch_size=settings.max_concurrent_requests if is_lean else _PREFILL_BATCH,
            prefill_step_size=settings.prefill_step_tokens,
        )
        if is_lean and not lean.install(self._generator, model):
            sys.exit("this mlx-lm is not the one that worker/lean.py was written for")

    def measure(self, workload: Workload) -> dict[str, Any]:
        """Run the workload; return what `bench.load.summary` returns."""
        streams, requests = range(workload.streams), range(workload.requests)
        waiting = [[self._tokens(prompt(workload, stream, each)) for each in requests][::-1] for stream in streams]
        inserted_at: dict[int, float] = {}
        stream_of: dict[int, int] = {}
        ttft_s: list[float] = []
        gaps_s: list[float] = []
        done = 0

        def insert(stream: int) -> None:
            now = time.perf_counter()
            samplers: list[Any] | None = None if self._sampler is None else [self._sampler]
            (uid,) = self._generator.insert([waiting[stream].pop()], [workload.tokens], samplers=samplers)
            inserted_at[uid] = now
            stream_of[uid] = stream

        started = last = time.perf_counter()
        for stream in streams:
            insert(stream)
        while stream_of:
            responses = self._generator.next()[1]
            now = time.perf_counter()
            done += len(responses)
            firsts = [now - inserted_at.pop(r.uid) for r in responses if r.uid in inserted_at]
            ttft_s += firsts
            gaps_s += [now - last] * (len(responses) - len(firsts))  # a stream that goes on has a token in each step
            last = now
            for response in responses:
                if response.finish_reason is not None:
                    stream = stream_of.pop(response.uid)
                    if waiting[stream]:
                        insert(stream)
        gap = percentile(gaps_s, 0.5)
        return {
            "seconds": time.perf_counter() - started,
            "requests": workload.streams * workload.requests,
            "tokens": done,
            "events": done,
            "ttft_s": ttft_s,
            "gap_p50_s": gap,
            "gap_p99_s": percentile(gaps_s, 0.99),
            "stream_tokens_per_s": 1 / gap,
            "errors": {},
            "client_cpu_s": 0.0,
        }

    def stepper(self, prompts: list[list[int]], tokens: int) -> tuple[Callable[[], Any], Callable[[], bool]]:
        """Insert these; return what makes a step, and what says whether there is one to make."""
        samplers: list[Any] | None = None if self._sampler is None else [self._sampler]
        left = {self._generator.insert([one], [tokens], samplers=samplers)[0] for one in prompts}

        def step() -> None:
            for response in self._generator.next()[1]:
                if response.finish_reason is not None:
                    left.discard(response.uid)

        return step, lambda: bool(left)

    def _tokens(self, text: str) -> list[int]:
        if not self._tokenizer.has_chat_template:
            return list(self._tokenizer.encode(f"user: {text}\nassistant:"))
        turns = [{"role": "user", "content": text}]
        return list(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True))


def main() -> None:
    """Serve measurements until stdin ends."""
    end_cleanly()
    # As in worker/process.py: the compiler that mx.compile starts must not get our matrix library.
    os.environ.pop("LD_PRELOAD", None)
    limit = Limit(sys.argv[1], is_lean=sys.argv[2:] == ["lean"])
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        found = limit.measure(msgspec.json.decode(line, type=Workload))
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
