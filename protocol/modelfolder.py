"""What a model folder holds, read in milliseconds and without MLX.

A model folder is the Hugging Face layout that `mlx_lm.load` reads: `config.json`, `model*.safetensors` (with
`model.safetensors.index.json` when there are several), a tokenizer. The supervisor looks here before it starts a
worker, so that a broken folder is refused in words instead of by a crash.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from protocol.encoder import Encoder, EncoderError, read_encoder
from protocol.safetensors import SafetensorsError, read_safetensors_header

#: Bounds of what is read. Real files: config 2 kB, index 0.3 MB, tokenizer_config (with its template) 0.1 MB.
MAX_JSON_BYTES: Final = 64_000_000
MAX_WEIGHT_FILES: Final = 2_000
MAX_FOLDER_ENTRIES: Final = 20_000
_MAX_CONTEXT: Final = 2**31
#: It becomes a module name in mlx-lm.
_MODEL_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_INDEX: Final = "model.safetensors.index.json"
_CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_TOKENIZER_FILES: Final = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "vocab.txt",
    "vocab.json",
)
_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
_PULL_AGAIN: Final = "remove the folder and pull or import the model again"

ModelFolderCode = Literal["missing", "corrupt", "unsupported"]


class ModelFolderError(Exception):
    """The folder cannot be served. `missing`: not there; `corrupt`: damaged; `unsupported`: refused as it is."""

    def __init__(self, code: ModelFolderCode, message: str) -> None:
        super().__init__(message)
        self.code: ModelFolderCode = code
        self.message = message


class ModelFolder(msgspec.Struct, frozen=True):
    """A folder whose files are whole; whether this mlx-lm knows the architecture, only the worker can tell."""

    path: Path
    #: `model_type` of config.json: the module of mlx-lm that runs it.
    model_type: str
    #: The class named in config.json, or "".
    architecture: str
    #: Bytes of all tensors, which is what loading them takes.
    weight_bytes: int
    tensor_count: int
    #: The longest context in tokens, if config.json says.
    max_model_len: int | None
    #: `quantization` of config.json as it is there: group_size, bits, and exceptions by layer.
    quantization: dict[str, Any] | None
    has_chat_template: bool
    #: Names in the folder, sorted.
    weight_files: tuple[str, ...]
    #: None for a model that generates text.
    encoder: Encoder | None = None


def inspect_model_folder(path: Path) -> ModelFolder:
    """Read a model folder's headers; raise `ModelFolderError`, and nothing else, if it cannot be served."""
    try:
        return _inspect(path)
    except OSError as error:
        code: ModelFolderCode = "missing" if isinstance(error, FileNotFoundError) else "corrupt"
        msg = f"{error.filename or path} cannot be read: {error.strerror or error}"
        raise ModelFolderError(code, msg) from None
    except ValueError as error:  # a path with a NUL byte
        msg = f"{str(path)!r} is not a path: {error}"
        raise ModelFolderError("missing", msg) from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the `config.json` of a model folder; raise `ModelFolderError` or `OSError`."""
    return _read_json(path / "config.json")


def _inspect(path: Path) -> ModelFolder:
    files = _list_files(path)
    config_path = path / "config.json"
    if config_path.name not in files:
        msg = f"{path} has no config.json, so it is not a model folder: give the folder that holds config.json"
        raise ModelFolderError("missing", msg)
    config = _read_json(config_path)
    _refuse_remote_code(path, config, files)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.fullmatch(model_type):
        msg = f"{config_path} names no usable model_type ({model_type!r:.100}): {_PULL_AGAIN}"
        raise ModelFolderError("corrupt", msg)
    weight_files = _find_weights(path, files)
    tensor_count, weight_bytes = _check_weights(path, files, weight_files)
    _check_tokenizer(path, files)
    try:
        encoder = read_encoder(path, config, files)
    except EncoderError as error:
        raise ModelFolderError("unsupported", str(error)) from None
    quantization = config.get("quantization")
    return ModelFolder(
        path=path,
        model_type=model_type,
        architecture=_first_architecture(config),
        weight_bytes=weight_bytes,
        tensor_count=tensor_count,
        max_model_len=_find_context(config) if encoder is None else encoder.max_tokens,
        quantization=quantization if isinstance(quantization, dict) else None,
        has_chat_template=_has_chat_template(path, files),
        weight_files=weight_files,
        encoder=encoder,
    )


def _list_files(path: Path) -> frozenset[str]:
    """Return the names of the regular files (links to files included: the hub's cache is made of links)."""
    if not path.exists():
        msg = f"{path} does not exist: check the path, or pull the model first"
        raise ModelFolderError("missing", msg)
    if not path.is_dir():
        hint = "import it first" if path.suffix == ".gguf" else "give the folder that holds config.json"
        msg = f"{path} is a file, not a model folder: {hint}"
        raise ModelFolderError("missing", msg)
    names = set()
    with os.scandir(path) as entries:
        for number, entry in enumerate(entries):
            if number >= MAX_FOLDER_ENTRIES:
                msg = f"{path} holds more than {MAX_FOLDER_ENTRIES:,} entries, so it is not a model folder"
                raise ModelFolderError("unsupported", msg)
            if entry.is_file():  # not a pipe, which would be waited for
                names.add(entry.name)
    return frozenset(names)


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; the stdlib's parser because configs in the wild hold `Infinity` and `NaN`."""
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        msg = f"{path} is longer than {MAX_JSON_BYTES:,} bytes: {_PULL_AGAIN}"
        raise ModelFolderError("corrupt", msg)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not valid JSON ({error}): {_PULL_AGAIN}"
        raise ModelFolderError("corrupt", msg) from None
    if not isinstance(value, dict):
        msg = f"{path} is not a JSON object: {_PULL_AGAIN}"
        raise ModelFolderError("corrupt", msg)
    return value


def _refuse_remote_code(path: Path, config: dict[str, Any], files: frozenset[str]) -> None:
    """Refuse a model that brings its own Python: running it is running its author's code as this user."""
    # `auto_map` in config.json names code for transformers' models, which mlx-lm never runs; many repositories of
    # well-known architectures carry it. `model_file` is mlx-lm's own key for code.
    if config.get("model_file"):
        msg = f"remote code refused: {path / 'config.json'} names Python code of its own (model_file)"
        raise ModelFolderError("unsupported", msg)
    tokenizer_config = path / "tokenizer_config.json"
    if tokenizer_config.name in files and _read_json(tokenizer_config).get("auto_map"):
        msg = f"remote code refused: {tokenizer_config} names Python code of its own (auto_map)"
        raise ModelFolderError("unsupported", msg)


def _find_weights(path: Path, files: frozenset[str]) -> tuple[str, ...]:
    """Return every file that mlx-lm would load, which is `model*.safetensors` whatever the index says."""
    weights = sorted(name for name in files if name.startswith("model") and name.endswith(".safetensors"))
    if len(weights) > MAX_WEIGHT_FILES:
        msg = f"{path} holds {len(weights):,} weight files; {MAX_WEIGHT_FILES:,} are the limit"
        raise ModelFolderError("unsupported", msg)
    if weights or _INDEX in files:  # an index without any shard is an unfinished download: told by the index
        return tuple(weights)
    pickles = sorted(name for name in files if name.endswith(_PICKLE_SUFFIXES))
    if pickles:
        msg = (
            f"{path} has its weights only as pickle files ({pickles[0]}), which can run code when they are read: "
            "take a repository with safetensors"
        )
        raise ModelFolderError("unsupported", msg)
    others = sorted(name for name in files if name.endswith((".safetensors", ".npz", ".gguf")))
    if others:
        msg = f"{path} has {others[0]}, but mlx-lm loads only files named model*.safetensors"
        raise ModelFolderError("unsupported", msg)
    msg = f"{path} has no weights (model.safetensors): {_PULL_AGAIN}"
    raise ModelFolderError("missing", msg)


def _check_weights(path: Path, files: frozenset[str], weights: tuple[str, ...]) -> tuple[int, int]:
    """Return the number of tensors and their bytes, having checked every header and the index."""
    indexed = _read_index(path) if _INDEX in files else {}
    for shard in sorted(set(indexed.values()).difference(weights)):
        msg = f"{path / _INDEX} names {shard!r}, which is not in the folder: {_PULL_AGAIN}"
        raise ModelFolderError("missing", msg)
    owner: dict[str, str] = {}
    weight_bytes = 0
    for name in weights:
        try:
            header = read_safetensors_header(path / name)
        except SafetensorsError as error:
            msg = f"{path / name} is corrupt: {error}; {_PULL_AGAIN}"
            raise ModelFolderError("corrupt", msg) from None
        weight_bytes += header.weight_bytes
        for tensor in header.names:
            if indexed.get(tensor, name) == name:
                owner[tensor] = name
            else:
                owner.setdefault(tensor, name)
    for tensor, shard in indexed.items():
        if owner.get(tensor) != shard:
            msg = f"{path / shard} lacks the tensor {tensor!r} that {_INDEX} promises: {_PULL_AGAIN}"
            raise ModelFolderError("corrupt", msg)
    if not owner:
        msg = f"{path} has weight files without any tensor: {_PULL_AGAIN}"
        raise ModelFolderError("corrupt", msg)
    return len(owner), weight_bytes


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name to file name."""
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        msg = f"{path / _INDEX} has no weight_map: {_PULL_AGAIN}"
        raise ModelFolderError("corrupt", msg)
    return weight_map


def _check_tokenizer(path: Path, files: frozenset[str]) -> None:
    """See that there is a tokenizer, and that a tokenizer.json (megabytes, not parsed here) is not cut off."""
    if "tokenizer.json" in files:
        with (path / "tokenizer.json").open("rb") as file:
            first = file.read(64).lstrip()
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64))
            last = file.read(64).rstrip()
        if not (first.startswith(b"{") and last.endswith(b"}")):
            msg = f"{path / 'tokenizer.json'} is truncated or not JSON: {_PULL_AGAIN}"
            raise ModelFolderError("corrupt", msg)
        return
    if files.isdisjoint(_TOKENIZER_FILES) and not any(name.endswith(".tiktoken") for name in files):
        msg = f"{path} has no tokenizer (tokenizer.json): {_PULL_AGAIN}"
        raise ModelFolderError("missing", msg)


def _has_chat_template(path: Path, files: frozenset[str]) -> bool:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    tokenizer_config = path / "tokenizer_config.json"
    return tokenizer_config.name in files and bool(_read_json(tokenizer_config).get("chat_template"))


def _find_context(config: dict[str, Any]) -> int | None:
    """Return the longest context in tokens; multimodal configs keep it in their text part."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in _CONTEXT_KEYS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_CONTEXT:
                return value
    return None


def _first_architecture(config: dict[str, Any]) -> str:
    match config.get("architectures"):
        case [str(name), *_] if _MODEL_TYPE.fullmatch(name):
            return name
        case _:
            return ""
