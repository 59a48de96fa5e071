"""`lmx-supervisor doctor` on homes that are made up."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from supervisor.cli import cli


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, as sockets want it."""
    folder = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def finding(home: Path, check: str) -> tuple[str, str]:
    done = CliRunner().invoke(cli, ["--home", str(home), "doctor", "--json"])
    (found,) = [each for each in json.loads(done.stdout)["checks"] if each["id"] == check]
    return found["status"], found["message"]


def test_a_configuration_that_nobody_reads_for_its_name_is_told(home: Path) -> None:
    assert finding(home, "config") == ("ok", "no lmx.toml: all is as it comes")
    (home / "config.toml").write_text("[gateway]\nport = 1\n")
    assert finding(home, "config") == ("warning", "config.toml: not read; the file has to be named lmx.toml")
    (home / "config.toml").rename(home / "lmx.toml")
    assert finding(home, "config") == ("ok", "lmx.toml can be read")
    (home / "lmx.toml").write_text("[gateway]\nport = 70000\n")
    status, message = finding(home, "config")
    assert status == "error"
    assert "gateway.port" in message
