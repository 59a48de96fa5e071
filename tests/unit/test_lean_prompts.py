"""Prompts processed our way and mlx-lm's end in the same answers, whatever joins and leaves, for all kinds of cache."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.cachekit import recurrent, windowed
from worker.batch import BatchBackend
from worker.jobs import GOES_ON, Job
from worker.prefill import PromptTurns

EOS = 511
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 48, 49, 100)
PARAMETERS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"temperature": 0.9, "seed": 4},
    {"logprobs": 2},
    {"logprobs": 1, "echo": True},
    {"repetition_penalty": 1.3},
    {"group": 3},
)


@pytest.fixture(scope="module", params=["plain", "windowed", "recurrent"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    mx.random.seed(1)
    if request.param == "plain":
        from mlx_lm.utils import load_model

        return load_model(tiny_model)[0]
    made = windowed() if request.param == "windowed" else recurrent()
    mx.eval(made.parameters())
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model count as one whose short prompts go together, on any machine: the chunks are then the same."""
    begin = PromptTurns.__init__

    def begin_quick(self: PromptTurns, *arguments: int) -> None:
        begin(self, *arguments)
        self._token_s = 1e-6

    monkeypatch.setattr(PromptTurns, "__init__", begin_quick)
    monkeypatch.setattr(PromptTurns, "took", lambda _self, _seconds: None)


def words(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(EOS) for _ in range(length)]


class Plan:
    """Jobs, when they come, and who is taken out when."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.slots = chance.choice([3, 16])
        self.prefill_tokens = chance.choice([16, 48, 256])
        self.jobs = []
        for number in range(chance.randint(3, 12)):
            more = chance.choice(PARAMETERS)
            prompt = words(30, 7) if "group" in more else words(chance.choice(LENGTHS), 100 * seed + number)
            # Of different clients, so that long prompts share a chunk, too.
            self.jobs.append(Job(number, prompt, chance.randint(1, 12), client=str(chance.randrange(4)), **more))
        self.coming = [chance.choice([0, 0, 1, 5]) for _ in range(7)] + [1]
        self.leaving = {chance.randrange(1, 12): chance.sample(range(len(self.jobs)), 2) for _ in range(2)}

    def backend(self, model: Any, *, plain: bool) -> BatchBackend:
        return BatchBackend(model, {EOS}, slots=self.slots, prefill_tokens=self.prefill_tokens, plain=plain)

    def run(self, backend: BatchBackend) -> dict[int, list[tuple[int, int]]]:
        waiting, step = list(self.jobs), 0
        said: dict[int, list[tuple[int, int]]] = {}
        while waiting or len(backend):
            for _ in range(min(self.coming[step % len(self.coming)], len(waiting))):
                backend.insert(waiting.pop(0))
            backend.remove(self.leaving.get(step, []))
            for job, token, end in backend.step():
                said.setdefault(job, []).append((token, end))
            step += 1
            assert step < 5_000
        return said


@pytest.mark.parametrize("seed", range(6))
def test_what_joins_and_leaves_is_answered_as_by_mlx_lm(model: Any, seed: int) -> None:
    plan = Plan(seed)
    answers = [plan.run(plan.backend(model, plain=plain)) for plain in (False, True)]
    assert answers[0] == answers[1]
    stayed = {job.id for job in plan.jobs} - {job for leaving in plan.leaving.values() for job in leaving}
    assert stayed <= {job for job, tokens in answers[0].items() if tokens[-1][1] != GOES_ON}


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_who_comes_after_all_have_left_is_answered_as_if_alone(model: Any, after: int) -> None:
    alone = BatchBackend(model, {EOS}, slots=8, prefill_tokens=16).generate(words(20, 1), 8)
    backend = BatchBackend(model, {EOS}, slots=8, prefill_tokens=16)
    for round_ in range(3):
        for number in range(4):
            backend.insert(Job(number, words((1, 2, 20, 40)[number], round_), 20, client=str(number)))
        for _ in range(after):
            backend.step()
        backend.remove([3, 1, 0, 2])
        assert len(backend) == 0
    assert backend.generate(words(20, 1), 8) == alone


def test_prompts_that_share_a_chunk_are_known_by_their_tokens_to_those_who_follow(model: Any) -> None:
    """A copy of a living sequence's cache is only as good as the tokens that it is said to hold."""
    backend = BatchBackend(model, {EOS}, slots=8, prefill_tokens=16)
    for number in range(4):
        backend.insert(Job(number, words((5, 14, 30, 33)[number], number), 30, client=str(number)))
    while backend.prefilling:
        backend.step()
    generator = backend._generator
    held = dict(zip(generator._generation_batch.uids, generator._generation_batch.tokens, strict=True))
    for number in range(4):
        prompt = words((5, 14, 30, 33)[number], number)
        assert held[backend._uids[number]][: len(prompt)] == prompt
