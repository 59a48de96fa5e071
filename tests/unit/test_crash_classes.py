"""Crash classes: the table against a corpus of real texts, and what must hold for any text."""

import json
import re
import signal
import time
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.states import WorkerExit
from supervisor.exits import ExitRecord, classify, exception_type, known_panic, known_text, record, table
from supervisor.platform.reports import jetsam_pids, jetsam_report, panic_time_and_text

CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "crashes"
SAMPLES: list[dict[str, Any]] = json.loads((CORPUS / "expected.json").read_text(encoding="utf-8"))["samples"]
CLASSES = {
    *("metal_oom", "gpu_timeout", "gpu_interactivity", "gpu_fault", "gpu_ignored", "gpu_victim", "buffer_limit"),
    *("resource_limit", "jetsam", "killed", "native_crash", "python_error", "load_error", "hang", "stall", "lease"),
    *("asked", "ended", "start_failed", "no_resources", "terminated", "lost", "panic", "thread_died", "protocol_error"),
    *("canary_mismatch", "no_device", "bad_config", "usage", "remote_code", "memory_limit", "memory_pressure"),
}
#: A search may take this long for the longest tail.
LIMIT_S = 0.05


def of(suffix: str) -> list[Any]:
    return [pytest.param(sample, id=sample["file"]) for sample in SAMPLES if sample["file"].endswith(suffix)]


def text_of(sample: dict[str, Any]) -> str:
    return (CORPUS / sample["file"]).read_text(encoding="utf-8")


def of_exit(returncode: int | None, tail: str = "", **more: Any) -> ExitRecord:
    return classify(returncode, at=1.0, **{"asked": False, "hung": False, "stderr_tail": tail, **more})


def of_sample(sample: dict[str, Any]) -> ExitRecord:
    keys = ("last_words", "asked", "hung", "jetsam", "verdict")
    return of_exit(sample["returncode"], text_of(sample), **{key: sample[key] for key in keys if key in sample})


# -- the corpus -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", of(".txt"))
def test_every_recorded_end_gets_its_class(sample: dict[str, Any]) -> None:
    found = of_sample(sample)
    assert found.name == sample["class"]
    assert sample.get("reason_has", "") in found.reason
    assert not [part for part in sample.get("reason_lacks", ()) if part in found.reason]


@pytest.mark.parametrize("sample", of(".ips"))
def test_a_jetsam_report_names_exactly_the_processes_it_killed(sample: dict[str, Any]) -> None:
    assert sorted(jetsam_pids(text_of(sample))) == sample["pids"]
    report = jetsam_report(text_of(sample))
    assert (None if report is None else report.at) == sample["at"]


@pytest.mark.parametrize("sample", of(".panic"))
def test_a_panic_report_tells_its_time_its_words_and_whose_thread_it_was(sample: dict[str, Any]) -> None:
    report = panic_time_and_text(text_of(sample))
    assert report is not None
    assert (report.at, report.kind, report.pid, report.text) == tuple(
        sample[key] for key in ("at", "kind", "pid", "text")
    )
    assert bool(report.words) == (report.kind != "other")


def test_the_corpus_is_complete_and_every_sample_has_a_source() -> None:
    files = {path.name for path in CORPUS.iterdir()} - {"expected.json"}
    assert files == {sample["file"] for sample in SAMPLES}
    assert len(SAMPLES) == len(files) >= 40
    assert all(sample["source"] for sample in SAMPLES)


def test_every_class_that_an_exit_can_show_is_in_the_corpus() -> None:
    seen = {sample["class"] for sample in SAMPLES if "class" in sample}
    assert seen == CLASSES - {"panic", "memory_limit", "memory_pressure", "no_resources"}  # no exit says so


@pytest.mark.parametrize("sample", of(".txt"))
def test_what_is_quoted_of_a_text_is_one_known_message(sample: dict[str, Any]) -> None:
    """Without last words, `reason` consists of the table's words, a known message or type, and the status."""
    if "last_words" in sample:
        return
    found = of_sample(sample)
    rows = [rule for rule in table().rules if rule.name == found.name]
    words = {table().classes[found.name].words, *(rule.words for rule in rows)}
    rest = next(found.reason.removeprefix(start) for start in sorted(words, reverse=True) if start in found.reason)
    match = re.fullmatch(r"(?:: (.+?))?(?: \((?:SIG\w+|exit code \d+)\))?", rest)
    assert match is not None
    quoted = match.group(1)
    assert not quoted or quoted == known_text(quoted) or quoted == exception_type(text_of(sample))


# -- the table --------------------------------------------------------------------------------------------------


def test_the_table_has_every_class_of_the_design_with_words_and_advice() -> None:
    assert set(table().classes) == CLASSES
    for name, kind in table().classes.items():
        assert kind.words, name
        assert kind.hint or not kind.counted, name
        assert not (kind.permanent and kind.probe), f"{name}: trying again cannot help, and would be tried again"


