"""A worker with a real model, over its sockets: raw prompts, logprobs, several answers, every parameter together."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from protocol import control, data
from protocol.config import ModelsConfig
from supervisor.platform.blas import find_blas
from tests.workerkit import Answer, Gateway, WorkerProcess

PROMPT = "The water of the river"


class Reference:
    """The same model in this process, without any cache or batch."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model, load_tokenizer

        self.model, _ = load_model(folder)
        self.tokenizer = load_tokenizer(folder)

    def logprobs(self, tokens: list[int]) -> Any:
        logits = np.array(self.model(mx.array(tokens)[None])[0].astype(mx.float32)).astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))

    def check(self, tokens: list[int], logprobs: list[data.TokenLogprob], top: int) -> None:
        """Compare the logprobs of the last of these tokens with one forward pass over all of them."""
        expected = self.logprobs(tokens)
        begin = len(tokens) - len(logprobs)
        for position, given in enumerate(logprobs, begin):
            if position == 0:
                assert (given.logprob, given.top) == (None, [])
                continue
            row = expected[position - 1]
            assert given.logprob == pytest.approx(row[tokens[position]], abs=5e-3)
            best = np.sort(row)[::-1][:top].tolist()
            assert [one.logprob for one in given.top] == pytest.approx(best, abs=5e-3)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[tuple[WorkerProcess, Gateway, Reference]]:
    models = ModelsConfig(prefill_step_tokens=64)
    with WorkerProcess(tiny_model, module="worker", models=models) as worker:
        yield worker, worker.ready().gateway(), Reference(tiny_model)


