"""Answers that are more than one text: choices, tool calls, thoughts, log probabilities, prompts, tokens."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from protocol.config import GatewayConfig
from protocol.control import Capabilities
from protocol.data import (
    Abort,
    Delta,
    Failed,
    Finish,
    Kind,
    Step,
    Submit,
    Tokenized,
    TokenLogprob,
    ToolDelta,
    TopLogprob,
    Usage,
)
from protocol.states import ModelState
from tests.contract.openai_schema import check
from tests.e2e.gateway_harness import FAIL, FakeWorker, Stack, chat_body, chunks, error_code, stack, until

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS = [
    ToolDelta(0, "call_1", "add", ""),
    ToolDelta(0, arguments='{"a":'),
    ToolDelta(0, arguments="1}"),
    ToolDelta(1, "call_2", "add", "{}"),
]


def logprob(token: str, value: float | None, *tops: tuple[str, float]) -> TokenLogprob:
    return TokenLogprob(token, value, token.encode(), [TopLogprob(t, v, t.encode()) for t, v in tops])


async def tell(worker: FakeWorker, *deltas: Delta) -> None:
    await worker.send(Step(worker.incarnation, 1, list(deltas)))


def last(rid: int, text: str = "", tokens: int = 1, finish: Finish = Finish.STOP, **fields: Any) -> Delta:
    return Delta(rid, text, [1], finish, Usage(7, tokens, 3), **fields)


def ask(lmx: Stack, path: str, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(lmx.client.post(path, json={"model": "tiny", **fields}))


def complete(lmx: Stack, **fields: Any) -> asyncio.Task[httpx.Response]:
    return ask(lmx, "/v1/completions", **{"prompt": "Once", **fields})


async def accept(worker: FakeWorker, count: int) -> list[Submit]:
    return [await worker.accept() for _ in range(count)]


def events(body: str, schema: str) -> list[Any]:
    """The chunks of a stream that came to its end, each of OpenAI's shape and of one answer."""
    *found, done = chunks(body)
    assert done == "[DONE]"
    for chunk in found:
        check(chunk, schema)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) == 1
    return found


CHAT_CHUNK = "CreateChatCompletionStreamResponse"
TEXT, TEXT_CHUNK = "CreateCompletionResponse", "CreateCompletionStreamResponse"


def of_choice(found: Sequence[Any], index: int) -> list[Any]:
    return [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]


# -- tools, thoughts, log probabilities -----------------------------------------------------------------------------


async def test_a_whole_answer_has_its_tool_calls() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
        submit = await worker.accept()
        assert submit.options is not None
        assert json.loads(submit.options.tools) == [TOOL]
        await tell(worker, Delta(submit.rid, "", [1], reasoning="Let me ", tool_calls=CALLS[:2]))
        await tell(worker, last(submit.rid, finish=Finish.TOOL_CALLS, reasoning="see", tool_calls=CALLS[2:]))
        body = (await asking).json()
        check(body, "CreateChatCompletionResponse")
        assert body["choices"][0]["finish_reason"] == "tool_calls"
        assert body["choices"][0]["message"] == {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "reasoning_content": "Let me see",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
                {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
            ],
        }


