"""Who may use how much memory: values in, verdicts out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import MemoryConfig
from supervisor.ledger import (
    Machine,
    Use,
    Verdict,
    budget,
    cache_budget,
    expired,
    free,
    largest,
    plan,
    reserve,
    worker_limit,
)

GIB = 1024**3
CONFIG = MemoryConfig()
MAC = Machine(total=64 * GIB, available=60 * GIB, gpu=48 * GIB)
LINUX = Machine(total=64 * GIB, available=60 * GIB)


def use(model: str, gib: float = 10, **more: object) -> Use:
    size = int(gib * GIB)
    return Use(**{"model": model, "need": size, "footprint": size, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "kept"), [(8, 2), (16, 4), (24, 6), (32, 8), (64, 8), (80, 8), (128, 12.8), (512, 51.2)]
)
def test_the_reserve_is_eight_gib_or_a_tenth_and_never_most_of_a_small_machine(total: int, kept: float) -> None:
    assert reserve(total * GIB, CONFIG) == int(kept * GIB)


def test_the_budget_is_below_the_share_the_reserve_and_what_the_gpu_may_use() -> None:
    assert budget(MAC, CONFIG) == 48 * GIB
    assert budget(LINUX, CONFIG) == 56 * GIB
    assert budget(LINUX, MemoryConfig(fraction=0.5)) == 32 * GIB
    assert budget(LINUX, MemoryConfig(reserve_bytes=40 * GIB)) == 24 * GIB
    assert budget(Machine(total=GIB, available=GIB), MemoryConfig(reserve_bytes=2 * GIB)) == 0
    assert budget(Machine(), CONFIG) is None


def test_a_load_fits_when_budget_and_system_have_room() -> None:
    assert plan(20 * GIB, LINUX, [use("a"), use("b")], CONFIG, now=0).verdict is Verdict.FITS
    refused = plan(57 * GIB, LINUX, [], CONFIG, now=0)
    assert refused.verdict is Verdict.REFUSE
    assert refused.must_go == ()
    assert refused.words.endswith("56.0 GiB are available, whatever is unloaded; free memory or take a smaller model")


def test_what_the_rest_of_the_machine_uses_is_not_there() -> None:
    crowded = Machine(total=64 * GIB, available=12 * GIB)
    # A twentieth stays free, or the load would only lead to shedding.
    assert free(crowded, [], CONFIG) == 12 * GIB - int(64 * GIB * (1 - CONFIG.shed))
    assert plan(10 * GIB, crowded, [], CONFIG, now=0).verdict is Verdict.REFUSE


def test_what_is_promised_to_a_model_is_not_promised_again() -> None:
    loading = use("a", need=30 * GIB, footprint=1 * GIB, ready=False)
    machine = Machine(total=64 * GIB, available=59 * GIB)
    assert free(machine, [loading], CONFIG) == 26 * GIB
    grown = use("a", need=30 * GIB, footprint=40 * GIB)
    assert free(Machine(total=64 * GIB, available=20 * GIB), [grown], CONFIG) == 16 * GIB


@pytest.mark.parametrize(
    ("machine", "uses"),
    [
        (Machine(total=64 * GIB), []),
        (Machine(available=64 * GIB), []),
        (LINUX, [use("a", need=0, footprint=None)]),
    ],
    ids=["available", "total", "a process"],
)
def test_what_is_unknown_is_not_nothing(machine: Machine, uses: list[Use]) -> None:
    found = plan(1, machine, uses, CONFIG, now=0)
    assert found.verdict is Verdict.UNKNOWN
    assert "MEMORY UNMONITORED" in found.words


def test_a_process_that_was_not_measured_yet_counts_with_what_was_predicted() -> None:
    assert free(LINUX, [use("a", footprint=None)], CONFIG) == free(LINUX, [use("a", footprint=0)], CONFIG)


def test_the_least_recently_used_idle_unpinned_models_go() -> None:
    uses = [
        use("new", used_at=30.0),
        use("busy", used_at=1.0, busy=True),
        use("pinned", used_at=2.0, pinned=True),
        use("old", used_at=10.0),
        use("loading", used_at=0.0, ready=False),
    ]
    machine = Machine(total=64 * GIB, available=14 * GIB)
    found = plan(12 * GIB, machine, uses, CONFIG, now=50)
    assert (found.verdict, found.evict) == (Verdict.EVICT, ("old",))
    found = plan(20 * GIB, machine, uses, CONFIG, now=50)
    assert (found.verdict, found.evict) == (Verdict.EVICT, ("old", "new"))
    found = plan(30 * GIB, machine, uses, CONFIG, now=50)
    assert found.verdict is Verdict.REFUSE
    assert found.evict == ()
    assert set(found.must_go) >= {"busy", "pinned"}
    assert "unload first: " in found.words


def test_nobody_goes_who_need_not() -> None:
    uses = [use("small", 1, used_at=1.0), use("large", 30, used_at=2.0)]
    machine = Machine(total=64 * GIB, available=30 * GIB)
    assert plan(40 * GIB, machine, uses, CONFIG, now=9).evict == ("large",)


def test_nothing_goes_where_that_is_not_wanted() -> None:
    uses = [use("a", 50)]
    machine = Machine(total=64 * GIB, available=14 * GIB)
    for config, may in ((MemoryConfig(evict=False), True), (CONFIG, False)):
        found = plan(20 * GIB, machine, uses, config, now=0, may_evict=may)
        assert (found.verdict, found.must_go) == (Verdict.REFUSE, ("a",))


def test_load_thrash_is_damped() -> None:
    uses = [use("a", 50)]
    machine = Machine(total=64 * GIB, available=14 * GIB)

    def verdict(now: float) -> Verdict:
        return plan(20 * GIB, machine, uses, CONFIG, now=now, last_eviction=100.0).verdict

    assert [verdict(100.0), verdict(129.9), verdict(130.0)] == [Verdict.WAIT, Verdict.WAIT, Verdict.EVICT]
    assert "a model was unloaded for another just now: a may be in 10 s" in plan(
        20 * GIB, machine, uses, CONFIG, now=120, last_eviction=100.0
    ).words  # fmt: skip


def test_models_go_after_their_own_time_but_never_in_use() -> None:
    uses = [
        use("short", used_at=0.0, ttl_s=10.0),
        use("long", used_at=0.0, ttl_s=1000.0),
        use("for ever", used_at=0.0),
        use("busy", used_at=0.0, ttl_s=10.0, busy=True),
        use("pinned", used_at=0.0, ttl_s=10.0, pinned=True),
    ]
    assert expired(uses, 9.9) == []
    assert expired(uses, 10.0) == ["short"]


def test_the_largest_is_by_what_it_really_occupies() -> None:
    uses = [use("a", 5), use("b", 7, pinned=True), use("c", 1, footprint=6 * GIB), use("d", 50, footprint=None)]
    assert largest(uses) == "c"
    assert largest([]) == ""


def test_a_workers_limit_is_above_what_it_needs() -> None:
    assert worker_limit(0, 0, 56 * GIB, CONFIG) == 0
    assert worker_limit(GIB // 2, 0, 56 * GIB, CONFIG) == GIB // 2 + GIB
    assert worker_limit(20 * GIB, 0, 56 * GIB, CONFIG) == 30 * GIB
    assert worker_limit(50 * GIB, 0, 56 * GIB, CONFIG) == 56 * GIB
    assert worker_limit(GIB, 20 * GIB, None, CONFIG) == 30 * GIB, "a wrong prediction is not the worker's fault"
    assert worker_limit(GIB, 0, None, MemoryConfig(worker_limit_bytes=7)) == 7
    assert worker_limit(GIB, 0, 56 * GIB, CONFIG, wish=5 * GIB) == 6 * GIB, "the caches of a full batch"
    assert worker_limit(GIB, 0, 56 * GIB, CONFIG, wish=50 * GIB) == 15 * GIB, "but a quarter of the machine at most"
    assert worker_limit(GIB, 0, 2 * GIB, CONFIG, wish=50 * GIB) == 2 * GIB


def test_caches_stay_below_the_mark_at_which_a_worker_stops_to_take_requests() -> None:
    assert cache_budget(10 * GIB, 4 * GIB, GIB, GIB, CONFIG) == int(3.5 * GIB)
    assert cache_budget(5 * GIB, 4 * GIB, GIB, GIB, CONFIG) == GIB, "what was reserved is theirs in any case"
    assert cache_budget(3 * GIB, 4 * GIB, 0, GIB, CONFIG) == 1, "never 0, which would be no limit"
    assert cache_budget(0, 4 * GIB, GIB, GIB, CONFIG) == 0
    assert cache_budget(10 * GIB, 0, 0, GIB, CONFIG) == 0, "of a model that nobody could look into"


sizes = st.integers(0, 100 * GIB)
some_uses = st.lists(
    st.builds(
        Use,
        model=st.text("abcdefgh", min_size=1, max_size=6),
        need=sizes,
        footprint=st.none() | sizes,
        busy=st.booleans(),
        ready=st.booleans(),
        pinned=st.booleans(),
        used_at=st.floats(0, 100),
    ),
    max_size=6,
    unique_by=lambda each: each.model,
)
machines = st.builds(Machine, total=st.none() | sizes, available=st.none() | sizes, gpu=st.none() | sizes)


@given(sizes, machines, some_uses, st.floats(0, 1000))
def test_whatever_there_is_no_plan_breaks_a_promise(need: int, machine: Machine, uses: list[Use], now: float) -> None:
    found = plan(need, machine, uses, CONFIG, now=now, last_eviction=0.0)
    by_name = {each.model: each for each in uses}
    assert all(by_name[model].evictable for model in found.evict)
    if found.verdict is Verdict.FITS:
        limit = budget(machine, CONFIG)
        assert limit is not None
        assert machine.available is not None
        assert need + sum(each.claim for each in uses) <= max(limit, sum(each.claim for each in uses))
        assert need <= machine.available
    if found.verdict is Verdict.EVICT:
        left = [each for each in uses if each.model not in found.evict]
        back = sum(by_name[model].footprint or 0 for model in found.evict)
        after = free(Machine(machine.total, (machine.available or 0) + back, machine.gpu), left, CONFIG)
        assert after is not None
        assert need <= after
    if None in {machine.total, machine.available}:
        assert found.verdict is Verdict.UNKNOWN
    assert bool(found.words) == (found.verdict not in {Verdict.FITS, Verdict.EVICT})
