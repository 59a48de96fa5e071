"""What goes wrong and when, as data."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import msgspec

from protocol.spec import WorkerSpec
from protocol.states import WorkerExit
from worker.failures import FatalError

VARIABLE = "LMX_FAULT"
_MARKER = re.compile(r"\[\[(\w+)((?: \d+)*)\]\]")

Moment = Literal["", "import", "hello", "loading", "warming", "idle"]
Deed = Literal["abort", "segv", "kill", "exit", "raise", "freeze", "seize", "leak", "fork"]


class FaultPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `LMX_FAULT`. Without `at`, `after_tokens` or `after_ready_s` nothing fails by itself."""

    #: Ids of models it is for; empty: all.
    models: tuple[str, ...] = ()
    #: Only for incarnations up to this one; 0: all.
    until_incarnation: int = 0
    #: Only if this file can be created: the fault happens once, whatever the incarnations are.
    once: str = ""
    #: What happens …
    deed: Deed = "abort"
    exit_code: int = 70
    #: What "raise" and "exit" say, if not that it was made up.
    words: str = ""
    #: … before anything is imported, before the hello, in the middle of loading, in warming, or in a canary
    #: of an idle worker,
    at: Moment = ""
    #: … or when this many tokens were generated in all,
    after_tokens: int = 0
    #: … or this long after ready, from a thread of its own.
    after_ready_s: float = 0.0

    ignore_sigterm: bool = False
    #: The same as the markers, for every request.
    garbage: bool = False
    wrong_incarnation: bool = False

    #: A healthy worker otherwise: how fast and how large.
    tokens_per_s: float = 500.0
    #: A named pipe: each byte written into it lets the engine do one step, at whatever pace.
    step_pipe: str = ""
    answer_tokens: int = 32
    max_model_len: int = 4096
    load_s: float = 0.0
    load_steps: int = 10
    #: A named pipe: the load ends when a byte is written into it, instead of after `load_s`.
    load_pipe: str = ""
    #: A named pipe: what happens in warming happens when a byte is written into it.
    warming_pipe: str = ""
    weight_bytes: int = 10_000_000
    #: Held from the start, besides what Python needs.
    ballast_mb: int = 0
    #: What its timing at the end of a load says.
    step_s: float = 0.0

    def applies(self, spec: WorkerSpec) -> bool:
        return (not self.models or spec.model in self.models) and (
            not self.until_incarnation or spec.incarnation <= self.until_incarnation
        )


def read_plan(spec: WorkerSpec | None = None) -> FaultPlan:
    """Return the plan of the environment, or a healthy one where it is not meant for this worker.

    "@file" names a file that is read at each start: a list of plans, of which the first that applies counts.
    """
    text = os.environ.get(VARIABLE) or "{}"
    if text.startswith("@"):
        plans = msgspec.json.decode(Path(text[1:]).read_bytes(), type=list[FaultPlan])
        return next((plan for plan in plans if spec is not None and plan.applies(spec)), FaultPlan())
    plan = msgspec.json.decode(text, type=FaultPlan)
    if spec is not None and not plan.applies(spec):
        return FaultPlan(tokens_per_s=plan.tokens_per_s, answer_tokens=plan.answer_tokens, load_s=plan.load_s)
    return plan


def wait_for_byte(pipe: str) -> None:
    """Return once a test has written a byte into a named pipe that it holds open."""
    with Path(pipe).open("rb", buffering=0) as stream:
        stream.read(1)


def marker(text: str) -> tuple[str, list[int]]:
    """Return the word and the numbers of the marker in a message, ("", []) if there is none."""
    found = _MARKER.search(text)
    return (found[1], [int(number) for number in found[2].split()]) if found else ("", [])


def commit(deed: str, plan: FaultPlan, exit_code: int | None = None) -> None:
    """Do it, unless it was to happen once and has."""
    if plan.once:
        try:
            Path(plan.once).touch(exist_ok=False)
        except FileExistsError:
            return
    signals = {"abort": signal.SIGABRT, "segv": signal.SIGSEGV, "kill": signal.SIGKILL}
    if deed in signals:
        os.kill(os.getpid(), signals[deed])
        time.sleep(60)  # the signal is on its way
    elif deed == "exit":
        code = plan.exit_code if exit_code is None else exit_code
        raise FatalError(WorkerExit(code), plan.words or "made up by the fault worker")
    elif deed == "raise":
        raise RuntimeError(plan.words or "[METAL] Command buffer execution failed: made up by the fault worker")
    elif deed == "freeze":
        time.sleep(3600)
    elif deed == "seize":
        ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the GIL
    elif deed == "leak":
        leaked = []
        while True:
            leaked.append(os.open(os.devnull, os.O_RDONLY))
    elif deed == "fork":
        # As mx.compile starts a compiler: a child of the process group, which outlives its parent.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", str(os.getpid())], env=dict(os.environ))
        os.kill(os.getpid(), signal.SIGABRT)
        time.sleep(60)
