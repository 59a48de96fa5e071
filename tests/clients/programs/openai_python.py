"""The `openai` package for Python."""

import math

import openai
from features import (
    EMBEDDER,
    GREEDY,
    KEY,
    MODEL,
    PERSON,
    QUESTION,
    URL,
    WEATHER,
    check_arguments,
    check_person,
    feature,
    run,
)

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120)


def ask(**more):
    return client.chat.completions.create(model=MODEL, messages=QUESTION, **{**GREEDY, **more})


@feature("models")
def _():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).created > 0


@feature("chat")
def _():
    answer = ask()
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@feature("streaming")
def _():
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = ask()
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


@feature("stop")
def _():
    answer = ask(stop=["Par"])
    assert "Par" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


@feature("seed")
def _():
    first, second = (ask(temperature=1.2, seed=11, top_p=0.95).choices[0].message.content for _ in range(2))
    assert first == second


@feature("n")
def _():
    answer = ask(n=3, temperature=1.5, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


@feature("logprobs")
def _():
    answer = ask(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode().startswith(answer.choices[0].message.content)
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert content[0].token == content[0].top_logprobs[0].token
    assert all(token.logprob <= 0 and math.isfinite(token.logprob) for token in content)


@feature("logprobs, streaming")
def _():
    whole = ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = []
    for chunk in ask(logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [token.token for token in streamed] == [token.token for token in whole]


@feature("JSON schema")
def _():
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    answer = ask(response_format=schema, max_tokens=80)
    assert answer.choices[0].finish_reason == "stop"
    check_person(answer.choices[0].message.content)


@feature("JSON object")
def _():
    import json

    answer = ask(response_format={"type": "json_object"}, max_tokens=60, temperature=0.2, seed=3)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


@feature("tools")
def _():
    answer = ask(tools=[WEATHER], tool_choice="required", max_tokens=80)
    (call,) = answer.choices[0].message.tool_calls[:1]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    check_arguments(call.function.arguments)


@feature("tools, streaming")
def _():
    choice = {"type": "function", "function": {"name": "get_weather"}}
    name, arguments, reasons = "", "", []
    for chunk in ask(tools=[WEATHER], tool_choice=choice, max_tokens=80, stream=True):
        for delta in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            assert delta.index == 0
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
        reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    assert (name, reasons) == ("get_weather", ["tool_calls"])
    check_arguments(arguments)


@feature("tool results")
def _():
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], **GREEDY)
    assert answer.choices[0].message.role == "assistant"


@feature("completions")
def _():
    answer = client.completions.create(model=MODEL, prompt=["The capital of France is", "2, 4, 6,"], **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text


@feature("echo and logprobs")
def _():
    prompt = "The capital of France is Paris"
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=1, temperature=0)
    choice = answer.choices[0]
    assert choice.text == prompt
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset[0] == 0


@feature("embeddings")
def _():
    cat, kitten, tax = (
        item.embedding
        for item in client.embeddings.create(model=EMBEDDER, input=["a cat", "a kitten", "income tax law"]).data
    )
    near, far = (sum(x * y for x, y in zip(cat, other, strict=True)) for other in (kitten, tax))
    assert near > far + 0.2
    floats = client.embeddings.create(model=EMBEDDER, input="a cat", encoding_format="float").data[0].embedding
    assert max(abs(x - y) for x, y in zip(cat, floats, strict=True)) < 1e-4


@feature("errors")
def _():
    try:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
        assert error.request_id
    else:
        raise AssertionError
    try:
        ask(temperature=9)
    except openai.BadRequestError as error:
        assert error.param == "temperature"
    else:
        raise AssertionError


run()
