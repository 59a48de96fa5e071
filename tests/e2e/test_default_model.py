"""The default model is a real language model, and the import has kept it one."""

import unicodedata
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from protocol.builtin_models import BUILTIN_MODELS, DEFAULT_MODEL_ID
from protocol.modelfolder import inspect_model_folder
from tests.modelkit import default_model

pytestmark = pytest.mark.real_model

TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "tabs\tand\r\nnew\nlines\n\n\n",
    "naïve café, Zürich, Łódź, straße",
    unicodedata.normalize("NFD", "é ö ñ å"),
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "日本語、中文、한국어",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
    "\U0001d518\U0001d52b𐍈 \U0010ffff",
    "zero\u200bwidth\u2060joiners\ufeff",
    "1234567890 3.14159 0x7f",
    "don't they'll I'VE",
    'def f(x):\n    return {"a": [x ** 2, None]}\n',
    "\x00\x01\x1f\x7f control",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start| >",
    "\ufffd replacement",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return default_model()


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    from mlx_lm import load

    model, tokenizer = load(str(folder))[:2]
    return model, tokenizer


def greedy(model: Any, tokenizer: Any, prompt: list[int], count: int) -> str:
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return str(tokenizer.decode([int(token) for token, _logprobs in steps]))


def test_the_folder_is_what_the_table_says(folder: Path) -> None:
    found = inspect_model_folder(folder)
    assert (found.model_type, found.max_model_len, found.has_chat_template) == ("llama", 8_192, True)
    if not mx.metal.is_available():
        assert found.quantization is None
        assert abs(found.weight_bytes - BUILTIN_MODELS[DEFAULT_MODEL_ID].folder_bytes) < 10e6


def test_the_capital_of_france(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert greedy(model, tokenizer, tokenizer.encode("The capital of France is"), 4).startswith(" Paris")


def test_a_chat_is_answered_and_ends(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == tokenizer.encode(text)

    answer = greedy(model, tokenizer, prompt, 24)
    assert "Paris" in answer
    assert tokenizer.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_text_survives_the_tokenizer(text: str, loaded: tuple[Any, Any]) -> None:
    _model, tokenizer = loaded
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own(loaded: tuple[Any, Any]) -> None:
    """SmolLM's pre-tokenizer; with GPT-2's the model reads numbers that it was never taught."""
    _model, tokenizer = loaded
    assert len(tokenizer.encode("2024")) == 4
    assert tokenizer.encode("<|im_end|>") == [2]
