"""A fault's stage: a running LMX, its victim, the requests of the row, and a second model that must not notice.

Whatever a row asserts itself, leaving its scene asserts what holds in every row of the matrix: requests to the other
model and to /healthz show no error, every request of the row ended exactly once, and neither the gateway nor the
supervisor was replaced.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from bench.host import json_lines
from protocol import control
from protocol.paths import Home
from supervisor.client import Client
from tests.chaos.clients import OTHER, PATIENCE_S, Call, Others
from tests.fault.plan import FaultPlan
from tests.harness import Lmx, chat, deadline

FAIL = {"X-LMX-On-Crash": "fail"}
#: Settings that rows share: restarts at once, many failures without the host's breaker, short graces.
SETTINGS = {
    "LMX_WORKER__MODULE": "tests.fault",
    "LMX_LIFECYCLE__BREAKER_FAILURES": "1000",
    "LMX_LIFECYCLE__STABLE_S": "0.05",
    "LMX_LIFECYCLE__STOP_MIN_S": "1",
    "LMX_LIFECYCLE__STOP_BASE_S": "1",
    "LMX_LIFECYCLE__DRAIN_S": "2",
}


def counted(tokens: int) -> str:
    """Return the text of so many tokens of the fault worker."""
    return "".join(f"tok{number} " for number in range(tokens))


def put(file: Path, content: bytes) -> None:
    """Write a file that others read at any time: they see all of it, or what was there before."""
    whole = file.with_name(f".{file.name}.new")
    whole.write_bytes(content)
    whole.replace(file)


def load_mark(lmx: Lmx) -> str:
    """Return the name of the model that is being loaded, as the state on disk has it."""
    for _ in deadline(PATIENCE_S):
        with contextlib.suppress(FileNotFoundError):  # the file is replaced in two steps
            body = (lmx.home / "state" / "runtime").read_text().partition("\n")[2]
            return str(json.loads(body)["load_mark"])
    raise AssertionError("no runtime state")


def logged(file: Path, event: str, *, seen: int = 0) -> list[dict[str, Any]]:
    """Return the events of that name in a log that is being written; `seen` bytes are left out."""
    return [entry for entry in json_lines(file, seen=seen) if entry["event"] == event]


class Victim:
    """A model's process at one moment."""

    def __init__(self, model: str, pid: int, incarnation: int) -> None:
        self.model = model
        self.pid = pid
        self.incarnation = incarnation

    def signal(self, number: signal.Signals) -> float:
        """Send a signal and return when."""
        now = time.time()
        os.kill(self.pid, number)
        return now