def test_every_rule_names_a_class_and_the_last_three_fit_everything() -> None:
    rules = table().rules
    assert {rule.name for rule in rules} <= CLASSES
    assert all(rule.signals == () or set(rule.signals) <= {s.name for s in signal.Signals} for rule in rules)
    assert {rule.how for rule in rules if not (rule.pattern or rule.codes or rule.signals)} == {
        *("code", "signal", "unknown")
    }


def test_every_exit_code_of_the_contract_has_a_row() -> None:
    rows = {code for rule in table().rules if not rule.pattern for code in rule.codes}
    assert set(WorkerExit) <= rows


def bounded(parsed: Any, *, inside: bool = False) -> bool:
    """Whether a pattern has only literals, digit and hex sets, alternatives, and short repeats that are not nested."""
    for operation, argument in parsed:
        kind = str(operation)
        if kind == "LITERAL":
            continue
        if kind == "IN" and all(str(op) in {"RANGE", "LITERAL", "CATEGORY"} for op, _ in argument):
            if any(str(op) == "CATEGORY" and str(value) != "CATEGORY_DIGIT" for op, value in argument):
                return False
            if any(str(op) == "RANGE" and value not in {(48, 57), (97, 102)} for op, value in argument):
                return False
        elif kind == "MAX_REPEAT":
            _, most, body = argument
            if most > 20 or (inside and most > 1) or not bounded(body, inside=most > 1):
                return False
        elif kind == "BRANCH":
            if not all(bounded(branch, inside=inside) for branch in argument[1]):
                return False
        elif kind == "SUBPATTERN":
            if not bounded(argument[-1], inside=inside):
                return False
        else:
            return False
    return True


@pytest.mark.parametrize("pattern", [row.pattern for row in (*table().rules, *table().panics) if row.pattern])
def test_a_pattern_is_linear_and_matches_nothing_that_a_person_could_have_written(pattern: str) -> None:
    assert bounded(_parser.parse(pattern))
    assert re.compile(pattern).groups == 0


@pytest.mark.parametrize(("pattern", "fine"), [(r"a\d{1,9}b", True), (r"a.*b", False), (r"(?:a{1,9}){1,9}", False)])
def test_the_check_of_patterns_can_fail(pattern: str, fine: bool) -> None:
    assert bounded(_parser.parse(pattern)) is fine


# -- what follows from a class ----------------------------------------------------------------------------------


def test_a_victim_of_another_process_is_not_counted_and_its_own_fault_before_it_is() -> None:
    victim = "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)\n"
    fault = "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)\n"
    assert (of_exit(-6, victim).name, of_exit(-6, victim).counted) == ("gpu_victim", False)
    assert (of_exit(-6, fault + victim).name, of_exit(-6, fault + victim).counted) == ("gpu_fault", True)
    assert of_exit(-6, victim + fault).name == "gpu_fault"


def test_an_ignored_process_cools_down_and_starts_with_less() -> None:
    found = of_exit(86, "kIOGPUCommandBufferCallbackErrorSubmissionsIgnored")
    assert (found.name, found.extra_delay_s, found.degrade, found.probe) == ("gpu_ignored", 60.0, True, True)


@pytest.mark.parametrize("name", ["load_error", "remote_code", "bad_config", "usage"])
def test_what_trying_again_cannot_help_is_permanent(name: str) -> None:
    found = record(name, at=0)
    assert (found.permanent, found.probe) == (True, False)


@pytest.mark.parametrize("name", ["jetsam", "panic"])
def test_what_endangers_the_machine_is_not_tried_again_by_itself(name: str) -> None:
    found = record(name, at=0)
    assert (found.permanent, found.probe, found.degrade) == (False, False, True)


def test_a_sigkill_is_jetsam_only_if_a_report_says_so() -> None:
    assert of_exit(-9).name == "killed"
    assert of_exit(-9, jetsam=True).name == "jetsam"
    assert of_exit(-6, jetsam=True).name == "native_crash"


def test_being_asked_and_being_hung_beat_every_text() -> None:
    text = "kIOGPUCommandBufferCallbackErrorTimeout"
    assert of_exit(-9, text, asked=True).name == "asked"
    assert of_exit(-9, text, asked=True, hung=True).name == "hang"
    assert of_exit(-9, text, hung=True, verdict="canary_mismatch").name == "canary_mismatch"


def test_last_words_are_one_short_line() -> None:
    found = of_exit(65, last_words="a\x1b[31m\n\rb" + "x" * 1000)
    assert len(found.reason) < 400
    assert found.reason.isprintable()


def test_a_record_of_a_class_without_an_exit_has_its_consequences() -> None:
    found = record("start_failed", at=5.0, detail=": No such file or directory")
    assert found == ExitRecord(
        "start_failed", "could not be started: No such file or directory", 5.0, hint=found.hint, probe=True
    )


def test_only_the_end_of_a_long_output_counts() -> None:
    text = "kIOGPUCommandBufferCallbackErrorOutOfMemory\n"
    assert of_exit(-6, text + "x" * 70_000).name == "native_crash"
    assert of_exit(-6, "x" * 70_000 + text).name == "metal_oom"


def test_panics_are_known_by_their_text() -> None:
    kind = known_panic('"completeMemory() prepare count underflow" @IOGPUMemory.cpp:550')
    assert kind is not None
    assert kind.kind == "gpu_memory"
    assert known_panic("something else") is None


