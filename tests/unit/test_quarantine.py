"""Who is refused after being in crashes, with a virtual clock."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.quarantine import Quarantine, digest_of, shown
from protocol.data import ChatMessage, Kind, Sampling, Submit

A, B = b"a" * 32, b"b" * 32


def submit(text: str = "secret words", rid: int = 1, trace: str = "", **sampling: Any) -> Submit:
    return Submit(0, rid, Kind.CHAT, [ChatMessage("user", text)], Sampling(**sampling), 9.0, trace=trace)


def test_a_digest_is_of_what_decides_the_answer_and_of_nothing_else() -> None:
    digest = digest_of("m", submit())
    assert digest == digest_of("m", submit(rid=2, trace="other"))
    others = [
        digest_of("n", submit()),
        digest_of("m", submit("secret word")),
        digest_of("m", submit(seed=1)),
        digest_of("m", submit(max_tokens=1)),
        digest_of("m", submit(stop=("x",))),
    ]
    assert len({digest, *others}) == 6
    assert len(shown(digest)) == 8


def test_named_twice_within_the_time_is_refused_for_the_time() -> None:
    quarantine = Quarantine(2, 600)
    assert not quarantine.name(A, 0)
    assert not quarantine.refuses(A, 1)
    assert quarantine.name(A, 599)
    assert quarantine.refuses(A, 600)
    assert quarantine.refuses(A, 1198)
    assert not quarantine.refuses(A, 1199)
    assert not quarantine  # and forgotten
    assert quarantine.refusal().spec.status == 422
    assert quarantine.refusal().retry_after_s is None


def test_two_crashes_far_apart_are_no_reason() -> None:
    quarantine = Quarantine(2, 600)
    assert not quarantine.name(A, 0)
    assert not quarantine.name(A, 600)
    assert quarantine.name(A, 601)


def test_one_that_comes_to_its_end_is_acquitted_unless_it_is_refused_already() -> None:
    quarantine = Quarantine(2, 600)
    quarantine.name(A, 0)
    quarantine.acquit(A, 0.5)
    assert not quarantine.name(A, 1)
    assert quarantine.name(A, 2)
    quarantine.acquit(A, 2.5)
    quarantine.acquit(B, 2.5)
    assert quarantine.refuses(A, 3)


def test_after_its_time_it_starts_from_nothing() -> None:
    quarantine = Quarantine(2, 600)
    quarantine.name(A, 0)
    quarantine.name(A, 1)
    assert not quarantine.name(A, 700)
    quarantine.acquit(A, 700)
    assert not quarantine


def test_one_that_was_refused_can_be_acquitted_of_what_came_later() -> None:
    quarantine = Quarantine(3, 100)
    assert [quarantine.name(A, at) for at in (0, 0, 1)] == [False, False, True]
    assert quarantine.name(A, 100)  # it still ran; only once within the time, so the refusal gets no longer
    quarantine.acquit(A, 100.5)
    assert quarantine.refuses(A, 100.5)
    quarantine.acquit(A, 101)
    assert not quarantine


def test_the_table_is_bounded_and_forgets_those_named_longest_ago() -> None:
    quarantine = Quarantine(2, 600)
    digests = [number.to_bytes(32, "big") for number in range(5000)]
    for digest in digests:
        quarantine.name(digest, 1)
    assert len(quarantine._records) == 1024
    assert quarantine.name(digests[-1], 2)
    assert not quarantine.name(digests[0], 2)


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.floats(0, 100), st.sampled_from(["name", "acquit"]))))
def test_refused_is_exactly_who_was_named_so_often_within_the_time(steps: list[tuple[bytes, float, str]]) -> None:
    quarantine, now = Quarantine(3, 100), 0.0
    named: dict[bytes, list[float]] = {A: [], B: []}
    until = {A: 0.0, B: 0.0}
    for digest, pause, what in steps:
        now += pause
        if what == "acquit":
            quarantine.acquit(digest, now)
            named[digest] = named[digest] if now < until[digest] else []
        else:
            named[digest] = [at for at in named[digest] if now - at < 100] + [now]
            if len(named[digest]) >= 3:
                until[digest] = now + 100
            assert quarantine.name(digest, now) == (now < until[digest])
        for each in (A, B):
            assert quarantine.refuses(each, now) == (now < until[each])
