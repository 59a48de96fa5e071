"""The batch with real MLX and a tiny model: every parameter inside it, each row as if it were alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from worker import lean, scoring
from worker.batch import BatchBackend
from worker.jobs import AT_LENGTH, GOES_ON, NO_TOKEN, Job, Scored

PREFILL = 16


class Model(NamedTuple):
    """A loaded model; `logits` runs it over all tokens at once, without a cache."""

    model: Any
    eos: frozenset[int]
    vocabulary: int

    def backend(self, *, plain: bool = False, slots: int = 16) -> BatchBackend:
        return BatchBackend(self.model, self.eos, slots=slots, prefill_tokens=PREFILL, plain=plain)

    def logits(self, tokens: list[int]) -> Any:
        """Return float64 (tokens, vocabulary)."""
        return np.array(self.model(mx.array(tokens)[None])[0].astype(mx.float32)).astype(np.float64)

    def logprobs(self, tokens: list[int]) -> Any:
        logits = self.logits(tokens)
        top = logits.max(axis=-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Model:
    from mlx_lm.utils import load_model

    model, config = load_model(tiny_model)
    return Model(model, frozenset({config["eos_token_id"]}), config["vocab_size"])


class Outcome:
    """What became of some jobs."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, int] = {}
        self.scores: dict[int, list[Scored]] = {}

    def add(self, backend: BatchBackend) -> None:
        """Make one step."""
        for job, token, end in backend.step():
            self.tokens.setdefault(job, []).append(token)
            if end != GOES_ON:
                assert job not in self.ends
                self.ends[job] = end
        for job, scores in backend.scores.items():
            self.scores.setdefault(job, []).extend(scores)


def run(
    backend: BatchBackend, jobs: list[Job], *, at: dict[int, Callable[[], None]] | None = None, every: int = 1
) -> Outcome:
    """Insert a job every so many steps, and run until all have ended. `at` does something before a step."""
    outcome, waiting, step = Outcome(), list(jobs), 0
    while waiting or len(backend):
        if waiting and step % every == 0:
            backend.insert(waiting.pop(0))
        if at and step in at:
            at[step]()
        outcome.add(backend)
        step += 1
        assert step < 5_000
    return outcome


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 1_500, length).tolist()  # type: ignore[no-any-return]


class OnlyEven:
    """A constraint: even tokens, and never the one before. Notes what it was told."""

    def __init__(self) -> None:
        self.said: list[list[int]] = []

    def __call__(self, said: Any, logits: Any) -> Any:
        self.said.append(list(said))
        allowed = np.zeros(logits.shape[-1], dtype=np.float32)
        allowed[1::2] = -np.inf
        if said:
            allowed[said[-1]] = -np.inf
        return logits + mx.array(allowed)


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.9, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"repetition_penalty": 1.3, "temperature": 0.8, "seed": 5},
    {"repetition_penalty": 1.2, "frequency_penalty": -0.5, "logit_bias": {400: 6.0, 401: -100.0}, "logprobs": 3},
    {"logprobs": 0},
    {"logprobs": 20, "temperature": 1.0, "seed": 6, "min_p": 0.1},
    {"logit_bias": {700: 100.0}},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.2, "seed": 8, "top_k": 5, "presence_penalty": 0.4, "logprobs": 5},
]


def mixed_jobs() -> list[Job]:
    jobs = [
        Job(number, prompt(3 + 11 * number % 50, number), 12 + 3 * number, **parameters)
        for number, parameters in enumerate(PARAMETERS)
    ]
    constrained = Job(90, prompt(9, 90), 20, constraint=OnlyEven(), logprobs=2)
    both = Job(91, prompt(20, 91), 20, constraint=OnlyEven(), repetition_penalty=1.4, temperature=0.7, seed=1)
    return [*jobs, constrained, both]


