"""A worker process between its supervisor and its gateways: the real IO thread, an engine that counts (tests.fault)."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from protocol import control, data
from protocol.config import LifecycleConfig, ModelsConfig
from protocol.messages import encode
from protocol.spec import WorkerSpec
from protocol.states import Phase, WorkerExit
from tests.fault.pipe import Pipe
from tests.workerkit import INCARNATION, Supervisor, WorkerProcess, fault_worker
from worker.io_thread import IoThread
from worker.jobs import Status, Warming


@contextlib.contextmanager
def stepped_worker(folder: Path, **options: Any) -> Iterator[tuple[WorkerProcess, Pipe]]:
    """A ready worker whose engine does one step for each byte that is written."""
    with Pipe(folder / "steps") as steps, fault_worker(fault={"step_pipe": str(steps.file)}, **options) as worker:
        yield worker, steps


def test_an_answer_streams_and_ends_with_its_usage() -> None:
    with fault_worker() as worker:
        answer = worker.gateway().ask("two words", max_tokens=3)
        assert answer.accepted == data.Accepted(INCARNATION, 1, prompt_tokens=2)
        assert answer.text == "tok0 tok1 tok2 "
        assert answer.tokens == [0, 1, 2]
        assert (answer.finish, answer.usage) == (data.Finish.LENGTH, data.Usage(2, 3))


def test_a_stop_string_ends_the_answer_and_is_not_shown() -> None:
    with fault_worker() as worker:
        answer = worker.gateway().ask(stop=("tok3", "never"))
        assert (answer.text, answer.finish) == ("tok0 tok1 tok2 ", data.Finish.STOP)
        worker.heartbeat(lambda beat: beat.running == 0)


def test_loading_is_reported_in_bytes_and_the_hello_comes_first() -> None:
    with WorkerProcess(fault={"load_s": 0.6, "load_steps": 30, "weight_bytes": 3000}) as worker:
        worker.ready()
        assert worker.supervisor is not None
        messages = worker.supervisor.messages
        hello = messages[0]
        assert isinstance(hello, control.WorkerHello)
        assert (hello.pid, hello.incarnation, hello.phase) == (worker.process.pid, INCARNATION, Phase.LOADING)
        loading = [message for message in messages if isinstance(message, control.Loading)]
        assert [message.done_bytes for message in loading] == sorted(message.done_bytes for message in loading)
        assert (loading[0].done_bytes, loading[-1].done_bytes) == (0, 3000)
        ready = next(message for message in messages if isinstance(message, control.Ready))
        assert len(loading) <= 3 + ready.load_s * 10  # 30 steps in 0.6 s, at most ten reports a second


def test_a_request_before_ready_is_told_that_the_model_loads() -> None:
    with WorkerProcess(fault={"load_s": 20}) as worker:
        assert worker.supervisor is not None
        worker.supervisor.wait(control.WorkerHello)
        answer = worker.gateway().ask()
        assert answer.code == "model_loading"


# -- admission ----------------------------------------------------------------------------------------------------


#: What an answer needs to run for more than a minute.
LONG = {"tokens_per_s": 50}


def test_slots_then_queue_then_busy(tmp_path: Path) -> None:
    models = ModelsConfig(max_concurrent_requests=1, queue_depth=1)
    with stepped_worker(tmp_path, models=models) as (worker, steps):
        gateway = worker.gateway()
        rids = [gateway.submit("[[tokens 40]]") for _ in range(3)]
        gateway.finish(rids[2])
        steps.let(100)
        answers = gateway.finish(*rids)
        assert [answer.code for answer in answers] == ["", "", "server_busy"]
        assert min(answers[1].steps) > max(answers[0].steps)
        assert isinstance(answers[2].error, data.Refused)


def test_no_slot_in_time_is_refused_before_anything_was_accepted() -> None:
    models = ModelsConfig(max_concurrent_requests=1, slot_timeout_s=0.2)
    with fault_worker(models=models, fault=LONG) as worker:
        gateway = worker.gateway()
        first = gateway.submit("[[tokens 100000]]")
        gateway.until(lambda: gateway.answers[first].accepted is not None)
        second = gateway.submit()
        (answer,) = gateway.finish(second)
        assert (answer.code, answer.accepted) == ("server_busy", None)
        assert not gateway.answers[first].done


def test_a_deadline_ends_a_streaming_and_a_waiting_request() -> None:
    models = ModelsConfig(max_concurrent_requests=1)
    with fault_worker(models=models, fault=LONG) as worker:
        gateway = worker.gateway()
        # Long enough for its first token, and for the other one to come, be held up and be refused.
        running = gateway.submit("[[tokens 100000]]", deadline_s=2.5)
        waiting = gateway.submit(deadline_s=0.3)
        answers = gateway.finish(running, waiting)
        assert [type(answer.error) for answer in answers] == [data.Failed, data.Refused]
        assert [answer.code for answer in answers] == ["timeout", "timeout"]
        assert answers[0].tokens
        assert gateway.ask(max_tokens=2).finish is data.Finish.LENGTH
        assert all(answer.after_end == 0 for answer in answers)


def test_an_abort_frees_the_slot_within_one_step(tmp_path: Path) -> None:
    models = ModelsConfig(max_concurrent_requests=1)
    with stepped_worker(tmp_path, models=models) as (worker, steps):
        gateway = worker.gateway()
        first = gateway.submit("[[tokens 1000]]")
        second = gateway.submit(max_tokens=1)
        worker.heartbeat(lambda beat: (beat.running, beat.waiting) == (1, 1))
        steps.let(3)  # the prefill and two tokens
        gateway.until(lambda: len(gateway.answers[first].tokens) == 2)
        gateway.abort(first)
        worker.heartbeat(lambda beat: (beat.running, beat.waiting) == (1, 0))
        steps.let(3)  # the step that was under way, then the prefill and the one token of the second
        (answer,) = gateway.finish(second)
        assert answer.tokens == [0]
        assert gateway.answers[first].tokens == [0, 1]
        worker.heartbeat(lambda beat: beat.phase is Phase.IDLE)  # and not a fourth step


# -- gateways -----------------------------------------------------------------------------------------------------


def test_a_dead_gateway_takes_only_its_own_requests_with_it() -> None:
    models = ModelsConfig(max_concurrent_requests=4)
    with fault_worker(models=models, fault=LONG) as worker:
        dead, alive = worker.gateway(), worker.gateway()
        for _ in range(6):  # four stream, two wait
            dead.submit("[[tokens 100000]]")
        dead.until(lambda: len(dead.steps) > 3)
        rid = alive.submit("[[tokens 5]]")
        worker.heartbeat(lambda beat: (beat.running, beat.waiting) == (4, 3))
        dead.close()
        (answer,) = alive.finish(rid)
        assert answer.finish is data.Finish.STOP
        worker.heartbeat(lambda beat: (beat.running, beat.waiting) == (0, 0))


def test_a_dead_gateway_is_noticed_before_its_request_has_a_token(tmp_path: Path) -> None:
    with stepped_worker(tmp_path) as (worker, _):
        dead = worker.gateway()
        dead.submit()
        dead.until(lambda: dead.answers[1].accepted is not None)
        dead.close()
        worker.heartbeat(lambda beat: beat.running == 0)


def test_nonsense_and_other_incarnations_are_dropped_and_counted() -> None:
    with fault_worker() as worker:
        gateway = worker.gateway()
        gateway.send_raw(b"")
        gateway.send_raw(b"\xff" * 100)
        gateway.send_raw(b"two", b"parts")
        gateway.send_raw(os.urandom(5000))
        gateway.send_raw(encode(control.Ping()))
        gateway.send(data.Submit(INCARNATION - 1, 99, data.Kind.CHAT, [], data.Sampling(), 1.0))
        gateway.send(data.Abort(INCARNATION + 1, [1]))
        assert gateway.ask(max_tokens=2).text == "tok0 tok1 "
        worker.heartbeat()
        assert worker.events("frames_dropped")[-1]["total"] == 7


def test_two_gateways_may_use_the_same_request_ids() -> None:
    with fault_worker() as worker:
        gateways = [worker.gateway(), worker.gateway()]
        for gateway in gateways:
            gateway.submit("[[tokens 20]]")
        for gateway in gateways:
            (answer,) = gateway.finish(1)
            assert answer.tokens == list(range(21))


# -- the end ------------------------------------------------------------------------------------------------------


def test_stop_fails_what_runs_exits_0_and_leaves_no_socket() -> None:
    with fault_worker(fault=LONG) as worker:
        gateway = worker.gateway()
        rid = gateway.submit("[[tokens 100000]]")
        gateway.until(lambda: len(gateway.steps) > 2)
        assert worker.supervisor is not None
        worker.supervisor.send(control.Stop("test"))
        (answer,) = gateway.finish(rid)
        assert isinstance(answer.error, data.Failed)
        assert (answer.error.code, answer.error.retryable) == ("model_restarting", True)
        assert worker.exit_code() == WorkerExit.ASKED
        assert not worker.endpoint.exists()


def test_a_worker_that_ends_while_frames_arrive_exits_as_it_was_asked_to() -> None:
    """There is always one more frame: also in the turn in which the sockets are closed."""
    with fault_worker() as worker:
        gateway = worker.gateway()
        gateway.ask(max_tokens=1)
        over = threading.Event()
        unknown = data.Abort(INCARNATION, list(range(1000, 2000)))
        thread = threading.Thread(target=gateway.flood, args=(unknown, over))
        thread.start()
        try:
            worker.heartbeat()
            assert worker.supervisor is not None
            worker.supervisor.send(control.Stop("asked"))
            code = worker.exit_code()
        finally:
            over.set()
            thread.join()
        assert code == WorkerExit.ASKED
        assert worker.events("thread_died") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_worker_that_serves(number: int) -> None:
    with fault_worker() as worker:
        worker.process.send_signal(number)
        assert worker.exit_code() == WorkerExit.ASKED
        assert not worker.endpoint.exists()


def test_a_signal_ends_a_worker_whose_main_thread_is_busy_loading() -> None:
    with WorkerProcess(fault={"load_s": 600, "load_steps": 1}) as worker:
        assert worker.supervisor is not None
        worker.supervisor.wait(control.Loading)
        worker.process.terminate()
        assert worker.exit_code() == WorkerExit.ASKED
        assert not worker.endpoint.exists()


def test_an_engine_that_hangs_does_not_keep_a_stopped_worker_for_ever() -> None:
    lifecycle = LifecycleConfig(heartbeat_s=0.05, stop_max_s=0.5)
    with fault_worker(lifecycle=lifecycle) as worker:
        gateway = worker.gateway()
        gateway.submit("[[freeze]]")
        worker.heartbeat(lambda beat: beat.phase is Phase.PREFILL and beat.step_age_s > 0.2)
        worker.process.terminate()
        assert worker.exit_code() == WorkerExit.STALLED
        assert "Current thread" in worker.stderr.read_text()


def test_drain_lets_the_running_finish_refuses_the_new_and_waits_for_stop(tmp_path: Path) -> None:
    models = ModelsConfig(max_concurrent_requests=1)
    with stepped_worker(tmp_path, models=models) as (worker, steps):
        gateway = worker.gateway()
        running, waiting = gateway.submit("[[tokens 50]]"), gateway.submit()
        steps.let(3)
        gateway.until(lambda: len(gateway.answers[running].tokens) == 2)
        assert worker.supervisor is not None
        worker.supervisor.send(control.Drain(600.0))
        gateway.finish(waiting)
        late = gateway.submit()
        gateway.finish(late)
        steps.let(49)
        answers = gateway.finish(running, waiting, late)
        assert [answer.code for answer in answers] == ["", "model_restarting", "model_restarting"]
        assert len(answers[0].tokens) == 51
        worker.supervisor.wait(control.Drained)
        assert worker.process.poll() is None
        worker.supervisor.send(control.Stop("drained"))
        assert worker.exit_code() == WorkerExit.ASKED


def test_a_drain_ends_at_its_grace() -> None:
    with fault_worker(fault=LONG) as worker:
        gateway = worker.gateway()
        rid = gateway.submit("[[tokens 100000]]")
        gateway.until(lambda: len(gateway.steps) > 2)
        assert worker.supervisor is not None
        worker.supervisor.send(control.Drain(0.2))
        (answer,) = gateway.finish(rid)
        assert answer.code == "model_restarting"
        worker.supervisor.wait(control.Drained)


def test_without_a_supervisor_a_worker_drains_and_ends_after_its_lease() -> None:
    lifecycle = LifecycleConfig(lease_s=0.5, drain_s=0.3)
    with WorkerProcess(supervised=False, lifecycle=lifecycle) as worker:
        assert worker.exit_code() == WorkerExit.LEASE_EXPIRED
        assert not worker.endpoint.exists()


def test_a_silent_supervisor_is_no_supervisor() -> None:
    lifecycle = LifecycleConfig(heartbeat_s=0.05, drain_s=0.3)
    with WorkerProcess(lifecycle=lifecycle) as worker:
        worker.ready()
        assert worker.supervisor is not None
        worker.supervisor.send(control.Welcome(1, 0.4))
        dying = worker.supervisor.wait(control.Dying)
        assert dying.code == WorkerExit.LEASE_EXPIRED
        assert worker.exit_code() == WorkerExit.LEASE_EXPIRED


def test_pings_renew_the_lease() -> None:
    lifecycle = LifecycleConfig(heartbeat_s=0.05)
    with fault_worker(lifecycle=lifecycle) as worker:
        assert worker.supervisor is not None
        lease_s = 3.0  # a moment in which this process is held is not the end of it
        started = time.monotonic()
        worker.supervisor.send(control.Welcome(1, lease_s))
        while time.monotonic() - started < 1.3 * lease_s:
            worker.heartbeat(lambda beat: beat.phase is Phase.IDLE)
            worker.supervisor.send(control.Ping())
        worker.heartbeat(lambda beat: beat.phase is Phase.IDLE)
        assert worker.events("lease_expired") == []


def test_a_worker_finds_the_next_supervisor_and_serves_on_meanwhile() -> None:
    with fault_worker() as worker:
        gateway = worker.gateway()
        rid = gateway.submit("[[tokens 300]]")
        gateway.until(lambda: len(gateway.steps) > 2)
        assert worker.supervisor is not None
        worker.supervisor.close()
        answer = worker.gateway().ask(max_tokens=3)
        assert answer.finish is data.Finish.LENGTH
        worker.supervisor = Supervisor(worker.control_path)
        hello = worker.supervisor.wait(control.WorkerHello)
        assert hello.pid == worker.process.pid
        assert hello.phase in {Phase.IDLE, Phase.DECODE}
        assert hello.capabilities is not None
        assert len(gateway.finish(rid)[0].tokens) == 301


# -- last words ---------------------------------------------------------------------------------------------------


def test_an_exception_in_the_engine_fails_every_request_and_exits_with_words() -> None:
    with fault_worker() as worker:
        gateway = worker.gateway()
        healthy, culprit = gateway.submit("[[tokens 100000]]"), gateway.submit("[[raise 3]]")
        for answer in gateway.finish(healthy, culprit):
            assert isinstance(answer.error, data.Failed)
            assert (answer.error.code, answer.error.retryable) == ("worker_crashed", True)
        assert worker.supervisor is not None
        dying = worker.supervisor.wait(control.Dying)
        assert dying.code == WorkerExit.GPU_POISONED
        assert "[METAL]" in dying.message
        assert worker.exit_code() == WorkerExit.GPU_POISONED


def test_a_worker_without_its_io_thread_ends_at_once() -> None:
    with fault_worker() as worker:
        worker.gateway().submit("[[io]]")
        assert worker.exit_code() == WorkerExit.BUG
        (died,) = worker.events("thread_died")
        assert died["thread"] == "io"


def test_a_canary_that_fails_ends_the_worker_before_it_is_ready() -> None:
    with WorkerProcess(fault={"at": "warming", "deed": "raise"}) as worker:
        assert worker.supervisor is not None
        worker.supervisor.wait(control.Dying)
        assert worker.exit_code() == WorkerExit.GPU_POISONED
        assert not any(isinstance(message, control.Ready) for message in worker.supervisor.messages)


def test_warming_is_told_also_when_it_is_over_before_it_could_be() -> None:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        path = Path(folder)
        supervisor = Supervisor(path / "s.sock")
        lifecycle = LifecycleConfig(heartbeat_s=60)
        endpoint, dials = str(path / "w.sock"), str(path / "s.sock")
        spec = WorkerSpec("w", "tiny", INCARNATION, "", endpoint, dials, "", "INFO", ModelsConfig(), lifecycle)
        status = Status()
        io = IoThread(spec, status, SimpleQueue())
        io.start()
        try:
            status.phase = Phase.IDLE  # as it is once the canary has passed
            io.emit(Warming())
            supervisor.wait(control.Heartbeat, lambda beat: beat.phase is Phase.WARMING, timeout_s=10)
        finally:
            io.finish(WorkerExit.ASKED, "")
            supervisor.close()
            io._mail.close()


def test_sigusr1_dumps_all_stacks_and_the_worker_serves_on() -> None:
    with fault_worker() as worker:
        worker.process.send_signal(signal.SIGUSR1)
        assert worker.gateway().ask(max_tokens=2).finish is data.Finish.LENGTH
        assert "most recent call first" in worker.stderr.read_text()


def test_logs_name_requests_and_never_their_text() -> None:
    with fault_worker() as worker:
        worker.gateway().ask("a very secret question", max_tokens=2)
        worker.heartbeat()
        (finished,) = worker.events("request_finished")
        assert (finished["trace"], finished["reason"], finished["completion_tokens"]) == ("req-1", "length", 2)
        assert "secret" not in worker.log.read_text()
        assert "tok0" not in worker.log.read_text()


@pytest.mark.parametrize(
    ("argv", "code"), [([], 64), (["a", "b"], 64), (["/nonexistent.json"], 78), (["/dev/null"], 78)]
)
def test_a_wrong_start_has_its_exit_code(argv: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "worker", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
