"""`POST /v1/chat/completions`: from the body to a worker and back."""

import secrets
import time
from typing import Final

from starlette.types import Receive, Scope, Send

from gateway.calls import Calls, ask, seeded
from gateway.chunks import ChatChunks, finish_reason
from gateway.errors import send_json
from gateway.logprobs import Shown, chat_logprobs
from gateway.requests import Request
from gateway.responses import AnswerMessage, ChatCompletion, Choice, Function, ToolCall, encode
from gateway.stream import send_events, usage_of
from gateway.validate import ChatCall, parse_chat
from protocol import __version__
from protocol.data import Kind, Submit, ToolDelta

FINGERPRINT: Final = f"lmx-{__version__}"


class ChatCompletions:
    """The endpoint."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; every failure before the first byte is raised as `LmxError`."""
        config = self._calls.config
        with self._calls.admit():
            chat = await self._calls.parsed(scope, receive, send, parse_chat)
            if chat is None:
                return
            self._calls.name_ignored(scope, chat.ignored)
            entering = self._calls.entered(
                scope, receive, chat.model, _asked(chat), timeout_s=config.chat_timeout_s, streams=chat.stream
            )
            async with entering as call:
                answer_id, created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
                if chat.stream:
                    usage = chat.include_usage
                    writer = ChatChunks(answer_id, created, chat.model, FINGERPRINT, usage=usage, choices=chat.n)
                    await send_events(call, writer, scope, send, include_usage=usage, keepalive_s=config.keepalive_s)
                else:
                    choices = [_choice(index, request) for index, request in enumerate(await call.whole())]
                    body = ChatCompletion(answer_id, created, chat.model, choices, usage_of(call), FINGERPRINT)
                    await send_json(send, 200, encode(body), [])


def _asked(chat: ChatCall) -> list[Submit]:
    """Return one request for each choice: the same but for the seed."""
    first = ask(Kind.CHAT, messages=chat.messages, sampling=chat.sampling, options=chat.options, group=int(chat.n > 1))
    return seeded(first, chat.n)


def _choice(index: int, request: Request) -> Choice:
    text, extras = request.take(), request.take_extras()
    message = AnswerMessage(text or None if extras.tool_calls else text)
    if extras.reasoning:
        message.reasoning_content = "".join(extras.reasoning)
    if extras.tool_calls:
        message.tool_calls = tool_calls(extras.tool_calls)
    logprobs = chat_logprobs(Shown().take(extras, text, request.finish)) if extras.logprobs else None
    return Choice(message, finish_reason(request.finish), index, logprobs)


def tool_calls(deltas: list[ToolDelta]) -> list[ToolCall]:
    """Return the calls that the pieces make up."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.setdefault(delta.index, ToolCall("", Function("", "")))
        call.id = call.id or delta.id
        call.function.name = call.function.name or delta.name
        call.function.arguments += delta.arguments
    return [calls[index] for index in sorted(calls)]
