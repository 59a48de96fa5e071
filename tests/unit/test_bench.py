"""What the bench counts is what happened, and its report says so."""

import asyncio
import io
import json
import time
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from bench import gate
from bench.__main__ import parse
from bench.compare import Comparison, Progress
from bench.contenders import Contender, ContenderFailedError, Measured
from bench.gate import read_baseline, table, verdict
from bench.load import run_load, summary
from bench.measures import percentile, slope
from bench.paths import _Transport, measure
from bench.plot import bars, nice
from bench.report import markdown, tokens_per_s
from bench.soak import growth
from bench.workloads import Workload, decode, prompt, standard

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
EVENTS = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"content": "one"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content": "two three"}}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens": 3,"total_tokens":4}}\n\ndata: [DONE]\n\n',
)
Answer = Callable[[asyncio.StreamWriter], Any]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answers each request with `answer`; yields its URL and the bodies that came."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                await answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield f"http://127.0.0.1:{port}", bodies


async def chunked(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
    for one in EVENTS:
        writer.write(b"%x\r\n%b\r\n" % (len(one), one))
        await writer.drain()
        await asyncio.sleep(0.01)  # so that the client reads them apart
    writer.write(b"0\r\n\r\n")


async def much_at_first(writer: asyncio.StreamWriter) -> None:
    writer.write(
        HEAD + b"\r\n" + b"".join(b'data: {"choices":[{"delta":{"content":"\\"%d"}}]}\n\n' % n for n in range(8))
    )
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.write(b'data: {"choices":[{"delta":{"content":"a \\"%d"}}]}\n\n' % 9 + EVENTS[-1].replace(b" 3,", b" 10,"))
    writer.close()


async def until_closed(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"\r\n" + b"".join(EVENTS))
    writer.close()


async def cut_off(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"\r\n" + b"".join(EVENTS[:-1]))
    writer.close()


async def busy(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}")


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.mark.parametrize("answer", [chunked, until_closed])
async def test_a_stream_is_counted_in_tokens_events_and_the_gaps_between(answer: Answer) -> None:
    async with server(answer) as (url, bodies):
        served, _ = await run_load(url, "m", Workload("w", 3, 7, 2))
    found = summary(served, 1.0)
    assert (found["requests"], found["tokens"], found["events"], found["errors"]) == (6, 18, 18, {})
    assert all(0 < one.ttft_s <= one.seconds for one in served)
    assert len({json.loads(body)["messages"][0]["content"] for body in bodies}) == 6
    if answer is chunked:
        assert found["gap_p99_s"] > 0.002
        assert all(len(one.gaps_s) <= 1 for one in served), "what ends an answer is no piece of text"


async def test_the_pace_of_a_stream_leaves_out_what_came_with_its_first_read() -> None:
    async with server(much_at_first) as (url, _):
        served, _ = await run_load(url, "m", Workload("w", 1, 7, 1))
    (one,) = served
    assert (one.tokens, one.events) == (10, 9)
    assert one.later_tokens == pytest.approx(10 * 5 / (8 * 3 + 5))  # characters as they stand in JSON
    assert summary(served, 1.0)["stream_tokens_per_s"] == pytest.approx(one.later_tokens / (one.seconds - one.ttft_s))


@pytest.mark.parametrize(("answer", "error"), [(cut_off, "cut off"), (busy, "429"), (reset, "reset")])
async def test_what_fails_is_counted_and_is_no_answer(answer: Answer, error: str) -> None:
    async with server(answer) as (url, _):
        found = summary(*await run_load(url, "m", Workload("w", 2, 7, 2)))
    assert (found["requests"], found["tokens"], found["errors"]) == (0, 0, {error: 4})


async def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    found = summary(*await run_load("http://127.0.0.1:1", "m", Workload("w", 2, 7, 2)))
    assert found["errors"] == {"refused": 4}


def test_prompts_are_the_same_in_every_run_and_begin_differently() -> None:
    workload = Workload("w", 4, 16, 2, prompt_words=50)
    texts = [prompt(workload, stream, request) for stream in range(4) for request in range(2)]
    assert texts == [prompt(workload, stream, request) for stream in range(4) for request in range(2)]
    assert len({text[:5] for text in texts}) == 8
    other = structs.replace(workload, variant=1)
    assert not {text[:5] for text in texts} & {prompt(other, stream, 0)[:5] for stream in range(4)}
    assert all(60 < len(text.split()) < 90 for text in texts)


def test_a_comparison_has_about_as_many_tokens_for_each_number_of_streams() -> None:
    assert [decode(streams, 128, 2048).total_tokens for streams in (1, 4, 16, 32, 64)] == [1024, 1024, 2048, 4096, 8192]
    names = [workload.name for workload in standard([1, 64], 128, 2048)]
    assert names[:2] == ["1 streams", "64 streams"]
    assert len(names) == 5


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.compare.psutil.cpu_percent", lambda _: 0.0)


class Fake(Contender):
    """Notes its turns."""

    def __init__(self, name: str, log: list[str], fails: str = "") -> None:
        self.name, self._log, self._fails = name, log, fails
        self.started = False
        self.variants: list[int] = []

    def _start(self) -> None:
        self._log.append(f"start {self.name}")
        if self._fails == "start":
            raise ContenderFailedError

    def _close(self) -> None:
        self._log.append(f"close {self.name}")

    def measure(self, workload: Workload) -> Measured:
        if not workload.name.startswith("warm-up"):
            self._log.append(self.name)
            self.variants.append(workload.variant)
            if self._fails == "measure":
                raise ContenderFailedError
        return measured(100)

    def pids(self) -> dict[str, int]:
        return {}


def measured(tokens: int, **more: Any) -> Measured:
    return {
        "seconds": 2.0, "requests": 2, "tokens": tokens, "events": tokens, "ttft_s": [0.010, 0.020, 0.5],
        "gap_p50_s": 0.004, "gap_p99_s": 0.009, "stream_tokens_per_s": 40.0, "errors": {},
        "cpu_s": {"gateway": 0.003, "client": 0.001}, "peak_bytes": {"gateway": 50 * 1024**2}, "others": 0.01, **more,
    }  # fmt: skip


def test_rounds_alternate_their_order() -> None:
    log: list[str] = []
    one, two = Fake("a", log), Fake("b", log)
    comparison = Comparison([one, two], rounds=2, say=lambda _: None)
    workloads = [Workload("w", 1, 1)]
    steps: list[int] = []
    comparison.run(workloads, lambda: steps.append(1))
    assert log == ["start a", "start b", "a", "b", "b", "a", "close a", "close b"]
    assert one.variants == two.variants == [1, 3]
    assert len(steps) == comparison.steps(workloads) == 4


def test_models_that_do_not_fit_side_by_side_are_in_memory_one_at_a_time() -> None:
    log: list[str] = []
    Comparison([Fake("a", log), Fake("b", log)], rounds=1, one_at_a_time=True, say=lambda _: None).run(
        [Workload("w", 1, 1)], lambda: None
    )
    assert log == ["start a", "a", "close a", "start b", "b", "close b"]


@pytest.mark.parametrize("fails", ["start", "measure"])
def test_a_contender_that_fails_is_left_out_and_the_others_are_measured(
    fails: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    comparison = Comparison([Fake("bad", log, fails), Fake("good", log)], rounds=3, say=lambda _: None)
    (result,) = comparison.run([Workload("w", 1, 1)], lambda: None)
    assert {name: len(rounds) for name, rounds in result["rounds"].items()} == {"good": 3}
    assert "without bad" in capsys.readouterr().err


def report() -> dict[str, Any]:
    workload = {"name": "4 streams", "kind": "chat"}
    ours = [measured(90), measured(200), measured(50)]
    limit = [measured(100), measured(400), measured(50)]
    peer = [measured(0, requests=0, errors={"reset": 4}, ttft_s=[]), measured(100, errors={"reset": 1}), measured(50)]
    rounds = {"in-process": limit, "LMX": ours, "peer": peer}
    head = {"version": "1", "machine": "2 cores", "model": "tiny", "rounds": 3, "blas_threads": 1}
    return {**head, "results": [{"workload": workload, "rounds": rounds}]}


def test_ratios_are_taken_within_rounds_and_a_round_without_answers_counts_for_nothing() -> None:
    text = markdown(report())
    # 0.9, 0.5 and 1; beside the peer only the second and the third round: 2 and 1.
    assert "| 4 streams | **0.90** · 1.00 | **1.50** · 1.00 |" in text
    assert "| 4 streams | 50 (25 to 200) | 45 (25 to 100) | 38 (25 to 50) |" in text
    assert "| 4 streams | 0 | 0 | 5 × reset of 9 |" in text
    assert "| LMX: gateway | 50 |" in text


def test_plots_are_svg_with_a_bar_for_each_contender() -> None:
    found = report()
    root = ET.fromstring(bars("Tokens & more", found["results"], ["in-process", "LMX", "peer"], tokens_per_s))
    filled = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("fill", "")[0] == "#"]
    assert len(filled) == 6  # three in the legend
    assert [nice(value) for value in (0.7, 1, 101, 9_500)] == [0.8, 1, 150, 10_000]


def test_progress_is_a_line_with_what_is_left() -> None:
    clock = iter([0.0, 10.0])
    stream = io.StringIO()
    progress = Progress(4, stream=stream, now=lambda: next(clock))
    progress.say("first")
    progress.step()
    progress.say("second")
    assert stream.getvalue().splitlines() == [
        "[....................] 0/4: first",
        "[#####...............] 1/4, about 30 s left: second",
    ]


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([3.0], 0.99) == 3.0


def test_a_slope_is_in_percent_of_the_mean_per_thousand() -> None:
    assert slope([(0, 95.0), (1000, 100.0), (2000, 105.0)]) == pytest.approx(5.0)
    assert slope([(0, 100.0), (500, 100.0)]) == 0
    assert slope([(7, 1.0), (7, 2.0)]) == 0


def test_a_contender_that_nobody_knows_is_refused() -> None:
    assert parse(["--streams", "1,2"]).streams == [1, 2]
    with pytest.raises(SystemExit):
        parse(["--who", "lmx,other"])


def test_the_gate_fails_only_for_what_is_worse_than_the_tolerance() -> None:
    baseline = {"a": 10.0, "b": 10.0, "gone": 1.0}
    found = {"a": 11.4, "b": 11.6, "new": 99.0}
    assert verdict(found, baseline, 0.15) == ["b"]
    assert verdict(found, baseline, 0.20) == []
    text = table(found, baseline, 0.15)
    assert "| a | 11.4 | 10 | +14% |" in text
    assert "| b | 11.6 | 10 | **+16%: too much** |" in text
    assert "| new | 99 | – | |" in text


def test_the_baseline_names_figures_of_every_part_of_the_gate() -> None:
    figures = read_baseline(Path(gate.__file__).with_name("baseline.json"))
    for words in ("over in-process", "of 10,000 events", "short requests", "over a bare start", "memory at start"):
        assert any(words in name for name in figures)


def test_growth_is_descriptors_threads_and_memory() -> None:
    before = {"gateway": {"fds": 20.0, "threads": 4.0, "mib": 100.0}}
    assert growth(before, {"gateway": {"fds": 22.0, "threads": 4.0, "mib": 114.0}}) == []
    grown = growth(before, {"gateway": {"fds": 30.0, "threads": 9.0, "mib": 120.0}})
    assert grown == ["gateway: fds 20 -> 30", "gateway: threads 4 -> 9", "gateway: 100 -> 120 MiB"]


def test_a_part_that_is_worse_is_measured_once_more_and_the_better_figure_counts() -> None:
    asked: list[list[str]] = []

    def again(parts: list[str]) -> dict[str, dict[str, float]]:
        asked.append(parts)
        return {"noisy": {"a": 10.0, "b": 30.0}}

    found = {"noisy": {"a": 20.0, "b": 10.0}, "quiet": {"c": 1.0}}
    baseline = {"a": 10.0, "b": 10.0, "c": 1.0}
    assert gate.judge(found, baseline, 0.15, again) == {"a": 10.0, "b": 10.0, "c": 1.0}
    assert asked == [["noisy"]]
    assert gate.judge({"quiet": {"c": 1.0}}, baseline, 0.15, again) == {"c": 1.0}
    assert asked == [["noisy"]], "what is well is not measured again"


async def test_the_gate_sees_work_and_waits_that_are_added_to_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    write = _Transport.write

    def waits(self: _Transport, data: bytes) -> None:
        time.sleep(0.0002)
        write(self, data)

    def works(self: _Transport, data: bytes) -> None:
        sum(map(len, [data] * 10))
        for _ in range(20):
            len(data)
        write(self, data)

    plain = await measure(5)
    monkeypatch.setattr(_Transport, "write", works)
    worse = verdict(await measure(5), plain, 0.15)
    assert "gateway: an event: calls" in worse
    monkeypatch.setattr(_Transport, "write", waits)
    worse = verdict(await measure(5), plain, 0.15)
    assert "gateway: an event: time over CPU, if above 2" in worse