async def test_a_stream_has_its_tool_calls_piece_by_piece() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(stream=True, tools=[TOOL])
        submit = await worker.accept()
        await tell(worker, Delta(submit.rid, "", [1], reasoning="hm"))
        await tell(worker, Delta(submit.rid, "So: ", [1]))
        await tell(worker, Delta(submit.rid, "", [1], tool_calls=CALLS[:1]))
        await tell(worker, Delta(submit.rid, "", [1], tool_calls=CALLS[1:]))
        await tell(worker, last(submit.rid, finish=Finish.TOOL_CALLS))
        found = events((await asking).text, CHAT_CHUNK)
        deltas = [choice["delta"] for choice in of_choice(found, 0)]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "So: "
        pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
        assert pieces[0]["id"] == "call_1"
        assert (pieces[0]["type"], pieces[0]["function"]["name"]) == ("function", "add")
        assert all(isinstance(piece["index"], int) for piece in pieces)
        assert "".join(piece["function"]["arguments"] for piece in pieces if piece["index"] == 0) == '{"a":1}'
        assert [piece["id"] for piece in pieces if "id" in piece] == ["call_1", "call_2"]
        assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_come_with_their_bytes(stream: bool) -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(stream=stream, logprobs=True, top_logprobs=2)
        submit = await worker.accept()
        assert submit.sampling.logprobs == 2
        first = logprob("Hé", -0.5, ("Hé", -0.5), ("x", float("-inf")))
        await tell(worker, Delta(submit.rid, "Hé", [1], logprobs=[first]))
        # A token that is a part of a character shows nothing yet.
        await tell(worker, Delta(submit.rid, "", [2], logprobs=[TokenLogprob("\ufffd", -1.0, b"\xe2\x98")]))
        await tell(worker, last(submit.rid, "☃", 3, logprobs=[TokenLogprob("\ufffd", -2.0, b"\x83")]))
        answer = await asking
        if stream:
            found = of_choice(events(answer.text, CHAT_CHUNK), 0)
            content = [one for choice in found if choice["logprobs"] for one in choice["logprobs"]["content"]]
            assert "".join(choice["delta"].get("content", "") for choice in found) == "Hé☃"
        else:
            check(answer.json(), "CreateChatCompletionResponse")
            content = answer.json()["choices"][0]["logprobs"]["content"]
        assert content[0] == {
            "token": "Hé",
            "logprob": -0.5,
            "bytes": [72, 195, 169],
            "top_logprobs": [
                {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169]},
                {"token": "x", "logprob": -9999.0, "bytes": [120]},
            ],
        }
        assert bytes(byte for one in content for byte in one["bytes"]).decode() == "Hé☃"


async def test_what_a_stop_string_cut_off_has_no_log_probabilities_in_a_stream_either() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(stream=True, logprobs=True, stop=" END")
        submit = await worker.accept()
        await tell(worker, Delta(submit.rid, "Hi", [1], logprobs=[logprob("Hi", -0.5)]))
        await tell(worker, Delta(submit.rid, "", [2], logprobs=[logprob(" EN", -0.5)]))
        await tell(worker, last(submit.rid, "", 3, logprobs=[]))
        found = of_choice(events((await asking).text, CHAT_CHUNK), 0)
        content = [one["token"] for choice in found if choice["logprobs"] for one in choice["logprobs"]["content"]]
        assert content == ["Hi"]


async def test_what_a_stop_string_cut_off_has_no_log_probabilities() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        found = [logprob("Hi", -0.5), logprob(" EN", -1.0), logprob("DED", -1.0)]
        asking = lmx.chat(logprobs=True, stop=" END")
        submit = await worker.accept()
        await tell(worker, last(submit.rid, "Hi", 3, logprobs=found))
        choice = (await asking).json()["choices"][0]
        assert [one["token"] for one in choice["logprobs"]["content"]] == ["Hi"]
        asking = complete(lmx, logprobs=0, stop=" END")
        submit = await worker.accept()
        await tell(worker, last(submit.rid, "Hi", 3, logprobs=found))
        choice = (await asking).json()["choices"][0]
        assert choice["logprobs"]["tokens"] == ["Hi"]


# -- several choices ----------------------------------------------------------------------------------------------


