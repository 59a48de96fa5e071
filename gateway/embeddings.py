"""`POST /v1/embeddings`: texts or tokens to vectors."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from typing import Final

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.calls import Calls, ask
from gateway.decode import bad, read
from gateway.errors import send_json
from gateway.parameters import EMBEDDING, settle
from gateway.schemas import EmbeddingRequest
from protocol.config import GatewayConfig
from protocol.data import Embedded, Kind
from protocol.errors import LmxError

#: OpenAI's.
MAX_INPUTS: Final = 2_048
#: A larger number can be no model's, and might not fit into a message.
MAX_DIMENSIONS: Final = 1_000_000
_MAX_TOKEN_ID: Final = 2**31
#: Numbers that are made into JSON between two looks at other streams: about 3 ms.
_FLOATS_AT_ONCE: Final = 16_384
_FLOAT_BYTES: Final = 4
_DECODER: Final = msgspec.json.Decoder(EmbeddingRequest)


class EmbeddingCall(msgspec.Struct):
    """A request that has passed every check that does not take the model."""

    model: str
    inputs: list[str | list[int]]
    base64: bool
    #: 0 for the model's own.
    dimensions: int
    ignored: list[str]


class Embeddings:
    """The endpoint."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; every failure is raised as `LmxError`."""
        with self._calls.admit():
            wanted = await self._calls.parsed(scope, receive, send, parse_embeddings)
            if wanted is None:
                return
            self._calls.name_ignored(scope, wanted.ignored)
            asked = ask(Kind.EMBED, inputs=wanted.inputs, dimensions=wanted.dimensions)
            timeout_s = self._calls.config.embedding_timeout_s
            async with self._calls.entered(scope, receive, wanted.model, [asked], timeout_s=timeout_s) as call:
                (request,) = await call.whole()
                result = request.result
                if not isinstance(result, Embedded) or not _fits(result, len(wanted.inputs)):
                    raise LmxError("protocol_error", "The process of the model sent something other than its vectors.")
                parts = [part async for part in _pieces(result.vectors, as_base64=wanted.base64)]
                tokens = result.prompt_tokens
                model = msgspec.json.encode(call.model.id)
                parts.append(b'],"model":%s,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (model, tokens, tokens))
                await send_json(send, 200, b"".join(parts), [])


def parse_embeddings(body: bytes, config: GatewayConfig) -> EmbeddingCall:
    """Return the call in `body`; raise `LmxError` with a 400 code for anything that is not one."""
    fields, request = read(body, _DECODER)
    if not request.model:
        raise bad("model", "must not be empty")
    ignored = settle(EMBEDDING, fields, strict=config.strict)
    encoding = request.encoding_format or "float"
    if encoding not in {"float", "base64"}:
        raise bad("encoding_format", "must be 'float' or 'base64'")
    if request.dimensions is not None and not 1 <= request.dimensions <= MAX_DIMENSIONS:
        raise bad("dimensions", "must be at least 1, and at most the model's own")
    return EmbeddingCall(
        model=request.model,
        inputs=_inputs(request.input),
        base64=encoding == "base64",
        dimensions=request.dimensions or 0,
        ignored=ignored,
    )


def _inputs(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [_filled(given, "input")]
    tokens = [item for item in given if isinstance(item, int)]
    if tokens and len(tokens) == len(given):
        return [_checked(tokens, "input")]
    if tokens:
        raise LmxError("invalid_type", "'input' mixes token ids with texts or lists of them.", param="input")
    if not 1 <= len(given) <= MAX_INPUTS:
        raise bad("input", f"must hold 1 to {MAX_INPUTS} inputs")
    inputs: list[str | list[int]] = []
    for number, item in enumerate(given):
        name = f"input[{number}]"
        if isinstance(item, str):
            inputs.append(_filled(item, name))
        elif isinstance(item, list):
            inputs.append(_checked(item, name))
    return inputs


def _filled(text: str, param: str) -> str:
    if not text:
        raise bad(param, "must not be empty")
    return text


def _checked(tokens: list[int], param: str) -> list[int]:
    if not tokens:
        raise bad(param, "must not be empty")
    if not 0 <= min(tokens) <= max(tokens) < _MAX_TOKEN_ID:
        raise bad(param, "must hold ids of the model's tokens")
    return tokens


def _fits(result: Embedded, inputs: int) -> bool:
    return len(result.vectors) == inputs and not any(len(vector) % _FLOAT_BYTES for vector in result.vectors)


async def _pieces(vectors: Sequence[bytes], *, as_base64: bool) -> AsyncIterator[bytes]:
    """Yield the beginning of the body up to its last vector, letting other streams have their turn in between."""
    yield b'{"object":"list","data":['
    made = 0
    for index, vector in enumerate(vectors):
        if as_base64:
            written = b'"%s"' % base64.b64encode(vector)
        else:
            # Little-endian, as every machine that runs MLX is.
            written = msgspec.json.encode(memoryview(vector).cast("f").tolist())
        comma = b"," if index else b""
        yield b'%s{"object":"embedding","index":%d,"embedding":%s}' % (comma, index, written)
        made += len(vector) // _FLOAT_BYTES
        if made >= _FLOATS_AT_ONCE:
            made = 0
            await asyncio.sleep(0)
