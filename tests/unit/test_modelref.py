"""MODEL on the command line is an id, a folder or a repository, and never a traceback (design 11)."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.paths import Home
from supervisor.modelref import ModelRef, UnknownModelError, fetch, resolve

BUILTIN = "smollm2-135m-instruct"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with one model, and an empty folder to stand in."""
    home = Home(tmp_path / "home")
    (home.models / "mine").mkdir(parents=True)
    (home.models / "org--name").mkdir()
    stand = tmp_path / "stand"
    stand.mkdir()
    monkeypatch.chdir(stand)
    return home


def test_a_known_name_is_its_folder_and_can_be_fetched(home: Home) -> None:
    assert resolve(BUILTIN, home) == ModelRef(BUILTIN, home.models / BUILTIN, BUILTIN)


def test_a_name_in_the_models_folder_is_that_folder(home: Home) -> None:
    assert resolve("mine", home) == ModelRef("mine", home.models / "mine")


def test_an_id_beats_a_folder_of_that_name_here(home: Home) -> None:
    for name in ("mine", BUILTIN):
        Path(name).mkdir()
        assert resolve(name, home).folder == home.models / name
        assert resolve(f"./{name}", home).folder == Path(name).absolute()


@pytest.mark.parametrize("text", ["here", "./here", "sub/../here"])
def test_a_folder_is_made_absolute_and_served_under_its_name(home: Home, text: str) -> None:
    Path("here").mkdir()
    Path("sub").mkdir()
    ref = resolve(text, home)
    assert (ref.id, ref.fetch) == ("here", None)
    assert ref.folder.is_absolute()
    assert ref.folder.resolve() == Path("here").resolve()


def test_a_path_that_does_not_exist_is_still_a_folder_and_never_a_download(home: Home) -> None:
    for text in ("./org/name", "/org/name", "../org/name", "~/org/name"):
        ref = resolve(text, home)
        assert (ref.id, ref.fetch) == ("name", None)


def test_the_folder_we_stand_in_has_its_real_name(home: Home) -> None:
    assert resolve(".", home).id == "stand"
    assert resolve("..", home).id == Path.cwd().parent.name
    Path("link").symlink_to(home.models / "mine")
    assert resolve("./link", home).id == "mine"


def test_a_home_folder_is_expanded(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model", home).folder == tmp_path / "model"


def test_a_repository_is_fetched_into_the_models_folder(home: Home) -> None:
    assert resolve("org/name", home) == ModelRef("org/name", home.models / "org--name", "org/name")
    assert resolve("mlx-community/Qwen3-0.6B-4bit", home).fetch == "mlx-community/Qwen3-0.6B-4bit"


def test_a_folder_of_ours_beats_a_repository_of_that_name(home: Home) -> None:
    Path("org/name").mkdir(parents=True)
    assert resolve("org/name", home).fetch is None


@pytest.mark.parametrize(
    "text",
    [
        "", "no-such-model", "a/b/c", "org/", "/".join("ab") + "\n", "mine\n", "org /name", "-rf/x", "org/-x", "a b",
        "https://huggingface.co/org/name", "x" * 300, "y/" + "x" * 5000, "\udc80", "org/\udc80", "a\x00b", "模/型",
    ],
    ids=lambda text: ascii(text)[:20],
)  # fmt: skip
def test_what_names_nothing_is_refused_in_one_line_of_words(home: Home, text: str) -> None:
    if text == "y/" + "x" * 5000:  # a repository by its form; the hub says the rest
        assert resolve(text, home).fetch == text
        return
    with pytest.raises(UnknownModelError) as caught:
        resolve(text, home)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_refusal_says_what_may_be_given(home: Home) -> None:
    known = f"give an id \\(all-minilm-l6-v2, {BUILTIN}\\), a folder, or a Hugging Face repository"
    with pytest.raises(UnknownModelError, match=known):
        resolve("nothing", home)


@pytest.mark.parametrize("text", ["~nobody-of-this-name/model", "./loop", "/proc/1/root/x", "./" + "x" * 5000])
def test_paths_that_the_system_cannot_follow_are_no_traceback(home: Home, text: str) -> None:
    Path("loop").symlink_to("loop")
    assert resolve(text, home).fetch is None


@given(st.text(st.characters(blacklist_categories=()), max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_model_or_refused(home: Home, text: str) -> None:
    try:
        ref = resolve(text, home)
    except UnknownModelError:
        return
    assert ref.folder.is_absolute()
    if ref.fetch is not None:
        assert ref.folder.parent == home.models
        assert os.sep not in ref.folder.name


def test_a_folder_needs_no_fetching(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> bool:
        raise AssertionError

    monkeypatch.setattr("supervisor.modelref.run_tool", never)
    assert fetch(ModelRef("mine", home.models / "mine"), home)