class Stage:
    """One LMX with the other model loaded, on which rows of one file play. Faults come from a file: see `Scene`."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.lmx = Lmx(**{**SETTINGS, **settings})
        self.faults = self.lmx.home / "fault.json"
        self.faults.write_text("[]")
        self.lmx.environ["LMX_FAULT"] = f"@{self.faults}"
        try:
            self.lmx.start()
            slow = FaultPlan(models=(OTHER,), tokens_per_s=100.0, answer_tokens=1000)
            self.plans(slow)
            self.lmx.load(folder, OTHER)
            self.plans()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.lmx.close()

    def plans(self, *plans: FaultPlan) -> None:
        """Say how processes that are started from now on misbehave; of several plans the first that applies counts."""
        put(self.faults, msgspec.json.encode(plans))

    @contextlib.contextmanager
    def scene(self, model: str) -> Iterator["Scene"]:
        with Scene(self, model) as scene:
            yield scene


class Scene:
    """One row on a stage. `model` is the victim's id, unloaded at the end."""

    def __init__(self, stage: Stage, model: str) -> None:
        self.lmx = stage.lmx
        self.model = model
        self.stage = stage
        self.calls: list[Call] = []
        self.url = self.lmx.url
        self._began_at = time.time()
        self._others = Others(self.lmx)
        self._extra: list[str] = []

    def __enter__(self) -> Self:
        document = self.lmx.status()
        assert document is not None
        self._standing = (document["supervisor"]["pid"], document["gateway"]["pid"], self.lmx.model(OTHER)["pid"])
        self._others.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for call in self.calls:
                    call.wait()
        finally:
            self._others.__exit__(kind, error, trace)
            self.stage.plans()
            for model in [self.model, *self._extra]:
                self.unload(model)
        if kind is None:
            assert [problem for call in self.calls if (problem := call.problem())] == []
            document = self.lmx.status()
            assert document is not None
            now = (document["supervisor"]["pid"], document["gateway"]["pid"], self.lmx.model(OTHER)["pid"])
            assert now == self._standing, "supervisor, gateway or the other model's process was replaced"

    # -- the victim -----------------------------------------------------------------------------------------------

    def fault(self, **plan: Any) -> None:
        """Say how this row's model misbehaves, from its next process on."""
        self.stage.plans(FaultPlan(**{"models": (self.model,), **plan}))

    def load(self, model: str = "", folder: Path | None = None, *, check: bool = True) -> control.Result:
        """Load the victim (or an additional model) and return what the command says."""
        model = model or self.model
        if model != self.model:
            self._extra.append(model)
        result = self.command(control.LoadRequest(model, str(folder or self.stage.folder)))
        assert not check or result.exit_code == 0, (result, self.lmx.tail())
        return result

    def loading(self, model: str = "") -> threading.Thread:
        """Begin to load; the thread ends with the command."""
        thread = threading.Thread(target=lambda: self.load(model, check=False), daemon=True)
        thread.start()
        return thread

    def unload(self, model: str) -> None:
        self.command(control.UnloadRequest(model))

    def victim(self, model: str = "") -> Victim:
        found = self.lmx.model(model or self.model)
        return Victim(found["id"], int(found["pid"] or 0), int(found["incarnation"]))

    def loaded(self, **plan: Any) -> Victim:
        """Load the victim with a fault plan and return its process."""
        if plan:
            self.fault(**plan)
        self.load()
        # Not what lives now: that may be the next one, if it is made to die soon.
        started = self.event("process_started")
        return Victim(self.model, started["pid"], started["incarnation"])

    def command(self, request: Any) -> control.Result:
        client = Client(Home(self.lmx.home))
        try:
            return next(m for m in client.ask(request, within_s=90) if isinstance(m, control.Result))
        finally:
            client.close()

    # -- requests -------------------------------------------------------------------------------------------------

    def ask(
        self,
        text: str = "Hello there",
        *,
        model: str = "",
        stream: bool = True,
        max_tokens: int = 20,
        headers: dict[str, str] | None = None,
        **more: object,
    ) -> Call:
        """Send a request to the victim; that it ends exactly once is asserted at the end of the scene."""
        body = chat(model or self.model, max_tokens=max_tokens, stream=stream, text=text, **more)
        self.calls.append(Call(self.url, body, headers or {}))
        return self.calls[-1]

    def serves(self, within_s: float = PATIENCE_S) -> Call:
        """Assert that the victim answers (again)."""
        call = self.ask(max_tokens=3).wait(within_s)
        assert call.whole, repr(call)
        return call

    # -- what operators see ---------------------------------------------------------------------------------------

    def event(self, name: str, within_s: float = PATIENCE_S, **fields: object) -> dict[str, Any]:
        """Return the first event of that name since the scene began, of the victim unless another model is given."""
        fields = {"model": self.model, **fields}
        for _ in deadline(within_s):
            for entry in self.events(name):
                if all(entry.get(key) == value for key, value in fields.items()):
                    return entry
        raise AssertionError((name, fields, self.lmx.journal()[-12:], self.lmx.tail()))

    def events(self, name: str = "") -> list[dict[str, Any]]:
        return [e for e in self.lmx.journal() if e["ts"] >= self._began_at and name in {"", e["event"]}]

    def exited(self, victim: Victim, within_s: float = PATIENCE_S) -> dict[str, Any]:
        return self.event("process_exited", within_s, model=victim.model, pid=victim.pid)

    def started_after(self, victim: Victim, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the event of the next start of a model."""

        def later(entry: dict[str, Any]) -> bool:
            return bool(entry["model"] == victim.model and entry["incarnation"] > victim.incarnation)

        return self._first("process_started", later, within_s)

    def ready_after(self, victim: Victim, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the event with which a model became ready again."""

        def ready(entry: dict[str, Any]) -> bool:
            newer = entry["model"] == victim.model and entry["incarnation"] > victim.incarnation
            return bool(newer and entry["state"] == "ready")

        return self._first("model_readiness_changed", ready, within_s)

    def wait_state(self, state: str, within_s: float = PATIENCE_S) -> dict[str, Any]:
        self.lmx.wait_model(self.model, state, within_s=within_s)
        return self.lmx.model(self.model)

    def attempts(self) -> int:
        """Return how many processes of the victim were started."""
        return sum(entry["model"] == self.model for entry in self.events("process_started"))

    def crash(self, incarnation: int, within_s: float = PATIENCE_S, *, named: bool = False) -> dict[str, Any]:
        """Return the crash record of an incarnation, with its files' texts.

        `named`: once the gateway has told whose requests it had, which may be after the end.
        """
        for _ in deadline(within_s):
            for folder in (self.lmx.home / "crashes").glob("[!.]*"):
                if not (folder / "record.json").exists():
                    continue
                record: dict[str, Any] = json.loads((folder / "record.json").read_text())
                if record["incarnation"] == incarnation and (record["requests"] or not named):
                    return {**record, **{file.name: file.read_text() for file in folder.glob("*.txt")}}
        raise AssertionError(f"no crash record of incarnation {incarnation}")

    def left_of(self, victim: Victim) -> list[str]:
        """Return what a dead incarnation left in the run folder."""
        run = self.lmx.home / "run"
        return [entry.name for entry in run.iterdir() if f".{victim.incarnation}." in entry.name]

    def _first(self, name: str, fits: Callable[[dict[str, Any]], bool], within_s: float) -> dict[str, Any]:
        for _ in deadline(within_s):
            for entry in self.events(name):
                if fits(entry):
                    return entry
        raise AssertionError((name, self.lmx.journal()[-12:], self.lmx.tail()))
