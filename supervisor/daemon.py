"""The supervisor itself: start, restore, run until asked to stop, stop."""

import asyncio
import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol import control
from protocol.config import Config
from protocol.config_load import BadConfigError
from protocol.logs import event
from protocol.paths import Home, UnsafeHomeError
from protocol.states import ModelState, Phase
from supervisor import adoption, views
from supervisor import events as ev
from supervisor.admission import Admission
from supervisor.children import trim_outputs
from supervisor.commands import Commands, add_model
from supervisor.front import Front
from supervisor.host import GATEWAY, Host
from supervisor.intent import Intent
from supervisor.journal import Journal
from supervisor.managed import Managed
from supervisor.ondemand import OnDemand
from supervisor.peers import Peers
from supervisor.platform import current_platform
from supervisor.platform.reports import panics_since
from supervisor.prediction import History
from supervisor.record import Record
from supervisor.restarts import gateway_policy
from supervisor.server import Connection, ControlServer
from supervisor.store import ChildRecord, Desired, DesiredModel, Runtime, Store
from supervisor.surroundings import Surroundings
from supervisor.tally import Tally
from supervisor.warden import Warden
from supervisor.watching import Changes

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: State that the disk did not take, and news that could not be told, are tried again after this long.
_SAVE_RETRY_S: Final = 3.0
_TELL_RETRY_S: Final = 0.5
#: For the answer to the command that ends this image.
_LAST_WORDS_S: Final = 0.1