def assert_scores_agree(some: list[Scored], others: list[Scored]) -> None:
    assert [one.token for one in some] == [one.token for one in others]
    for one, other in zip(some, others, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_the_lean_batch_is_installed_for_the_pinned_mlx_lm(tiny: Model) -> None:
    assert tiny.backend().is_lean
    assert not tiny.backend(plain=True).is_lean


@pytest.mark.parametrize("known", ["_KNOWN_STATE", "_KNOWN_PROMPT_STATE"])
def test_an_unknown_mlx_lm_is_left_alone(tiny: Model, monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    monkeypatch.setattr(lean, known, getattr(lean, known) | {"_new"})
    backend = tiny.backend()
    assert not backend.is_lean
    assert type(backend._generator._generation_batch).__name__ == "GenerationBatch"
    assert run(backend, [Job(1, prompt(5), 4)]).ends == {1: AT_LENGTH}


def test_lean_and_plain_batches_choose_the_same_tokens_whatever_joins_and_leaves(tiny: Model) -> None:
    outcomes = []
    for plain in (False, True):
        backend = tiny.backend(plain=plain)
        removal = {
            30: lambda backend=backend: backend.remove([8, 90]),
            37: lambda backend=backend: backend.remove([10]),
        }
        outcomes.append(run(backend, mixed_jobs(), at=removal))
    lean_one, plain_one = outcomes
    assert lean_one.tokens == plain_one.tokens
    assert lean_one.ends == plain_one.ends
    assert lean_one.scores.keys() == plain_one.scores.keys() == {5, 6, 7, 10, 90}
    for job, scores in lean_one.scores.items():
        assert [one.token for one in scores] == lean_one.tokens[job]
        assert_scores_agree(scores, plain_one.scores[job])


@pytest.mark.parametrize("plain", [False, True])
def test_each_job_gets_what_it_would_get_alone(tiny: Model, plain: bool) -> None:
    together = run(tiny.backend(plain=plain), mixed_jobs())
    for job in mixed_jobs():
        alone = run(tiny.backend(plain=plain), [job])
        assert alone.tokens[job.id] == together.tokens[job.id], job.id
        assert_scores_agree(alone.scores.get(job.id, []), together.scores.get(job.id, []))


def test_a_job_goes_on_after_any_token_as_if_never_interrupted(tiny: Model) -> None:
    for job in mixed_jobs():
        if job.constraint is not None:
            continue
        whole = run(tiny.backend(), [job])
        tokens = whole.tokens[job.id]
        rests = [
            Job(**{field: getattr(job, field) for field in job.__struct_fields__}
                | {"id": cut, "said": tokens[:cut], "max_tokens": len(tokens) - cut})
            for cut in (1, 2, 7, len(tokens) - 1)
        ]  # fmt: skip
        outcome = run(tiny.backend(), rests)
        for rest in rests:
            assert outcome.tokens[rest.id] == tokens[rest.id :], (job.id, rest.id)
            assert_scores_agree(outcome.scores.get(rest.id, []), whole.scores.get(job.id, [])[rest.id :])


def test_a_constraint_is_told_the_answer_so_far_also_of_another_process(tiny: Model) -> None:
    constraint = OnlyEven()
    whole = run(tiny.backend(), [Job(1, prompt(9), 12, constraint=constraint), Job(2, prompt(4), 30)])
    tokens = whole.tokens[1]
    assert all(token % 2 == 0 for token in tokens)
    # One more call than tokens: mlx-lm begins with the next token before it knows that this was the last.
    assert constraint.said[: len(tokens)] == [tokens[:count] for count in range(len(tokens))]
    again = OnlyEven()
    rest = run(tiny.backend(), [Job(1, prompt(9), 7, said=tokens[:5], constraint=again)])
    assert rest.tokens[1] == tokens[5:]
    assert again.said[0] == tokens[:5]


def reference_greedy(model: Model, job: Job) -> list[int]:
    """Choose one token after the other from full forward passes, with the parameters as their definitions say."""
    answer: list[int] = []
    for _ in range(job.max_tokens):
        logits = model.logits(job.prompt + answer)[-1]
        for token in set(job.prompt) | set(answer):
            logits[token] *= job.repetition_penalty if logits[token] < 0 else 1 / job.repetition_penalty
        for token in set(answer):
            logits[token] -= job.presence_penalty + job.frequency_penalty * answer.count(token)
        for token, bias in job.logit_bias.items():
            logits[token] += bias
        answer.append(int(logits.argmax()))
    return answer


@pytest.mark.parametrize(
    "parameters",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.0},
        {"frequency_penalty": -1.0},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {500: 3.0}},
    ],
)
def test_penalties_do_what_their_definitions_say(tiny: Model, parameters: dict[str, Any]) -> None:
    job = Job(1, prompt(12), 40, **parameters)
    others = [Job(2, prompt(30), 20), Job(3, prompt(5), 30, temperature=1.0, seed=1)]
    assert run(tiny.backend(), [others[0], job, others[1]]).tokens[1] == reference_greedy(tiny, job)


