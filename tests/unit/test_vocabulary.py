"""Tokens in words: their bytes, and the checks of raw prompts (no MLX)."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from protocol.data import ChatMessage, Kind, Resume, Sampling, Submit, TokenLogprob, TopLogprob
from protocol.errors import LmxError
from worker.completions import MAX_ECHOED_LOGPROBS, CompletionMaker, Kinds, check_sampling
from worker.jobs import Prepared, Scored
from worker.vocabulary import Words

CONTEXT = 64
BEGIN = 0


class Wrapped:
    """As much of a Hugging Face tokenizer as is asked for, around a real `tokenizers` one."""

    bos_token = None

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()  # type: ignore[no-any-return]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tiny_words(tiny_model: Path) -> Words:
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    return Words(tokenizer, len(tokenizer.get_vocab()), lambda _: [5, 6])


def sentencepiece_words() -> Words:
    pieces = ["<unk>", "\u2581hello", "\u2581", "wor", "ld", *[f"<0x{byte:02X}>" for byte in range(256)], "x"]
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Words(Wrapped(backend), len(pieces), lambda _: [])


TEXTS = ["the water is cold", " two  spaces", "naïve café", "日本語 text", "👩‍🚀 and 🇩🇪", "a\nb\tc", "ß\u0301"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tiny_words: Words, text: str) -> None:
    tokens = tiny_words.encode(text)
    assert b"".join(tiny_words.bytes_of(token) for token in tokens) == text.encode()
    assert tiny_words.decode(tokens) == text


@pytest.mark.real_model
@pytest.mark.parametrize("text", TEXTS)
def test_so_they_are_for_the_default_model(real_model: Path, text: str) -> None:
    from mlx_lm.utils import load_tokenizer

    words = Words(load_tokenizer(real_model), 49_152, lambda _: [])
    assert b"".join(words.bytes_of(token) for token in words.encode(text)) == text.encode()


def test_pieces_of_sentencepiece_are_spelled_with_spaces_and_bytes() -> None:
    words = sentencepiece_words()
    assert [words.bytes_of(token) for token in (1, 2, 3, 5 + 0xE6)] == [b" hello", b" ", b"wor", b"\xe6"]


def test_half_a_character_is_a_replacement_as_text_and_itself_as_bytes(tiny_words: Words) -> None:
    first, *_ = tiny_words.encode("日")
    half = tiny_words.bytes_of(first)
    assert half == "日".encode()[: len(half)] != "日".encode()
    water = tiny_words.encode(" water")[0]
    assert tiny_words.spell(Scored(first, -0.5, [(water, -0.25), (first, -0.5)])) == TokenLogprob(
        "\ufffd", -0.5, half, [TopLogprob(" water", -0.25, b" water"), TopLogprob("\ufffd", -0.5, half)]
    )


def test_special_tokens_are_spelled_out_and_rows_without_a_token_are_empty(tiny_words: Words) -> None:
    (start,) = tiny_words.encode("<|im_start|>")
    assert tiny_words.spell(Scored(start, None, [])) == TokenLogprob("<|im_start|>", None, b"<|im_start|>", [])
    assert tiny_words.bytes_of(tiny_words.size + 5) == b""


# -- tokenize and detokenize ----------------------------------------------------------------------------------------


def ask(kind: Kind, *inputs: Any, messages: list[ChatMessage] | None = None, **sampling: Any) -> Submit:
    return Submit(1, 1, kind, messages or [], Sampling(**sampling), 1.0, inputs=list(inputs))


def test_a_text_is_tokenized_and_comes_back(tiny_words: Words) -> None:
    tokens, text = tiny_words.tokenize(ask(Kind.TOKENIZE, "the water"))
    assert text == "the water"
    assert tiny_words.tokenize(ask(Kind.DETOKENIZE, tokens)) == (tokens, "the water")


def test_messages_go_through_the_chat_template(tiny_words: Words) -> None:
    tokens, text = tiny_words.tokenize(ask(Kind.TOKENIZE, messages=[ChatMessage("user", "hi")]))
    assert (tokens, text) == ([5, 6], tiny_words.decode([5, 6]))


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (Kind.TOKENIZE, []),
        (Kind.TOKENIZE, ["a", "b"]),
        (Kind.TOKENIZE, [[1]]),
        (Kind.DETOKENIZE, []),
        (Kind.DETOKENIZE, ["a"]),
        (Kind.DETOKENIZE, [[-1]]),
        (Kind.DETOKENIZE, [[10**9]]),
    ],
)
def test_what_cannot_be_answered_is_the_senders_mistake(tiny_words: Words, kind: Kind, inputs: list[Any]) -> None:
    with pytest.raises(LmxError) as raised:
        tiny_words.tokenize(ask(kind, *inputs))
    assert raised.value.code == "invalid_value"


# -- raw prompts ----------------------------------------------------------------------------------------------------


def prepare(words: Words, submit: Submit) -> Prepared:
    maker = CompletionMaker(words, max_model_len=CONTEXT, special=frozenset({BEGIN}), begin=BEGIN)
    return Kinds(maker.prepare, maker.prepare, words.size)(submit)


def complete(
    words: Words, given: Any, *, echo: bool = False, resume: Resume | None = None, **sampling: Any
) -> Prepared:
    submit = Submit(
        1, 1, Kind.COMPLETION, [], Sampling(**sampling), 1.0, inputs=[given], echo=echo, resume=resume
    )  # fmt: skip
    return prepare(words, submit)


def test_a_prompt_is_taken_as_it_is(tiny_words: Words) -> None:
    tokens = tiny_words.encode("the water")
    assert complete(tiny_words, "the water", max_tokens=3).prompt == tokens
    assert complete(tiny_words, tokens, max_tokens=3).prompt == tokens
    assert complete(tiny_words, tokens).max_tokens == CONTEXT - len(tokens)
    assert complete(tiny_words, "").prompt == [BEGIN]


def test_an_echo_is_the_prompt_as_given(tiny_words: Words) -> None:
    assert complete(tiny_words, "the  water", echo=True).echo == "the  water"
    assert complete(tiny_words, tiny_words.encode("the  water"), echo=True).echo == "the  water"
    assert complete(tiny_words, "the  water").echo == ""


def test_only_a_prompt_that_is_not_continued_may_fill_the_context(tiny_words: Words) -> None:
    assert complete(tiny_words, [5] * CONTEXT, echo=True, logprobs=1, max_tokens=0).max_tokens == 0
    assert complete(tiny_words, [5] * (CONTEXT - 1), max_tokens=9).max_tokens == 1


@pytest.mark.parametrize(
    ("given", "sampling", "code", "param"),
    [
        ([5] * CONTEXT, {}, "context_length_exceeded", "prompt"),
        ([5] * (CONTEXT + 1), {"max_tokens": 0}, "context_length_exceeded", "prompt"),
        ("water " * 100_000, {}, "context_length_exceeded", "prompt"),
        ([5, -1], {}, "invalid_value", "prompt"),
        ([5, 10**12], {}, "invalid_value", "prompt"),
        ([5], {"max_tokens": -1}, "invalid_value", "max_tokens"),
        ([5], {"stop": tuple("abcde")}, "invalid_value", "stop"),
        ([5], {"logit_bias": {10**8: 1.0}}, "invalid_value", "logit_bias"),
        ([5], {"logit_bias": {-1: 1.0}}, "invalid_value", "logit_bias"),
        ([5], {"logit_bias": {5: float("nan")}}, "invalid_value", "logit_bias"),
        ([5], {"logprobs": 21}, "invalid_value", "top_logprobs"),
        ([5], {"repetition_penalty": 0.0}, "invalid_value", "repetition_penalty"),
        ([5], {"presence_penalty": float("inf")}, "invalid_value", "presence_penalty"),
    ],
)
def test_bad_prompts_and_parameters_are_named(
    tiny_words: Words, given: Any, sampling: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(LmxError) as raised:
        complete(tiny_words, given, **sampling)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert "water" not in raised.value.message


def test_an_answer_begun_with_other_tokens_is_not_looked_up(tiny_words: Words) -> None:
    with pytest.raises(LmxError) as raised:
        complete(tiny_words, "the water", resume=Resume([5, 10**8]))
    assert raised.value.code == "internal_error"


def test_an_echo_too_large_for_a_frame_is_refused(tiny_words: Words) -> None:
    maker = CompletionMaker(tiny_words, max_model_len=10**6, special=frozenset())
    tokens = [5] * (MAX_ECHOED_LOGPROBS // 2 + 1)
    submit = Submit(1, 1, Kind.COMPLETION, [], Sampling(logprobs=1), 1.0, inputs=[tokens], echo=True)
    with pytest.raises(LmxError) as raised:
        maker.prepare(submit)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "logprobs")


def test_a_kind_that_is_not_generated_is_refused(tiny_words: Words) -> None:
    with pytest.raises(LmxError) as raised:
        prepare(tiny_words, ask(Kind.EMBED, "text"))
    assert raised.value.code == "unsupported_parameter"


def test_every_token_of_the_model_may_be_biased(tiny_words: Words) -> None:
    check_sampling(Sampling(logit_bias={0: 100.0, tiny_words.size - 1: -100.0}, logprobs=20), tiny_words.size)
