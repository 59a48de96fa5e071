"""A call: what one client asked for in one HTTP request, made of one or more requests to a model.

One for each choice of each prompt. They share the client, the deadline and the fate: if one fails, the call has failed.
"""

from collections import deque
from collections.abc import Sequence

from gateway.bell import Bell
from gateway.context import ClientGoneError, RequestContext
from gateway.desk import Desk
from gateway.requests import Request
from protocol.control import CatalogModel
from protocol.errors import LmxError


class Call:
    """One client's call, while it is being answered. For the one task that writes the answer.

    `requests` are in the order asked. `error` is the first that one of them ended with.
    """

    def __init__(
        self,
        model: CatalogModel,
        context: RequestContext,
        requests: list[Request],
        prompts: list[Request],
        bell: Bell[Request],
        desk: Desk,
    ) -> None:
        self.model = model
        self.context = context
        self.requests = requests
        #: The first request of each prompt: its tokens are counted once.
        self.prompts = prompts
        self.bell = bell
        self.error: LmxError | None = None
        self._desk = desk
        #: As many at once as the model runs at once, so that a long list leaves room in the queue for others.
        self._at_once = 32 if model.capabilities is None else max(1, model.capabilities.max_concurrent_requests)
        self._open = 0
        self._waiting = deque(requests)
        self._unended = len(requests)

    @property
    def ended(self) -> bool:
        """Whether every request has, or one has failed."""
        return self._unended == 0 or self.error is not None

    @property
    def under_way(self) -> list[Request]:
        """Those that have been sent to the model, or held for it: the others follow as these end."""
        return self.requests[: len(self.requests) - len(self._waiting)]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(tokens_of(request)[0] for request in self.prompts)

    @property
    def cached_tokens(self) -> int:
        """How many of them came from a cache."""
        return sum(tokens_of(request)[1] for request in self.prompts)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers, also of those that were generated only to be compared."""
        return sum(0 if request.usage is None else request.usage.completion_tokens for request in self.requests)

    def enter(self) -> None:
        """Send what may be sent now. A request that is refused at once has failed, and the call with it."""
        while self._waiting and self._open < self._at_once and self.error is None:
            request = self._waiting.popleft()
            self._open += 1
            try:
                self._desk.enter(request)
            except LmxError as error:
                request.fail(error)
                self.error = error

    async def news(self) -> list[Request]:
        """Wait until something happened; return the requests it happened to. Raises `ClientGoneError`."""
        rung = await self.bell.news()
        self.hear(rung)
        return rung

    def hear(self, rung: Sequence[Request]) -> None:
        """Take note of what the bell has told. Raises `ClientGoneError`."""
        if self.bell.client_gone:
            raise ClientGoneError
        for request in rung:
            if request.ended:
                self._on_end(request)

    def _on_end(self, request: Request) -> None:
        self._unended -= 1
        self._open -= 1
        if request.error is not None:
            self.error = self.error or request.error
        elif self._waiting:
            self.enter()

    async def whole(self) -> list[Request]:
        """Wait for the end; return the requests. Raises `LmxError` or `ClientGoneError`."""
        while not self.ended:
            await self.news()
        if self.error is not None:
            raise self.error
        return self.requests

    def fail(self, error: LmxError) -> None:
        """End every request that has not ended."""
        for request in self.requests:
            request.fail(error)

    def leave(self) -> None:
        """Whatever their state: no worker is left working."""
        for request in self.requests:
            self._desk.leave(request)


def tokens_of(request: Request) -> tuple[int, int]:
    """Return the tokens of a request's prompt, and how many of them came from a cache."""
    if request.usage is not None:
        return request.usage.prompt_tokens, request.usage.cached_tokens
    result = request.result
    return getattr(result, "prompt_tokens", request.prompt_tokens), request.cached_tokens