async def test_choices_are_requests_with_one_prompt_and_seeds_of_their_own() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(n=3, seed=2**63 - 2, temperature=1)
        submits = await accept(worker, 3)
        assert len({submit.rid for submit in submits}) == 3
        assert {submit.group for submit in submits} == {submits[0].rid}
        assert [submit.sampling.seed for submit in submits] == [2**63 - 2, 2**63 - 1, -(2**63)]
        for number, submit in reversed(list(enumerate(submits))):
            await tell(worker, last(submit.rid, f"answer {number}", 4))
        body = (await asking).json()
        check(body, "CreateChatCompletionResponse")
        assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [
            (0, "answer 0"),
            (1, "answer 1"),
            (2, "answer 2"),
        ]
        # The prompt is counted once.
        usage = body["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 12, 19)


async def test_choices_stream_interleaved() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(n=2, stream=True, stream_options={"include_usage": True})
        one, two = await accept(worker, 2)
        for word in "abc":
            await tell(worker, Delta(one.rid, word, [1]), Delta(two.rid, word.upper(), [1]))
        await tell(worker, last(two.rid, "!", 4))
        await tell(worker, Delta(one.rid, "d", [1]))
        await tell(worker, last(one.rid, "?", 5, Finish.LENGTH))
        found = events((await asking).text, CHAT_CHUNK)
        for index, text, reason in ((0, "abcd?", "length"), (1, "ABC!", "stop")):
            mine = of_choice(found, index)
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(choice["delta"].get("content", "") for choice in mine) == text
            assert [choice["finish_reason"] for choice in mine][-1] == reason
            assert not any(choice["finish_reason"] for choice in mine[:-1])
        assert found[-1]["choices"] == []
        assert found[-1]["usage"]["total_tokens"] == 16
        assert sum(chunk.get("usage") is not None for chunk in found) == 1


async def test_one_failing_choice_fails_the_whole_answer() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(n=2)
        one, two = await accept(worker, 2)
        await worker.send(Failed(1, two.rid, "internal_error", "words"))
        answer = await asking
        assert (answer.status_code, error_code(answer)) == (500, "internal_error")
        await worker.aborted(one.rid)

        got = ""
        body = chat_body(n=2, stream=True)
        accepting = asyncio.create_task(accept(worker, 2))
        async with lmx.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            one, two = await accepting
            await tell(worker, Delta(one.rid, "some", [1]), Delta(two.rid, "more", [1]))
            async for text in answer.aiter_text():
                if "more" not in got and "more" in got + text:
                    # Not before: an error that comes before the headers is a clean status.
                    await worker.send(Failed(1, two.rid, "internal_error", "words"))
                got += text
        assert "some" in got
        assert "[DONE]" not in got
        assert (got.count("event: error"), chunks(got)[-1]["error"]["code"]) == (1, "internal_error")
        await worker.aborted(one.rid)


async def test_leaving_ends_every_choice() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(n=3, stream=True)
        submits = await accept(worker, 3)
        asking.cancel()
        abort = await worker.receive(Abort)
        assert sorted(abort.rids) == sorted(submit.rid for submit in submits)


async def test_every_choice_goes_on_in_the_next_process() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        body: list[str] = []

        async def read() -> None:
            async with lmx.client.stream("POST", "/v1/chat/completions", json=chat_body(n=2, stream=True)) as answer:
                async for piece in answer.aiter_text():
                    body.append(piece)  # noqa: PERF401 - looked at while it grows

        asking = asyncio.create_task(read())
        submits = await accept(worker, 2)
        await tell(worker, *(Delta(submit.rid, "Hel", [1]) for submit in submits))
        # A dead process' unsent words are lost: only what has reached the client is surely continued.
        await until(lambda: "".join(body).count('"Hel"') == 2)
        worker.die()
        again = await lmx.start_worker("tiny", 2)
        rids = set()
        for _ in submits:
            # On probation: one after the other.
            submit = await again.accept()
            assert submit.resume is not None
            assert submit.resume.token_ids == [1]
            rids.add(submit.rid)
            await again.step(submit.rid, "lo", finish=Finish.STOP)
        assert rids == {submit.rid for submit in submits}
        await asking
        found = events("".join(body), CHAT_CHUNK)
        texts = ["".join(c["delta"].get("content", "") for c in of_choice(found, index)) for index in (0, 1)]
        assert texts == ["Hello", "Hello"]


async def test_choices_that_cannot_go_on_end_as_one() -> None:
    async with stack(FAIL) as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(n=2)
        await accept(worker, 2)
        worker.die()
        answer = await asking
        assert (answer.status_code, error_code(answer)) == (503, "worker_crashed")


# -- completions --------------------------------------------------------------------------------------------------


async def test_a_completion_reaches_the_worker_as_it_is() -> None:
    async with stack(GatewayConfig(completion_timeout_s=60)) as lmx:
        worker = await lmx.start_worker()
        asking = complete(lmx, prompt=[5, 6], max_tokens=3, stop="x", odd=1)
        submit = await worker.accept()
        assert (submit.kind, submit.inputs, submit.messages, submit.echo) == (Kind.COMPLETION, [[5, 6]], [], False)
        assert (submit.sampling.max_tokens, submit.sampling.stop) == (3, ("x",))
        assert 0 < submit.deadline_s <= 60
        await tell(worker, last(submit.rid, " upon", 1, Finish.LENGTH))
        answer = await asking
        body = answer.json()
        check(body, TEXT)
        assert answer.headers["x-lmx-ignored"] == "odd"
        assert body["choices"] == [{"text": " upon", "index": 0, "logprobs": None, "finish_reason": "length"}]
        assert body["usage"]["total_tokens"] == 8


async def test_choices_are_numbered_over_all_prompts() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = complete(lmx, prompt=["a", "b"], n=2)
        submits = await accept(worker, 4)
        assert [submit.inputs for submit in submits] == [["a"], ["a"], ["b"], ["b"]]
        groups = [submit.group for submit in submits]
        assert groups == [submits[0].rid, submits[0].rid, submits[2].rid, submits[2].rid]
        for number, submit in enumerate(submits):
            await tell(worker, last(submit.rid, str(number)))
        body = (await asking).json()
        assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(n, str(n)) for n in range(4)]
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (14, 4)


