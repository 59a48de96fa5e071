"""Clients of a row: requests read to their end, and the clients of another model that must not notice."""

import json
import threading
import time
from typing import Any, Final, Self

import httpx

from tests.harness import Lmx, chat

OTHER: Final = "other"
PATIENCE_S: Final = 30.0


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
        assert self.failures == [], self.failures[:5]  # this file is not rewritten by pytest
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
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as http:
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
