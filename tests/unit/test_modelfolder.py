"""A broken model folder is refused in words before a worker is started for it, whatever is wrong with it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.modelfolder import ModelFolderError, inspect_model_folder
from tests.modelkit import REPOSITORY, make_tiny_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("whole") / "tiny", layers=1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[object], begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_whole_folder(folder: Path) -> None:
    found = inspect_model_folder(folder)

    assert (found.path, found.model_type, found.architecture) == (folder, "llama", "LlamaForCausalLM")
    assert (found.max_model_len, found.quantization, found.has_chat_template) == (8_192, None, True)
    assert found.weight_files == (WEIGHTS,)
    size = (folder / WEIGHTS).stat().st_size
    assert size - 5_000 < found.weight_bytes < size
    assert found.tensor_count == 12


def test_several_files_with_an_index_and_links_as_in_the_hubs_cache(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in whole.iterdir():
        if file.name != WEIGHTS:
            (folder / file.name).symlink_to(file)
    (folder / "model-1.safetensors").write_bytes(safetensors({"a": entry("F32", [2], 0, 8)}, bytes(8)))
    (folder / "model-2.safetensors").write_bytes(safetensors({"b": entry("F8_E4M3", [3], 0, 3)}, bytes(3)))
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}),
    )
    found = inspect_model_folder(folder)
    assert found.weight_files == ("model-1.safetensors", "model-2.safetensors")
    assert (found.weight_bytes, found.tensor_count) == (11, 2)


def test_what_the_config_says(folder: Path) -> None:
    quantization = {"group_size": 64, "bits": 4}
    text = {"max_position_embeddings": 4_096}
    edit(folder / "config.json", max_position_embeddings=None, text_config=text, quantization=quantization)
    edit(folder / "tokenizer_config.json", chat_template=None)
    found = inspect_model_folder(folder)
    assert (found.max_model_len, found.quantization, found.has_chat_template) == (4_096, quantization, False)

    edit(folder / "config.json", text_config=None, max_position_embeddings=-1, architectures=[7])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = inspect_model_folder(folder)
    assert (found.max_model_len, found.architecture, found.has_chat_template) == (None, "", True)


def test_infinity_in_a_config_is_no_reason_to_refuse_it(folder: Path) -> None:
    edit(folder / "config.json", time_step_limit=[0.0, float("inf")])
    assert inspect_model_folder(folder).model_type == "llama"


def header_of(folder: Path) -> dict[str, dict[str, object]]:
    raw = (folder / WEIGHTS).read_bytes()
    header: dict[str, dict[str, object]] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def truncate(folder: Path, size: int) -> None:
    os.truncate(folder / WEIGHTS, size)


def write_weights(header: object, data: bytes = b"") -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(safetensors(header, data))


def write_index(value: object) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(json.dumps(value))


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def pipe_instead_of_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


CASES: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("folder missing", shutil.rmtree, "missing", "does not exist.*pull"),
    ("a file", lambda f: (shutil.rmtree(f), f.write_text("x")), "missing", "is a file, not a model folder"),
    ("empty", lambda f: (shutil.rmtree(f), f.mkdir()), "missing", "no config.json"),
    ("no config", lambda f: (f / "config.json").unlink(), "missing", "no config.json"),
    ("config is a pipe", pipe_instead_of_config, "missing", "no config.json"),
    ("config is not JSON", lambda f: (f / "config.json").write_text("{"), "corrupt", "config.json is not valid JSON"),
    ("config is not UTF-8", lambda f: (f / "config.json").write_bytes(b'{"\xff"}'), "corrupt", "not valid JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), "corrupt", "not a JSON object"),
    ("config is deep", lambda f: (f / "config.json").write_text("[" * 10**6), "corrupt", "not valid JSON"),
    ("config has a huge number", lambda f: (f / "config.json").write_text("9" * 5_000), "corrupt", "not valid JSON"),
    ("config is endless", lambda f: os.truncate(f / "config.json", 10**9), "corrupt", "longer than"),
    ("no model type", lambda f: edit(f / "config.json", model_type=None), "corrupt", "model_type"),
    ("hostile model type", lambda f: edit(f / "config.json", model_type="../x"), "corrupt", "model_type"),
    ("model_file", lambda f: edit(f / "config.json", model_file="m.py"), "unsupported", "remote code refused"),
    (
        "tokenizer code",
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
        "unsupported",
        "remote code refused.*tokenizer_config",
    ),
    ("tokenizer config", lambda f: (f / "tokenizer_config.json").write_text("x"), "corrupt", "tokenizer_config.json"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), "missing", "no weights"),
    ("pickle only", only_pickle, "unsupported", "pickle.*pytorch_model.bin.*safetensors"),
    ("other names", lambda f: (f / WEIGHTS).rename(f / "weights.safetensors"), "unsupported", "weights.safetensors"),
    ("index is not JSON", lambda f: (f / INDEX).write_text("x"), "corrupt", "index.json is not valid JSON"),
    ("index without map", write_index({}), "corrupt", "no weight_map"),
    ("index with numbers", write_index({"weight_map": {"a": 1}}), "corrupt", "no weight_map"),
    ("shard missing", write_index({"weight_map": {"a": "model-2.safetensors"}}), "missing", "'model-2.safetensors'"),
    ("shard elsewhere", write_index({"weight_map": {"a": "../x.safetensors"}}), "missing", "not in the folder"),
    ("index only", lambda f: ((f / WEIGHTS).unlink(), write_index({"weight_map": {"a": "m"}})(f)), "missing", "'m'"),
    ("tensor missing", write_index({"weight_map": {"a": WEIGHTS}}), "corrupt", "lacks the tensor 'a'"),
    ("empty weights", lambda f: truncate(f, 0), "corrupt", "ends after 0 bytes"),
    ("cut in the length", lambda f: truncate(f, 5), "corrupt", "ends after 5 bytes"),
    ("cut in the header", lambda f: truncate(f, 100), "corrupt", "truncated"),
    ("cut in the weights", lambda f: truncate(f, 400_000), "corrupt", "truncated: 400,000 bytes of"),
    ("one byte short", lambda f: truncate(f, (f / WEIGHTS).stat().st_size - 1), "corrupt", "truncated"),
    ("one byte more", lambda f: truncate(f, (f / WEIGHTS).stat().st_size + 1), "corrupt", "1 bytes behind"),
    ("page of a web server", lambda f: (f / WEIGHTS).write_text("<!DOCTYPE html>"), "corrupt", "not a safetensors"),
    ("header is not JSON", write_weights(b"{nonsense"), "corrupt", "not JSON"),
    ("header is a list", write_weights([]), "corrupt", "not JSON"),
    ("header is deep", write_weights(b"[" * 10**6), "corrupt", "not JSON"),
    ("no tensor", write_weights({}), "corrupt", "without any tensor"),
    ("entry is a number", write_weights({"a": 1}), "corrupt", "no dtype, shape"),
    ("gap", write_weights({"a": entry("U8", [1], 1, 2)}, b"00"), "corrupt", "begins at byte 1 where 0"),
    (
        "overlap",
        write_weights({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"000"),
        "corrupt",
        "begins at byte 1 where 2",
    ),
    ("size", write_weights({"a": entry("F32", [2], 0, 4)}, b"0000"), "corrupt", "does not fill"),
    ("backwards", write_weights({"a": entry("Q9", [2], 4, 0)}, b"0000"), "corrupt", "does not fill"),
    ("negative", write_weights({"a": entry("U8", [-1, -1], 0, 1)}, b"0"), "corrupt", "natural numbers"),
    ("fraction", write_weights({"a": entry("U8", [1.5], 0, 1)}, b"0"), "corrupt", "natural numbers"),
    ("many dimensions", write_weights({"a": entry("U8", [2**60] * 10**5, 0, 1)}, b"0"), "corrupt", "no dtype, shape"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "missing", "no tokenizer"),
    ("cut tokenizer", lambda f: os.truncate(f / "tokenizer.json", 1_000), "corrupt", "tokenizer.json is truncated"),
    ("empty tokenizer", lambda f: os.truncate(f / "tokenizer.json", 0), "corrupt", "tokenizer.json is truncated"),
]


@pytest.mark.parametrize(("damage", "code", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_folder_is_refused_in_words(
    damage: Callable[[Path], object], code: str, words: str, folder: Path
) -> None:
    damage(folder)
    started = time.monotonic()
    with pytest.raises(ModelFolderError, match=words) as caught:
        inspect_model_folder(folder)
    assert caught.value.code == code
    assert str(folder) in caught.value.message
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("path", ["a\0b", "x" * 5_000, "/proc/self/mem/x", ""])
def test_a_hostile_path_is_refused(path: str) -> None:
    with pytest.raises(ModelFolderError):
        inspect_model_folder(Path(path))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2_000) | st.integers(0, 500_000))
def test_every_truncation_is_found(cut: int, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "cut", dirs_exist_ok=True)
    truncate(folder, min(cut, (whole / WEIGHTS).stat().st_size - 1))
    with pytest.raises(ModelFolderError) as caught:
        inspect_model_folder(folder)
    assert caught.value.code == "corrupt"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", INDEX]),
    changes=st.lists(st.tuples(st.integers(0, 1_500), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_damage_never_raises_anything_else(
    name: str, changes: list[tuple[int, bytes]], whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "damaged", dirs_exist_ok=True)
    index = {"weight_map": dict.fromkeys(header_of(whole).keys() - {"__metadata__"}, WEIGHTS)}
    (folder / INDEX).write_text(json.dumps(index))
    damaged = bytearray((folder / name).read_bytes())
    for place, junk in changes:
        damaged[place : place + len(junk)] = junk
    (folder / name).write_bytes(damaged)
    try:
        inspect_model_folder(folder)
    except ModelFolderError as error:
        assert str(folder) in error.message  # noqa: PT017 - some damage cannot be seen without the weights


def test_looking_costs_no_heavy_import() -> None:
    """The supervisor looks; it must never import MLX."""
    code = "import sys, protocol.modelfolder, protocol.builtin_models; print([n for n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert not {"mlx", "numpy", "transformers", "tokenizers", "safetensors"} & set(eval(done.stdout))


def test_code_for_transformers_models_is_no_obstacle_because_nothing_runs_it(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-auto-map"
    shutil.copytree(tiny_model, folder)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert inspect_model_folder(folder).model_type == "llama"