async def test_many_prompts_leave_room_for_others() -> None:
    """As many at once as the model runs at once; the next when one has ended."""
    async with stack() as lmx:
        worker = FakeWorker(lmx.home, "tiny")
        lmx.workers.append(worker)
        lmx.supervisor.publish(worker.catalog_model(capabilities=Capabilities(2048, 1, ["chat"], 2)))
        await lmx.state("tiny", ModelState.READY)
        for stream in (False, True):
            asking = complete(lmx, prompt=[str(n) for n in range(5)], stream=stream)
            open_rids = [(await worker.accept()).rid for _ in range(2)]
            for _ in range(3):
                await tell(worker, last(open_rids.pop(0), "x"))
                # Nothing came before: this is the next message of all.
                open_rids.append((await worker.accept()).rid)
            for rid in open_rids:
                await tell(worker, last(rid, "x"))
            answer = await asking
            if stream:
                found = events(answer.text, TEXT_CHUNK)
                assert sorted({choice["index"] for chunk in found for choice in chunk["choices"]}) == list(range(5))
            else:
                assert [choice["text"] for choice in answer.json()["choices"]] == ["x"] * 5


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_is_scored(stream: bool) -> None:
    """What lm-evaluation-harness reads."""
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = complete(lmx, prompt="Once upon", echo=True, max_tokens=0, logprobs=1, stream=stream)
        submit = await worker.accept()
        assert (submit.echo, submit.sampling.max_tokens, submit.sampling.logprobs) == (True, 0, 1)
        first = [logprob("Once", None), logprob(" up", -1.5, (" a", -0.5))]
        await tell(worker, Delta(submit.rid, "Once up", [], logprobs=first))
        await tell(worker, last(submit.rid, "on", 0, Finish.LENGTH, logprobs=[logprob("on", -0.1, ("on", -0.1))]))
        answer = await asking
        if stream:
            found = of_choice(events(answer.text, TEXT_CHUNK), 0)
            made = [choice["logprobs"] for choice in found if choice["logprobs"]]
            got = {name: [one for part in made for one in part[name]] for name in made[0]}
            assert "".join(choice["text"] for choice in found) == "Once upon"
        else:
            check(answer.json(), TEXT_CHUNK)
            got = answer.json()["choices"][0]["logprobs"]
            assert answer.json()["choices"][0]["text"] == "Once upon"
        assert got == {
            "tokens": ["Once", " up", "on"],
            "token_logprobs": [None, -1.5, -0.1],
            "top_logprobs": [None, {" a": -0.5, " up": -1.5}, {"on": -0.1}],
            "text_offset": [0, 4, 7],
        }


