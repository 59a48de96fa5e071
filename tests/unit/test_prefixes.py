"""The prefix cache inside the batch, with real MLX and a tiny model: the same tokens, sooner."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from tests.cachekit import windowed
from worker import prefixes as module
from worker.batch import BatchBackend
from worker.jobs import Job, Relieve
from worker.loading import relieve
from worker.prefix_chain import BLOCK_TOKENS
from worker.prefix_disk import PrefixDisk
from worker.prefix_kv import Layout, probe
from worker.prefix_shelf import Shelf
from worker.prefixes import Prefixes

BINDING = b"b" * 32
PREFILL = 128
LIMIT = 64 * 1024 * 1024


class Model(NamedTuple):
    """A loaded model and the form of its cache."""

    model: Any
    eos: frozenset[int]
    layout: Layout

    def backend(self, prefixes: Prefixes | None = None, *, slots: int = 8, plain: bool = False) -> BatchBackend:
        return BatchBackend(self.model, self.eos, slots=slots, prefill_tokens=PREFILL, plain=plain, prefixes=prefixes)

    def prefixes(self, limit: int = LIMIT, **more: Any) -> Prefixes:
        return Prefixes(self.layout, BINDING, limit, **more)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Model:
    from mlx_lm.utils import load_model

    model, config = load_model(tiny_model)
    layout = probe(model)
    assert layout is not None
    return Model(model, frozenset({config["eos_token_id"]}), layout)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer to read or write small files than a request or an end should wait."""
    monkeypatch.setattr(module, "_DISK_WAIT_S", 60.0)
    monkeypatch.setattr(module, "_CLOSE_S", 60.0)


@pytest.fixture
def open_disk(tmp_path: Path, tiny: Model) -> Iterator[Callable[[], PrefixDisk]]:
    made: list[PrefixDisk] = []

    def make() -> PrefixDisk:
        made.append(PrefixDisk(Shelf(tmp_path / "cache", "slot", BINDING, 10**9), BINDING, tiny.layout.block_bytes))
        return made[-1]

    yield make
    for disk in made:
        disk.close(5)


def words(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 1_500, length).tolist()  # type: ignore[no-any-return]


def run(backend: BatchBackend, *jobs: Job, every: int = 1) -> dict[int, list[int]]:
    """Insert a job every so many steps; return the tokens of each."""
    tokens: dict[int, list[int]] = {job.id: [] for job in jobs}
    waiting, step = list(jobs), 0
    while waiting or len(backend):
        if waiting and step % every == 0:
            backend.insert(waiting.pop(0))
        for job, token, _ in backend.step():
            tokens[job].append(token)
        step += 1
        assert step < 20_000
    return tokens


def one(backend: BatchBackend, prompt: list[int], count: int = 12, **fields: Any) -> tuple[list[int], int]:
    """Return the tokens of one request, and how many of its prompt came from the cache."""
    job = Job(1, prompt, count, **fields)
    return run(backend, job)[1], job.reused.tokens