# -- any text ---------------------------------------------------------------------------------------------------

fragments = st.sampled_from(
    [
        *(known_text(text_of(sample)) or "x" for sample in SAMPLES),
        *("Traceback (most recent call last):\n", "  File \"x\", line 1, in f\n", "kIOGPUCommandBufferCallbackError"),
        *("[metal::malloc] Attempting to allocate 1", "Ignored (for causing", "\n", "\x00", "\x1b[0m", "MemoryError"),
    ]
)  # fmt: skip
texts = st.one_of(
    st.binary(max_size=65_536).map(lambda data: data.decode(errors="replace")),
    st.text(max_size=2000),
    st.lists(fragments, max_size=40).map("".join),
    st.builds(lambda part, count: (part * count)[:65_536], fragments, st.integers(1, 5000)),
)


def fastest(tail: str, rounds: int = 5) -> float:
    """Return the least processor time of a few rounds: other work on the machine does not count."""
    best = float("inf")
    for _ in range(rounds):
        started = time.thread_time()
        of_exit(1, tail)
        best = min(best, time.thread_time() - started)
        if best < LIMIT_S:
            break
    return best


@given(
    tail=texts,
    code=st.one_of(st.none(), st.integers(-70, 300)),
    words=st.one_of(st.just(""), texts),
    jetsam=st.booleans(),
    verdict=st.sampled_from(["", "protocol_error", "no such class"]),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_output_ends_in_a_known_class(tail: str, code: int | None, words: str, jetsam: bool, verdict: str) -> None:
    found = classify(
        code, at=0, asked=False, hung=False, last_words=words, stderr_tail=tail, jetsam=jetsam, verdict=verdict
    )
    assert found.name in CLASSES
    assert found.reason
    assert len(found.reason) < 600
    assert (found.code is None) or (found.signal is None)


@given(tail=texts)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_output_is_classed_within_50_ms(tail: str) -> None:
    assert fastest(tail) < LIMIT_S


@pytest.mark.parametrize("rule", [rule for rule in table().rules if rule.pattern], ids=lambda rule: rule.pattern[:40])
def test_the_beginning_of_a_pattern_over_and_over_is_classed_within_50_ms(rule: Any) -> None:
    literal = re.sub(r"\\(.)", r"\1", re.split(r"(?<!\\)[(|{]", rule.pattern)[0])
    assert fastest((literal or "x") * (65_536 // len(literal or "x"))) < LIMIT_S


secrets = st.text(st.characters(categories=["Ll", "Lu"]), min_size=12, max_size=30).map(lambda text: f"Zq{text}qZ")


@given(secret=secrets, code=st.sampled_from([-6, -9, -11, 0, 1, 70, 86, 87, 88, None]))
@settings(max_examples=150, deadline=None)
def test_no_word_of_the_output_reaches_the_reason(secret: str, code: int | None) -> None:
    tails = [
        f"{secret}\n",
        f"Traceback (most recent call last):\n  File \"{secret}\", line 1, in {secret}\n{secret}: {secret}\n",
        f"Traceback (most recent call last):\n  File \"a\", line 1, in f\nValueError: {secret}\n{secret}\n",
        f"libc++abi: terminating due to uncaught exception of type {secret}: {secret}\n",
        f"[METAL] Command buffer execution failed: {secret}\n",
        f"[metal::malloc] Attempting to allocate {secret} bytes\n",
        f"Exception in thread {secret}:\n",
        f"kIOGPUCommandBufferCallbackErrorTimeout{secret}\n",
    ]  # fmt: skip
    assert not [tail for tail in tails if secret in of_exit(code, tail).reason]


def test_the_type_of_the_last_traceback_is_the_first_line_after_its_frames() -> None:
    text = (
        "Traceback (most recent call last):\n  File \"a\", line 1, in f\nKeyError: 'x'\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        'Traceback (most recent call last):\n  File "a", line 2, in g\n    work()\n    ~~~~^^\n'
        "RuntimeError: first line\nTypeError: second line of the message\n"
    )
    assert exception_type(text) == "RuntimeError"
    assert exception_type("RuntimeError: no traceback") == ""
    assert exception_type("Traceback (most recent call last):") == ""


@given(text=texts)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_as_a_report_raises_nothing(text: str) -> None:
    jetsam_pids(text)
    panic_time_and_text(text)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                ["processes", "pid", "reason", "killDelta", "memoryStatus", "panicString", "timestamp", "date", "x"]
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=20,
)


@given(header=json_values, body=json_values)
@settings(max_examples=200, deadline=None)
def test_any_json_as_a_report_raises_nothing(header: Any, body: Any) -> None:
    text = f"{json.dumps(header)}\n{json.dumps(body)}"
    assert all(isinstance(pid, int) for pid in jetsam_pids(text))
    panic_time_and_text(text)


def test_a_deeply_nested_report_raises_nothing() -> None:
    text = '{"bug_type":"298"}\n' + '{"processes":' * 100_000
    assert jetsam_pids(text) == frozenset()
    assert panic_time_and_text(text) is None