async def test_the_best_answers_are_those_the_model_found_likeliest() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = complete(lmx, n=1, best_of=3)
        submits = await accept(worker, 3)
        for submit, value in zip(submits, (-2.0, -0.5, -1.0), strict=True):
            await tell(worker, last(submit.rid, str(value), 2, logprobs=[logprob("x", value)]))
        body = (await asking).json()
        assert [(choice["text"], choice["logprobs"]) for choice in body["choices"]] == [("-0.5", None)]
        assert body["usage"]["completion_tokens"] == 6


async def test_a_broken_completion_stream_has_no_done() -> None:
    async with stack(FAIL) as lmx:
        worker = await lmx.start_worker()
        asking = complete(lmx, stream=True)
        submit = await worker.accept()
        await tell(worker, Delta(submit.rid, "some", [1]))
        worker.die()
        answer = await asking
        assert "[DONE]" not in answer.text
        assert error_code(answer) == "worker_crashed"


# -- tokens -------------------------------------------------------------------------------------------------------


async def test_tokens_of_texts_and_conversations() -> None:
    async with stack(GatewayConfig(embedding_timeout_s=60)) as lmx:
        worker = await lmx.start_worker()
        for path in ("/tokenize", "/v1/tokenize"):
            asking = ask(lmx, path, prompt="some text")
            submit = await worker.receive(Submit)
            assert (submit.kind, submit.inputs) == (Kind.TOKENIZE, ["some text"])
            assert 0 < submit.deadline_s <= 60
            await worker.send(Tokenized(1, submit.rid, [3, 4], "some text"))
            assert (await asking).json() == {"count": 2, "max_model_len": 2048, "tokens": [3, 4]}
        asking = ask(lmx, "/tokenize", messages=[{"role": "user", "content": "hi"}])
        submit = await worker.receive(Submit)
        assert ([m.content for m in submit.messages], submit.inputs) == (["hi"], [])
        await worker.send(Tokenized(1, submit.rid, [], ""))
        assert (await asking).json()["count"] == 0
        asking = ask(lmx, "/v1/detokenize", tokens=[3, 4])
        submit = await worker.receive(Submit)
        assert (submit.kind, submit.inputs) == (Kind.DETOKENIZE, [[3, 4]])
        await worker.send(Tokenized(1, submit.rid, [3, 4], "some text"))
        assert (await asking).json() == {"prompt": "some text"}
        # An answer of another kind is the worker's fault.
        asking = ask(lmx, "/detokenize", tokens=[3])
        submit = await worker.accept()
        await tell(worker, last(submit.rid, "text"))
        assert error_code(await asking) == "protocol_error"


# -- all of them --------------------------------------------------------------------------------------------------


async def test_a_strict_gateway_refuses_what_it_does_not_know() -> None:
    async with stack(GatewayConfig(strict=True)) as lmx:
        await lmx.start_worker()
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "odd": 1}]}),
            ("/v1/completions", {"prompt": "x", "messages.odd": 1}),
        ):
            answer = await ask(lmx, path, **body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.odd")


async def test_an_inference_logs_one_line_however_many_choices() -> None:
    async with stack() as lmx:
        worker = await lmx.start_worker()
        asking = lmx.chat(n=2)
        for submit in await accept(worker, 2):
            await tell(worker, last(submit.rid, "secret answer", 3))
        await asking
        await until(lambda: any(event["event"] == "inference_complete" for event in lmx.gateway.events()))
        lines = [event for event in lmx.gateway.events() if event["event"] == "inference_complete"]
        assert [(e["kind"], e["requests"], e["prompt_tokens"], e["completion_tokens"]) for e in lines] == [
            ("chat", 2, 7, 6)
        ]
        assert "secret" not in lmx.gateway.log.read_text()
