"""What the routes for administrators have in common: who asks, parameters, bodies, and giving up with the client."""

import asyncio
import re
from collections.abc import Awaitable, Mapping
from typing import Final, TypeVar
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.body import BodyReader
from gateway.context import ClientGoneError, context_of
from gateway.decode import bad, read, shorten
from gateway.errors import send_json
from protocol import PROTOCOL_VERSION, __version__
from protocol.control import CliHello
from protocol.errors import LmxError

T = TypeVar("T")
_COUNT: Final = re.compile(r"[0-9]{1,16}")


def hello_of(scope: Scope) -> CliHello:
    """Return how the supervisor is told who asks: the key's id, the address, the request."""
    context = context_of(scope)
    by = "" if context.access is None else context.access.client
    return CliHello(PROTOCOL_VERSION, __version__, by, context.address, context.request_id)


def parameters(scope: Scope, *known: str) -> Mapping[str, str]:
    """Return the parameters in the address; raise a 400 for one that is not known here, or is there twice."""
    try:
        text = scope["query_string"].decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict", max_num_fields=32)
    except ValueError:
        raise LmxError("invalid_value", "The parameters in the address cannot be read.") from None
    found = dict(pairs)
    for name in found:
        if name not in known:
            words = f"its parameters are: {', '.join(known)}" if known else "it has none"
            raise LmxError("invalid_value", f"This route has no parameter '{shorten(name)}'; {words}.", param="query")
    if len(found) != len(pairs):
        raise LmxError("invalid_value", "A parameter stands in the address twice.", param="query")
    return found


def number(values: Mapping[str, str], name: str, default: float, most: float) -> float:
    """Return a parameter between 0 and `most`."""
    text = values.get(name)
    if text is None:
        return default
    try:
        found = float(text)
    except ValueError:
        raise bad(name, "is not a number") from None
    if not 0 <= found <= most:  # also for what is not a number in a number's clothes
        raise bad(name, f"must be between 0 and {most:g}")
    return found


def count(values: Mapping[str, str], name: str, default: int, most: int) -> int:
    """Return a parameter that is a whole number between 0 and `most`."""
    text = values.get(name)
    if text is None:
        return default
    if not _COUNT.fullmatch(text) or int(text) > most:
        raise bad(name, f"must be a whole number between 0 and {most}")
    return int(text)


async def read_body(
    bodies: BodyReader, scope: Scope, receive: Receive, send: Send, decoder: "msgspec.json.Decoder[T]"
) -> T | None:
    """Return the body as `decoder` reads it, None when it was refused and the client knows; raise a 400."""
    body = await bodies.read(scope, receive, send)
    return None if body is None else read(body, decoder)[1]


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Return what `work` returns; give it up, and raise `ClientGoneError`, when the client hangs up meanwhile."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_document(send: Send, document: bytes, status: int = 200) -> None:
    """Answer with a document that is JSON already."""
    await send_json(send, status, document, [(b"cache-control", b"no-store")])
