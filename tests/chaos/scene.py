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

import httpx
import msgspec

from protocol import control
from protocol.paths import Home
from supervisor.client import Client
from tests.fault.plan import FaultPlan
from tests.harness import Lmx, chat, deadline

OTHER = "other"
PATIENCE_S = 30.0
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


class Call(threading.Thread):
    """One request, read to its end however it ends. Times are Unix time."""

    def __init__(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.body = body
        self.status = 0
        self.text = ""
        self.error: dict[str, Any] = {}
        self.headers: httpx.Headers = httpx.Headers()
        self.usage: dict[str, Any] | None = None
        #: Ends that were seen: an answer, [DONE], an error. Must become 1.
        self.ends = 0
        self.after_end: list[str] = []
        self.comments = 0
        self.broken = ""
        self.sent_at = self.ended_at = 0.0
        #: When each chunk with text came.
        self.chunks_at: list[float] = []
        self._url = url
        self._headers = headers
        self._news = threading.Condition()
        self.start()

    @property
    def code(self) -> str:
        return str(self.error.get("code", ""))

    @property
    def whole(self) -> bool:
        """Whether it ended with its whole answer."""
        return self.status == 200 and self.ends == 1 and not self.error and not self.broken

    def wait(self, within_s: float = PATIENCE_S) -> Self:
        """Return once it has ended; a request that hangs fails the test."""
        self.join(within_s)
        assert not self.is_alive(), f"hangs: {self!r}"
        return self

    def wait_chunks(self, count: int, within_s: float = PATIENCE_S) -> Self:
        """Return once so many chunks with text have come."""
        with self._news:
            there = self._news.wait_for(lambda: len(self.chunks_at) >= count or not self.is_alive(), within_s)
        assert there, repr(self)
        assert len(self.chunks_at) >= count, repr(self)
        return self

    def problem(self) -> str:
        """Say in words why it did not end exactly once, "" if it did."""
        if self.ends != 1 or self.after_end or self.broken:
            return f"{self.ends} ends, {self.after_end} after, {self.broken or 'not broken'}: {self!r}"
        return ""

    def run(self) -> None:
        self.sent_at = time.time()
        try:
            with (
                httpx.Client(base_url=self._url, timeout=PATIENCE_S, headers=self._headers) as http,
                http.stream("POST", "/v1/chat/completions", json=self.body) as response,
            ):
                self.status, self.headers = response.status_code, response.headers
                if response.status_code == 200 and self.body["stream"]:
                    self._read(response)
                else:
                    self._take(json.loads(response.read()))
        except httpx.HTTPError as error:
            self.broken = type(error).__name__
        self.ended_at = time.time()
        with self._news:
            self._news.notify_all()

    def _read(self, response: httpx.Response) -> None:
        event = ""
        for line in response.iter_lines():
            if not line:
                event = ""
            elif line.startswith(":"):
                self.comments += 1
            elif line.startswith("event:"):
                event = line.removeprefix("event:").strip()
            elif self.ends:
                self.after_end.append(line)
            elif line == "data: [DONE]":
                self.ends += 1
            elif event == "error":
                self.ends += 1
                self.error = json.loads(line.removeprefix("data:"))["error"]
            else:
                self._chunk(json.loads(line.removeprefix("data:")))

    def _chunk(self, data: dict[str, Any]) -> None:
        self.usage = data.get("usage") or self.usage
        for choice in data["choices"]:
            text = choice["delta"].get("content") or ""
            if text:
                with self._news:
                    self.text += text
                    self.chunks_at.append(time.time())
                    self._news.notify_all()

    def _take(self, document: dict[str, Any]) -> None:
        self.ends += 1
        if "error" in document:
            self.error = document["error"]
        else:
            self.text = document["choices"][0]["message"]["content"]
            self.usage = document["usage"]

    def __repr__(self) -> str:
        state, model = "open" if self.is_alive() else "ended", self.body["model"]
        return f"<{state} {model} {self.status} {self.code} ends={self.ends} {self.broken} {self.text[:40]!r}>"


class Others:
    """Clients of another model, and of /healthz, that go on all the time and note every failure."""

    def __init__(self, lmx: Lmx, model: str = OTHER) -> None:
        self._url = lmx.url
        self._model = model
        self._stop = threading.Event()
        self.failures: list[str] = []
        self.streams = self.polls = 0
        self.slowest_poll_s = 0.0
        # Two, so that one is in the middle of an answer whenever something happens.
        targets = (self._stream, self._stream, self._poll)
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        if kind is None:
            self.check()

    def check(self) -> None:
        assert not any(thread.is_alive() for thread in self._threads), "a request to the other model hangs"
        assert self.failures == []
        assert self.streams
        assert self.polls

    def _stream(self) -> None:
        body, first = chat(self._model, max_tokens=40, stream=True, text="What do the others see?"), ""
        while not self._stop.is_set():
            call = Call(self._url, body, {})
            call.join(PATIENCE_S)
            if call.is_alive() or not call.whole or call.text != (first or call.text) or not call.text:
                self.failures.append(repr(call))
            first = first or call.text
            self.streams += 1
            # An engine that answers in a moment would otherwise take a core for this.
            self._stop.wait(0.03 if call.ended_at - call.sent_at > 0.3 else 0.15)

    def _poll(self) -> None:
        with httpx.Client(base_url=self._url, timeout=5) as http:
            while not self._stop.is_set():
                asked = time.monotonic()
                try:
                    response = http.get("/healthz")
                    if response.status_code != 200:
                        self.failures.append(f"healthz {response.status_code}")
                except httpx.HTTPError as error:
                    self.failures.append(f"healthz {type(error).__name__}")
                self.slowest_poll_s = max(self.slowest_poll_s, time.monotonic() - asked)
                self.polls += 1
                self._stop.wait(0.05)


class Victim:
    """A model's process at one moment."""

    def __init__(self, lmx: Lmx, model: str) -> None:
        found = lmx.model(model)
        self.model = model
        self.pid = int(found["pid"] or 0)
        self.incarnation = int(found["incarnation"])
        self.slot = ""

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
            self.faults.write_bytes(msgspec.json.encode([slow]))
            self.lmx.load(folder, OTHER)
            self.faults.write_text("[]")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.lmx.close()

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
            self.stage.faults.write_text("[]")
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
        made = FaultPlan(**{"models": (self.model,), **plan})
        self.stage.faults.write_bytes(msgspec.json.encode([made]))

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
        return Victim(self.lmx, model or self.model)

    def loaded(self, **plan: Any) -> Victim:
        """Load the victim with a fault plan and return its process."""
        if plan:
            self.fault(**plan)
        self.load()
        return self.victim()

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

    def crash(self, incarnation: int, within_s: float = 5.0) -> dict[str, Any]:
        """Return the crash record of an incarnation, with its files' texts."""
        for _ in deadline(within_s):
            for folder in (self.lmx.home / "crashes").iterdir():
                if folder.name.startswith(".") or not (folder / "record.json").exists():
                    continue
                record: dict[str, Any] = json.loads((folder / "record.json").read_text())
                if record["incarnation"] == incarnation:
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