def test_a_bias_forces_and_forbids_and_ids_past_the_vocabulary_touch_nothing(tiny: Model) -> None:
    plain = run(tiny.backend(), [Job(1, prompt(5), 10)]).tokens[1]
    wild = {10**8: 50.0, tiny.vocabulary: 50.0, -1: 50.0}
    jobs = [Job(1, prompt(5), 10, logit_bias=wild), Job(2, prompt(5), 10, logit_bias={777: 100.0})]
    forbidden = Job(3, prompt(5), 10, logit_bias=dict.fromkeys(plain, -100.0))
    outcome = run(tiny.backend(), [*jobs, forbidden])
    assert outcome.tokens[1] == plain
    assert outcome.tokens[2] == [777] * 10
    assert not set(outcome.tokens[3]) & set(plain)


def assert_scores_are_the_models(model: Model, job: Job, answer: list[int], scores: list[Scored], first: int) -> None:
    """`first` is the position of the first scored token in prompt and answer."""
    tokens = job.prompt + job.said + answer
    expected = model.logprobs(tokens)
    assert [one.token for one in scores] == tokens[first:]
    for position, one in enumerate(scores, first):
        if position == 0:
            assert one == Scored(tokens[0], None, [])
            continue
        row = expected[position - 1]
        assert one.logprob == pytest.approx(row[one.token], abs=2e-3)
        assert len(one.top) == job.logprobs
        assert [logprob for _, logprob in one.top] == sorted((logprob for _, logprob in one.top), reverse=True)
        best = np.sort(row)[::-1][: len(one.top)]
        assert [logprob for _, logprob in one.top] == pytest.approx(best.tolist(), abs=2e-3)
        assert [row[token] for token, _ in one.top] == pytest.approx(best.tolist(), abs=2e-3)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 1.3, "seed": 2, "top_k": 3}, {"logit_bias": {600: 50.0}}, {"repetition_penalty": 1.5}],
)
def test_logprobs_are_the_models_own_before_any_parameter(tiny: Model, parameters: dict[str, Any]) -> None:
    job = Job(1, prompt(20), 15, logprobs=4, **parameters)
    outcome = run(tiny.backend(), [Job(2, prompt(7), 30, logprobs=1), job, Job(3, prompt(30), 20)])
    assert_scores_are_the_models(tiny, job, outcome.tokens[1], outcome.scores[1], len(job.prompt))
    assert outcome.scores.keys() == {1, 2}


# -- prompts that are scored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, PREFILL, PREFILL + 1, PREFILL + 2, 5 * PREFILL + 3])
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_an_echoed_prompt_is_scored_as_by_one_forward_pass(tiny: Model, length: int, max_tokens: int) -> None:
    job = Job(1, prompt(length), max_tokens, logprobs=2, echo=True)
    outcome = run(tiny.backend(), [job])
    answer = [token for token in outcome.tokens[1] if token != NO_TOKEN]
    assert (len(answer), outcome.ends) == (max_tokens, {1: AT_LENGTH})
    assert_scores_are_the_models(tiny, job, answer, outcome.scores[1], 0)
    assert answer == run(tiny.backend(), [Job(1, prompt(length), max(1, max_tokens))]).tokens[1][:max_tokens]


