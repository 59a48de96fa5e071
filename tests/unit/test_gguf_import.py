"""The import of GGUF files: right, typed in its refusals, and whole or not there at all."""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.modelfolder import inspect_model_folder
from tests.ggufkit import (
    Tensor,
    decode_quantized,
    encode_float,
    encode_quantized,
    gguf_bytes,
    llama_gguf,
)
from tests.modelkit import REPOSITORY, TURN_END, make_tiny_model
from worker.gguf_file import read_gguf
from worker.gguf_import import ImportFailed, convert_gguf, import_gguf
from worker.gguf_llama import LlamaShape
from worker.gguf_tensors import read_tensor
from worker.gguf_tokenizer import GgufTokenizer
from worker.staging import staged_folder

PROMPT = "the people say: Hello, wörld 42 日本 😀"
QUANTIZED = {"token_embd.weight": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q4_0", "ffn_down": "F16", "attn_v": "F16"}


def encode_f32(_name: str, array: np.ndarray) -> tuple[str, bytes]:
    return "F32", encode_float("F32", array)


def encode_mixed(name: str, array: np.ndarray) -> tuple[str, bytes]:
    if array.ndim == 1:
        return encode_f32(name, array)
    kind = next((kind for part, kind in QUANTIZED.items() if part in name), "Q4_1")
    return kind, (encode_float if kind == "F16" else encode_quantized)(kind, array)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("original") / "tiny", layers=1)


