"""A worker without a model: the real process, threads and sockets, and tokens that cost nothing. `worker.module`.

It makes `LMX_BENCH_STEPS_PER_S` steps a second (default 1,000), each with a token for every request it runs; what is
left to measure is the gateway, or what a worker is before it imports MLX.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from protocol.control import Capabilities
from protocol.data import Submit
from protocol.errors import LmxError
from protocol.spec import WorkerSpec
from worker import process
from worker.jobs import AT_LENGTH, GOES_ON, NO_SCORES, NOTHING, Job, Loaded, Prepared, Said, Token

STEPS_VARIABLE: Final = "LMX_BENCH_STEPS_PER_S"
_CONTEXT: Final = 1_000_000
_DEFAULT_TOKENS: Final = 16
_WORD: Final = Said(" word")


class Words:
    """An answer of one word a token: `worker.jobs.Answer`."""

    stopped = False
    called = False
    failed: LmxError | None = None

    def add(self, _token: int) -> Said:
        """Return the word."""
        return _WORD

    def finish(self) -> Said:
        """Return nothing: nothing is held back."""
        return NOTHING


class NullBackend:
    """`worker.jobs.Backend`: a token for each job in each step, as many steps a second as it is told."""

    scores = NO_SCORES
    prefilling = False

    def __init__(self, steps_per_s: float) -> None:
        self._pause_s = 1 / steps_per_s
        self._next_at = 0.0
        self._left: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._left)

    def insert(self, job: Job) -> None:
        """Begin with a job."""
        self._left[job.id] = job.max_tokens

    def remove(self, jobs: Sequence[int]) -> None:
        """Forget jobs."""
        for job in jobs:
            self._left.pop(job, None)

    def step(self) -> list[Token]:
        """Return a token for each job."""
        now = time.monotonic()
        if now < self._next_at:
            time.sleep(self._next_at - now)
        self._next_at = max(now, self._next_at) + self._pause_s
        tokens: list[Token] = []
        for job, left in list(self._left.items()):
            tokens.append((job, left, GOES_ON if left > 1 else AT_LENGTH))
            if left > 1:
                self._left[job] = left - 1
            else:
                del self._left[job]
        return tokens


def prepare(submit: Submit) -> Prepared:
    """Make a prompt of as many tokens as the messages have words."""
    words = sum(len(message.content.split()) for message in submit.messages) or 1
    return Prepared([0] * words, submit.sampling.max_tokens or _DEFAULT_TOKENS, Words())


def make_folder(folder: Path) -> Path:
    """Write a model folder that the supervisor takes for one, and return it: nobody reads its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4}
    config = {"model_type": "llama", **sizes, "max_position_embeddings": _CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder


def load(spec: WorkerSpec, report: Callable[[int, int, str], None]) -> Loaded:
    """Load nothing."""
    report(1, 1, "weights")
    return Loaded(
        backend=NullBackend(float(os.environ.get(STEPS_VARIABLE) or 1000)),
        capabilities=Capabilities(_CONTEXT, 1, ["chat"], spec.models.max_concurrent_requests),
        prepare=prepare,
        canary=lambda: None,
        memory=lambda: (1, 0, 1),
    )


if __name__ == "__main__":
    process.main(sys.argv, load)
