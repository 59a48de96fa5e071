"""The bench refuses what it cannot measure, counts what fails, and leaves nothing running when it is ended."""

import asyncio
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import __main__ as program
from bench import gate
from bench.__main__ import parse
from bench.compare import Comparison, undisturbed
from bench.contenders import Contender, Measured, Peer
from bench.gate import highest, outgrown, read_baseline, read_tolerance, verdict
from bench.inprocess import Limit
from bench.load import run_load, summary
from bench.workloads import Workload


@pytest.mark.parametrize(
    "options",
    [
        ["--streams", "x"],
        ["--streams", "1,"],
        ["--streams", "0"],
        ["--tokens", "0"],
        ["--total", "-1"],
        ["--rounds", "0"],
        ["--blas-threads", "0"],
        ["--who", ""],
        ["--model", "/nowhere"],
        ["--embedder", "/nowhere"],
        ["--out", "/dev/null"],
    ],
)
def test_options_that_cannot_be_are_refused_in_words(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(options)
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_run_in_which_nothing_was_answered_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "run", lambda *_: {"results": [{"rounds": {"LMX": [{"requests": 0}]}}]})
    monkeypatch.setattr(program, "end_cleanly", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert program.main() == 1
    assert "nothing was answered" in capsys.readouterr().err


async def test_the_clock_begins_with_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made_at: list[float] = []

    def slowly(*_: Any) -> str:
        time.sleep(0.5)
        made_at.append(time.perf_counter())
        return "words"

    monkeypatch.setattr("bench.load.prompt", slowly)
    served, seconds = await run_load("http://127.0.0.1:1", "m", Workload("w", 1, 1))
    assert [one.error for one in served] == ["refused"]
    assert seconds <= time.perf_counter() - made_at[-1]


class Generator:
    """Two rows: nothing in the first step, then a token of each in every step."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.steps = 0
        self.now = 0.0

    def insert(self, _prompts: list[list[int]], tokens: list[int], **_: Any) -> tuple[int]:
        self.left[len(self.left)] = tokens[0]
        return (len(self.left) - 1,)

    def next(self) -> tuple[None, list[SimpleNamespace]]:
        self.steps += 1
        self.now += 100.0 if self.steps == 2 else 1.0
        if self.steps == 1:
            return None, []
        self.left = {uid: left - 1 for uid, left in self.left.items()}
        return None, [SimpleNamespace(uid=uid, finish_reason=None if n else "length") for uid, n in self.left.items()]


def test_in_process_too_a_gap_is_between_two_tokens_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, generator = Limit.__new__(Limit), Generator()
    monkeypatch.setattr("bench.inprocess.time", SimpleNamespace(perf_counter=lambda: generator.now))
    limit._generator, limit._sampler = generator, None
    limit._tokenizer = SimpleNamespace(has_chat_template=False, encode=lambda _: [1])
    found = limit.measure(Workload("w", 2, 9))
    assert found["tokens"] == 18
    assert found["gap_p99_s"] == 1.0, "before the first token there is no gap"
    assert found["ttft_s"] == [101.0, 101.0]


async def test_an_answer_that_never_comes_costs_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load._PATIENCE_S", 0.1)
    monkeypatch.setattr("bench.load._PER_TOKEN_S", 0.0)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = summary(*await run_load(f"http://127.0.0.1:{port}", "m", Workload("w", 1, 1, 3)))
    assert found["errors"] == {"timeout": 3}


class Scripted(Contender):
    """Measures what it is told; notes what it is asked."""

    name = "scripted"
    embeds = True

    def __init__(self, *script: Measured, closes: bool = True) -> None:
        self._script, self._closes = list(script), closes
        self.started = False
        self.asked: list[Workload] = []
        self.closed = 0

    def _start(self) -> None:
        pass

    def _close(self) -> None:
        self.closed += 1
        if not self._closes:
            raise OSError

    def measure(self, workload: Workload) -> Measured:
        self.asked.append(workload)
        return self._script.pop(0) if self._script else {"others": 0.0, "errors": {}, "requests": 1}


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.compare.psutil.cpu_percent", lambda _: 0.0)


def test_a_measurement_with_errors_is_never_the_one_that_is_left_out() -> None:
    failed = {"others": 0.9, "errors": {"reset": 1}}
    assert undisturbed(Scripted({"others": 0.5, "errors": {}}, failed), Workload("w", 1, 1)) is failed
    assert undisturbed(Scripted(failed, {"others": 0.0, "errors": {}}), Workload("w", 1, 1)) is failed


def test_a_model_of_vectors_is_warmed_up_with_texts() -> None:
    contender = Scripted()
    workload = Workload("texts", 1, 0, kind="embeddings")
    Comparison([contender], rounds=1, vectors=True, say=lambda _: None).run([workload], lambda: None)
    assert len(contender.asked) > 1
    assert {each.kind for each in contender.asked} == {"embeddings"}


def test_one_that_does_not_let_itself_be_ended_keeps_no_other_from_it() -> None:
    bad, good = Scripted(closes=False), Scripted()
    for order in ([bad, good], [good, bad]):
        good.closed = 0
        with pytest.raises(OSError):  # noqa: PT011 - it has no words
            Comparison(order, rounds=1, say=lambda _: None).run([Workload("w", 1, 1)], lambda: None)
        assert good.closed == 1


class Starting(Peer):
    """A server that is still starting."""

    name = "starting"

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-c", f"import time; time.sleep(60); {port}"]

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process


def test_a_server_that_is_still_starting_is_ended_with_the_bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told_to_end(*_: Any, **__: Any) -> None:
        sys.exit(143)

    monkeypatch.setattr("bench.contenders.urllib.request.urlopen", told_to_end)
    peer = Starting(tmp_path, None, 1)
    with pytest.raises(SystemExit):
        peer.start()
    assert peer.process.poll() is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_a_program_and_the_second_does_not_cut_that_short(number: signal.Signals) -> None:
    code = """if True:
        import sys, time
        from bench.options import end_cleanly
        end_cleanly()
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("ending", flush=True)
            sys.stdin.readline()
            print("ended", flush=True)
    """
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate("\n", timeout=30) == ("ended\n", "")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("text", [None, "{}", "no json", '{"figures": {"a": "b"}}'])
def test_a_gate_without_a_baseline_is_no_gate(
    text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "baseline.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("LMX_PERF_BASELINE", str(file))
    monkeypatch.setattr(sys, "argv", ["perf-gate", "--parts", "modules"])
    with pytest.raises(SystemExit) as ended:
        gate.main()
    assert ended.value.code == 2
    assert "is no baseline" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["x", "nan", "-0.1", "inf"])
def test_a_tolerance_that_is_none_is_refused(given: str) -> None:
    assert read_tolerance("0.3") == 0.3
    with pytest.raises(ValueError, match="LMX_PERF_TOLERANCE"):
        read_tolerance(given)


def test_a_part_that_the_gate_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["perf-gate", "--parts", "paths,nothere"])
    with pytest.raises(SystemExit) as ended:
        gate.main()
    assert ended.value.code == 2
    assert "there is no nothere" in capsys.readouterr().err


def test_what_is_no_number_does_not_pass_the_gate() -> None:
    assert verdict({"a": math.nan}, {"a": 1.0}, 0.15) == ["a"]


def test_the_gate_says_when_its_baseline_has_been_outgrown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = {"a: calls": 10.0, "modules": 10.0, "CPU": 10.0}
    assert outgrown({"a: calls": 8.4, "modules": 8.6, "CPU": 1.0, "new: calls": 1.0}, baseline, 0.15) == ["a: calls"]
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"figures": {"a: calls": 10.0}}))
    monkeypatch.setenv("LMX_PERF_BASELINE", str(file))
    monkeypatch.setattr(gate, "PARTS", {"one": lambda *_: {"a: calls": 4.0}})
    monkeypatch.setattr(gate, "end_cleanly", lambda: None)
    monkeypatch.setattr(sys, "argv", ["perf-gate", "--parts", "one"])
    assert gate.main() == 0
    assert "--update" in capsys.readouterr().out


def test_an_update_writes_the_highest_of_several_and_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert highest([{"a": 1.0}, {"a": 9.0}, {"a": 2.0}]) == {"a": 9.0}
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"figures": {"a": 10.0, "other": 5.0}}))
    values = iter([3.0, 6.0, 4.0])
    monkeypatch.setenv("LMX_PERF_BASELINE", str(file))
    monkeypatch.setattr(gate, "PARTS", {"one": lambda *_: {"a": next(values)}})
    monkeypatch.setattr(gate, "end_cleanly", lambda: None)
    monkeypatch.setattr(sys, "argv", ["perf-gate", "--parts", "one", "--update"])
    assert gate.main() == 0
    assert read_baseline(file) == {"a": 6.0, "other": 5.0}