@pytest.fixture(scope="module")
def plain(original: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return llama_gguf(original, encode_f32)


@pytest.fixture
def source(tmp_path: Path, plain: tuple[dict[str, Any], dict[str, Tensor]]) -> Path:
    return write(tmp_path, *plain)


def write(tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "in" / "model.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def logits(folder: Path) -> np.ndarray:
    from mlx_lm import load

    model, tokenizer = load(str(folder))[:2]
    return np.array(model(mx.array(tokenizer.encode(PROMPT))[None]).astype(mx.float32))


def test_a_float32_import_is_the_original(original: Path, source: Path, tmp_path: Path) -> None:
    folder = import_gguf(source, tmp_path / "out", dequantize=True, dtype="float32")

    wanted, found = mx.load(str(original / "model.safetensors")), mx.load(str(folder / "model.safetensors"))
    assert set(found) == set(wanted)
    assert all(mx.array_equal(found[name], wanted[name]).item() for name in wanted)
    np.testing.assert_array_equal(logits(folder), logits(original))


def test_the_rows_of_q_and_k_must_be_put_back(original: Path, source: Path, tmp_path: Path) -> None:
    """Without it the model still talks: the test that tells is the numeric one."""
    gguf = read_gguf(source)
    with source.open("rb") as file:
        raw = read_tensor(file, gguf.tensors["blk.0.attn_q.weight"])
    wanted = mx.load(str(original / "model.safetensors"))["model.layers.0.self_attn.q_proj.weight"]

    assert not mx.array_equal(raw.weight, wanted).item()
    assert mx.array_equal(raw.unpermuted(heads=4).weight, wanted).item()


def test_the_tokenizer_is_the_original(original: Path, source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = import_gguf(source, tmp_path / "out", dtype="float32")
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(original)
    messages = [{"role": "user", "content": PROMPT}]

    assert ours.encode(PROMPT + TURN_END) == theirs.encode(PROMPT + TURN_END)
    assert ours.decode(ours.encode(PROMPT)) == PROMPT
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert (ours.eos_token, ours.eos_token_id) == (TURN_END, theirs.eos_token_id)


def test_the_beginning_of_text_is_put_in_front_if_the_file_says_so(
    plain: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    metadata = plain[0] | {"tokenizer.ggml.add_bos_token": True}
    folder = import_gguf(write(tmp_path, metadata, plain[1]), tmp_path / "out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert tokenizer.encode("the")[0] == metadata["tokenizer.ggml.bos_token_id"]


@pytest.fixture
def mixed(original: Path, tmp_path: Path) -> Path:
    return write(tmp_path, *llama_gguf(original, encode_mixed))


def test_blocks_are_read_as_mlx_itself_reads_them(mixed: Path) -> None:
    gguf, wanted = read_gguf(mixed), mx.load(str(mixed))
    kinds = set()
    with mixed.open("rb") as file:
        for name, tensor in gguf.tensors.items():
            kinds.add(tensor.type.name)
            found = read_tensor(file, tensor)
            parts = {"weight": found.weight, "scales": found.scales, "biases": found.biases}
            for part, array in parts.items():
                other = wanted.get(name.removesuffix("weight") + part)
                assert (array is None) == (other is None), (name, part)
                assert array is None or mx.array_equal(array, other).item(), (name, part)
    assert kinds == {"F32", "F16", "Q4_0", "Q4_1", "Q8_0"}


def test_dequantized_weights_are_those_of_ggml(original: Path, mixed: Path, tmp_path: Path) -> None:
    folder = import_gguf(mixed, tmp_path / "out", dtype="float32")
    found = mx.load(str(folder / "model.safetensors"))

    _metadata, tensors = llama_gguf(original, encode_mixed)
    for name, mlx_name in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "output.weight": "lm_head.weight",
    }.items():
        kind, shape, data = tensors[name]
        np.testing.assert_allclose(np.array(found[mlx_name]), decode_quantized(kind, data, shape), rtol=1e-6, atol=1e-6)
    assert {str(array.dtype) for array in found.values()} == {"mlx.core.float32"}


def test_quantized_weights_can_stay_as_they_are(mixed: Path, tmp_path: Path) -> None:
    """What happens on a Mac."""
    from mlx import nn
    from mlx_lm import load

    kept = import_gguf(mixed, tmp_path / "kept", dequantize=False)
    plain = import_gguf(mixed, tmp_path / "plain", dtype="float32")

    quantization = inspect_model_folder(kept).quantization
    assert quantization is not None
    assert (quantization["group_size"], quantization["bits"]) == (32, 4)
    assert quantization["model.embed_tokens"] == {"group_size": 32, "bits": 8}
    assert quantization["model.layers.0.mlp.down_proj"] is False
    model = load(str(kept))[0]
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert model.model.embed_tokens.bits == 8
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    ours, reference = logits(kept), logits(plain)
    assert np.abs(ours - reference).max() < 0.01 * np.abs(reference).max()
    assert inspect_model_folder(kept).weight_bytes < inspect_model_folder(plain).weight_bytes / 3


def test_bfloat16_stays_exact(original: Path, tmp_path: Path) -> None:
    def encode(_name: str, array: np.ndarray) -> tuple[str, bytes]:
        return "BF16", encode_float("BF16", array)

    metadata, tensors = llama_gguf(original, encode)
    folder = import_gguf(write(tmp_path, metadata, tensors), tmp_path / "out", dequantize=False)
    found = mx.load(str(folder / "model.safetensors"))["lm_head.weight"]

    assert found.dtype == mx.bfloat16
    wanted = np.frombuffer(tensors["output.weight"][2], "<u2")
    np.testing.assert_array_equal(np.array(found.view(mx.uint16)).reshape(-1), wanted)


def test_many_files_with_an_index(original: Path, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    convert_gguf(source, folder, dtype="float32", shard_bytes=200_000)

    assert len(inspect_model_folder(folder).weight_files) > 2
    np.testing.assert_array_equal(logits(folder), logits(original))


def test_progress_counts_up_to_the_whole(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = import_gguf(
        source, tmp_path / "out", dtype="float32", progress=lambda done, total, _stage: seen.append((done, total))
    )
    total = inspect_model_folder(folder).weight_bytes
    assert seen == sorted(seen)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)


Change = Callable[[dict[str, Any], dict[str, Tensor]], None]
CASES: list[tuple[str, Change, str, str]] = [
    ("architecture", lambda m, _t: m.update({"general.architecture": "qwen2"}), "unsupported", "'qwen2'.*llama"),
    ("no architecture", lambda m, _t: m.pop("general.architecture"), "unsupported", "None"),
    ("sentencepiece", lambda m, _t: m.update({"tokenizer.ggml.model": "llama"}), "unsupported", "'llama'.*gpt2"),
    ("splitting", lambda m, _t: m.update({"tokenizer.ggml.pre": "qwen2"}), "unsupported", "'qwen2'.*smollm"),
    ("no splitting", lambda m, _t: m.pop("tokenizer.ggml.pre"), "unsupported", "splits text"),
    ("experts", lambda m, _t: m.update({"llama.expert_count": 8}), "unsupported", "mixture of experts"),
    ("rope", lambda m, _t: m.update({"llama.rope.scaling.type": "yarn"}), "unsupported", "rotary"),
    ("part", lambda m, _t: m.update({"split.count": 3}), "unsupported", "one part of several"),
    ("rotated part", lambda m, _t: m.update({"llama.rope.dimension_count": 8}), "corrupt", "shape"),
    ("type", lambda _m, t: t.update({"output.weight": ("Q4_K", *t["output.weight"][1:])}), "unsupported", "Q4_K.*Q4_1"),
    ("bias", lambda _m, t: t.update({"blk.0.attn_q.bias": ("F32", (1,), b"0000")}), "unsupported", "attn_q.bias"),
    ("missing tensor", lambda _m, t: t.pop("blk.0.ffn_up.weight"), "corrupt", "lacks.*ffn_up"),
    ("missing embedding", lambda _m, t: t.pop("token_embd.weight"), "corrupt", "token_embd"),
    ("more layers", lambda m, _t: m.update({"llama.block_count": 2}), "corrupt", "lacks.*blk.1"),
    ("no layers", lambda m, _t: m.update({"llama.block_count": 0}), "corrupt", "block_count"),
    ("heads", lambda m, _t: m.update({"llama.attention.head_count": [4, 4]}), "corrupt", "head_count"),
    ("kv heads", lambda m, _t: m.update({"llama.attention.head_count_kv": 3}), "corrupt", "3 KV heads"),
    ("width", lambda m, _t: m.update({"llama.embedding_length": 128}), "corrupt", "shape"),
    ("eps", lambda m, _t: m.update({"llama.attention.layer_norm_rms_epsilon": float("nan")}), "corrupt", "epsilon"),
    ("no eos", lambda m, _t: m.pop("tokenizer.ggml.eos_token_id"), "corrupt", "ends a text"),
    ("eos", lambda m, _t: m.update({"tokenizer.ggml.eos_token_id": 10**6}), "corrupt", "eos_token_id"),
    ("no tokens", lambda m, _t: m.pop("tokenizer.ggml.tokens"), "corrupt", "tokens"),
    ("same token", lambda m, _t: m.update({"tokenizer.ggml.tokens": ["a", "a"]}), "corrupt", "twice"),
    ("merges", lambda m, _t: m.update({"tokenizer.ggml.merges": ["no way"]}), "corrupt", "'no way'"),
    ("types", lambda m, _t: m.update({"tokenizer.ggml.token_type": [1]}), "corrupt", "token_type"),
    (
        "more tokens",
        lambda m, _t: m.update(
            {
                "tokenizer.ggml.tokens": [*m["tokenizer.ggml.tokens"], "§§ new"],
                "tokenizer.ggml.token_type": [*m["tokenizer.ggml.token_type"], 1],
            }
        ),
        "corrupt",
        "embeddings",
    ),
    ("alignment", lambda m, _t: m.update({"general.alignment": 0}), "corrupt", "alignment"),
    ("value type", lambda m, _t: m.update({"x": struct.pack("<I", 77)}), "corrupt", "unknown type 77"),
    ("array in array", lambda m, _t: m.update({"x": struct.pack("<IIQ", 9, 9, 1)}), "corrupt", "unknown type 9"),
    ("long array", lambda m, _t: m.update({"x": struct.pack("<IIQ", 9, 4, 2**60)}), "corrupt", "items"),
    ("long string", lambda m, _t: m.update({"x": struct.pack("<IQ", 8, 2**63)}), "corrupt", "string"),
    ("string past the end", lambda m, _t: m.update({"x": struct.pack("<IQ", 8, 10**7)}), "corrupt", "truncated"),
    ("not UTF-8", lambda m, _t: m.update({"x": struct.pack("<IQ", 8, 1) + b"\xff"}), "corrupt", "UTF-8"),
    ("5 dimensions", lambda _m, t: t.update({"x": ("F32", (1, 1, 1, 1, 1), b"0000")}), "corrupt", "5 dimensions"),
    ("empty tensor", lambda _m, t: t.update({"x": ("F32", (0, 4), b"")}), "corrupt", "cannot hold"),
    ("half a block", lambda _m, t: t.update({"x": ("Q8_0", (2, 16), b"0" * 34)}), "corrupt", "cannot hold"),
    ("huge tensor", lambda _m, t: t.update({"x": ("F32", (2**60, 4), b"0000")}), "corrupt", "truncated"),
]


@pytest.mark.parametrize(("change", "code", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_cannot_be_imported_is_refused_by_name(
    change: Change,
    code: str,
    words: str,
    plain: tuple[dict[str, Any], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    metadata, tensors = dict(plain[0]), dict(plain[1])
    change(metadata, tensors)
    path = write(tmp_path, metadata, tensors)

    with pytest.raises(ImportFailed, match=words) as caught:
        import_gguf(path, tmp_path / "out", dtype="float32")

    assert caught.value.code == code
    assert str(path) in caught.value.message
    assert names(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "not_gguf", "not a GGUF"),
        (b"GGM", "not_gguf", "not a GGUF"),
        (b"PK\x03\x04" + bytes(100), "not_gguf", "not a GGUF"),
        (b"GGUF", "corrupt", "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "unsupported", "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "unsupported", "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "corrupt", "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "corrupt", "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "unsupported", "architecture None"),
    ],
)
def test_a_file_that_is_not_a_gguf_is_refused(content: bytes, code: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ImportFailed, match=words) as caught:
        import_gguf(path, tmp_path / "out")
    assert caught.value.code == code
    assert names(tmp_path) == ["x.gguf"]


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportFailed, match="does not exist") as caught:
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    assert caught.value.code == "missing"
    with pytest.raises(ImportFailed, match="is a folder"):
        import_gguf(tmp_path, tmp_path / "out")
    assert names(tmp_path) == []


def test_a_taken_destination_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ImportFailed, match="exists already") as caught:
        import_gguf(source, tmp_path / "out")
    assert caught.value.code == "exists"
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert names(tmp_path) == ["in", "out"]


def test_two_imports_to_one_place_do_not_meet(source: Path, tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", ImportFailed) as staging:
        (staging / "first").touch()
        with pytest.raises(ImportFailed, match="another process") as caught:
            import_gguf(source, tmp_path / "out")
        assert caught.value.code == "busy"
    assert names(tmp_path / "out") == ["first"]
    assert names(tmp_path) == ["in", "out"]


def test_a_disk_that_is_too_small_is_told_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: FreeSpace())
    with pytest.raises(ImportFailed, match="are free") as caught:
        import_gguf(source, tmp_path / "out")
    assert caught.value.code == "no_space"
    assert names(tmp_path) == ["in"]


class FreeSpace:
    free = 1_000_000


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_a_cut_file_is_always_refused_as_such(
    data: st.DataObject, plain: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    whole = gguf_bytes(*plain)
    cut = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 60_000))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:cut])
    with pytest.raises(ImportFailed) as caught:
        read_gguf(path)
    assert caught.value.code == ("not_gguf" if cut < 4 else "corrupt")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(changes=st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_never_raises_anything_else(
    changes: list[tuple[int, int]], plain: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    damaged = bytearray(gguf_bytes(*plain))
    for place, byte in changes:
        damaged[place] = byte
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        gguf = read_gguf(path)
        LlamaShape.of(gguf)
        GgufTokenizer(gguf).write(tmp_path, 100)
    except ImportFailed as error:
        assert error.message  # noqa: PT017 - damage to a name or number may well go unseen


# A job that stops in the middle of the weights, and says so, until a signal comes.
STOPS_HALFWAY = """
import sys, time
from worker import tools
from worker.gguf_import import import_gguf

def halfway(source, destination, **_options):
    def progress(done, total, stage):
        if done > total // 2:
            sys.stdout.write("halfway\\n"), sys.stdout.flush()
            time.sleep(60)
    return import_gguf(source, destination, dtype="float32", progress=progress)

tools.import_gguf = halfway
tools.main(["import", sys.argv[1], "--to", sys.argv[2]])
"""


def stop_halfway(source: Path, destination: Path, number: signal.Signals) -> tuple[int, str]:
    command = [sys.executable, "-c", STOPS_HALFWAY, str(source), str(destination)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halfway\n"
        assert any(name.startswith(f".{destination.name}.part-") for name in names(destination.parent))
        process.send_signal(number)
        _out, errors = process.communicate(timeout=30)
        return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    status, errors = stop_halfway(source, tmp_path / "models" / "out", number)
    assert status == 1
    assert errors.splitlines()[-1] == "error: interrupted; nothing half-made is left behind"
    assert names(tmp_path / "models") == []


def test_what_a_sigkill_leaves_is_removed_by_the_next_run(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    stop_halfway(source, models / "out", signal.SIGKILL)
    assert not (models / "out").exists()
    assert names(models) != []
    (models / ".out2.part-00000000").mkdir()  # another destination's

    done = run_tool("import", str(source), "--to", str(models / "out"), "--dtype", "float32")

    assert (done.returncode, done.stdout) == (0, f"{models / 'out'}\n"), done.stderr
    assert names(models) == [".out2.part-00000000", "out"]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker.tools", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY)


def test_the_command_says_what_it_made_and_what_went_wrong(mixed: Path, tmp_path: Path) -> None:
    done = run_tool("import", str(mixed), "--to", str(tmp_path / "out"), "--keep-quantized")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "100 %" in done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 4

    done = run_tool("import", str(mixed), "--to", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'out'} exists already: remove it, or choose another name\n"

    done = run_tool("import", str(mixed))
    assert done.returncode == 2
    done = run_tool("import", str(mixed), "--to", "x", "--keep-quantized", "--dtype", "float32")
    assert done.returncode == 2
