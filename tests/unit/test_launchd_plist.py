"""The launchd job says what it has to say, and its installer copes with launchd's habits."""

import os
import plistlib
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "deploy" / "com.lmx.supervisor.plist"
INSTALLER = REPOSITORY / "deploy" / "install-launchd.sh"


def install(*options: str, path: str = os.defpath, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["/bin/sh", str(INSTALLER), *options],
        env={"PATH": path, **environment},
        capture_output=True,
        timeout=30,
        check=False,
    )


def printed(*options: str, **environment: str) -> dict[str, Any]:
    done = install("--print", *options, **environment)
    assert done.returncode == 0, done.stderr
    return plistlib.loads(done.stdout)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    return printed(HOME=str(tmp_path))


def test_the_template_itself_is_a_plist() -> None:
    assert plistlib.loads(TEMPLATE.read_bytes())["Label"] == "com.lmx.supervisor"


def test_the_job_is_exactly_what_the_documents_ask_for(job: dict[str, Any], tmp_path: Path) -> None:
    home = f"{tmp_path}/.lmx"
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    assert job == {
        "Label": "com.lmx.supervisor",
        "ProgramArguments": [
            *("/usr/bin/caffeinate", "-i"),
            *(str(REPOSITORY / ".venv/bin/python"), "-m", "supervisor", "run"),
        ],
        "WorkingDirectory": home,
        "EnvironmentVariables": {"HOME": str(tmp_path), "LMX_HOME": home},
        "UserName": user,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": 60,
        "AbandonProcessGroup": False,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 4096},
        "HardResourceLimits": {"NumberOfFiles": 4096},
        "StandardOutPath": f"{home}/logs/launchd.out.log",
        "StandardErrorPath": f"{home}/logs/launchd.err.log",
    }


def test_the_job_starts_a_module_that_exists(job: dict[str, Any]) -> None:
    _, module = job["ProgramArguments"][3:5]
    assert find_spec(f"{module}.__main__") is not None


def test_a_daemon_logs_to_var_log_and_no_job_logs_to_tmp() -> None:
    daemon = printed("--daemon", HOME="/Users/ann")
    assert daemon["StandardErrorPath"] == "/var/log/lmx/launchd.err.log"
    agent = printed(HOME="/Users/ann")
    paths = [job[key] for job in (daemon, agent) for key in ("StandardOutPath", "StandardErrorPath")]
    assert not [path for path in paths if path.startswith(("/tmp", "/private/tmp"))]


def test_paths_with_every_awkward_character_survive() -> None:
    home = r"/Users/a & b/<x>|\1/@HOME@ it's"
    job = printed(HOME="/Users/a", LMX_HOME=home, LMX_PYTHON="/opt/p&q/bin/python")
    assert job["EnvironmentVariables"]["LMX_HOME"].startswith(r"/Users/a & b/<x>|\1/")
    assert job["WorkingDirectory"] == job["EnvironmentVariables"]["LMX_HOME"]
    assert job["ProgramArguments"][2] == "/opt/p&q/bin/python"


def test_nothing_is_left_to_fill_in(job: dict[str, Any]) -> None:
    assert b"@" not in plistlib.dumps(job).replace(b"python@", b"")


class StandInMac:
    """Folders and commands of a Mac: a `launchctl` that keeps its state in files and notes each call."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.calls = root / "calls"
        self.refusals = root / "refusals"  # one exit status a line, for the coming bootstraps
        self.loaded = root / "loaded"
        self.bin = root / "bin"
        for folder in (self.home, self.bin):
            folder.mkdir()
        self.refusals.touch()
        calls, loaded, refusals = (shlex.quote(str(p)) for p in (self.calls, self.loaded, self.refusals))
        self._command("uname", "echo Darwin")
        self._command("id", "case $1 in -u) echo 501;; -un) echo ann;; esac")
        self._command("sleep", f'echo "sleep $1" >>{calls}')
        self._command("plutil", f'echo "plutil $1" >>{calls}')
        self._command(
            "launchctl",
            f"""
            echo "$*" >>{calls}
            case $1 in
              print) [ "$2" = gui/501 ] || [ -e {loaded} ] || exit 113 ;;
              bootout) rm {loaded} ;;
              bootstrap)
                status=$(head -n 1 {refusals}); sed 1d {refusals} >{refusals}.new; mv {refusals}.new {refusals}
                [ -z "$status" ] || exit "$status"
                touch {loaded} ;;
            esac""",
        )

    def _command(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    def install(self, *options: str) -> subprocess.CompletedProcess[bytes]:
        path = f"{self.bin}:{os.defpath}"
        return install(*options, path=path, HOME=str(self.home), LMX_PYTHON="/bin/sh")

    def count(self, call: str) -> int:
        return sum(line.startswith(call) for line in self.calls.read_text().splitlines())


@pytest.fixture
def mac(tmp_path: Path) -> StandInMac:
    return StandInMac(tmp_path)


def test_installing_writes_the_job_makes_its_folders_and_says_how_to_look_at_it(mac: StandInMac) -> None:
    done = mac.install()
    assert done.returncode == 0, done.stderr
    job = plistlib.loads((mac.home / "Library/LaunchAgents/com.lmx.supervisor.plist").read_bytes())
    assert Path(job["StandardErrorPath"]).parent.is_dir()
    assert (mac.home / ".lmx").stat().st_mode & 0o777 == 0o700
    assert mac.loaded.exists()
    assert mac.count("plutil -lint") == 1
    assert mac.count("bootout") == 0
    assert b"launchctl print gui/501/com.lmx.supervisor" in done.stdout


def test_installing_again_stops_the_old_job_and_waits_out_launchd(mac: StandInMac) -> None:
    mac.loaded.touch()
    mac.refusals.write_text("5\n37\n113\n")
    done = mac.install()
    assert done.returncode == 0, done.stderr
    assert mac.count("bootout gui/501/com.lmx.supervisor") == 1
    assert mac.count("bootstrap gui/501 ") == 4
    assert mac.loaded.exists()


def test_a_bootstrap_that_never_works_ends_after_15_s(mac: StandInMac) -> None:
    mac.refusals.write_text("5\n" * 100)
    done = mac.install()
    assert done.returncode == 1
    assert b"still fails with 5" in done.stderr
    assert mac.count("sleep 1") == 15


def test_any_other_failure_is_not_retried(mac: StandInMac) -> None:
    mac.refusals.write_text("125\n")
    assert mac.install().returncode == 1
    assert mac.count("bootstrap") == 1


def test_an_unknown_option_is_a_usage_error() -> None:
    assert install("--demon", HOME="/Users/ann").returncode == 2
