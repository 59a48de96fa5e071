"""Breaks the guarded code on purpose, one change at a time in a copy of the tree, and asks whether a row turns red.

`python -m tests.chaos.mutate` runs all, `… NAME…` those whose words contain a NAME. One that stays green is a row that
cannot fail, and the exit code is 1. `mutations.md` lists what was seen.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CHAOS = "tests/chaos"


class Mutation(NamedTuple):
    """`old` stands once in `file`; with `new` in its place `test` fails."""

    what: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "the supervisor is not told of a worker that sends nonsense",
        "gateway/peer.py",
        "            self._owner.on_misbehaved(self)\n",
        "",
        "test_rows_worker_protocol.py::test_row_31_nonsense_ends_the_process_after_three[garbage]",
    ),
    Mutation(
        "a model is started whatever memory is missing",
        "supervisor/reclaim.py",
        "if debt is None or (",
        "if True or (",
        "test_rows_memory.py::test_row_25_memory_not_returned_after_death",
    ),
    Mutation(
        "a dead gateway is started again after six seconds",
        "supervisor/restarts.py",
        "stable_s=0.0, quarantine=False)",
        "stable_s=0.0, quarantine=False, delays_s=(6.0,))",
        "test_rows_gateway.py::test_row_37_gateway_killed_under_load",
    ),
    Mutation(
        "workers keep the requests of a dead gateway",
        "worker/requests.py",
        "if owner == gateway]",
        "if owner == gateway and False]",
        "test_rows_gateway.py::test_row_37_gateway_killed_under_load",
    ),
    Mutation(
        "a silent gateway is no hang",
        "supervisor/host.py",
        "            hung = config.gateway_hung_s\n",
        "            hung = 1e6\n",
        "test_rows_gateway.py::test_row_38_gateway_stopped",
    ),
    Mutation(
        "a process that cannot be watched is left to itself",
        "supervisor/children.py",
        "        process.kill()\n        process.wait()\n        raise\n",
        "        raise\n",
        "test_rows_gateway.py::test_row_39_what_cannot_be_watched_does_not_run",
    ),
    Mutation(
        "the home is not locked",
        "supervisor/lock.py",
        "            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            fcntl.flock(self._descriptor, fcntl.LOCK_UN)\n",
        "test_rows_gateway.py::test_row_41_two_supervisors_and_two_gateways",
    ),
    Mutation(
        "nothing is adopted",
        "supervisor/peers.py",
        "        return self._host.adopt(",
        "        return False and self._host.adopt(",
        "test_rows_supervisor.py::test_row_45_supervisor_killed_under_load",
    ),
    Mutation(
        "no lease of a worker ever ends",
        "worker/io_thread.py",
        "        if not self._lease_over and now >= control.heard_at + self._lease_s:\n",
        "        if False:\n",
        "test_rows_supervisor.py::test_row_46_supervisor_dead_for_longer_than_the_lease",
    ),
    Mutation(
        "processes of which only files tell are not waited for",
        "supervisor/adoption.py",
        "    return frozenset(leftovers(home).values()) - ",
        "    return frozenset() - ",
        "test_rows_supervisor.py::test_row_47_supervisor_dies_in_the_middle_of_a_start",
    ),
    Mutation(
        "a damaged state file has no predecessor",
        "protocol/statefile.py",
        "        for candidate in (self._file, self._previous):\n            try:\n                return Loaded(",
        "        for candidate in (self._file,):\n            try:\n                return Loaded(",
        "test_rows_supervisor.py::test_row_56_power_loss",
    ),
    Mutation(
        "a state file is not synced before it gets its name",
        "protocol/statefile.py",
        "            self._sync(descriptor)\n",
        "",
        "test_rows_supervisor.py::test_row_56_power_loss",
    ),
    Mutation(
        "a supervisor that is started again and again trusts itself",
        "supervisor/safety.py",
        "    if recent < config.safe_mode_starts:\n",
        "    if True:\n",
        "test_rows_supervisor.py::test_row_50_supervisor_crash_loop",
    ),
    Mutation(
        "an exception in a beat ends all beats",
        "supervisor/guard.py",
        "            exception_event(\"internal_error\", error, where=where)\n",
        "            exception_event(\"internal_error\", error, where=where)\n            raise\n",
        "test_rows_supervisor.py::test_row_51_the_supervisor_still_pings_after_an_exception",
    ),
    Mutation(
        "a worker that became ready unheard does not say so again",
        "supervisor/peers.py",
        "        if hello.capabilities is not None:  # it",
        "        if False:  # it",
        "test_rows_supervisor.py::test_row_51_exception_while_a_process_ends_and_starts[hello]",
    ),
    Mutation(
        "a gateway that is told to end does not wait for its requests",
        "gateway/service.py",
        "        self._watch_drain(self._traffic.idle(grace_s), code)\n",
        "        self._watch_drain(self._traffic.idle(0.0), code)\n",
        "test_rows_supervisor.py::test_row_52_sigterm[False]",
    ),
    Mutation(
        "no mark is written before a load",
        "supervisor/record.py",
        "        self._load_mark = model\n",
        "",
        "test_rows_supervisor.py::test_row_57_machine_goes_down_while_a_model_loads",
    ),
    Mutation(
        "panics are forgotten",
        "supervisor/safety.py",
        "        if sum(now - strike.at <= within_s for strike in strikes) >= count:\n",
        "        if False:\n",
        "test_rows_supervisor.py::test_row_58_two_panics_within_a_day",
    ),
    Mutation(
        "time that the machine slept counts against leases",
        "protocol/standstill.py",
        "        return late if late > self._slept_s else 0.0\n",
        "        return 0.0\n",
        "test_rows_supervisor.py::test_row_59_sleep_and_wake",
    ),
    Mutation(
        "starts in the future count",
        "supervisor/safety.py",
        "sum(0 <= now - at <= config",
        "sum(now - at <= config",
        "test_rows_supervisor.py::test_row_60_starts_in_the_future_are_no_crash_loop",
    ),
    Mutation(
        "state that the disk did not take is not saved again",
        "supervisor/store.py",
        "            self._save(file, payload)\n\n    def _save",
        "            pass\n\n    def _save",
        "test_rows_disk.py::test_row_62_state_cannot_be_written",
    ),
    Mutation(
        "state of a newer version is overwritten",
        "protocol/statefile.py",
        "                self._read_only = True\n",
        "                pass\n",
        "test_rows_disk.py::test_row_65_state_of_a_newer_version",
    ),
    Mutation(
        "anybody's run folder will do",
        "protocol/paths.py",
        "    if not stat.S_ISDIR(status.st_mode):\n",
        "    if False:\n",
        "test_rows_disk.py::test_row_66_run_folder_that_cannot_be_trusted",
    ),
    Mutation(
        "numbers of leftovers are used again",
        "supervisor/daemon.py",
        "        numbers = adoption.leftovers(self._home).values()\n",
        "        numbers: list[int] = []\n",
        "test_rows_disk.py::test_row_67_stale_sockets_and_pid_files",
    ),
    Mutation(
        "a gateway of another version is dismissed with its requests",
        "supervisor/peers.py",
        "            managed.foreign = True  # its requests may end before the next one takes its place\n",
        '            self._dismiss(hello.pid, connection, "gateway")\n',
        "test_rows_disk.py::test_row_70_upgrade_to_another_protocol_version",
    ),
    Mutation(
        "a worker is not told of clients that left",
        "gateway/peer.py",
        "        self._aborts.append(request.rid)\n",
        "        return\n",
        "test_rows_clients.py::test_row_72_disconnect_in_queue_and_decode[True]",
    ),
    Mutation(
        "whatever a slow reader does not take waits for it",
        "gateway/requests.py",
        "        elif self._unsent > self._limit and self._bell.blocked:\n",
        "        elif False:\n",
        "test_rows_clients.py::test_row_73_slow_reader",
    ),
    Mutation(
        "a write may take for ever",
        "gateway/stream.py",
        "            if now - self._writing_since >= WRITE_STALL_S:\n",
        "            if False:\n",
        "test_rows_clients.py::test_row_73_reader_that_has_stopped",
    ),
    Mutation(
        "a head may take for ever",
        "gateway/server.py",
        "        if self._head_timer is None:\n",
        "        if False:\n",
        "test_rows_clients.py::test_row_74_slow_heads_and_bodies",
    ),
    Mutation(
        "the declared size of a body is not looked at",
        "gateway/body.py",
        "        if declared.isdigit() and int(declared) > self._limit:\n",
        "        if False:\n",
        "test_rows_clients.py::test_row_75_body_too_large",
    ),
    Mutation(
        "a worker's queue has no end",
        "worker/slots.py",
        "        if len(self._line) + coming < self._limits.queue_depth + self.free:\n",
        "        if True:\n",
        "test_rows_clients.py::test_row_79_burst",
    ),
)  # fmt: skip


def red(mutation: Mutation, tree: Path) -> bool:
    """Return whether the row fails with this change."""
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        message = f"{mutation.file}: what is to be changed stands there {text.count(mutation.old)} times"
        raise SystemExit(message)
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{CHAOS}/{mutation.test}"],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "LMX_FIGURES": ""},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode not in {0, 1}:
        sys.stdout.write(done.stdout[-2000:])
    return done.returncode == 1


def main() -> int:
    """Try them; exit 1 if a row stays green."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.what for word in words)]
    green = 0
    with tempfile.TemporaryDirectory(prefix="lmx-mutants-", dir="/tmp") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*cache"))
        for mutation in chosen:
            outcome = red(mutation, tree)
            green += not outcome
            row = mutation.test.partition("::test_")[2]
            print(f"| {mutation.what} | `{mutation.file}` | {row if outcome else '**GREEN** ' + row} |", flush=True)
    return 1 if green else 0


if __name__ == "__main__":
    sys.exit(main())
