"""`POST /v1/completions`: text that goes on from a prompt, without roles and templates."""

import secrets
import time
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from gateway.calls import Calls, ask, seeded
from gateway.chat import FINGERPRINT
from gateway.chunks import TextChunks, finish_reason
from gateway.errors import send_json
from gateway.logprobs import LegacyWriter, Shown, mean
from gateway.requests import Extras, Request
from gateway.responses import Completion, TextChoice, encode
from gateway.stream import send_events, usage_of
from gateway.validate import CompletionCall, parse_completion
from protocol.data import Kind, Submit


class Completions:
    """The endpoint."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; every failure before the first byte is raised as `LmxError`."""
        config = self._calls.config
        with self._calls.admit():
            wanted = await self._calls.parsed(scope, receive, send, parse_completion)
            if wanted is None:
                return
            self._calls.name_ignored(scope, wanted.ignored)
            entering = self._calls.entered(
                scope,
                receive,
                wanted.model,
                _asked(wanted),
                timeout_s=config.completion_timeout_s,
                streams=wanted.stream,
            )
            async with entering as call:
                answer_id, created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
                if wanted.stream:
                    usage, count = wanted.include_usage, len(call.requests)
                    writer = TextChunks(answer_id, created, wanted.model, FINGERPRINT, usage=usage, choices=count)
                    await send_events(call, writer, scope, send, include_usage=usage, keepalive_s=config.keepalive_s)
                else:
                    shown = _choices(wanted, await call.whole())
                    body = Completion(answer_id, created, wanted.model, shown, FINGERPRINT, usage=usage_of(call))
                    await send_json(send, 200, encode(body), [])


class _Answer(NamedTuple):
    request: Request
    extras: Extras


def _asked(wanted: CompletionCall) -> list[Submit]:
    """Return the requests: those of the first prompt, then those of the second."""
    asked: list[Submit] = []
    for number, prompt in enumerate(wanted.prompts, 1):
        group = number if wanted.best_of > 1 else 0
        first = ask(Kind.COMPLETION, inputs=[prompt], sampling=wanted.sampling, echo=wanted.echo, group=group)
        asked += seeded(first, wanted.best_of)
    return asked


def _choices(wanted: CompletionCall, requests: list[Request]) -> list[TextChoice]:
    """Return `n` answers for each prompt: the best, if more were made."""
    choices: list[TextChoice] = []
    for start in range(0, len(requests), wanted.best_of):
        answers = [_Answer(request, request.take_extras()) for request in requests[start : start + wanted.best_of]]
        if wanted.best_of > wanted.n:
            # With `echo` the prompt's log probabilities are the same in all.
            answers.sort(key=lambda answer: mean(answer.extras.logprobs), reverse=True)
        for answer in answers[: wanted.n]:
            text, finish = answer.request.take(), answer.request.finish
            shown = Shown().take(answer.extras, text, finish)
            logprobs = LegacyWriter().shape(shown) if wanted.logprobs else None
            choices.append(TextChoice(text, len(choices), logprobs, finish_reason(finish)))
    return choices
