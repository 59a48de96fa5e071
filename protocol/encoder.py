"""What a folder says about an encoder: a model that turns a text into a vector or a score, not into more text.

Its layout is that of sentence-transformers: beside `config.json` there may be `modules.json`, `1_Pooling/config.json`
and `sentence_bert_config.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

_Size = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]

#: `model_type` of config.json -> positions that are taken up before the first token's (RoBERTa counts from 2).
POSITION_OFFSETS: Final[Mapping[str, int]] = MappingProxyType({"bert": 0, "roberta": 2, "xlm-roberta": 2})
#: Class in config.json -> whether it has a head that scores a pair of texts.
_ARCHITECTURES: Final[Mapping[str, bool]] = MappingProxyType(
    {
        "BertModel": False,
        "RobertaModel": False,
        "XLMRobertaModel": False,
        "BertForSequenceClassification": True,
        "RobertaForSequenceClassification": True,
        "XLMRobertaForSequenceClassification": True,
    }
)
#: Encoders that neither mlx-lm nor LMX runs; named so that they are refused in words.
_OTHER_ENCODERS: Final = frozenset(
    {
        "albert",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "nomic_bert",
    }
)
_MODULES: Final = frozenset({"Transformer", "Pooling", "Normalize"})
_MAX_JSON_BYTES: Final = 1_000_000
#: What an HF tokenizer says when it knows no limit is 10^30.
_BELIEVABLE: Final = 2**31

Pooling = Literal["mean", "cls"]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]


class EncoderError(Exception):
    """The folder holds an encoder that LMX does not run; the text says why."""


class EncoderShape(msgspec.Struct, frozen=True):
    """The numbers of config.json that the network is built from."""

    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    intermediate_size: _Size
    vocab_size: _Size
    max_position_embeddings: _Size
    type_vocab_size: _Size = 2
    layer_norm_eps: float = 1e-12
    hidden_act: Activation = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False


class Encoder(msgspec.Struct, frozen=True):
    """An encoder that LMX runs."""

    shape: EncoderShape
    #: Positions before the first token's.
    position_offset: int
    #: Whether a pair of texts gets a score; otherwise one text gets a vector.
    scores_pairs: bool
    pooling: Pooling
    #: The longest input, with the tokens that the model wants around it.
    max_tokens: int


def read_encoder(path: Path, config: dict[str, Any], files: frozenset[str]) -> Encoder | None:
    """Return what `config` (of the folder's config.json) says, None for a generating model.

    Raises `EncoderError` for an encoder of another kind, `OSError`.
    """
    model_type = str(config.get("model_type"))
    if model_type in _OTHER_ENCODERS:
        supported = ", ".join(POSITION_OFFSETS)
        raise EncoderError(f"{path} is an encoder of the type {model_type!r}; LMX runs those of the types {supported}")
    if model_type not in POSITION_OFFSETS:
        return None
    scores_pairs = _check_architecture(path, config)
    if config.get("quantization"):
        raise EncoderError(f"{path} is a quantized encoder, which LMX does not run: take the one it was made of")
    if "tokenizer.json" not in files:
        raise EncoderError(f"{path} has no tokenizer.json; LMX needs it for an encoder")
    try:
        shape = msgspec.convert(config, EncoderShape)
    except msgspec.ValidationError as error:
        raise EncoderError(f"{path / 'config.json'} does not describe an encoder that LMX runs: {error}") from None
    if shape.hidden_size % shape.num_attention_heads:
        raise EncoderError(f"{path / 'config.json'}: hidden_size is no multiple of num_attention_heads")
    offset = POSITION_OFFSETS[model_type]
    return Encoder(
        shape=shape,
        position_offset=offset,
        scores_pairs=scores_pairs,
        pooling="cls" if scores_pairs else _read_pooling(path),
        max_tokens=_find_max_tokens(path, shape.max_position_embeddings - offset),
    )


def _check_architecture(path: Path, config: dict[str, Any]) -> bool:
    """Return whether the model has a head that scores pairs."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise EncoderError(
            f"{path} is a {name or 'model without architecture'!s:.100}; of this family LMX runs {known}"
        )
    if not _ARCHITECTURES[name]:
        return False
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise EncoderError(
            f"{path} sorts texts into {count} classes; LMX runs classifiers with one label, as rerankers"
        )
    return True


def _read_pooling(path: Path) -> Pooling:
    folder, promised = "1_Pooling", False
    for module in _read(path / "modules.json", []):
        kind = str(module.get("type")) if isinstance(module, dict) else ""
        if kind.rpartition(".")[2] not in _MODULES:
            raise EncoderError(f"{path / 'modules.json'} asks for {kind:.100}, which LMX does not have")
        if kind.endswith(".Pooling"):
            folder, promised = str(module.get("path")), True
    if "/" in folder or folder.startswith("."):
        raise EncoderError(f"{path / 'modules.json'} names a folder that is not beside it")
    if promised and not (path / folder / "config.json").is_file():
        raise EncoderError(f"{path / folder / 'config.json'} is missing: remove the folder and pull the model again")
    settings = _read(path / folder / "config.json", {})
    wanted = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    match wanted:
        case [] | ["pooling_mode_mean_tokens"]:
            return "mean"
        case ["pooling_mode_cls_token"]:
            return "cls"
    names = ", ".join(wanted)
    raise EncoderError(f"{path / folder / 'config.json'} asks for {names:.200}; LMX has mean and cls, one at a time")


def _find_max_tokens(path: Path, positions: int) -> int:
    """Return the least of what sentence-transformers, the tokenizer and the table of positions allow."""
    told = (
        _read(path / "sentence_bert_config.json", {}).get("max_seq_length"),
        _read(path / "tokenizer_config.json", {}).get("model_max_length"),
    )
    limits = [int(limit) for limit in told if isinstance(limit, int | float) and 2 < limit < _BELIEVABLE]
    return min([positions, *limits])


def _read(path: Path, otherwise: Any) -> Any:
    """Return what a JSON file holds if it is of the same type as `otherwise`, which stands for a missing file."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
        value = json.loads(raw)
    except FileNotFoundError:
        return otherwise
    except (ValueError, RecursionError) as error:
        raise EncoderError(f"{path} is not valid JSON ({error}): remove the folder and pull the model again") from None
    if not isinstance(value, type(otherwise)):
        raise EncoderError(f"{path} does not hold what it should: remove the folder and pull the model again")
    return value
