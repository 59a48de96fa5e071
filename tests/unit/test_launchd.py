"""What `launchctl print` says of our job is held against what stopping takes and what the GPU needs."""

from pathlib import Path

import pytest

from protocol.config import LifecycleConfig
from supervisor.platform import launchd

SAMPLES = Path(__file__).resolve().parents[1] / "corpus" / "launchd"


def printed(name: str) -> str:
    return (SAMPLES / name).read_text()


def test_the_defaults_of_the_system_are_flagged() -> None:
    timeout, spawn = launchd.problems(printed("system-default.txt"), 45)
    assert timeout.startswith("launchd kills the supervisor 5 s after asking it to stop, which may take 45 s")
    assert "ProcessType" in spawn


def test_the_job_as_we_install_it_is_not() -> None:
    assert launchd.problems(printed("as-installed.txt"), launchd.stop_seconds(LifecycleConfig())) == []


@pytest.mark.parametrize("text", ["", "Could not find service", "exit timeout = soon\n", "\texit timeout = 0\n"])
def test_what_is_not_found_is_not_complained_about(text: str) -> None:
    """0 is launchd's word for no limit."""
    assert launchd.problems(text, 45) == []


def test_a_longer_grace_asks_for_a_longer_timeout() -> None:
    long = LifecycleConfig(drain_s=120)
    assert len(launchd.problems(printed("as-installed.txt"), launchd.stop_seconds(long))) == 1


def test_without_launchctl_there_is_no_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launchd.printed_job() == ""


def test_the_job_of_the_login_session_is_found_when_there_is_none_of_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "launchctl"
    fake.write_text('#!/bin/sh\ncase "$2" in gui/*) echo "exit timeout = 7" ;; *) exit 113 ;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launchd.printed_job() == "exit timeout = 7\n"
