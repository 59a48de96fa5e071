"""No key is committed."""

import re
import subprocess
from pathlib import Path

import pytest

from protocol.keys import new_key

REPOSITORY = Path(__file__).parents[2]
#: A key of ours that is not made of one letter, as those of the documentation and the tests are; a private key.
SECRET = re.compile(
    rb"lmx-(?!(?P<letter>[A-Za-z0-9])(?P=letter){42})[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"
    rb"|BEGIN [A-Z ]*PRIVATE KEY-{5}\s+[A-Za-z0-9+/]"
)


def test_no_committed_file_holds_a_key() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [REPOSITORY / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert [file.name for file in files if file.is_file() and SECRET.search(file.read_bytes())] == []
    assert SECRET.search(f"admin_key = '{new_key()}'".encode())
