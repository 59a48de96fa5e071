"""For those who use Locust: `locust -f deploy/locustfile.py --host http://127.0.0.1:1234` (pip install locust).

Locust is no dependency of LMX, and its client costs more CPU than a stream of a small model: for ratios use `make
bench`. LMX_MODEL names the model, LMX_KEY an API key. `chat` is the time to the head of an answer; reported besides are
`first text`, and `tokens` (its "response time" is the time between two tokens, its length their number).
"""

import json
import os
import time

from locust import HttpUser, between, task

MODEL = os.environ.get("LMX_MODEL", "smollm2-135m-instruct")
KEY = os.environ.get("LMX_KEY", "")


class ChatUser(HttpUser):
    """Asks for a stream, reads it to the end, waits a moment."""

    wait_time = between(0.1, 1.0)

    @task
    def chat(self) -> None:
        """One streamed answer."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "What did people find near the river?"}],
            "max_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"authorization": f"Bearer {KEY}"} if KEY else {}
        began = time.perf_counter()
        first, tokens, whole = 0.0, 0, False
        with self.client.post(
            "/v1/chat/completions", json=body, headers=headers, stream=True, catch_response=True, name="chat"
        ) as response:
            for line in response.iter_lines():
                if line == b"data: [DONE]":
                    whole = True
                elif line.startswith(b"data: "):
                    chunk = json.loads(line[6:])
                    if not first and chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                        first = time.perf_counter()
                    if chunk.get("usage"):
                        tokens = chunk["usage"]["completion_tokens"]
            if not whole:
                response.failure(f"status {response.status_code}, not whole")
        if first:
            self._report("first text", first - began, 0)
        if first and tokens > 1:
            self._report("tokens", (time.perf_counter() - first) / (tokens - 1), tokens)

    def _report(self, name: str, seconds: float, length: int) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=seconds * 1000,
            response_length=length,
            exception=None,
            context={},
        )
