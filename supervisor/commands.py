"""Commands of operators as the supervisor carries them out, whoever passes them on: each ends in one `Result`."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from protocol import control
from protocol.channel import Channel, ChannelClosedError
from protocol.config_load import BadConfigError
from protocol.messages import Message, encode
from protocol.modelfolder import ModelFolderError, inspect_model_folder
from protocol.paths import UnsafeHomeError, slot_name
from protocol.states import CliExit, ModelState
from supervisor import crashes, views
from supervisor import events as ev
from supervisor import lifecycle as life
from supervisor.actions import ACTIONS, note
from supervisor.admission import Admission, NoRoomError
from supervisor.host import Host
from supervisor.intent import Intent
from supervisor.managed import Managed
from supervisor.ondemand import CannotLoadError
from supervisor.restarts import worker_policy
from supervisor.server import Connection
from supervisor.watching import Changes

_PROGRESS_S: Final = 0.25
_MAX_ID_LENGTH: Final = 200


class CommandError(Exception):
    """A command cannot be done; the text says why, `code` (of `protocol.errors`) what kind of reason it is."""

    def __init__(self, message: str, exit_code: CliExit = CliExit.FAILED, code: str = "conflict") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.code = code


class Commands:
    """Serves one connection of an operator after the other; several may be open at once.

    `status` returns the encoded status document; `resume` leaves safe mode; `reload` takes a new configuration over or
    raises `BadConfigError` or `UnsafeHomeError`; `hand_over` and `stop` end this supervisor.
    """

    def __init__(
        self,
        host: Host,
        changes: Changes,
        intent: Intent,
        admission: Admission,
        *,
        status: Callable[[], bytes],
        resume: Callable[[], str],
        reload: Callable[[], None],
        hand_over: Callable[[], None],
        stop: Callable[[str], None],
    ) -> None:
        self._host = host
        self._changes = changes
        self._status = status
        self._intent = intent
        self._admission = admission
        self._resume = resume
        self._reload = reload
        self._hand_over = hand_over
        self._stop = stop

    async def serve(self, hello: control.CliHello, connection: Connection) -> None:
        """Answer requests until the client leaves."""
        while True:
            request = await connection.receive()
            if isinstance(request, control.EventsRequest):
                await self._follow(request, connection)
            note(self._host.journal, request, hello)
            result = await self._tried(request, connection.channel)
            if result is not None:
                if result.exit_code != CliExit.OK:
                    note(self._host.journal, request, hello, failed=result.code)
                connection.channel.send(encode(result))

    async def _tried(self, request: control.ToSupervisor, channel: Channel) -> control.Result | None:
        """Return the end of a command, good or bad; None for a question that was answered."""
        failed = CliExit.FAILED
        try:
            return await self._answer(request, channel)
        except ModelFolderError as error:
            return control.Result(failed, str(error), code="model_unusable")
        except NoRoomError as error:
            return control.Result(failed, str(error), code="insufficient_memory")
        except (BadConfigError, UnsafeHomeError) as error:
            return control.Result(CliExit.BAD_CONFIG, str(error), code="invalid_config")
        except crashes.UnknownCrashError as error:
            return control.Result(failed, str(error), code="crash_not_found")
        except CommandError as error:
            return control.Result(error.exit_code, str(error), code=error.code)
        except TimeoutError:
            limit = self._host.config.lifecycle.command_timeout_s
            words = f"not done within {limit:g} s; it goes on: see status"
            return control.Result(CliExit.TIMED_OUT, words, code="timeout")

    async def _follow(self, request: control.EventsRequest, connection: Connection) -> None:
        """Pass the journal on until the client leaves, which raises `ChannelClosedError`."""
        channel, journal = connection.channel, self._host.journal

        def pass_on(entry: bytes) -> None:
            with contextlib.suppress(ChannelClosedError):  # `receive` says so
                channel.send(encode(control.JournalEntry(entry)))

        for entry in journal.recent(request.last, request.since):
            pass_on(entry)
        with journal.followed(pass_on):
            while True:
                await connection.receive()

    async def _answer(self, request: control.ToSupervisor, channel: Channel) -> control.Result | None:
        async with asyncio.timeout(self._host.config.lifecycle.command_timeout_s):
            if type(request) in ACTIONS:
                return await self._act(request, channel)
            match request:
                case control.StatusRequest():
                    reply: Message = control.StatusReply(self._status())
                case control.FitRequest(model, path):
                    document = await self._admission.fit(model, Path(path or self._folder_of(model)))
                    reply = control.FitReply(msgspec.json.encode(document))
                case control.CrashesRequest(crash):
                    document = await asyncio.to_thread(crashes.document, self._host.crashes.store, crash)
                    reply = control.CrashesReply(msgspec.json.encode(document))
                case _:
                    raise CommandError("the supervisor does not know this command", CliExit.USAGE, "invalid_value")
            channel.send(encode(reply))
            return None

    async def _act(self, request: control.ToSupervisor, channel: Channel) -> control.Result:
        match request:
            case control.LoadRequest():
                return await self._load(request, channel)
            case control.PinRequest(model, pinned):
                return self._pin(model, pinned=pinned)
            case control.UnloadRequest(model):
                return await self._unload(model)
            case control.RestartRequest(model, force):
                return await self._restart(model, channel, force=force)
            case control.ResetRequest(model):
                return self._reset(model)
            case control.ResumeRequest():
                return control.Result(CliExit.OK, self._resume())
            case control.ReloadRequest():
                self._reload()
                words = "the configuration is good: supervisor and gateway are replaced and read it, models stay"
                return control.Result(CliExit.OK, words)
            case control.HandoverRequest():
                self._hand_over()
                return control.Result(CliExit.OK, "handing over")
        self._stop("stop command")
        return control.Result(CliExit.OK, "stopping")

    # -- commands -------------------------------------------------------------------------------------------------

    async def load_on_demand(self, model: str, path: Path) -> None:
        """Give a model a slot; raise `NoRoomError`, `ModelFolderError` or `CannotLoadError`."""
        try:
            async with asyncio.timeout(self._host.config.lifecycle.command_timeout_s):
                await self._admit(control.LoadRequest(model, str(path)))
        except CommandError as error:
            raise CannotLoadError(str(error)) from None

    async def _load(self, request: control.LoadRequest, channel: Channel) -> control.Result:
        return await self._loaded(await self._admit(request), channel)

    async def _admit(self, request: control.LoadRequest) -> Managed:
        """Give a model that fits a slot, or return the one it has."""
        model = request.id
        _check_id(model)
        if not request.path:
            request = msgspec.structs.replace(request, path=self._folder_of(model))
        path = Path(request.path)
        folder = await asyncio.to_thread(inspect_model_folder, path)
        managed = self._host.find(model)
        if managed is not None and managed.slot.pid:
            return self._place(request, folder.weight_bytes)
        async with self._admission.room_for(model, path) as prediction:
            managed = self._place(request, folder.weight_bytes)
            managed.account.prediction = prediction
        return managed

    def _folder_of(self, model: str) -> str:
        """Return the folder of a model that is loaded, or lies in the models folder."""
        managed = self._host.find(model)
        if managed is not None:
            return managed.path
        folder = views.loadable_folders(self._host.home.models).get(model)
        if folder is None:
            msg = f"there is no model {_shown(model)}: fetch it with lmx-supervisor pull"
            raise CommandError(msg, CliExit.UNREACHABLE, "model_not_found")
        return str(folder)

    def _place(self, request: control.LoadRequest, weight_bytes: int) -> Managed:
        """Want a model in its slot, or a new one."""
        if self._host.ending:
            raise CommandError("the supervisor is stopping", code="shutting_down")
        model, path = request.id, request.path
        managed = self._host.find(model)
        if managed is not None and managed.slot.state is not ModelState.QUARANTINED:
            if managed.path != path:
                msg = f"{model} is loaded from {managed.path}: unload it first, or choose another --id"
                raise CommandError(msg)
        elif managed is not None:
            managed.path = path
        else:
            managed = add_model(self._host, model, path, time.time())
        self._host.feed(managed, ev.Want())
        managed.slot = life.weigh(managed.slot, weight_bytes)
        account = managed.account
        account.pinned = account.pinned or request.pin
        account.ttl_s = account.ttl_s if request.ttl_s is None else request.ttl_s
        self._remember(managed)
        return managed

    def _remember(self, managed: Managed) -> None:
        account = managed.account
        self._intent.want(managed.model, managed.path, managed.created_at, pinned=account.pinned, ttl_s=account.ttl_s)

    async def _loaded(self, managed: Managed, channel: Channel) -> control.Result:
        await self._until_ready(managed, channel, "loaded")
        pid = managed.slot.pid
        return control.Result(CliExit.OK, f"{managed.model} is ready (pid {pid})", new_pid=pid)

    def _pin(self, model: str, *, pinned: bool) -> control.Result:
        managed = self._known(model)
        managed.account.pinned = pinned
        self._remember(managed)
        self._changes.ring()
        if not pinned and model in self._host.config.memory.pinned:
            return control.Result(CliExit.OK, f"{model} stays pinned by the configuration (memory.pinned)")
        return control.Result(CliExit.OK, f"{model} is {'pinned' if pinned else 'not pinned any more'}")

    async def _unload(self, model: str) -> control.Result:
        managed = self._known(model)
        self._intent.forget(model)
        self._host.feed(managed, ev.Unwant())
        await self._changes.wait_for(lambda: managed.slot.state is ModelState.STOPPED or managed.slot.wanted)
        if managed.slot.wanted:
            msg = f"{model} was asked for again meanwhile"
            raise CommandError(msg)
        self._host.remove(managed)
        return control.Result(CliExit.OK, f"{model} is unloaded")

    async def _restart(self, model: str, channel: Channel, *, force: bool) -> control.Result:
        managed = self._known(model)
        self._admission.check_restart(managed)
        old_pid, old_incarnation = managed.slot.pid, managed.slot.incarnation
        self._host.feed(managed, ev.Restart(force))
        _tell(managed, channel)
        settled = {ModelState.QUARANTINED, ModelState.STOPPED}
        await self._changes.wait_for(
            lambda: managed.slot.incarnation != old_incarnation or managed.slot.state in settled
        )
        await self._until_ready(managed, channel, "restarted")
        new_pid = managed.slot.pid
        return control.Result(CliExit.OK, f"{model}: pid {old_pid or '-'} -> {new_pid}", old_pid, new_pid)

    def _reset(self, model: str) -> control.Result:
        managed = self._known(model)
        self._intent.pardon(model)
        self._host.feed(managed, ev.Reset())
        return control.Result(CliExit.OK, f"{model}: failures forgotten, {managed.slot.state.value}")

    async def _until_ready(self, managed: Managed, channel: Channel, verb: str) -> None:
        """Wait for ready, telling the client how far it is; raise when the model is given up."""
        last = 0.0
        while managed.slot.state is not ModelState.READY:
            slot = managed.slot
            if slot.state is ModelState.QUARANTINED:
                permanent = slot.last_exit is not None and slot.last_exit.permanent
                if permanent and verb == "loaded":
                    self._drop(managed)
                msg = f"{managed.model} could not be {verb}: {slot.reason}"
                raise CommandError(msg, code="model_unusable" if permanent else "model_quarantined")
            if slot.state is ModelState.STOPPED or managed.name not in self._host.slots:
                msg = f"{managed.model} was unloaded meanwhile"
                raise CommandError(msg)
            if time.monotonic() - last >= _PROGRESS_S:
                last = time.monotonic()
                _tell(managed, channel)
            await self._changes.wait(_PROGRESS_S)

    def _drop(self, managed: Managed) -> None:
        """A load that can never work leaves nothing behind."""
        self._intent.forget(managed.model)
        self._host.feed(managed, ev.Unwant(force=True))
        self._host.remove(managed)

    def _known(self, model: str) -> Managed:
        managed = self._host.find(model)
        if managed is None:
            msg = f"no model {_shown(model)} is loaded; see: lmx-supervisor status"
            raise CommandError(msg, CliExit.UNREACHABLE, "model_not_found")
        return managed


def _tell(managed: Managed, channel: Channel) -> None:
    """Say where a model is on its way."""
    slot, words = managed.slot, managed.blocked or managed.slot.reason
    channel.send(encode(control.Progress(managed.model, slot.state, slot.done_bytes, slot.total_bytes, words)))


def _shown(model: str) -> str:
    """Return a name that nobody here knows, fit to be printed."""
    return "".join(char if char.isprintable() else "?" for char in model[:_MAX_ID_LENGTH])


def add_model(host: Host, model: str, path: str, created_at: float) -> Managed:
    """Make the slot of a model."""
    policy = worker_policy(host.config.lifecycle)
    return host.add(slot_name(model), policy, model=model, path=path, created_at=created_at)


def _check_id(model: str) -> None:
    """An id is printable text without spaces or parent references: it stands in URLs, logs and file names."""
    parts = model.split("/")
    fine = model.isprintable() and " " not in model and all(part and not part.startswith(".") for part in parts)
    if not fine or len(model) > _MAX_ID_LENGTH:
        msg = "a model id has letters, digits, '-', '_', '.' and '/', at most 200 characters: choose one with --id"
        raise CommandError(msg, CliExit.USAGE, "invalid_value")
