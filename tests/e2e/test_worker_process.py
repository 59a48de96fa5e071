"""A worker process with real MLX on a tiny model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol import control, data
from protocol.config import ModelsConfig
from protocol.states import Phase, WorkerExit
from tests.modelkit import make_tiny_model
from tests.workerkit import REPOSITORY, Gateway, WorkerProcess

PROMPTS = [f"number {number} is told about the sea" for number in range(16)]
LENGTH = 48

#: mlx-lm's own batch in a process of its own, without a line of ours.
_REFERENCE = """
import json, sys
from mlx_lm import load
from mlx_lm.generate import batch_generate
folder, length, prompts = json.loads(sys.argv[1])
model, tokenizer = load(folder)
ids = [tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True) for p in prompts]
out = batch_generate(model, tokenizer, ids, max_tokens=length, return_token_ids=True)
print(json.dumps([out.token_ids, [tokenizer.decode(t) for t in out.token_ids]]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def worker(tiny: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(tiny, module="worker") as started:
        yield started.ready()


@pytest.fixture
def gateway(worker: WorkerProcess) -> Iterator[Gateway]:
    gateway = worker.gateway()
    yield gateway
    gateway.abort(*gateway.answers)
    worker.heartbeat(lambda beat: (beat.running, beat.waiting) == (0, 0))


def test_nothing_heavy_is_imported_before_the_hello() -> None:
    """The hello is sent by `IoThread.start`, and `worker.process.run` calls that before it calls `load`."""
    code = "import worker.loading, worker.process, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert {"mlx", "mlx.core", "mlx_lm", "transformers", "numpy", "jinja2"}.isdisjoint(done.stdout.split())


def test_it_says_hello_then_its_bytes_then_warming_then_ready(worker: WorkerProcess, tiny: Path) -> None:
    assert worker.supervisor is not None
    messages = worker.supervisor.messages
    hello = messages[0]
    assert isinstance(hello, control.WorkerHello)
    assert (hello.phase, hello.capabilities, hello.source) == (Phase.LOADING, None, str(tiny))
    loading = [message for message in messages if isinstance(message, control.Loading)]
    size = (tiny / "model.safetensors").stat().st_size
    assert loading[0].stage == "imports"
    assert 0.9 * size < loading[-1].done_bytes == loading[-1].total_bytes <= size
    phases = [message.phase for message in messages if isinstance(message, control.Heartbeat)]
    assert phases.index(Phase.WARMING) >= 0
    ready = next(message for message in messages if isinstance(message, control.Ready))
    assert 0 < ready.capabilities.step_s < 1
    assert ready.capabilities == control.Capabilities(
        8192, loading[-1].done_bytes, ["chat", "completion", "tokenize"], 32, step_s=ready.capabilities.step_s
    )
    assert ready.load_s > 0


def test_heartbeats_carry_memory_and_steps(worker: WorkerProcess, gateway: Gateway) -> None:
    before = worker.heartbeat(lambda beat: beat.phase is Phase.IDLE)
    gateway.ask(max_tokens=8)
    after = worker.heartbeat(lambda beat: beat.phase is Phase.IDLE and beat.step > before.step)
    assert after.step >= before.step + 8
    assert after.active_bytes > 0
    assert after.peak_bytes >= after.active_bytes


def test_16_streams_have_the_greedy_text_of_mlx_lm(gateway: Gateway, tiny: Path) -> None:
    rids = [gateway.submit(prompt, max_tokens=LENGTH) for prompt in PROMPTS]
    answers = gateway.finish(*rids)
    argument = json.dumps([str(tiny), LENGTH, PROMPTS])
    done = subprocess.run([sys.executable, "-c", _REFERENCE, argument], capture_output=True, text=True, check=True)
    token_ids, texts = json.loads(done.stdout.splitlines()[-1])
    assert [answer.tokens for answer in answers] == token_ids
    assert [answer.text for answer in answers] == texts
    assert all(answer.finish is data.Finish.LENGTH for answer in answers)


def test_16_streams_are_one_batch(gateway: Gateway) -> None:
    for prompt in PROMPTS:
        gateway.submit(prompt, max_tokens=5000)
    # However long after each other they came, from then on each step is one of all of them.
    gateway.until(lambda: bool(gateway.steps) and gateway.steps[-1][1] == 16)
    since = len(gateway.steps)
    gateway.until(lambda: len(gateway.steps) >= since + 10)
    assert [deltas for _, deltas in gateway.steps[since:]] == [16] * 10


def test_a_seed_gives_the_same_text_alone_and_among_others(gateway: Gateway) -> None:
    wanted = {"max_tokens": 40, "temperature": 1.0, "top_p": 0.95, "seed": 1234}
    alone = gateway.ask("tell me a story", **wanted)
    others = [gateway.submit(prompt, max_tokens=60, temperature=0.9, seed=None) for prompt in PROMPTS[:5]]
    others += [gateway.submit(prompt, max_tokens=60) for prompt in PROMPTS[5:8]]
    others += [gateway.submit("tell me a story", max_tokens=40, temperature=1.0, top_p=0.95, seed=99)]
    among = gateway.ask("tell me a story", **wanted)
    answers = gateway.finish(*others)
    assert among.tokens == alone.tokens
    assert answers[-1].tokens != alone.tokens


def test_without_a_seed_two_answers_differ(gateway: Gateway) -> None:
    one, two = (gateway.ask(max_tokens=30, temperature=1.0) for _ in range(2))
    assert one.tokens != two.tokens


def test_a_stop_string_of_real_text_ends_the_answer_before_it(gateway: Gateway) -> None:
    whole = gateway.ask("once", max_tokens=30)
    stop = whole.text[20:27]
    answer = gateway.ask("once", max_tokens=30, stop=(stop,))
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish is data.Finish.STOP
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(answer.tokens) < 30


def test_the_context_bounds_the_prompt_and_the_answer(tmp_path: Path) -> None:
    with WorkerProcess(make_tiny_model(tmp_path / "short", context=256), module="worker") as worker:
        gateway = worker.ready().gateway()
        refused = gateway.ask("sea " * 300)
        assert (refused.code, refused.accepted) == ("context_length_exceeded", None)
        assert isinstance(refused.error, data.Refused)
        assert refused.error.param == "messages"
        assert "256" in refused.error.message  # and the prompt's own length, which the template adds to
        clipped = gateway.ask("sea " * 200, max_tokens=5000)
        unlimited = gateway.ask("sea " * 200)
        for answer in (clipped, unlimited):
            assert answer.finish is data.Finish.LENGTH
            assert answer.usage is not None
            assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 256


def test_aborts_free_their_slot_at_every_stage(tmp_path: Path) -> None:
    models = ModelsConfig(max_concurrent_requests=2, prefill_step_tokens=16)
    with WorkerProcess(make_tiny_model(tmp_path / "long", context=65_536), module="worker", models=models) as worker:
        worker.ready()
        gateway = worker.gateway()
        decoding = gateway.submit(max_tokens=20_000)
        gateway.until(lambda: len(gateway.answers[decoding].tokens) > 3)
        long_prompt = "sea " * 32_000  # 2,000 chunks: more than this process could miss
        prefilling = gateway.submit(long_prompt)
        waiting = gateway.submit(long_prompt)
        worker.heartbeat(lambda beat: (beat.running, beat.waiting) == (2, 1))
        gateway.until(lambda: gateway.answers[prefilling].accepted is not None)
        last = gateway.steps[-1][0]
        gateway.abort(waiting, prefilling)
        (after,) = gateway.finish(gateway.submit("short", max_tokens=2))
        assert after.steps[0] - last < 1_500  # and not the rest of 2,000 chunks
        gateway.abort(decoding)
        worker.heartbeat(lambda beat: (beat.running, beat.waiting, beat.phase) == (0, 0, Phase.IDLE))
        assert gateway.ask(max_tokens=3).finish is data.Finish.LENGTH
        assert not gateway.answers[prefilling].tokens
        assert not gateway.answers[waiting].accepted
        at_once = gateway.submit("seen by nobody", max_tokens=1000)
        gateway.abort(at_once)
        assert gateway.ask(max_tokens=2).finish is data.Finish.LENGTH


def test_a_worker_stops_cleanly_in_the_middle_of_a_batch(tiny: Path) -> None:
    with WorkerProcess(tiny, module="worker") as worker:
        worker.ready()
        gateway = worker.gateway()
        rids = [gateway.submit(prompt, max_tokens=5000) for prompt in PROMPTS]
        gateway.until(lambda: len(gateway.steps) > 5)
        assert worker.supervisor is not None
        worker.supervisor.send(control.Stop("test"))
        assert {answer.code for answer in gateway.finish(*rids)} == {"model_restarting"}
        assert worker.exit_code() == WorkerExit.ASKED
        assert not worker.endpoint.exists()


def broken(tiny: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    match damage:
        case "missing":
            shutil.rmtree(folder)
        case "truncated":
            weights = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        case "shapes":
            (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
        case "architecture":
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
        case "remote code":
            (folder / "config.json").write_text(json.dumps(config | {"model_file": "model.py"}))
            (folder / "model.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ("missing", WorkerExit.MISSING_MODEL, "does not exist"),
        ("truncated", WorkerExit.CORRUPT_MODEL, "corrupt"),
        ("shapes", WorkerExit.CORRUPT_MODEL, "does not load"),
        ("architecture", WorkerExit.CORRUPT_MODEL, "unheard_of"),
        ("remote code", WorkerExit.REMOTE_CODE_REFUSED, "remote code refused"),
        ("tokenizer", WorkerExit.CORRUPT_MODEL, "does not load"),
    ],
)
def test_a_folder_that_does_not_load_has_an_exit_code_and_words(
    tiny: Path, tmp_path: Path, damage: str, code: WorkerExit, words: str
) -> None:
    folder = broken(tiny, tmp_path / "broken", damage)
    with WorkerProcess(folder, module="worker") as worker:
        assert worker.supervisor is not None
        dying = worker.supervisor.wait(control.Dying)
        assert dying.code == code
        assert words in dying.message
        assert worker.exit_code() == code
        assert not worker.endpoint.exists()
        assert not (folder / "ran").exists()
