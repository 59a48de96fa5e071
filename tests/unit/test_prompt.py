"""Prompts made with a real tokenizer of transformers."""

from typing import Any

import pytest

from protocol.data import ChatMessage, Kind, Sampling, Submit
from protocol.errors import LmxError
from tests.modelkit import make_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(make_tiny_model(tmp_path_factory.mktemp("model")))


def maker(tokenizer: Any, max_model_len: int = 100) -> Any:
    from worker.prompt import PromptMaker

    return PromptMaker(tokenizer, max_model_len=max_model_len, eos=frozenset(tokenizer.eos_token_ids))


def submit(*messages: ChatMessage, **sampling: Any) -> Submit:
    return Submit(1, 1, Kind.CHAT, list(messages or [ChatMessage("user", "the sea")]), Sampling(**sampling), 10.0)


def refusal(tokenizer: Any, message: Submit) -> LmxError:
    with pytest.raises(LmxError) as caught:
        maker(tokenizer).prepare(message)
    return caught.value


def test_a_conversation_becomes_the_models_own_format(tokenizer: Any) -> None:
    prepared = maker(tokenizer).prepare(submit(ChatMessage("system", "be"), ChatMessage("user", "the sea")))
    assert tokenizer.decode(prepared.prompt) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n"
    )


def test_developer_is_system_for_a_template_that_does_not_know_it(tokenizer: Any) -> None:
    prepared = maker(tokenizer).prepare(submit(ChatMessage("developer", "be"), ChatMessage("user", "the sea")))
    assert tokenizer.decode(prepared.prompt).startswith("<|im_start|>system\nbe")


def test_the_answer_has_the_room_that_is_left(tokenizer: Any) -> None:
    prompt = len(maker(tokenizer).prepare(submit()).prompt)
    assert maker(tokenizer).prepare(submit()).max_tokens == 100 - prompt
    assert maker(tokenizer).prepare(submit(max_tokens=5)).max_tokens == 5
    assert maker(tokenizer).prepare(submit(max_tokens=5000)).max_tokens == 100 - prompt
    assert maker(tokenizer, prompt + 1).prepare(submit()).max_tokens == 1
    with pytest.raises(LmxError, match=f"{prompt} tokens.* {prompt} tokens"):
        maker(tokenizer, prompt).prepare(submit())


def test_text_that_cannot_fit_is_refused_without_tokenizing_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", forbidden)
    error = refusal(tokenizer, submit(ChatMessage("user", "x" * 1_000_000)))
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert "at least" in error.message


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": ("a", "b", "c", "d", "e")}, "stop"),
        ({"stop": ("x" * 1025,)}, "stop"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(tokenizer: Any, sampling: dict[str, Any], param: str) -> None:
    error = refusal(tokenizer, submit(**sampling))
    assert (error.code, error.param) == ("invalid_value", param)


def test_no_messages_are_refused(tokenizer: Any) -> None:
    error = refusal(tokenizer, Submit(1, 1, Kind.CHAT, [], Sampling(), 10.0))
    assert (error.code, error.param) == ("invalid_value", "messages")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate: ' + messages[0]['content']) }}",
        "{{ messages[7]['content'] }}",
        "{{ messages[0]['content'] / 2 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_template_that_fails_is_told_in_our_words(tokenizer: Any, template: str) -> None:
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        error = refusal(tokenizer, submit(ChatMessage("user", "a secret")))
    finally:
        tokenizer.chat_template = original
    assert (error.code, error.param) == ("invalid_value", "messages")
    assert "secret" not in error.message


def test_a_model_without_a_template_continues_a_transcript(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = maker(tokenizer)
    monkeypatch.setattr(type(prompts._template), "exists", False)
    prepared = prompts.prepare(submit(ChatMessage("system", "be"), ChatMessage("user", "the sea")))
    assert tokenizer.decode(prepared.prompt) == "system: be\nuser: the sea\nassistant:"


def test_the_text_of_special_tokens_never_appears(tokenizer: Any) -> None:
    answer = maker(tokenizer).prepare(submit()).answer
    ids = tokenizer.encode(" the<|im_start|> sea<|endoftext|> of", add_special_tokens=False)
    assert "".join(answer.add(token).text for token in ids) == " the sea of"
