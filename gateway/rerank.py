"""`POST /v1/rerank`: documents by their relevance to a query, in the shape of Cohere and Jina."""

from typing import Final

import msgspec
from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from gateway.calls import Calls, ask
from gateway.decode import bad, read
from gateway.errors import send_json
from gateway.parameters import RERANK, settle
from gateway.responses import EmbeddingUsage, RankedDocument, Ranking, encode
from gateway.schemas import Document, RerankRequest
from protocol.config import GatewayConfig
from protocol.data import Kind, Ranked
from protocol.errors import LmxError

#: As many as `/v1/embeddings` takes.
MAX_DOCUMENTS: Final = 2_048
_DECODER: Final = msgspec.json.Decoder(RerankRequest)


class RankCall(msgspec.Struct):
    """A request that has passed every check that does not take the model."""

    model: str
    query: str
    documents: list[str]
    top_n: int
    return_documents: bool
    ignored: list[str]


class Rerank:
    """The endpoint."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; every failure is raised as `LmxError`."""
        with self._calls.admit():
            wanted = await self._calls.parsed(scope, receive, send, parse_rerank)
            if wanted is None:
                return
            self._calls.name_ignored(scope, wanted.ignored)
            asked = ask(Kind.RERANK, inputs=[wanted.query, *wanted.documents])
            timeout_s = self._calls.config.embedding_timeout_s
            async with self._calls.entered(scope, receive, wanted.model, [asked], timeout_s=timeout_s) as call:
                (request,) = await call.whole()
                result = request.result
                if not isinstance(result, Ranked) or len(result.scores) != len(wanted.documents):
                    raise LmxError("protocol_error", "The process of the model sent something other than its scores.")
                usage = EmbeddingUsage(result.prompt_tokens, result.prompt_tokens)
                ranking = Ranking(f"rerank-{call.context.request_id}", call.model.id, _order(wanted, result), usage)
                await send_json(send, 200, encode(ranking), [])


def parse_rerank(body: bytes, config: GatewayConfig) -> RankCall:
    """Return the call in `body`; raise `LmxError` with a 400 code for anything that is not one."""
    fields, request = read(body, _DECODER)
    if not request.model:
        raise bad("model", "must not be empty")
    ignored = settle(RERANK, fields, strict=config.strict)
    if not request.query:
        raise bad("query", "must not be empty")
    documents = [item if isinstance(item, str) else item.text for item in request.documents]
    if not 1 <= len(documents) <= MAX_DOCUMENTS:
        raise bad("documents", f"must hold 1 to {MAX_DOCUMENTS} documents")
    if not all(documents):
        raise bad(f"documents[{documents.index('')}]", "must not be empty")
    if request.top_n is not None and request.top_n < 1:
        raise bad("top_n", "must be at least 1")
    return RankCall(
        model=request.model,
        query=request.query,
        documents=documents,
        top_n=len(documents) if request.top_n is None else request.top_n,
        return_documents=request.return_documents is True,
        ignored=ignored,
    )


def _order(wanted: RankCall, result: Ranked) -> list[RankedDocument]:
    """Return the most relevant documents; of equals the first one given comes first."""
    order = sorted(range(len(result.scores)), key=lambda index: -result.scores[index])
    return [
        RankedDocument(
            index, result.scores[index], Document(wanted.documents[index]) if wanted.return_documents else UNSET
        )
        for index in order[: wanted.top_n]
    ]
