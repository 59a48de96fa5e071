"""Names of slots are unique, short and safe; a home that cannot be trusted is refused with words (design 3, 9)."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from protocol import paths
from protocol.paths import MAX_SOCKET_PATH_BYTES, Home, UnsafeHomeError, default_home, slot_name
from protocol.states import CliExit
from supervisor.cli import cli

HOSTILE = [
    "", ".", "..", "/", "../../etc/passwd", "a/../b", "-rf", "a b", "a\nb", "a\x00b", "模型", "ÄÖÜ", "\udc80",
    "x" * 5000, "%2e%2e", "gateway", "supervisor", "spare", "supervisor.sock", "~", "$HOME", "CON", "a.sock",
    ".hidden", "a" * 15 + "...",
]  # fmt: skip


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lmx-", dir="/tmp") as folder:
        yield Path(folder) / "home"


def refusal(home: Home) -> str:
    with pytest.raises(UnsafeHomeError) as caught:
        home.ensure()
    return str(caught.value)


# -- slots ----------------------------------------------------------------------------------------------------------


def check(name: str) -> None:
    assert name.isascii()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert name[0].isalnum()
    assert 0 < len(name) <= 25
    assert name not in {"gateway", "supervisor", "spare"}


@pytest.mark.parametrize("model", HOSTILE, ids=lambda model: ascii(model)[:20])
def test_the_slot_of_a_hostile_id_is_a_safe_file_name(model: str) -> None:
    check(slot_name(model))


@given(st.text(st.characters(blacklist_categories=())))
def test_the_slot_of_any_id_is_a_safe_file_name(model: str) -> None:
    check(slot_name(model))
    assert slot_name(model) == slot_name(model)


def test_a_slot_can_be_recognised_by_a_person() -> None:
    assert slot_name("mlx-community/Qwen3-4B-4bit").startswith("mlx-community-qw-")
    assert slot_name("tiny").startswith("tiny-")


def test_ids_that_look_alike_have_slots_of_their_own() -> None:
    """Two models in one slot would be one process that nobody knows of."""
    ids = ["Tiny", "tiny", "tiny ", "t-iny", "t/iny", "t.iny", "ti-ny/", *HOSTILE]
    ids += [f"mlx-community/Qwen3-{size}B-4bit" for size in range(1000)]
    ids += ["!" * length for length in range(1, 1000)]
    assert len({slot_name(model) for model in ids}) == len(set(ids))


# -- sockets --------------------------------------------------------------------------------------------------------


def test_the_longest_socket_of_an_accepted_home_fits(root: Path) -> None:
    for length in range(20, 120):
        home = Home(root / ("h" * (length - len(str(root)) - 1)))
        longest = os.fsencode(home.endpoint(slot_name("x" * 300), 10**8))
        if len(longest) > MAX_SOCKET_PATH_BYTES:
            assert "too long" in refusal(home)
            assert not home.root.exists()
        else:
            home.ensure()
            shutil.rmtree(home.root)


def test_length_is_counted_in_bytes() -> None:
    home = Home(Path("/tmp") / ("模" * 25))
    assert "too long" in refusal(home)
    assert "103 bytes" in refusal(home)


def test_no_two_incarnations_share_a_path(root: Path) -> None:
    home = Home(root)
    made = {home.endpoint(slot_name(model), n) for model in ("a", "b") for n in range(50)}
    made |= {home.spec(slot_name(model), n) for model in ("a", "b") for n in range(50)}
    assert len(made) == 200
    assert all(path.parent == home.run for path in made)


# -- the home -------------------------------------------------------------------------------------------------------


def test_a_home_is_made_private_to_this_user(root: Path) -> None:
    before = os.umask(0)
    try:
        Home(root).ensure()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (root, *root.iterdir())} == {0o700}
    Home(root).ensure()


@pytest.mark.parametrize("name", ["run", "state", "logs", "crashes"])
def test_a_link_in_the_place_of_a_folder_is_refused(root: Path, name: str) -> None:
    home = Home(root)
    home.ensure()
    (root / name).rmdir()
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (root / name).symlink_to(elsewhere)
    assert refusal(home) == f"{root / name} is not a folder (a link is refused): remove it"
    assert elsewhere.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["run", "state", "models"])
def test_a_file_in_the_place_of_a_folder_is_refused(root: Path, name: str) -> None:
    root.mkdir()
    (root / name).touch()
    assert str(root / name) in refusal(Home(root))


def test_models_may_lie_on_another_disk(root: Path) -> None:
    root.mkdir()
    elsewhere = root.parent / "disk"
    elsewhere.mkdir()
    (root / "models").symlink_to(elsewhere)
    Home(root).ensure()


def test_access_of_others_is_taken_away(root: Path) -> None:
    home = Home(root)
    home.ensure()
    home.run.chmod(0o777)
    home.ensure()
    assert home.run.stat().st_mode & 0o777 == 0o700


def test_a_home_that_everybody_can_write_is_refused_and_left_as_it_is(root: Path) -> None:
    """Anybody could put a folder of theirs in the place of ours; and if it is /tmp, changing it would be worse."""
    root.mkdir()
    root.chmod(0o1777)
    assert "can be written by everybody" in refusal(Home(root))
    assert root.stat().st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("whose", ["root", "run"])
def test_a_folder_of_another_user_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    home = Home(root)
    home.ensure()
    mine = os.geteuid()
    if whose == "root":
        monkeypatch.setattr(paths.os, "geteuid", lambda: mine + 1)
        assert refusal(home).startswith(f"{root} belongs to uid {mine}, not to uid {mine + 1}")
    elif mine == 0:
        os.chown(home.run, 12345, -1)
        assert refusal(home).startswith(f"{home.run} belongs to uid 12345, not to uid 0")
    else:
        pytest.skip("only root can give a folder away")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_is_closed_to_us_is_refused(root: Path) -> None:
    root.mkdir(mode=0o500)
    assert "cannot create" in refusal(Home(root))


def test_a_place_that_cannot_be_made_is_refused_with_the_systems_words() -> None:
    assert refusal(Home(Path("/dev/null/home"))) == "cannot create /dev/null/home: Not a directory"


def test_the_home_is_lmx_home_or_a_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("LMX_HOME", raising=False)
    assert default_home() == Path("/home/somebody/.lmx")
    monkeypatch.setenv("LMX_HOME", "")
    assert default_home() == Path("/home/somebody/.lmx")
    monkeypatch.setenv("LMX_HOME", "~/x")
    assert default_home() == Path("/home/somebody/x")


@pytest.mark.parametrize("user", ["~no-such-user", "~no-such-user/lmx"])
@pytest.mark.parametrize("way", ["variable", "option"])
@pytest.mark.parametrize("command", ["status", "run", "stop"])
def test_the_home_of_an_unknown_user_is_refused_with_words(way: str, command: str, user: str) -> None:
    option = ["--home", user] if way == "option" else []
    environ = {"LMX_HOME": user} if way == "variable" else {}
    done = CliRunner(env=environ).invoke(cli, [*option, command])
    assert done.exit_code == CliExit.BAD_CONFIG == 5
    assert done.output == f"error: {user} names the home of nobody this machine knows: choose another LMX_HOME\n"


def test_a_relative_home_does_not_follow_us_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home(Path("here"))
    monkeypatch.chdir("/")
    assert home.root == tmp_path / "here"
