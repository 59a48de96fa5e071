"""Who asked for what: every command that changes something is a line of the journal before it is carried out."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from protocol import control
from supervisor.journal import Journal

#: What changes something, by what it is called. All other requests are questions.
ACTIONS: Final[Mapping[type[object], str]] = MappingProxyType(
    {
        control.LoadRequest: "load",
        control.UnloadRequest: "unload",
        control.RestartRequest: "restart",
        control.PinRequest: "pin",
        control.ResetRequest: "reset",
        control.ResumeRequest: "resume",
        control.ReloadRequest: "reload_config",
        control.HandoverRequest: "hand_over",
        control.StopRequest: "stop",
    }
)
#: Who asked, if no administrator did over HTTP: somebody with a shell on this machine.
_COMMAND_LINE: Final = "cli"


def note(journal: Journal, request: control.ToSupervisor, hello: control.CliHello, failed: str | None = None) -> None:
    """Write down who wants what changed; with `failed`, a code of `protocol.errors`, that it was not done."""
    action = ACTIONS.get(type(request))
    if action is None:
        return
    if isinstance(request, control.PinRequest) and not request.pinned:
        action = "unpin"
    who = {"by": hello.by or _COMMAND_LINE, "address": hello.address, "request_id": hello.request_id}
    what = {"action": action, "model": getattr(request, "id", "")}
    if failed is None:
        journal.write("admin_action", **what, **who)
    else:
        journal.write("admin_action_failed", level="WARNING", **what, **who, code=failed)
