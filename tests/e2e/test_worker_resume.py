"""A worker goes on with an answer that another one began (real MLX), and looks after itself while nobody asks."""

from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from protocol import data
from protocol.config import LifecycleConfig
from protocol.control import Dying, Heartbeat
from protocol.states import Phase, WorkerExit
from tests.workerkit import INCARNATION, Answer, Gateway, WorkerProcess, fault_worker
from worker.engine import Engine
from worker.failures import FatalError
from worker.jobs import Command, End, Job, Status
from worker.loading import Canary

TOKENS = 60


def resume(gateway: Gateway, said: list[int], **sampling: Any) -> Answer:
    """Submit the rest of a request; its answer fills up as the gateway reads."""
    gateway._last_rid += 1
    rid = gateway._last_rid
    gateway.answers[rid] = Answer()
    wanted = data.Sampling(**({"temperature": 0.0, "max_tokens": TOKENS} | sampling))
    messages = [data.ChatMessage("user", "a story please")]
    gateway.send(data.Submit(INCARNATION, rid, data.Kind.CHAT, messages, wanted, 60.0, resume=data.Resume(said)))
    return gateway.answers[rid]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 5}])
def test_from_every_token_the_rest_is_the_same(tiny_model: Path, sampling: dict[str, Any]) -> None:
    with WorkerProcess(tiny_model, module="worker") as worker:
        gateway = worker.ready().gateway()
        whole = gateway.ask("a story please", max_tokens=TOKENS, **sampling)
        assert (len(whole.tokens), whole.finish) == (TOKENS, data.Finish.LENGTH)
        shorter = {n: gateway.submit("a story please", **({"max_tokens": n} | sampling)) for n in range(1, TOKENS)}
        gateway.finish(*shorter.values())
        rests = {cut: resume(gateway, whole.tokens[:cut], **sampling) for cut in range(1, TOKENS + 1)}
        gateway.finish()
        for cut, rest in rests.items():
            assert rest.tokens == whole.tokens[cut:]
            before = gateway.answers[shorter[cut]].text if cut < TOKENS else whole.text
            assert before + rest.text == whole.text
            assert (rest.finish, rest.usage) == (whole.finish, whole.usage)
            assert rest.accepted is not None
            assert whole.accepted is not None
            assert rest.accepted.prompt_tokens == whole.accepted.prompt_tokens


def test_a_rest_ends_by_itself_and_at_stop_strings(tiny_model: Path) -> None:
    with WorkerProcess(tiny_model, module="worker") as worker:
        gateway = worker.ready().gateway()
        plain = gateway.ask("a story please", max_tokens=TOKENS)
        stop = plain.text[len(plain.text) // 2 :][:25]
        whole = gateway.ask("a story please", max_tokens=TOKENS, stop=(stop,))
        assert (whole.text, whole.finish) == (plain.text.partition(stop)[0], data.Finish.STOP)
        rests = [resume(gateway, whole.tokens[:cut], stop=(stop,)) for cut in range(1, len(whole.tokens))]
        gateway.finish()
        for rest in rests:
            assert whole.text.endswith(rest.text)
            assert (rest.finish, rest.usage) == (whole.finish, whole.usage)


def test_tokens_of_another_model_are_not_looked_up(tiny_model: Path) -> None:
    with WorkerProcess(tiny_model, module="worker") as worker:
        gateway = worker.ready().gateway()
        refused = resume(gateway, [5, 10**8])
        gateway.finish()
        assert refused.code == "internal_error"
        assert gateway.ask(max_tokens=3).finish is data.Finish.LENGTH


# -- the canary of an idle engine -----------------------------------------------------------------------------------


def test_an_idle_worker_steps_and_a_real_model_gives_the_same_token_each_time(tiny_model: Path) -> None:
    lifecycle = LifecycleConfig(heartbeat_s=0.05, canary_idle_s=0.1)
    with WorkerProcess(tiny_model, module="worker", lifecycle=lifecycle) as worker:
        gateway = worker.ready().gateway()
        first = worker.heartbeat().step
        worker.heartbeat(lambda beat: beat.step >= first + 3 and beat.running == 0)
        assert gateway.ask(max_tokens=20).finish is data.Finish.LENGTH


def test_a_canary_that_fails_ends_the_worker_with_last_words() -> None:
    lifecycle = LifecycleConfig(heartbeat_s=0.05, canary_idle_s=0.1)
    with fault_worker(lifecycle=lifecycle, fault={"at": "idle", "deed": "exit"}) as worker:
        assert worker.supervisor is not None
        assert worker.supervisor.wait(Dying).code == WorkerExit.BUG
        assert worker.exit_code() == WorkerExit.BUG


def test_a_canary_that_hangs_is_seen_as_decoding() -> None:
    lifecycle = LifecycleConfig(heartbeat_s=0.05, canary_idle_s=0.1)
    with fault_worker(lifecycle=lifecycle, fault={"at": "idle", "deed": "freeze"}) as worker:
        beat = worker.heartbeat(lambda beat: beat.phase is Phase.DECODE and beat.step_age_s > 0.2)
        assert isinstance(beat, Heartbeat)


class Chanting:
    """A backend whose greedy token is what the test says."""

    def __init__(self) -> None:
        self.token = 7

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        assert (len(prompt), max_tokens) == (8, 1)
        return [self.token] if self.token is not None else []


def test_another_token_than_at_first_is_a_mismatch() -> None:
    backend: Any = Chanting()
    canary = Canary(backend, 3)
    canary()
    canary()
    backend.token = 8
    with pytest.raises(FatalError) as raised:
        canary()
    assert raised.value.code is WorkerExit.GPU_POISONED
    assert "another token" in raised.value.message
    backend.token = None
    with pytest.raises(RuntimeError):
        canary()


def test_a_busy_engine_has_no_canary() -> None:
    """It steps for far longer than the interval; the canary comes only once it is idle."""
    order: list[str] = []
    commands: Queue[Command] = Queue()

    class Busy:
        prefilling = False
        left = 0

        def __len__(self) -> int:
            return self.left

        def insert(self, job: Job) -> None:
            self.left = job.max_tokens

        def remove(self, jobs: Any) -> None:
            pass

        def step(self) -> list[Any]:
            self.left -= 1
            order.append("step")
            return []

    def canary() -> None:
        order.append("canary")
        commands.put(End(WorkerExit.ASKED, ""))

    status = Status()
    commands.put(Job(1, [1], 2000))
    engine = Engine(Busy(), commands, lambda _: None, status, canary=canary, canary_idle_s=0.0005)
    engine.run()
    assert order == ["step"] * 2000 + ["canary"]
    assert status.step == 2001
