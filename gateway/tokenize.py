"""`POST /tokenize` and `/detokenize`, in vLLM's shapes: what a model's tokenizer makes of a text, and back."""

from starlette.types import Receive, Scope, Send

from gateway.calls import Calls, ask
from gateway.errors import send_json
from gateway.requests import Request
from gateway.responses import Detokenized, Tokens, encode
from gateway.validate import parse_detokenize, parse_tokenize
from protocol.data import Kind, Tokenized
from protocol.errors import LmxError


class Tokenize:
    """The endpoint for the tokens of a text, or of a conversation."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; every failure is raised as `LmxError`."""
        with self._calls.admit():
            wanted = await self._calls.parsed(scope, receive, send, parse_tokenize)
            if wanted is None:
                return
            self._calls.name_ignored(scope, wanted.ignored)
            inputs = [] if wanted.prompt is None else [wanted.prompt]
            asked = ask(Kind.TOKENIZE, inputs=inputs, messages=wanted.messages, options=wanted.options)
            timeout_s = self._calls.config.embedding_timeout_s
            async with self._calls.entered(scope, receive, wanted.model, [asked], timeout_s=timeout_s) as call:
                (request,) = await call.whole()
                tokens = _result(request).tokens
                # Asked now, not before: the model may have been loaded for this.
                known = self._calls.find(wanted.model).capabilities
                longest = None if known is None else known.max_model_len
                await send_json(send, 200, encode(Tokens(len(tokens), longest, tokens)), [])


class Detokenize:
    """The endpoint for the text of tokens."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; every failure is raised as `LmxError`."""
        with self._calls.admit():
            wanted = await self._calls.parsed(scope, receive, send, parse_detokenize)
            if wanted is None:
                return
            self._calls.name_ignored(scope, wanted.ignored)
            asked = ask(Kind.DETOKENIZE, inputs=[wanted.tokens])
            timeout_s = self._calls.config.embedding_timeout_s
            async with self._calls.entered(scope, receive, wanted.model, [asked], timeout_s=timeout_s) as call:
                (request,) = await call.whole()
                await send_json(send, 200, encode(Detokenized(_result(request).text)), [])


def _result(request: Request) -> Tokenized:
    if not isinstance(request.result, Tokenized):
        raise LmxError("protocol_error", "The process of the model sent something other than tokens.")
    return request.result