def test_streams_go_on_while_a_long_prompt_is_scored(tiny: Model) -> None:
    backend, outcome = tiny.backend(), Outcome()
    backend.insert(Job(1, prompt(5), 60))
    for _ in range(5):
        outcome.add(backend)
    backend.insert(Job(2, prompt(20 * PREFILL + 1), 0, logprobs=0, echo=True))
    steps = 0
    while 2 not in outcome.ends:
        before = len(outcome.tokens[1])
        outcome.add(backend)
        assert len(outcome.tokens[1]) == before + 1
        steps += 1
    assert steps == 20
    assert backend.prefilling is False


def test_no_more_logits_are_made_at_once_than_allowed(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 3 * tiny.vocabulary)
    backend, sizes = tiny.backend(), []

    def model(tokens: Any, cache: Any = None) -> Any:
        sizes.append(tokens.shape[1])
        return tiny.model(tokens, cache=cache)

    model.layers = tiny.model.layers  # type: ignore[attr-defined]
    backend._scorer._model = model
    job = Job(1, prompt(2 * PREFILL + 1), 0, logprobs=1, echo=True)
    outcome = Outcome()
    backend.insert(job)
    outcome.add(backend)
    assert sum(sizes[1:]) == PREFILL
    outcome.add(backend)
    assert max(sizes) == 3
    assert_scores_are_the_models(tiny, job, [], outcome.scores[1], 0)


def test_several_short_prompts_are_scored_in_one_step(tiny: Model) -> None:
    backend = tiny.backend()
    for number in range(4):
        backend.insert(Job(number, prompt(5, number), 0, logprobs=0, echo=True))
    assert sorted(job for job, _, _ in backend.step()) == [0, 1, 2, 3]
    assert len(backend) == 0


def test_a_prompt_can_be_removed_while_it_is_scored(tiny: Model) -> None:
    backend = tiny.backend()
    jobs = [Job(number, prompt(4 * PREFILL, number), 3, logprobs=0, echo=True) for number in range(3)]
    outcome = run(backend, jobs, at={2: lambda: backend.remove([0, 99])})
    assert outcome.ends == {1: AT_LENGTH, 2: AT_LENGTH}
    assert not backend._scorer
    assert backend._prompt_scores == {}


# -- several answers to one prompt ------------------------------------------------------------------------------------

LENGTH = 4 * PREFILL + 5


def siblings(count: int, first: int = 0, length: int = LENGTH, **parameters: Any) -> list[Job]:
    return [Job(first + number, prompt(length), 10, group=7, **parameters) for number in range(count)]


def prefilled(backend: BatchBackend) -> int:
    return int(backend._generator._counters.prompt_tokens) + backend._scorer.processed


def assert_forgotten(backend: BatchBackend) -> None:
    """Nothing of jobs that are over is kept."""
    assert len(backend) == 0
    assert not backend.prefilling
    for kept in (backend._jobs, backend._uids, backend._leading, backend._recorders, backend._prompt_scores):
        assert not kept
    assert backend._groups._groups == backend._groups._of_job == {}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("every", [1, 2, 4, 7])
def test_siblings_share_one_prefill_whenever_they_arrive(tiny: Model, every: int, plain: bool) -> None:
    alone = run(tiny.backend(), siblings(1)).tokens[0]
    backend = tiny.backend(plain=plain)
    outcome = run(backend, siblings(4), every=every)
    assert [outcome.tokens[job] for job in range(4)] == [alone] * 4
    assert prefilled(backend) == LENGTH - 1
    assert_forgotten(backend)


