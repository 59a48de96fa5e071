"""`langchain-openai`."""

from features import EMBEDDER, KEY, MODEL, PERSON, URL, WEATHER, feature, run
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

common = {"base_url": URL, "api_key": KEY, "max_retries": 0, "timeout": 120}
chat = ChatOpenAI(model=MODEL, temperature=0, max_tokens=80, **common)
QUESTION = "What is the capital of France? Answer in one word."


@feature("chat")
def _():
    answer = chat.invoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0


@feature("streaming")
def _():
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == chat.invoke(QUESTION).content


@feature("JSON schema")
def _():
    schema = {"title": "person", "description": "A person", **PERSON}
    person = chat.with_structured_output(schema, method="json_schema", strict=True).invoke("Invent a person.")
    assert set(person) == {"name", "age"}


@feature("tools")
def _():
    answer = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke("How is the weather in Paris?")
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city", "unit"}


@feature("tools, streaming")
def _():
    total = None
    for chunk in chat.bind_tools([WEATHER], tool_choice="required").stream("How is the weather in Paris?"):
        total = chunk if total is None else total + chunk
    assert total.tool_calls[0]["name"] == "get_weather"
    assert set(total.tool_calls[0]["args"]) == {"city", "unit"}


@feature("tool results")
def _():
    call = {"id": "call_1", "name": "get_weather", "args": {"city": "Paris", "unit": "C"}}
    turns = [HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), ToolMessage("18", tool_call_id="call_1")]
    assert chat.bind_tools([WEATHER]).invoke(turns).type == "ai"


@feature("logprobs")
def _():
    answer = chat.bind(logprobs=True).invoke(QUESTION)
    assert answer.response_metadata["logprobs"]["content"][0]["logprob"] <= 0


@feature("embeddings")
def _():
    embedder = OpenAIEmbeddings(model=EMBEDDER, check_embedding_ctx_length=False, **common)
    assert [len(vector) for vector in embedder.embed_documents(["a cat", "a dog"])] == [384, 384]


run()