# -- the same text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_a_second_request_is_given_what_the_first_processed_and_says_the_same(tiny: Model, plain: bool) -> None:
    prompt = words(500)
    expected, none = one(tiny.backend(plain=plain), prompt)
    backend = tiny.backend(tiny.prefixes(), plain=plain)
    assert one(backend, prompt) == (expected, none)
    assert one(backend, prompt) == (expected, 500 // BLOCK_TOKENS * BLOCK_TOKENS)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 192, 193])
def test_prompts_of_every_length_around_a_block_are_answered_alike(tiny: Model, length: int) -> None:
    """An exact hit is trimmed by one token: the batch needs one to begin with."""
    prompt = words(length, seed=length)
    expected, _ = one(tiny.backend(), prompt)
    backend = tiny.backend(tiny.prefixes())
    one(backend, prompt + words(200, seed=99))
    known = min(length // BLOCK_TOKENS * BLOCK_TOKENS, length - 1)
    assert one(backend, prompt) == (expected, known)
    assert one(backend, prompt) == (expected, known)


def test_the_turns_of_a_conversation_continue_each_other(tiny: Model) -> None:
    backend, plain = tiny.backend(tiny.prefixes()), tiny.backend()
    conversation = words(300)
    for turn in range(3):
        expected, _ = one(plain, conversation, 70)
        answer, reused = one(backend, conversation, 70)
        assert answer == expected
        # Of the last turn at most the end is processed again: what the last look at the answer did not see.
        assert reused >= len(conversation) - 30 - 32 - 2 * BLOCK_TOKENS if turn else reused == 0
        conversation += answer + words(30, seed=turn)


def test_prompts_that_share_a_beginning_share_it_within_one_batch(tiny: Model) -> None:
    system = words(400)
    jobs = [Job(number, system + words(7 * number, seed=number), 10 + number) for number in range(1, 8)]
    expected = {job.id: one(tiny.backend(), job.prompt, job.max_tokens)[0] for job in jobs}
    backend = tiny.backend(tiny.prefixes())
    assert run(backend, *jobs, every=3) == expected
    assert sum(job.reused.tokens > 0 for job in jobs) >= 4
    assert run(backend, *jobs) == expected


def test_several_choices_share_one_prompt_and_the_cache(tiny: Model) -> None:
    prompt = words(300)
    backend = tiny.backend(tiny.prefixes())
    one(backend, prompt, 1)
    for length in (257, 256, 130, 2):
        beginning = prompt[:length]
        alone, _ = one(tiny.backend(), beginning, 12)
        jobs = [Job(number, beginning, 12, group=5) for number in range(1, 5)]
        assert run(backend, *jobs) == dict.fromkeys(range(1, 5), alone)
        assert jobs[0].reused.tokens == max(0, min(length // BLOCK_TOKENS * BLOCK_TOKENS, length - 2))


def test_a_continued_answer_uses_what_was_processed_of_it(tiny: Model) -> None:
    prompt = words(150)
    whole, _ = one(tiny.backend(), prompt, 110)
    backend = tiny.backend(tiny.prefixes())
    one(backend, prompt, 110)
    for cut in (1, 109):
        job = Job(1, prompt, 110 - cut, said=whole[:cut])
        assert run(backend, job)[1] == whole[cut:]
        assert job.reused.tokens >= 128
        assert job.reused.tokens <= len(prompt), "cached tokens are tokens of the prompt"


def test_scored_and_seeded_and_penalised_requests_are_the_same_with_it(tiny: Model) -> None:
    prompt = words(200)
    fields: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 3},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 0.8, "seed": 4},
        {"logprobs": 3},
        {"logprobs": 2, "echo": True},
    ]
    backend = tiny.backend(tiny.prefixes())
    one(backend, prompt)
    for of_one in fields:
        assert one(backend, prompt, **of_one)[0] == one(tiny.backend(), prompt, **of_one)[0]


def test_requests_of_different_salts_share_nothing(tiny: Model) -> None:
    backend = tiny.backend(tiny.prefixes())
    prompt = words(200)
    assert [one(backend, prompt, salt=salt)[1] for salt in ("key:a", "key:b", "", "key:a")] == [0, 0, 0, 192]


# -- what is not used -----------------------------------------------------------------------------------------------


def test_a_cache_that_is_not_what_it_should_be_is_dropped(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = tiny.prefixes()
    backend, prompt = tiny.backend(prefixes), words(200)
    expected, _ = one(backend, prompt)
    join = Layout.join

    def wrong(self: Layout, blocks: Any, tokens: int) -> Any:
        layers = join(self, blocks, tokens)
        layers[-1].offset -= 1
        return layers

    monkeypatch.setattr(Layout, "join", wrong)
    assert one(backend, prompt) == (expected, 0)
    assert prefixes.stats.rejected == 1
    monkeypatch.undo()
    assert one(backend, prompt) == (expected, 192), "it was dropped and made anew"


def test_models_whose_caches_cannot_be_cut_have_none() -> None:
    assert probe(windowed()) is None


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_blocks_cross_the_disk_bit_by_bit_in_every_type(tiny_model: Path, dtype: mx.Dtype) -> None:
    from mlx_lm.utils import load_model

    model, _ = load_model(tiny_model)
    model.set_dtype(dtype)
    layout = probe(model)
    assert layout is not None
    prefixes = Prefixes(layout, BINDING, LIMIT)
    backend = BatchBackend(model, [], slots=2, prefill_tokens=PREFILL, prefixes=prefixes)
    run(backend, Job(1, words(200), 1))
    blocks = list(prefixes._tree.recent())
    assert len(blocks) == 3
    for block in blocks:
        payload = b"".join(bytes(view) for view in layout.to_bytes(block.data))
        assert len(payload) == layout.block_bytes
        again = layout.from_bytes(memoryview(payload))
        assert all(bool(mx.array_equal(x, y)) for x, y in zip(again, block.data, strict=True))
    with pytest.raises(ValueError, match="bytes"):
        layout.from_bytes(memoryview(b"x"))


# -- bounds ---------------------------------------------------------------------------------------------------------


def test_the_bytes_stay_below_the_limit_whatever_is_asked(tiny: Model) -> None:
    prefixes = tiny.prefixes(limit=5 * tiny.layout.block_bytes)
    backend = tiny.backend(prefixes)
    for seed in range(4):
        prompt = words(200 + 50 * seed, seed=seed)
        assert one(backend, prompt, 5)[0] == one(tiny.backend(), prompt, 5)[0]
        assert 0 < prefixes.bytes <= 5 * tiny.layout.block_bytes


def test_what_is_kept_is_no_view_of_the_batch(tiny: Model) -> None:
    """A view would keep the keys and values of the whole batch in memory, uncounted."""
    prefixes = tiny.prefixes()
    backend = tiny.backend(prefixes, slots=4)
    before = mx.get_active_memory()
    run(backend, *[Job(number, words(1000, seed=number), 5) for number in range(4)])
    assert mx.get_active_memory() - before <= prefixes.bytes * 1.2 + 200_000


def test_it_gives_way_when_the_process_is_short_of_memory(tiny: Model) -> None:
    spare = 10**9
    prefixes = tiny.prefixes(spare=lambda: spare)
    backend = tiny.backend(prefixes)
    one(backend, words(500))
    had = prefixes.bytes
    assert had >= 7 * tiny.layout.block_bytes
    spare = -3 * tiny.layout.block_bytes
    one(backend, words(100, seed=1))
    assert prefixes.bytes <= had - 3 * tiny.layout.block_bytes
    spare = -(10**9)
    one(backend, words(100, seed=2))
    assert (prefixes.bytes, prefixes.limit_bytes) == (0, 0)
    spare = 10**9
    one(backend, words(100, seed=3))
    assert prefixes.bytes > 0


def test_relief_drops_everything_when_told_and_else_what_nobody_used_for_long(tiny: Model) -> None:
    now = 0.0
    prefixes = tiny.prefixes(clock=lambda: now)
    backend = tiny.backend(prefixes)
    one(backend, words(200))
    now = 1800.0
    one(backend, words(200, seed=1))
    relieve(Relieve(2**60), prefixes)
    assert prefixes.bytes == 6 * tiny.layout.block_bytes
    now = 4000.0
    relieve(Relieve(2**60), prefixes)
    assert prefixes.bytes == 3 * tiny.layout.block_bytes
    relieve(Relieve(caches=True), prefixes)
    assert prefixes.bytes == 0


def test_requests_that_leave_early_leave_nothing_behind(tiny: Model, open_disk: Callable[[], PrefixDisk]) -> None:
    prefixes = tiny.prefixes(disk=open_disk())
    backend = tiny.backend(prefixes)
    for number in range(1, 9):
        backend.insert(Job(number, words(300, seed=number % 3), 50, group=7 if number > 5 else 0))
        backend.step()
        backend.remove([number - 1])
    backend.remove([8])
    assert (len(backend), prefixes._rows, backend._searching) == (0, {}, {})


# -- over restarts --------------------------------------------------------------------------------------------------


def test_another_process_goes_on_with_what_is_on_disk(tiny: Model, open_disk: Callable[[], PrefixDisk]) -> None:
    prompt = words(500)
    expected, _ = one(tiny.backend(), prompt)
    first = tiny.prefixes(disk=open_disk())
    one(tiny.backend(first), prompt)
    first.close()
    second = tiny.prefixes(disk=open_disk())
    backend = tiny.backend(second)
    assert one(backend, prompt) == (expected, 448)
    assert second.stats.tokens_from_disk == 448
    assert one(backend, prompt) == (expected, 448)
    assert second.stats.tokens_from_disk == 448, "the second time it was in memory"
    # Others run on while it is read.
    third = tiny.prefixes(disk=open_disk())
    jobs = [Job(1, words(100, seed=5), 40), Job(2, prompt, 12), Job(3, prompt[:400], 12)]
    assert run(tiny.backend(third), *jobs, every=2)[2] == expected
    assert (jobs[1].reused.tokens, jobs[2].reused.tokens) == (448, 384)


def test_what_a_failed_engine_kept_is_gone_from_memory_and_from_the_disk(
    tiny: Model, open_disk: Callable[[], PrefixDisk]
) -> None:
    prompt = words(200)
    prefixes = tiny.prefixes(disk=open_disk())
    one(tiny.backend(prefixes), prompt)
    assert prefixes.bytes > 0
    prefixes.disown()
    assert prefixes.bytes == 0
    assert one(tiny.backend(tiny.prefixes(disk=open_disk())), prompt)[1] == 0, "the next process finds nothing of it"


def test_a_disk_that_does_not_answer_is_not_waited_for(
    tiny: Model, open_disk: Callable[[], PrefixDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = words(300)
    expected, _ = one(tiny.backend(), prompt)
    first = tiny.prefixes(disk=open_disk())
    one(tiny.backend(first), prompt)
    first.close()
    disk = open_disk()
    monkeypatch.setattr(disk, "load", lambda _names: 77)
    monkeypatch.setattr(module, "_DISK_WAIT_S", 0.1)
    assert one(tiny.backend(tiny.prefixes(disk=disk)), prompt) == (expected, 0)


def test_a_request_that_leaves_while_its_prefix_is_read_calls_that_off(
    tiny: Model, open_disk: Callable[[], PrefixDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny.prefixes(disk=open_disk())
    one(tiny.backend(first), words(300))
    first.close()
    disk = open_disk()
    called_off: list[int] = []
    monkeypatch.setattr(disk, "load", lambda _names: 77)
    monkeypatch.setattr(disk, "forget", called_off.append)
    prefixes = tiny.prefixes(disk=disk)
    backend = tiny.backend(prefixes)
    backend.insert(Job(1, words(300), 12))
    backend.step()
    assert backend._searching
    backend.remove([1])
    assert (called_off, prefixes._open, len(backend)) == ([77], set(), 0)


def test_what_nobody_came_back_to_is_written_only_as_the_wear_allows(
    tiny: Model, open_disk: Callable[[], PrefixDisk]
) -> None:
    class Never:
        def allows(self, _bytes: int, _now: float) -> bool:
            return False

    disk = open_disk()
    wear: Any = Never()
    prefixes = tiny.prefixes(disk=disk, wear=wear)
    backend = tiny.backend(prefixes)
    one(backend, words(200))
    assert not disk.waiting
    assert not disk._names
    one(backend, words(200))
    prefixes.close()
    prefixes.take_in(())
    assert len(disk._names) == 3, "it was used a second time"
