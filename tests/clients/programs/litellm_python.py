"""`litellm`, as its proxy and many agents use it."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet at import

import litellm
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

common = {"api_base": URL, "api_key": KEY, "num_retries": 0, "timeout": 120}


def ask(**more):
    return litellm.completion(model=f"openai/{MODEL}", messages=QUESTION, **common, **{**GREEDY, **more})


@feature("chat")
def _():
    assert "Paris" in ask().choices[0].message.content


@feature("streaming")
def _():
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True) if chunk.choices)
    assert text == ask().choices[0].message.content


@feature("JSON schema")
def _():
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    check_person(ask(response_format=schema, max_tokens=80).choices[0].message.content)


@feature("tools")
def _():
    answer = ask(tools=[WEATHER], tool_choice="required", max_tokens=80)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    check_arguments(call.function.arguments)


@feature("tools, streaming")
def _():
    chunks = list(ask(tools=[WEATHER], tool_choice="required", max_tokens=80, stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    check_arguments(whole.choices[0].message.tool_calls[0].function.arguments)


@feature("completions")
def _():
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="The capital of France is", **common, **GREEDY
    )
    assert "Paris" in answer.choices[0].text


@feature("embeddings")
def _():
    answer = litellm.embedding(model=f"openai/{EMBEDDER}", input=["a cat"], encoding_format="float", **common)
    assert len(answer.data[0]["embedding"]) == 384


@feature("errors")
def _():
    try:
        litellm.completion(model="openai/nobody", messages=QUESTION, **common)
    except litellm.NotFoundError as error:
        assert "nobody" in str(error)
    else:
        raise AssertionError


run()
