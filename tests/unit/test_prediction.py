"""What a model will occupy, from its folder and from what earlier runs showed."""

from pathlib import Path

import pytest

from protocol.kvsize import KvShape
from protocol.modelfolder import ModelFolderError
from supervisor.prediction import BASE_BYTES, History, Prediction, grant, key_of, predict

MIB = 1024**2


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "memory")


def test_a_first_load_is_weights_python_tokenizer_and_cache(tiny_model: Path, history: History) -> None:
    found = predict(tiny_model, 100, history, "worker")
    tokenizer = (tiny_model / "tokenizer.json").stat().st_size
    assert found.idle == found.weight_bytes + BASE_BYTES + 14 * tokenizer
    # 2 layers, 2 heads of 16, keys and values, 4 bytes each.
    assert found.kv == KvShape(token_bytes=2 * 2 * 16 * 2 * 4)
    assert found.need == found.idle + 100 * 512
    assert predict(tiny_model, 10**7, history, "worker").tokens == 8192, "no more than the context"


def test_a_second_load_is_what_the_first_one_showed(tiny_model: Path, tmp_path: Path, history: History) -> None:
    first = predict(tiny_model, 0, history, "worker")
    history.learn(key_of(str(tiny_model), first.weight_bytes, "worker"), 80 * MIB, 95 * MIB)
    again = History(tmp_path / "memory")
    again.load()
    second = predict(tiny_model, 0, again, "worker")
    assert (second.idle, second.need) == (80 * MIB, 95 * MIB)
    assert predict(tiny_model, 0, again, "another.engine") == first


def test_a_run_that_grew_without_end_is_not_expected_again(tiny_model: Path, history: History) -> None:
    first = predict(tiny_model, 0, history, "worker")
    history.learn(key_of(str(tiny_model), first.weight_bytes, "worker"), 80 * MIB, 80_000 * MIB)
    assert predict(tiny_model, 0, history, "worker").need < 1200 * MIB


def test_only_so_many_models_are_remembered_and_a_broken_file_is_none(tmp_path: Path, history: History) -> None:
    for number in range(205):
        history.learn(str(number), 1, 2)
    assert history.of("4") is None
    assert history.of("204") is not None
    (tmp_path / "memory").write_text("nonsense")
    (tmp_path / "memory.prev").unlink()
    again = History(tmp_path / "memory")
    again.load()
    assert again.of("204") is None
    again.learn("x", 1, 1)


def test_the_need_is_the_larger_of_loading_and_working() -> None:
    assert Prediction(100, 10, 50, KvShape(token_bytes=1), 20).need == 160
    assert Prediction(100, 10, 5, KvShape(token_bytes=1), 20).need == 130


def test_a_folder_that_cannot_be_served_is_said_to_be_so(tmp_path: Path, history: History) -> None:
    with pytest.raises(ModelFolderError):
        predict(tmp_path, 0, history, "worker")


def test_prefixes_are_granted_half_of_what_a_load_leaves_and_nothing_is_reserved_for_them() -> None:
    plain = Prediction(100 * MIB, 50 * MIB, 0, KvShape(token_bytes=1024), 1024)
    assert grant(plain, plain.need + 80 * MIB, 30 * MIB).prefix_bytes == 30 * MIB
    assert grant(plain, plain.need + 40 * MIB, 30 * MIB).prefix_bytes == 20 * MIB
    assert grant(plain, plain.need - 1, 30 * MIB).prefix_bytes == 0
    assert grant(plain, None, 30 * MIB).prefix_bytes == 0, "unknown is not free"
    assert grant(plain, 2**40, 30 * MIB).need == plain.need
    assert grant(grant(plain, None, 1), 2**40, 30 * MIB).prefix_bytes == 30 * MIB, "asked anew with each start"
    assert grant(Prediction(1, 1, 0, KvShape(), 0), 2**40, 30 * MIB).prefix_bytes == 0, "an encoder has none"
