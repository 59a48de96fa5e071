"""`lmx-supervisor keys`: what is made can be used, what is stored cannot, and two at once lose nothing."""

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from protocol.keys import KeyFile, digest_of, looks_like_a_key
from supervisor.cli import cli


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, as sockets want it."""
    folder = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))
    yield folder / "home"
    shutil.rmtree(folder)


def keys(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--home", str(home), "keys", *arguments])


def test_a_key_is_shown_once_and_stored_as_its_digest(home: Path) -> None:
    made = keys(home, "create", "--name", "bot")
    key = made.stdout.strip()
    assert looks_like_a_key(key.encode())
    assert key not in made.stderr
    file = home / "state" / "keys"
    assert key[4:] not in file.read_text()
    assert digest_of(key.encode()).hex() in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    listed = keys(home, "list").stdout + keys(home, "list", "--json").stdout
    assert "bot" in listed
    assert key not in listed
    assert digest_of(key.encode()).hex() not in listed


def test_everything_that_was_asked_for_is_kept(home: Path) -> None:
    options = ["--scope", "admin", "--models", "a,b", "--models", "org/c", "--rpm", "5", "--tpm", "0"]
    options += ["--concurrency", "3", "--priority", "-2", "--expires", "2h"]
    document = json.loads(keys(home, "create", "--name", "ci", *options, "--json").stdout)
    (shown,) = document["keys"]
    (record,) = KeyFile(home / "state" / "keys").read()
    assert document["schema"] == "lmx.keys/1"
    assert record.digest == digest_of(document["key"].encode()).hex()
    assert (record.scope, record.models, record.priority) == ("admin", ("a", "b", "org/c"), -2)
    assert (record.requests_per_minute, record.tokens_per_minute, record.concurrent_requests) == (5, 0, 3)
    assert record.expires_at is not None
    assert abs(record.expires_at - record.created_at - 7200) < 5
    assert shown["id"] == record.id


@pytest.mark.parametrize(
    "options",
    [
        ["--name", "two words"],
        ["--name", ""],
        ["--name", "x" * 65],
        ["--name", "a\nb"],
        ["--name", "x", "--scope", "root"],
        ["--name", "x", "--rpm", "-1"],
        ["--name", "x", "--expires", "yesterday"],
        ["--name", "x", "--expires", "2001-01-01"],
        ["--name", "x", "--expires", "9999999d"],
        [],
    ],
    ids=str,
)
def test_wrong_usage_is_told_and_stores_nothing(home: Path, options: list[str]) -> None:
    done = keys(home, "create", *options)
    assert done.exit_code == 2
    assert not (home / "state" / "keys").exists()


def test_names_are_used_once_and_free_again_after_revoking(home: Path) -> None:
    assert keys(home, "create", "--name", "bot").exit_code == 0
    again = keys(home, "create", "--name", "bot")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "revoke it first" in again.stderr
    assert keys(home, "revoke", "bot").exit_code == 0
    assert keys(home, "revoke", "bot").exit_code == 1
    assert keys(home, "create", "--name", "bot").exit_code == 0
    (record,) = KeyFile(home / "state" / "keys").read()
    assert keys(home, "revoke", record.id).exit_code == 0
    assert "no keys" in keys(home, "list").stdout


def test_who_changed_which_key_is_in_the_journal_and_never_the_key(home: Path) -> None:
    key = keys(home, "create", "--name", "bot", "--scope", "admin").stdout.strip()
    assert keys(home, "revoke", "bot").exit_code == 0
    assert keys(home, "revoke", "bot").exit_code == 1
    text = (home / "state" / "events.jsonl").read_text()
    made, revoked = map(json.loads, text.splitlines())
    assert (made["event"], revoked["event"]) == ("key_created", "key_revoked")
    assert made["key"] == revoked["key"]
    assert (made["name"], made["scope"]) == ("bot", "admin")
    assert (made["by"], made["uid"]) == (pwd.getpwuid(os.getuid()).pw_name, os.getuid())
    assert key not in text
    assert digest_of(key.encode()).hex() not in text


def test_a_damaged_file_is_told_and_never_overwritten(home: Path) -> None:
    keys(home, "create", "--name", "bot")
    file = home / "state" / "keys"
    file.write_text("damaged")
    for arguments in (["create", "--name", "other"], ["list"], ["revoke", "bot"]):
        done = keys(home, *arguments)
        assert done.exit_code == 1
        assert "bring back a good copy" in done.stderr
    assert file.read_text() == "damaged"


def test_commands_at_the_same_time_lose_nothing(home: Path) -> None:
    keys(home, "create", "--name", "first")

    def create(number: int) -> int:
        command = [sys.executable, "-m", "supervisor", "--home", str(home), "keys", "create", "--name", f"bot-{number}"]
        return subprocess.run(command, capture_output=True, check=False).returncode

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(create, range(6))) == {0}
    names = {record.name for record in KeyFile(home / "state" / "keys").read()}
    assert names == {"first", *(f"bot-{number}" for number in range(6))}


def test_a_home_that_cannot_be_used_exits_with_5(home: Path, tmp_path: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "state").symlink_to(tmp_path)
    assert keys(home, "create", "--name", "bot").exit_code == 5
    assert list(tmp_path.iterdir()) == []