class Daemon:
    """One supervisor on one home. `announce(url, model)` is called once, when the first model answers requests.

    `check_config` raises `BadConfigError` or `UnsafeHomeError` if a supervisor that starts now would refuse to.
    """

    def __init__(
        self, home: Home, config: Config, announce: Callable[[str, str], None], check_config: Callable[[], object]
    ) -> None:
        self._home = home
        self._check_config = check_config
        self._config = config
        self._announce: Callable[[str, str], None] | None = announce
        self._platform = current_platform()
        self._journal = Journal(home.journal)
        self._tally = Tally()
        self._journal.follow(self._tally.hear)
        self._store = Store(home, self._platform, self._journal.write)
        self._intent = Intent(home, config, self._store, self._journal)
        self._changes = Changes()
        self._host = Host(home, config, self._platform, self._journal, self._changed)
        self._history = History(home.state / "memory")
        self._admission = Admission(self._host, self._changes, self._history, self._intent.evicted)
        self._warden = Warden(self._host, self._admission, self._history, self._changed)
        self._commands = Commands(
            self._host,
            self._changes,
            self._intent,
            self._admission,
            status=lambda: msgspec.json.encode(self._status()),
            resume=self._resume,
            reload=self._take_over_config,
            hand_over=self._hand_over,
            stop=self._stop,
        )
        self._on_demand = OnDemand(
            config.models.on_demand,
            self._journal,
            folders=lambda: views.loadable_folders(home.models),
            load=self._commands.load_on_demand,
            closed=lambda: self._intent.safe_mode,
            changed=self._changed,
        )
        self._front = Front(self._host, config)
        self._peers = Peers(self._host, self._catalog, self._front.handed_back, self._on_demand.wanted)
        self._server = ControlServer(home.control_socket, self._platform, self._greet)
        self._surroundings = Surroundings(config, self._journal, self._host.guard, self._changed)
        self._before = Runtime()
        self._started_at = time.time()
        self._record = Record(self._host, self._store, self._intent, self._started_at, self._status)
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stop_reason = ""
        self._host.before_load = self._record.mark_load
        #: Set when this image of the program should be replaced by the next one, children and all left running.
        self.handing_over = False
        self._catalog_version = 0
        self._catalog_models: list[control.CatalogModel] = []
        self._shedding = False
        self._publishing = False

    async def run(self) -> None:
        """Serve until a signal or a stop command, then end every child and return."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="look"))
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number.name)
        # Held back by the image before this one: what came meanwhile comes now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        # From a terminal that is closed it means the end; from an operator of a service, that a file has changed.
        if sys.stdin is not None and sys.stdin.isatty():
            loop.add_signal_handler(signal.SIGHUP, self._stop, signal.SIGHUP.name)
        else:
            loop.add_signal_handler(signal.SIGHUP, self._reload)
        expected = self._remember()
        self._server.open()
        tasks = [
            loop.create_task(task)
            for task in (self._beat(), self._warden.run(), self._save_again(), self._surroundings.run())
        ]
        try:
            await self._restore(expected)
            tasks.append(loop.create_task(self._front.open(handed_over=self._before.handover)))
            tasks.append(loop.create_task(self._roll()))
            await self._stopping.wait()
            if self.handing_over:
                # Nothing is started or written any more, whatever ends now: the next image finds it out.
                self._host.holding = True
                signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
                self._record.save(clean=True, reason=self._stop_reason, handover=True)
            else:
                await self._shut_down()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._server.close()
            await self._peers.close()
            self._on_demand.close()
            self._admission.close()
            self._host.close()
            self._front.close()

    # -- start ----------------------------------------------------------------------------------------------------

    def _remember(self) -> tuple[ChildRecord, ...]:
        """Read what the last supervisor left, and mark this run as unclean until it ends well."""
        desired, self._before = self._store.load()
        self._intent.begin(
            desired or Desired(),
            self._before,
            boot_id=self._platform.boot_id(),
            now=self._started_at,
            panic=self._panic_since,
        )
        if not self._before.last_clean_shutdown:
            self._host.recovery.expect(self._before.loaded_models)
        expected = adoption.living(self._before, self._platform)
        for child in adoption.stale(self._before, self._platform):
            self._journal.write("stale_identity", level="WARNING", model=child.model, slot=child.slot, pid=child.pid)
        numbers = adoption.leftovers(self._home).values()
        self._host.incarnation = max(self._before.incarnation, *numbers, 0)
        event(
            "supervisor_started",
            home=str(self._home.root),
            last_clean_shutdown=self._before.last_clean_shutdown,
            left_behind=len(expected),
        )
        if self._host.launcher.preload is not None:
            event("blas_preload", library=self._host.launcher.preload.library)
        self._history.load()
        self._record.begin(expected)
        return expected

    async def _restore(self, expected: tuple[ChildRecord, ...]) -> None:
        host = self._host
        gateway = host.add(GATEWAY, gateway_policy(self._config.lifecycle))
        host.feed(gateway, ev.Want())
        running = {child.model for child in expected}
        skipped = [model for model in self._intent.to_load() if self._intent.safe_mode and model.id not in running]
        for model in self._intent.to_load():
            if model not in skipped:
                self._bring_back(model)
        if skipped:
            event("safe_mode_skip_auto_load", level="WARNING", models_skipped=len(skipped))
        unrecorded = adoption.unrecorded(self._before, self._home, self._platform)
        await adoption.adopt(host, self._changes, expected, unrecorded)
        adoption.sweep(host)
        host.release()
        self._record.save()

    def _bring_back(self, model: DesiredModel) -> None:
        managed = add_model(self._host, model.id, model.path, model.added_at)
        managed.account.pinned, managed.account.ttl_s = model.pinned, model.ttl_s
        why = self._intent.why_not(model.id)
        self._host.feed(managed, ev.SetAside(why) if why else ev.Want())

    def _panic_since(self, since: float) -> str:
        reports = panics_since(since, self._host.crashes.folders)
        return (reports[0].words or "kernel panic") if reports else ""

    async def _roll(self) -> None:
        """Replace workers of another protocol version, one after the other.

        A gateway of that version finishes its requests on them first: it will not hear of their successors.
        """
        slots = self._host.slots
        await self._changes.wait_for(
            lambda: not any(m.foreign and m.child is not None for m in slots.values() if not m.model)
        )
        for managed in [m for m in self._host.models() if m.foreign]:
            self._journal.write("worker_rolled", model=managed.model, pid=managed.slot.pid)
            self._host.feed(managed, ev.Restart(force=True))
            await self._changes.wait_for(functools.partial(_is_replaced, managed))

    # -- while running --------------------------------------------------------------------------------------------

    async def _greet(self, hello: control.Hello, connection: Connection) -> None:
        match hello:
            case control.WorkerHello():
                await self._peers.worker(hello, connection)
            case control.GatewayHello():
                await self._peers.gateway(hello, connection)
            case control.SpareHello():
                await self._peers.spare(hello, connection)
            case control.CliHello():
                await self._commands.serve(hello, connection)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._config.lifecycle.heartbeat_s)
            vitals = control.Ping()
            with self._host.guard("vitals"):
                vitals = control.Ping(msgspec.json.encode({**self._status(), "counters": self._tally.document()}))
            for managed in list(self._host.slots.values()):
                with self._host.guard("beat"):
                    managed.tell(control.Ping() if managed.model else vitals)
                    if managed.foreign and managed.child is not None:
                        self._host.feed(managed, ev.Beat(Phase.IDLE, 0))  # it cannot tell us itself
            if self._host.spare is not None:
                self._host.spare.ping()

    async def _save_again(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_RETRY_S)
            with self._host.guard("save"):
                self._store.try_again()
            with self._host.guard("outputs"):
                await asyncio.to_thread(trim_outputs, self._home.logs)

    def _changed(self) -> None:
        """Something visible changed: tell everyone once the present events are done."""
        if not self._publishing:
            self._publishing = True
            asyncio.get_running_loop().call_soon(self._publish)

    def _publish(self) -> None:
        self._publishing = False
        self._changes.ring()
        told = False
        with self._host.guard("publish"):
            self._tell_all()
            told = True
        if not told:
            asyncio.get_running_loop().call_later(_TELL_RETRY_S, self._changed)

    def _tell_all(self) -> None:
        gateway = self._host.slots.get(GATEWAY)
        if self._refresh_catalog():
            for managed in self._host.slots.values():
                if not managed.model:
                    managed.tell(self._catalog())
        self._record.follow()
        self._tell_first(gateway is not None and gateway.slot.state is ModelState.READY)

    def _tell_first(self, serving: bool) -> None:
        ready = [m.model for m in self._host.models() if m.slot.state is ModelState.READY]
        if serving and ready and self._announce is not None and self._front.url:
            self._announce(self._front.url, ready[0])
            self._announce = None

    def _refresh_catalog(self) -> bool:
        """Look at all models again; return whether a client would see a difference."""
        now, ending = time.monotonic(), self._host.ending
        models = [views.catalog_model(managed, now, ending=ending) for managed in self._host.models()]
        loaded = {model.id for model in models}
        models += [
            views.loadable_model(
                model,
                folder,
                on_demand=self._on_demand.allows(model),
                refusal=views.ENDING if ending else self._on_demand.refusal(model, now),
            )
            for model, folder in views.loadable_folders(self._home.models).items()
            if model not in loaded
        ]
        if models == self._catalog_models and self._shedding == self._warden.shedding:
            return False
        self._catalog_models, self._shedding = models, self._warden.shedding
        self._catalog_version += 1
        return True

    def _catalog(self) -> control.Catalog:
        return control.Catalog(self._catalog_version, self._catalog_models, self._shedding)

    def _status(self) -> dict[str, Any]:
        document = views.status_document(
            self._host.slots.values(),
            url=self._front.url,
            started_at=self._started_at,
            problem=self._store.problem,
            safe_mode=self._intent.safe_mode,
            handed_over=self._before.handover,
            breaker_open_s=max(0.0, self._host.breaker.open_until - time.monotonic()),
            internal_errors=self._host.guard.count + self._server.failures,
            now=time.monotonic(),
        )
        document["memory"] = self._warden.document()
        document |= self._surroundings.document()
        now = time.monotonic()
        for entry, managed in zip(document["models"], self._host.models(), strict=True):
            entry.update(self._warden.of_model(managed, now))
        spare = self._host.spare
        if spare is not None:
            pid = spare.child.pid if spare.child is not None else None
            document["spare"] = {"pid": pid, "state": "ready" if spare.ready else "starting" if pid else "stopped"}
        return document

    # -- state ----------------------------------------------------------------------------------------------------

    def _resume(self) -> str:
        """Leave safe mode and load what should be live; return words for the operator."""
        was = self._intent.resume(self._started_at)
        missing = [model for model in self._intent.to_load() if self._host.find(model.id) is None]
        for model in missing:
            self._bring_back(model)
        return f"restoring {len(missing)} models" if was else "not in safe mode; nothing to do"

    def _reload(self) -> None:
        with contextlib.suppress(BadConfigError, UnsafeHomeError):
            self._take_over_config()

    def _take_over_config(self) -> None:
        """Become the next image with a new configuration; keep the old one, and raise, if it is bad."""
        try:
            self._check_config()
        except (BadConfigError, UnsafeHomeError) as error:
            self._journal.write("config_rejected", level="ERROR", reason=str(error))
            raise
        self._hand_over()

    def _hand_over(self) -> None:
        self._journal.write("supervisor_handover")
        self._stop_reason = "handover"
        self.handing_over = True
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._stopping.set)

    # -- stop -----------------------------------------------------------------------------------------------------

    def _on_signal(self, name: str) -> None:
        event("sigterm_received", signal=name)
        self._stop(name)

    def _stop(self, reason: str) -> None:
        if self._stopping.is_set():
            if self.handing_over:
                os.kill(os.getpid(), signal.SIGTERM)  # held back by now: for the next image
            self._hurry.set()  # asked twice: do not wait for running requests
            return
        self.handing_over = False
        self._stop_reason = reason
        self._journal.write("supervisor_stopping", reason=reason)
        self._stopping.set()

    async def _shut_down(self) -> None:
        """Let running requests end, then end the gateway, then the workers. Deadlines are the lifecycle's."""
        host = self._host
        self._record.freeze_loaded()
        host.holding = host.ending = True
        # Also those that were replaced and have requests left.
        gateways = [managed for managed in host.slots.values() if not managed.model]

        def unwant(*, force: bool) -> None:
            for managed in gateways:
                host.feed(managed, ev.Unwant(force=force))

        unwant(force=False)
        hurry = asyncio.get_running_loop().create_task(self._hurry.wait())
        hurry.add_done_callback(lambda task: None if task.cancelled() else unwant(force=True))
        await self._changes.wait_for(lambda: not any(managed.child is not None for managed in gateways))
        hurry.cancel()
        for managed in host.models():
            host.feed(managed, ev.Unwant(force=True))
        spare = host.spare
        if spare is not None:
            spare.stop()
            await self._changes.wait_for(lambda: spare.child is None)
        # Not for a state: what somebody wants again meanwhile is not started, and would be waited for in vain.
        await self._changes.wait_for(lambda: not any(managed.child is not None for managed in host.models()))
        self._record.save(clean=True, reason=self._stop_reason)
        with contextlib.suppress(OSError):
            Path(self._home.control_socket).unlink()
        self._journal.write("supervisor_stopped", reason=self._stop_reason, models=len(self._record.loaded))


def _is_replaced(managed: Managed) -> bool:
    settled = {ModelState.READY, ModelState.QUARANTINED, ModelState.STOPPED}
    return not managed.foreign and managed.slot.state in settled
