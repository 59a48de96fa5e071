"""What administrators ask and order about the whole system: its status, its crashes, its configuration."""

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.admin_call import hello_of, parameters, send_document, while_connected
from gateway.forward import Action, Forwarder, Question
from protocol.control import CrashesRequest, ReloadRequest, Result, ResumeRequest, StatusRequest


class _Answer:
    """A question without parameters."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    async def _tell(self, question: Question, scope: Scope, receive: Receive, send: Send) -> None:
        parameters(scope)
        document = await while_connected(receive, self._forwarder.ask(question, hello_of(scope)))
        await send_document(send, document)


class Status(_Answer):
    """The document of `lmx-supervisor status --json`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await self._tell(StatusRequest(), scope, receive, send)


class Crashes(_Answer):
    """Every crash that is kept, newest first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await self._tell(CrashesRequest(), scope, receive, send)


class Crash(_Answer):
    """One crash, with what its process wrote and its stacks."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await self._tell(CrashesRequest(scope["path_params"]["id"]), scope, receive, send)


class _Order:
    """An order without parameters."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    async def _do(self, action: Action, scope: Scope, receive: Receive, send: Send) -> None:
        parameters(scope)
        end = await while_connected(receive, self._forwarder.order(action, hello_of(scope)))
        message = end.message if isinstance(end, Result) else ""
        await send_document(send, msgspec.json.encode({"status": "done", "message": message}))


class Reload(_Order):
    """Checks the configuration file and takes it over: supervisor and gateway are replaced, models stay."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, and answer."""
        await self._do(ReloadRequest(), scope, receive, send)


class Resume(_Order):
    """Leaves safe mode: what should be live is loaded."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, and answer."""
        await self._do(ResumeRequest(), scope, receive, send)
