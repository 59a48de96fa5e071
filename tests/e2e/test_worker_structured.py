"""Structured answers of a real worker: MLX, batches, resumes, hostile schemas."""

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from protocol import PROTOCOL_VERSION, control, data
from protocol.config import ModelsConfig
from tests.modelkit import default_model, make_tiny_model
from tests.workerkit import INCARNATION, Answer, Gateway, WorkerProcess

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "maxItems": 3},
        "where": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "kind", "tags", "where"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "add_person", "parameters": PERSON}},
    {
        "type": "function",
        "function": {"name": "count", "parameters": {"properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                                                     "additionalProperties": False}},
    },
]  # fmt: skip


class Talk:
    """One gateway's requests with options, their thoughts and calls."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.calls: dict[int, dict[int, list[str]]] = {}
        self.reasoning: dict[int, str] = {}
        self.arrivals: dict[int, list[float]] = {}
        self._plain = gateway._on_delta
        gateway._on_delta = self._on_delta  # type: ignore[method-assign]
        self._last = 1000

    def ask(self, text: str = "the sea", *, resume: list[int] | None = None, **more: Any) -> int:
        self._last += 1
        rid = self._last
        names = {field for field in data.ChatOptions.__struct_fields__ if field in more}
        options = data.ChatOptions(**{name: more.pop(name) for name in names}) if names else None
        sampling = data.Sampling(**({"temperature": 0.0, "max_tokens": 300} | more))
        messages = [data.ChatMessage("user", text)]
        self.gateway.answers[rid] = Answer()
        self.calls[rid], self.reasoning[rid], self.arrivals[rid] = {}, "", []
        resumed = None if resume is None else data.Resume(resume)
        submit = data.Submit(
            INCARNATION, rid, data.Kind.CHAT, messages, sampling, 600.0, resume=resumed, options=options
        )
        self.gateway.send(submit)
        return rid

    def _on_delta(self, step: int, delta: data.Delta) -> None:
        self._plain(step, delta)
        self.arrivals[delta.rid].append(time.monotonic())
        self.reasoning[delta.rid] += delta.reasoning
        for call in delta.tool_calls:
            name_and_arguments = self.calls[delta.rid].setdefault(call.index, ["", ""])
            name_and_arguments[0] += call.name
            name_and_arguments[1] += call.arguments


def check_person(person: Any) -> None:
    assert set(person) == set(PERSON["required"])
    assert len(person["name"]) <= 12
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 150
    assert person["kind"] in {"cat", "dog", None}
    assert len(person["tags"]) <= 3
    assert all(2 <= len(tag) <= 5 and tag.isascii() and tag.islower() for tag in person["tags"])
    assert isinstance(person["where"], bool) or -9 <= person["where"]["x"] <= 9


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    models = ModelsConfig(max_concurrent_requests=16)
    with WorkerProcess(model, module="worker", models=models) as process:
        yield process.ready()


@pytest.fixture
def talk(worker: WorkerProcess) -> Talk:
    return Talk(worker.gateway())


def test_random_text_under_a_schema_parses_and_neighbours_say_what_they_say_alone(talk: Talk) -> None:
    schema = json.dumps(PERSON).encode()
    (alone,) = talk.gateway.finish(talk.ask("the land", max_tokens=60))
    free = [talk.ask("the land", max_tokens=60) for _ in range(3)]
    bound = [talk.ask(json_schema=schema, temperature=1.5, seed=seed) for seed in range(10)]
    answers = talk.gateway.finish(*free, *bound)
    assert [answer.text for answer in answers[:3]] == [alone.text] * 3
    assert [answer.finish for answer in answers[3:]] == [data.Finish.STOP] * 10
    for answer in answers[3:]:
        check_person(json.loads(answer.text))
    assert len({answer.text for answer in answers[3:]}) > 5


def test_any_object_is_an_object_and_what_is_cut_says_so(talk: Talk) -> None:
    rids = [talk.ask(json_object=True, temperature=1.0, seed=seed, max_tokens=80) for seed in range(8)]
    for answer in talk.gateway.finish(*rids):
        assert answer.text.startswith("{")
        if answer.finish is data.Finish.STOP:
            assert isinstance(json.loads(answer.text), dict)
        else:
            assert answer.finish is data.Finish.LENGTH
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 80


def test_a_forced_call_always_parses(talk: Talk) -> None:
    tools = json.dumps(TOOLS).encode()
    options = {"tools": tools, "tool_choice": data.ToolChoice.REQUIRED, "stop": ("a", "{")}
    rids = [talk.ask(temperature=1.5, seed=seed, **options) for seed in range(8)]
    named = talk.ask(tools=tools, tool_choice=data.ToolChoice.NAMED, tool_name="count")
    answers = talk.gateway.finish(*rids, named)
    assert {answer.finish for answer in answers} == {data.Finish.TOOL_CALLS}
    assert {answer.text for answer in answers} == {""}
    for rid in rids:
        ((name, arguments),) = talk.calls[rid].values()
        parsed = json.loads(arguments)
        if name == "add_person":
            check_person(parsed)
        else:
            assert parsed["n"] in {1, 2}
    assert talk.calls[named][0][0] == "count"


def test_an_answer_under_a_grammar_goes_on_in_another_process(talk: Talk) -> None:
    options: dict[str, Any] = {"json_schema": json.dumps(PERSON).encode(), "temperature": 1.2, "seed": 5}
    (whole,) = talk.gateway.finish(talk.ask(**options))
    for cut in (1, len(whole.tokens) // 2, len(whole.tokens) - 2):
        (rest,) = talk.gateway.finish(talk.ask(resume=whole.tokens[:cut], **options))
        assert rest.tokens == whole.tokens[cut:]
        assert whole.text.endswith(rest.text)
        assert rest.finish is data.Finish.STOP


def test_hostile_schemas_cost_their_sender_alone(talk: Talk) -> None:
    alternatives = [{"anyOf": [{"$ref": f"#/$defs/d{n}"}, {"$ref": f"#/$defs/d{n}"}]} for n in range(1, 21)]
    exploding = {f"d{n}": {"allOf": [either, either]} for n, either in enumerate(alternatives)} | {
        "d20": {"type": "object", "properties": {"x": {"type": "string"}}}
    }
    hostile: list[bytes] = [
        b'{"a":' * 12_000,
        b"[" * 60_000,
        json.dumps({"enum": [str(number) for number in range(9_000)]}).encode(),
        json.dumps({"type": "string", "pattern": "(" * 3000 + "foo**" + ")" * 3000}).encode(),
        json.dumps({"$ref": "#"}).encode(),
        json.dumps({"$ref": "http://127.0.0.1:9/schema.json"}).encode(),
        json.dumps({"$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {}]} for n in range(1_200)}}).encode(),
        json.dumps({"$defs": exploding, "$ref": "#/$defs/d0"}).encode(),
        json.dumps({"type": "integer", "multipleOf": 1_000_003}).encode(),
        json.dumps({"allOf": [{"pattern": f"(.*{chr(97 + n)}.{{{n + 5}}})*"} for n in range(20)]}).encode(),
    ]
    other = talk.ask("the land", max_tokens=2_000)
    talk.gateway.until(lambda: len(talk.arrivals[other]) > 20)
    said = len(talk.gateway.answers[other].tokens)
    for schema in hostile:
        started = time.monotonic()
        (answer,) = talk.gateway.finish(talk.ask(json_schema=schema))
        assert time.monotonic() - started < 10
        assert isinstance(answer.error, data.Refused)
        assert (answer.error.code, answer.error.param) == ("invalid_value", "response_format")
    # The longest of them takes as long as dozens of tokens, which come meanwhile.
    assert len(talk.gateway.answers[other].tokens) - said > 10
    (answer,) = talk.gateway.finish(other)
    assert answer.finish is data.Finish.LENGTH
    arrivals = talk.arrivals[other]
    assert max(then - before for before, then in itertools.pairwise(arrivals)) < 7


def test_a_pattern_that_explodes_on_the_way_ends_its_request_alone(talk: Talk) -> None:
    schema = json.dumps({"type": "string", "pattern": "(.*a.{40}){20}(.*b.{50}){20}"}).encode()
    other = talk.ask("the land", max_tokens=200)
    bad = talk.ask(json_schema=schema, temperature=1.0, seed=1)
    answers = talk.gateway.finish(other, bad)
    assert answers[0].finish is data.Finish.LENGTH
    assert answers[1].code == "invalid_value"


def test_a_request_dropped_while_it_is_prepared_leaves_nothing_behind(worker: WorkerProcess, talk: Talk) -> None:
    rids = [talk.ask("the sea " * 1_000, json_object=True) for _ in range(4)]
    talk.gateway.abort(*rids)
    talk.gateway.finish(talk.ask())
    talk.gateway.finish(talk.ask(json_object=True, max_tokens=3))
    worker.heartbeat(lambda beat: beat.running == 0 and beat.waiting == 0)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_default_model_keeps_to_schemas_and_calls_tools_when_told() -> None:
    weather = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}},
                           "required": ["city"], "additionalProperties": False},
        },
    }  # fmt: skip
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    with WorkerProcess(default_model(), module="worker") as process:
        talk = Talk(process.ready().gateway())
        assert process.supervisor is not None
        # Without the fast matrix library of the supervisor's children this takes longer than an ordinary lease.
        process.supervisor.send(control.Welcome(PROTOCOL_VERSION, 900.0))
        asked = "What is the capital of France? Answer in JSON."
        about = talk.ask(asked, json_schema=json.dumps(schema).encode(), max_tokens=100)
        tools = json.dumps([weather]).encode()
        forced = talk.ask("How is the weather in Paris?", tools=tools, tool_choice=data.ToolChoice.REQUIRED)
        answers = talk.gateway.finish(about, forced, timeout_s=300)
        assert [answer.error for answer in answers] == [None, None]
        assert json.loads(answers[0].text)["city"] == "Paris"
        assert answers[0].finish is data.Finish.STOP
        assert answers[1].finish is data.Finish.TOOL_CALLS
        assert talk.calls[forced][0][0] == "get_weather"
        assert json.loads(talk.calls[forced][0][1])["city"]
