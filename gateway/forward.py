"""Passes what an administrator asks for on to the supervisor, each on a connection of its own, as a command line does.

So nothing waits behind a load that takes minutes, and what is given up is given up by hanging up.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from protocol import PROTOCOL_VERSION, __version__
from protocol.channel import Channel, ChannelClosedError, dial
from protocol.control import (
    MAX_FRAME_BYTES,
    CliHello,
    CrashesReply,
    CrashesRequest,
    EventsRequest,
    FitReply,
    FitRequest,
    JournalEntry,
    LoadRequest,
    PinRequest,
    Progress,
    ReloadRequest,
    ResetRequest,
    RestartRequest,
    Result,
    ResumeRequest,
    StatusReply,
    StatusRequest,
    UnloadRequest,
    from_supervisor_decoder,
)
from protocol.errors import LmxError, from_peer
from protocol.messages import MalformedMessageError, encode
from protocol.states import CliExit

#: A supervisor that is being replaced is back within this time.
_DIAL_S: Final = 3.0
#: Questions are answered from memory; a fit and the crashes read files.
QUESTION_S: Final = 30.0
#: Each kind of caller has places of its own: loads that take minutes must not keep out the unload that makes room.
_MAX_ACTIONS: Final = 16
_MAX_QUESTIONS: Final = 16
MAX_FOLLOWERS: Final = 16

Question = StatusRequest | FitRequest | CrashesRequest
Action = LoadRequest | UnloadRequest | RestartRequest | PinRequest | ResetRequest | ResumeRequest | ReloadRequest


class _Places:
    """A bound on how many do something at once."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._taken = 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Take a place while the block runs; raise `server_busy` if there is none."""
        if self._taken >= self._most:
            raise LmxError("server_busy", f"{self._most} {self._what} at once are all there may be: try again later.")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class Forwarder:
    """The way to the supervisor at a control socket. `timeout_s` bounds what changes something."""

    def __init__(self, control_socket: Path, timeout_s: float) -> None:
        self._path = control_socket
        self._timeout_s = timeout_s
        self._decoder = from_supervisor_decoder()
        self._actions = _Places(_MAX_ACTIONS, "administrators' orders")
        self._questions = _Places(_MAX_QUESTIONS, "administrators' questions")
        self._followers = _Places(MAX_FOLLOWERS, "followers of events")

    async def ask(self, question: Question, hello: CliHello, *, within_s: float = QUESTION_S) -> bytes:
        """Return the document, as JSON, that answers a question; raise `LmxError`."""
        with self._questions.one():
            async with self._connected(hello, within_s) as channel:
                channel.send(encode(question))
                while True:
                    message = self._decoder.decode(await channel.receive())
                    if isinstance(message, StatusReply | FitReply | CrashesReply):
                        return message.document
                    if isinstance(message, Result):
                        raise _failed(message)

    async def order(self, action: Action, hello: CliHello, *, wait: bool = True) -> Result | Progress:
        """Have something done; return its `Result`, or without `wait` the first `Progress` of what takes time.

        Raises `LmxError` for what could not be done, and when it takes too long: it may go on then.
        """
        with self._actions.one():
            async with self._connected(hello, self._timeout_s) as channel:
                channel.send(encode(action))
                while True:
                    message = self._decoder.decode(await channel.receive())
                    if isinstance(message, Result):
                        if message.exit_code != CliExit.OK:
                            raise _failed(message)
                        return message
                    if isinstance(message, Progress) and not wait:
                        return message

    @contextlib.contextmanager
    def follower(self) -> Iterator[None]:
        """Take the place of one who follows events while the block runs."""
        with self._followers.one():
            yield

    async def events(self, last: int, since: float) -> AsyncGenerator[bytes, None]:
        """Yield entries of the journal, as JSON, until the supervisor hangs up; raise `LmxError` if there is none."""
        channel = await self._dialled(_DIAL_S)
        try:
            channel.send(encode(CliHello(PROTOCOL_VERSION, __version__)))
            channel.send(encode(EventsRequest(last, since)))
            while True:
                message = self._decoder.decode(await channel.receive())
                if isinstance(message, JournalEntry):
                    yield message.line
        except (ChannelClosedError, MalformedMessageError):
            return
        finally:
            channel.close()

    @contextlib.asynccontextmanager
    async def _connected(self, hello: CliHello, within_s: float) -> AsyncIterator[Channel]:
        channel = await self._dialled(min(within_s, _DIAL_S))
        try:
            channel.send(encode(hello))
            async with asyncio.timeout(within_s):
                yield channel
        except TimeoutError:
            text = f"The supervisor was not done within {within_s:g} s; what was ordered may go on: see /admin/models."
            raise LmxError("timeout", text) from None
        except ChannelClosedError:
            text = "The supervisor ended before it was done; whether it did what was ordered shows in /admin/models."
            raise LmxError("supervisor_unavailable", text) from None
        except MalformedMessageError:
            text = "The supervisor's answer cannot be read: it may be of another version than this gateway."
            raise LmxError("supervisor_unavailable", text) from None
        finally:
            channel.close()

    async def _dialled(self, within_s: float) -> Channel:
        try:
            return await dial(self._path, limit=MAX_FRAME_BYTES, within_s=within_s)
        except OSError:
            text = "No supervisor answers; models that are loaded serve on. It is started with: lmx-supervisor run"
            raise LmxError("supervisor_unavailable", text) from None


def _failed(result: Result) -> LmxError:
    """Return the error for a command that was not carried out."""
    words = result.message[:1].upper() + result.message[1:]
    return from_peer(result.code or "conflict", words if words.endswith((".", "?")) else f"{words}.")