def test_siblings_with_seeds_each_get_what_they_would_get_alone(tiny: Model) -> None:
    jobs = [Job(n, prompt(LENGTH), 10, group=7, temperature=1.0, seed=n, repetition_penalty=1.2) for n in range(3)]
    backend = tiny.backend()
    outcome = run(backend, [*jobs, Job(50, prompt(30, 2), 30)])
    assert prefilled(backend) == LENGTH - 1 + 29
    for job in jobs:
        assert outcome.tokens[job.id] == run(tiny.backend(), [job]).tokens[job.id]
    assert len({tuple(outcome.tokens[job.id]) for job in jobs}) == 3


def test_a_sibling_that_comes_after_the_last_one_ended_processes_the_prompt_anew(tiny: Model) -> None:
    backend = tiny.backend()
    first = run(backend, siblings(1)).tokens[0]
    second = run(backend, siblings(1, first=1)).tokens[1]
    assert first == second
    assert prefilled(backend) == 2 * (LENGTH - 1)


@pytest.mark.parametrize("step", range(0, 9, 2))
def test_siblings_survive_the_end_of_the_first(tiny: Model, step: int) -> None:
    alone = run(tiny.backend(), siblings(1)).tokens[0]
    backend = tiny.backend()
    jobs = siblings(4)
    for job in jobs:
        backend.insert(job)
    outcome = run(backend, [], at={step: lambda: backend.remove([0, 2])})
    assert outcome.tokens[1] == outcome.tokens[3] == alone
    assert outcome.ends == {1: AT_LENGTH, 3: AT_LENGTH}
    assert_forgotten(backend)


def test_a_group_number_used_for_another_prompt_shares_nothing(tiny: Model) -> None:
    jobs = [Job(1, prompt(40, 1), 8, group=7), Job(2, prompt(40, 2), 8, group=7), Job(3, prompt(1, 3), 8, group=7)]
    together = run(tiny.backend(), jobs)
    for job in jobs:
        assert together.tokens[job.id] == run(tiny.backend(), [job]).tokens[job.id]


def test_siblings_go_on_where_an_earlier_process_left_each(tiny: Model) -> None:
    whole = run(tiny.backend(), siblings(1)).tokens[0]
    jobs = [Job(n, prompt(LENGTH), 10 - cut, said=whole[:cut], group=7) for n, cut in enumerate((3, 0, 7))]
    backend = tiny.backend()
    outcome = run(backend, [])
    for job in jobs:
        backend.insert(job)
    outcome = run(backend, [])
    assert [outcome.tokens[n] for n in range(3)] == [whole[3:], whole, whole[7:]]
    # What is said is processed for each: all but its last token, and the last of the prompt.
    assert prefilled(backend) == LENGTH - 1 + 3 + 0 + 7


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_siblings_share_the_scores_of_their_prompt(tiny: Model, max_tokens: int) -> None:
    backend = tiny.backend()
    jobs = [Job(n, prompt(LENGTH), max_tokens, group=7, logprobs=1, echo=True) for n in range(3)]
    for job in jobs:
        backend.insert(job)
    outcome = run(backend, [])
    assert prefilled(backend) == LENGTH - 1
    for job in jobs:
        answer = [token for token in outcome.tokens[job.id] if token != NO_TOKEN]
        assert len(answer) == max_tokens
        assert_scores_are_the_models(tiny, job, answer, outcome.scores[job.id], 0)
    assert_forgotten(backend)


def test_where_caches_cannot_be_copied_each_sibling_processes_the_prompt(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean, "can_copy_caches", lambda _: False)
    backend = tiny.backend()
    outcome = run(backend, siblings(3))
    assert outcome.tokens[0] == outcome.tokens[1] == outcome.tokens[2]
    assert prefilled(backend) == 3 * (LENGTH - 1)


def test_more_siblings_than_rows_of_the_generator_all_get_their_turn(tiny: Model) -> None:
    backend = tiny.backend(slots=2)
    jobs = siblings(6)
    for job in jobs:
        backend.insert(job)
    outcome = run(backend, [])
    assert len({tuple(outcome.tokens[job.id]) for job in jobs}) == 1
    assert prefilled(backend) == LENGTH - 1
