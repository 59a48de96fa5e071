"""An encoder that LMX does not run is refused in words before a worker is started for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.modelfolder import ModelFolderError, inspect_model_folder
from tests.modelkit import make_tiny_encoder, make_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    value = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_a_whole_folder(folder: Path) -> None:
    found = inspect_model_folder(folder)
    assert found.encoder is not None
    assert (found.encoder.pooling, found.encoder.scores_pairs, found.encoder.shape.hidden_size) == ("mean", False, 32)
    assert (found.max_model_len, found.encoder.max_tokens, found.encoder.position_offset) == (24, 24, 0)


def test_a_generating_model_is_none(tmp_path: Path) -> None:
    assert inspect_model_folder(make_tiny_model(tmp_path / "m", layers=1)).encoder is None


def test_the_longest_input_is_the_least_of_what_is_told(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", max_seq_length=16)
    assert inspect_model_folder(folder).max_model_len == 16
    edit(folder / "tokenizer_config.json", model_max_length=12)
    assert inspect_model_folder(folder).max_model_len == 12
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=1e30)
    assert inspect_model_folder(folder).max_model_len == 24


def test_roberta_counts_its_positions_from_2(tmp_path: Path) -> None:
    found = inspect_model_folder(make_tiny_encoder(tmp_path / "m", model_type="roberta"))
    assert found.encoder is not None
    assert (found.encoder.position_offset, found.encoder.max_tokens) == (2, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "distilbert"}, "an encoder of the type 'distilbert'; LMX runs those of the types bert"),
        ({"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM; of this family LMX runs BertModel"),
        ({"architectures": None}, "model without architecture"),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 3}, "into 3 classes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "a quantized encoder"),
        ({"hidden_act": "silu"}, "does not describe an encoder that LMX runs"),
        ({"hidden_size": 10**9}, "does not describe an encoder that LMX runs"),
        ({"position_embedding_type": "relative_key"}, "does not describe an encoder that LMX runs"),
        ({"is_decoder": True}, "does not describe an encoder that LMX runs"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads"),
    ],
)
def test_what_is_refused_and_why(changes: dict[str, Any], words: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelFolderError, match=words) as caught:
        inspect_model_folder(folder)
    assert caught.value.code == "unsupported"


def test_modules_and_poolings_that_lmx_lacks(folder: Path) -> None:
    pooling = folder / "1_Pooling/config.json"
    edit(pooling, pooling_mode_max_tokens=True)
    with pytest.raises(ModelFolderError, match="LMX has mean and cls, one at a time"):
        inspect_model_folder(folder)
    pooling.unlink()
    with pytest.raises(ModelFolderError, match="is missing: remove the folder"):
        inspect_model_folder(folder)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}])
    )
    with pytest.raises(ModelFolderError, match=r"asks for sentence_transformers\.models\.Dense"):
        inspect_model_folder(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../elsewhere"}]))
    with pytest.raises(ModelFolderError, match="not beside it"):
        inspect_model_folder(folder)


def test_without_a_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(ModelFolderError, match=r"no tokenizer\.json"):
        inspect_model_folder(folder)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    file=st.sampled_from(["modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config.json"]),
    key=st.sampled_from(
        ["architectures", "max_seq_length", "hidden_size", "id2label", "pooling_mode_cls_token", "path"]
    ),
    value=ANYTHING,
    listed=st.booleans(),
)
def test_whatever_the_files_hold_the_answer_is_a_folder_or_words(
    file: str, key: str, value: Any, listed: bool, folder: Path
) -> None:
    path = folder / file
    before = path.read_bytes() if path.exists() else None
    content = json.loads(before) if before and file == "config.json" else {}
    content[key] = value
    path.write_text(json.dumps([content, {"type": value}] if listed else content))
    try:
        inspect_model_folder(folder)
    except ModelFolderError as error:
        assert error.message  # noqa: PT017 - either outcome is right
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
