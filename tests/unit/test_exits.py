"""Every way a process can end has one class, words for the operator, and says whether it counts and whether to try
again (design 6). What Metal and MLX say beside it is in test_crash_classes.py."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.states import WorkerExit
from supervisor.exits import ExitRecord, classify, table


def end(returncode: int | None, *, asked: bool = False, hung: bool = False, last_words: str = "") -> ExitRecord:
    return classify(returncode, at=12.5, asked=asked, hung=hung, last_words=last_words)


#: Exit code, class, counted, permanent, a word of the reason. The codes are part of the contract with workers.
CODES = [
    (0, "ended", True, False, "without being asked"),
    (64, "usage", True, True, "started wrongly"),
    (65, "load_error", True, True, "damaged"),
    (66, "load_error", True, True, "missing"),
    (69, "no_device", True, False, "GPU"),
    (70, "python_error", True, False, "Python"),
    (77, "remote_code", True, True, "refused"),
    (78, "bad_config", True, True, "configuration"),
    (87, "metal_oom", True, False, "memory"),
    (88, "resource_limit", True, False, "limit"),
    (89, "stall", True, False, "progress"),
    (90, "lease", False, False, "lease"),
    (1, "python_error", True, False, "Python"),
    (2, "python_error", True, False, "not one of ours"),
    (255, "python_error", True, False, "not one of ours"),
]
SIGNALS = [
    (signal.SIGABRT, "native_crash"),
    (signal.SIGSEGV, "native_crash"),
    (signal.SIGBUS, "native_crash"),
    (signal.SIGILL, "native_crash"),
    (signal.SIGFPE, "native_crash"),
    (signal.SIGTRAP, "native_crash"),
    (signal.SIGSYS, "native_crash"),
    (signal.SIGKILL, "killed"),
    (signal.SIGTERM, "terminated"),
    (signal.SIGINT, "terminated"),
    (signal.SIGHUP, "terminated"),
]


@pytest.mark.parametrize(("code", "name", "counted", "permanent", "word"), CODES)
def test_an_exit_code_means_its_class(code: int, name: str, counted: bool, permanent: bool, word: str) -> None:
    record = end(code)
    assert (record.name, record.counted, record.permanent) == (name, counted, permanent)
    assert (record.code, record.signal, record.at) == (code, None, 12.5)
    assert word in record.reason
    assert record.reason.endswith(f"(exit code {code})")


@pytest.mark.parametrize(("number", "name"), SIGNALS)
def test_a_signal_means_its_class_and_is_named(number: signal.Signals, name: str) -> None:
    record = end(-number)
    assert (record.name, record.counted, record.permanent) == (name, True, False)
    assert (record.code, record.signal) == (None, number.name)
    assert number.name in record.reason


def test_every_exit_code_of_a_worker_has_a_class_of_its_own_meaning() -> None:
    unknown = end(255).reason.replace("255", "{}")
    for code in WorkerExit:
        assert end(code).reason != unknown.format(int(code)), code.name


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert end(-99).signal == "signal 99"


@pytest.mark.parametrize("returncode", [0, 70, -6, -9, -15, None])
def test_what_we_asked_for_is_never_counted(returncode: int | None) -> None:
    record = end(returncode, asked=True)
    assert (record.name, record.counted, record.permanent) == ("asked", False, False)


@pytest.mark.parametrize("asked", [False, True])
def test_a_hang_is_a_hang_however_the_process_then_ended(asked: bool) -> None:
    record = end(-9, asked=asked, hung=True)
    assert (record.name, record.counted, record.signal) == ("hang", True, "SIGKILL")


def test_an_end_without_a_status_is_neither_code_nor_signal() -> None:
    record = end(None)
    assert (record.name, record.code, record.signal) == ("lost", None, None)
    assert "None" not in record.reason


def test_the_workers_own_words_stand_in_the_reason() -> None:
    record = end(65, last_words="model.safetensors is truncated: 10 bytes of 20")
    assert "model.safetensors is truncated: 10 bytes of 20" in record.reason


def every_returncode() -> Iterator[int | None]:
    yield None
    yield from range(-130, 260)


def test_every_return_code_there_is_has_a_class_of_the_table() -> None:
    for returncode in every_returncode():
        record = end(returncode)
        assert record.name in table().classes
        assert record.reason


@given(st.text(st.characters(blacklist_categories=()), max_size=2000), st.sampled_from([None, 0, 65, 70, -6, -9]))
def test_no_last_words_break_the_line_or_make_it_long(words: str, returncode: int | None) -> None:
    reason = end(returncode, last_words=words).reason
    assert len(reason) < 600
    assert not any(char in reason for char in "\n\r\x00\x1b\u2028\u202e")