@pytest.fixture(scope="module")
def blas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes a model that is not tiny usable here."""
    found = find_blas(tmp_path_factory.mktemp("blas"))
    return {} if found is None else found.environment


Tiny = tuple[WorkerProcess, Gateway, Reference]


def finish(gateway: Gateway, rid: int) -> Answer:
    (answer,) = gateway.finish(rid)
    assert answer.error is None
    return answer


def test_a_worker_says_what_it_can_do(tiny: Tiny) -> None:
    worker, _, _ = tiny
    assert worker.supervisor is not None
    (ready,) = [message for message in worker.supervisor.messages if isinstance(message, control.Ready)]
    assert ready.capabilities.kinds == ["chat", "completion", "tokenize"]
    assert not worker.events("batch_is_plain")


def test_a_completion_goes_on_from_text_or_tokens_alike(tiny: Tiny) -> None:
    _, gateway, reference = tiny
    tokens = reference.tokenizer.encode(PROMPT)
    by_text = finish(gateway, gateway.complete(PROMPT, max_tokens=12))
    by_tokens = finish(gateway, gateway.complete(tokens, max_tokens=12))
    assert by_text.tokens == by_tokens.tokens
    assert by_text.text == by_tokens.text == reference.tokenizer.decode(by_text.tokens)
    assert by_text.usage == data.Usage(len(tokens), 12)
    assert by_text.accepted is not None
    assert by_text.accepted.prompt_tokens == len(tokens)


def test_an_echo_is_scored_as_by_a_forward_pass(tiny: Tiny) -> None:
    _, gateway, reference = tiny
    prompt = (PROMPT + " and the long way home ") * 20
    tokens = reference.tokenizer.encode(prompt)
    assert len(tokens) > 64 * 2
    answer = finish(gateway, gateway.complete(prompt, echo=True, max_tokens=5, logprobs=3))
    assert answer.text.startswith(prompt)
    assert answer.text == prompt + reference.tokenizer.decode(answer.tokens)
    first_text, first_tokens, first_logprobs = answer.deltas[0]
    assert first_text.startswith(prompt)
    assert len(first_logprobs) == len(tokens) + len(first_tokens)
    assert b"".join(one.bytes for one in answer.logprobs) == answer.text.encode()
    reference.check(tokens + answer.tokens, answer.logprobs, 3)


def test_a_prompt_can_be_scored_and_nothing_else(tiny: Tiny) -> None:
    _, gateway, reference = tiny
    tokens = reference.tokenizer.encode(PROMPT)
    answer = finish(gateway, gateway.complete(PROMPT, echo=True, max_tokens=0, logprobs=1))
    assert (answer.text, answer.tokens, answer.finish) == (PROMPT, [], data.Finish.LENGTH)
    assert answer.usage == data.Usage(len(tokens), 0)
    assert len(answer.deltas) == 1
    reference.check(tokens, answer.logprobs, 1)


def test_nothing_asked_for_is_answered_at_once(tiny: Tiny) -> None:
    _, gateway, _ = tiny
    echo = finish(gateway, gateway.complete(PROMPT, echo=True, max_tokens=0))
    silent = finish(gateway, gateway.complete(PROMPT, max_tokens=0, logprobs=1))
    assert (echo.text, echo.finish, silent.text, silent.finish) == (PROMPT, data.Finish.LENGTH, "", data.Finish.LENGTH)
    assert echo.logprobs == silent.logprobs == []
    assert echo.steps == [0]


def test_bad_prompts_are_refused_with_the_name_of_the_parameter(tiny: Tiny) -> None:
    _, gateway, _ = tiny
    cases = {
        gateway.complete([5, 10**8]): ("invalid_value", "prompt"),
        gateway.complete([-1]): ("invalid_value", "prompt"),
        gateway.complete([5] * 9_000): ("context_length_exceeded", "prompt"),
        gateway.complete(PROMPT, logit_bias={10**8: 1.0}): ("invalid_value", "logit_bias"),
        gateway.submit("hi", logit_bias={10**8: 1.0}): ("invalid_value", "logit_bias"),
        gateway.submit("hi", logprobs=21): ("invalid_value", "top_logprobs"),
        gateway.request(data.Kind.EMBED, "text"): ("unsupported_parameter", "model"),
        gateway.request(data.Kind.DETOKENIZE, [10**8]): ("invalid_value", "tokens"),
    }
    gateway.finish(*cases)
    for rid, (code, param) in cases.items():
        error = gateway.answers[rid].error
        assert isinstance(error, data.Refused)
        assert (error.code, error.param) == (code, param)
    assert gateway.ask(max_tokens=2).finish is data.Finish.LENGTH


def test_tokens_are_told_without_a_slot(tiny_model: Path) -> None:
    models = ModelsConfig(max_concurrent_requests=1, queue_depth=0)
    with WorkerProcess(tiny_model, module="worker", models=models) as worker:
        gateway = worker.ready().gateway()
        busy = gateway.submit("a long story", max_tokens=8_000)
        gateway.until(lambda: bool(gateway.answers[busy].tokens))
        asked = gateway.request(data.Kind.TOKENIZE, PROMPT)
        chat = gateway.request(data.Kind.TOKENIZE, messages=[data.ChatMessage("user", "hi")])
        gateway.finish(asked, chat)
        reply = gateway.answers[asked].reply
        assert isinstance(reply, data.Tokenized)
        assert reply.text == PROMPT
        back = gateway.request(data.Kind.DETOKENIZE, reply.tokens)
        gateway.finish(back)
        again = gateway.answers[back].reply
        assert isinstance(again, data.Tokenized)
        assert (again.tokens, again.text) == (reply.tokens, PROMPT)
        template = gateway.answers[chat].reply
        assert isinstance(template, data.Tokenized)
        assert template.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert not gateway.answers[busy].done


def test_each_token_of_a_stream_comes_with_its_logprob(tiny: Tiny) -> None:
    _, gateway, reference = tiny
    (answer,) = gateway.finish(gateway.submit("a story", max_tokens=30, logprobs=2, temperature=1.2, seed=4))
    assert all(len(tokens) == len(logprobs) for _, tokens, logprobs in answer.deltas)
    assert b"".join(one.bytes for one in answer.logprobs) == answer.text.encode()
    messages = [{"role": "user", "content": "a story"}]
    prompt = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    reference.check(list(prompt) + answer.tokens, answer.logprobs, 2)
    assert all(one.token.encode() == one.bytes for one in answer.logprobs)


def test_logprobs_go_no_further_than_the_token_that_completes_a_stop_string(tiny: Tiny) -> None:
    _, gateway, _ = tiny
    whole = gateway.ask("a story", max_tokens=40, logprobs=0)
    texts = [one.token for one in whole.logprobs]
    stop = texts[20] + texts[21]  # begins with a token of its own, and takes two
    cut = gateway.ask("a story", max_tokens=40, logprobs=0, stop=(stop,))
    assert cut.finish is data.Finish.STOP
    assert cut.text == whole.text.partition(stop)[0]
    count = len(cut.tokens)
    assert cut.tokens == whole.tokens[:count]
    # The token that completes it has none; the one that began it was sent when that could not be known.
    assert cut.logprobs == whole.logprobs[: count - 1]
    assert "".join(one.token for one in cut.logprobs) == cut.text + texts[count - 2]


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 1, "top_k": 30},
    {"temperature": 0.9, "seed": 2, "top_p": 0.8, "min_p": 0.05, "logprobs": 2},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.2, "temperature": 0.8, "seed": 3},
    {"logit_bias": {500: 5.0}, "logprobs": 1},
    {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.1, "presence_penalty": 0.3, "top_k": 50},
    {"temperature": 0.7},
]


def mixed_answers(gateway: Gateway, mixed: list[dict[str, Any]], max_tokens: int) -> None:
    """Ask for each alone and for all at once; where a seed or nothing draws, both are the same."""
    prompt = "Tell me about the water of the river and the fish in it"
    alone = [finish(gateway, gateway.submit(prompt, max_tokens=max_tokens, **sampling)) for sampling in mixed]
    rids = [gateway.submit(prompt, max_tokens=max_tokens, **sampling) for sampling in mixed]
    for sampling, one, other in zip(mixed, alone, gateway.finish(*rids), strict=True):
        if sampling.get("temperature", 0.0) and "seed" not in sampling:
            continue
        assert one.tokens == other.tokens, sampling
        assert one.text == other.text
        assert len(one.logprobs) == len(other.logprobs)
        for mine, others in zip(one.logprobs, other.logprobs, strict=True):
            assert math.isclose(mine.logprob or 0.0, others.logprob or 0.0, abs_tol=5e-3)


def test_an_answer_does_not_depend_on_the_others_in_the_batch(tiny: Tiny) -> None:
    mixed_answers(tiny[1], MIXED, 24)


@pytest.mark.real_model
@pytest.mark.slow
def test_so_it_is_with_the_default_model(real_model: Path, blas: dict[str, str]) -> None:
    with WorkerProcess(real_model, module="worker", environment=blas) as worker:
        gateway = worker.ready().gateway()
        mixed_answers(gateway, MIXED[:6], 8)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_default_models_echo_is_scored_as_by_a_forward_pass(real_model: Path, blas: dict[str, str]) -> None:
    reference = Reference(real_model)
    with WorkerProcess(real_model, module="worker", environment=blas) as worker:
        gateway = worker.ready().gateway()
        tokens = reference.tokenizer.encode("Paris is 日本")
        answer = finish(gateway, gateway.complete(tokens, echo=True, max_tokens=2, logprobs=5))
        reference.check(tokens + answer.tokens, answer.logprobs, 5)
        # An answer cut off inside a character has its bytes in the logprobs and not in the text.
        assert b"".join(one.bytes for one in answer.logprobs).startswith(answer.text.encode())
        assert answer.text.startswith("Paris is 日本")


PENALISED = {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "logprobs": 1}


def test_a_penalised_answer_with_a_seed_goes_on_in_another_process_as_if_nothing_had_happened(tiny: Tiny) -> None:
    _, gateway, _ = tiny
    whole = gateway.ask("a story please", max_tokens=30, **PENALISED)
    for cut in (1, 9, 29):
        rid = gateway.request(
            data.Kind.CHAT,
            sampling=PENALISED | {"max_tokens": 30},
            messages=[data.ChatMessage("user", "a story please")],
            resume=data.Resume(whole.tokens[:cut]),
        )
        rest = finish(gateway, rid)
        assert rest.tokens == whole.tokens[cut:]
        assert [one.token for one in rest.logprobs] == [one.token for one in whole.logprobs[cut:]]
        assert whole.text.endswith(rest.text)


def test_an_echo_is_not_repeated_when_an_answer_goes_on(tiny: Tiny) -> None:
    _, gateway, _ = tiny
    whole = finish(gateway, gateway.complete(PROMPT, echo=True, max_tokens=10, logprobs=0))
    rid = gateway.request(
        data.Kind.COMPLETION,
        PROMPT,
        sampling={"max_tokens": 10, "logprobs": 0},
        echo=True,
        resume=data.Resume(whole.tokens[:4]),
    )
    rest = finish(gateway, rid)
    assert rest.tokens == whole.tokens[4:]
    assert [one.token for one in rest.logprobs] == [one.token for one in whole.logprobs[-6:]]
    assert whole.text.endswith(rest.text)
    assert PROMPT not in rest.text


def test_siblings_are_answered_as_if_each_had_come_alone(tiny: Tiny) -> None:
    _, gateway, _ = tiny
    prompt = "the water of the river and the long way home " * 40
    alone = finish(gateway, gateway.complete(prompt, max_tokens=12))
    first = gateway._last_rid + 1
    rids = [gateway.complete(prompt, max_tokens=12, group=first) for _ in range(4)]
    seeded = [gateway.complete(prompt, max_tokens=12, group=first, temperature=1.0, seed=n) for n in range(3)]
    gateway.abort(rids[0])
    answers = gateway.finish(*rids[1:], *seeded)
    assert {answer.text for answer in answers[:3]} == {alone.text}
    assert len({answer.text for answer in answers[3:]}) == 3


def test_steps_go_on_while_a_long_prompt_is_scored(tiny: Tiny) -> None:
    _, gateway, _ = tiny
    stream = gateway.submit("a story", max_tokens=7_000)
    gateway.until(lambda: len(gateway.answers[stream].tokens) > 5)
    answer = gateway.answers[stream]
    before = answer.steps[-1]
    scored = finish(
        gateway, gateway.complete([300 + n % 900 for n in range(2_600)], echo=True, max_tokens=0, logprobs=1)
    )
    gateway.abort(stream)
    # 2,599 tokens in chunks of 64: as many steps, each with a token for the one who streams.
    steps = scored.steps[0] - before
    assert steps >= 39
    told = zip(answer.deltas, answer.steps, strict=True)
    assert sum(len(tokens) for (_, tokens, _), step in told if before < step <= scored.steps[0]) >= steps - 2
    assert len(scored.logprobs) == 2_600
