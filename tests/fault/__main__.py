"""`python -m tests.fault SPEC.json`."""

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path
from queue import Queue

from tests.fault.plan import FaultPlan, commit, marker, read_plan

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if read_plan().at == "import" and not read_plan().models:
    commit(read_plan().deed, read_plan())

import zmq  # noqa: E402

from protocol.data import Accepted, Delta, Failed, Finish, Step, Submit  # noqa: E402
from protocol.messages import encode  # noqa: E402
from protocol.spec import WorkerSpec, read_spec  # noqa: E402
from tests.fault.engine import load  # noqa: E402
from worker import process  # noqa: E402
from worker.failures import FatalError  # noqa: E402
from worker.inbound import Inbound  # noqa: E402
from worker.io_thread import IoThread  # noqa: E402
from worker.jobs import Command, Status  # noqa: E402

HUGE_BYTES = 100 * 1024 * 1024


class FaultyInbound(Inbound):
    """Answers some requests with nonsense first."""

    plan = FaultPlan()

    def _on_submit(self, gateway: bytes, submit: Submit, now: float) -> None:
        word, _ = marker(submit.messages[-1].content if submit.messages else "")
        if word == "io":
            msg = "made up by the fault worker"
            raise RuntimeError(msg)
        router = self._link._router
        if self.plan.garbage or word == "garbage":
            for frame in (b"", b"\xff" * 64, b"\x93\x21\x01", os.urandom(2000), b"\xc1"):
                router.send_multipart([gateway, frame])
        if self.plan.wrong_incarnation or word == "wrong":
            wrong = self._incarnation + 1
            for message in (
                Accepted(wrong, submit.rid, 1),
                Step(wrong, 1, [Delta(submit.rid, "WRONG", [1], Finish.STOP)]),
                Failed(wrong, submit.rid, "internal_error", "WRONG"),
            ):
                router.send_multipart([gateway, encode(message)])
        if word == "flood":
            # Valid frames about nobody, as fast as they go and whether they are read or not.
            for number in range(200_000):
                with contextlib.suppress(zmq.Again):
                    router.send_multipart([gateway, encode(Step(self._incarnation, number, []))], zmq.NOBLOCK)
        if word == "huge":
            router.send_multipart([gateway, bytes(HUGE_BYTES)])
        if word == "twice":
            for _ in range(3):
                router.send_multipart([gateway, encode(Accepted(self._incarnation, submit.rid, 1))])
        super()._on_submit(gateway, submit, now)


class FaultyIo(IoThread):
    """The real IO thread, with a tongue of its own."""

    plan = FaultPlan()

    def __init__(self, spec: WorkerSpec, status: Status, commands: "Queue[Command]") -> None:
        super().__init__(spec, status, commands)
        self._inbound = FaultyInbound(self._link, spec.incarnation)
        self._inbound.plan = self.plan

    def start(self) -> None:
        if self.plan.ignore_sigterm:
            # Blocked for the whole process: this is called before any other thread is there.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        super().start()


def main() -> None:
    if len(sys.argv) == 2 and Path(sys.argv[1]).exists():
        plan = read_plan(read_spec(Path(sys.argv[1]), WorkerSpec))
        FaultyIo.plan = plan
        if plan.at in {"import", "hello"}:
            try:
                commit(plan.deed, plan)
            except FatalError as error:
                sys.exit(error.code)
    process.main(sys.argv, load, FaultyIo)


main()
