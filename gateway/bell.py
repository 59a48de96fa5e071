"""What wakes the one task that answers a client, whichever of the call's requests has news."""

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class _Ringer(Protocol):
    #: Whether it has rung since it was last listed.
    rung: bool


RingerT = TypeVar("RingerT", bound=_Ringer)


class Bell(Generic[RingerT]):
    """One per call. Requests ring as frames arrive; the task that writes the answer waits, or has someone listen.

    Waking a task for each event costs as much as the event itself: a listener is called without that.
    """

    def __init__(self, *, blocked: bool = False) -> None:
        #: The client has closed its connection.
        self.client_gone = False
        #: The task takes nothing now: it is stuck in a write, or takes all at the end.
        self.blocked = blocked
        #: Called when more waits for the client than may.
        self.on_overflow: Callable[[], None] | None = None
        #: Whether something has happened that nobody has been told yet.
        self.dirty = False
        self._rung: list[RingerT] = []
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[list[RingerT]], None] | None = None
        self._loop = asyncio.get_running_loop()

    def ring(self, ringer: RingerT) -> None:
        """Tell that this one has news."""
        if not ringer.rung:
            ringer.rung = True
            self._rung.append(ringer)
        self.wake()

    def leave(self) -> None:
        """The client has gone."""
        self.client_gone = True
        self.wake()

    def wake(self) -> None:
        """Let `news` return, or the listener hear of it in the next turn of the loop."""
        if self.dirty:
            return
        self.dirty = True
        if self._listener is not None:
            self._loop.call_soon(self._tell)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def listen(self, listener: "Callable[[list[RingerT]], None] | None") -> None:
        """Have what `news` would return given to `listener`, None to nobody any more. It must not raise."""
        self._listener = listener
        if listener is not None and self.dirty:
            self._loop.call_soon(self._tell)

    async def news(self) -> list[RingerT]:
        """Wait until something happened since the last call returned; return who rang. For one task only."""
        if not self.dirty:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._take()

    def _tell(self) -> None:
        if self._listener is not None and self.dirty:
            self._listener(self._take())

    def _take(self) -> list[RingerT]:
        self.dirty = False
        rung, self._rung = self._rung, []
        for ringer in rung:
            ringer.rung = False
        return rung
