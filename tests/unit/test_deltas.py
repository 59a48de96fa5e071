"""What a gateway is told of tokens, logprobs, echoes and groups, without sockets or MLX."""

from typing import Any

import pytest

from protocol.data import (
    Delta,
    Finish,
    Kind,
    Resume,
    Sampling,
    Step,
    Submit,
    Tokenized,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from protocol.errors import LmxError
from worker.detok import AnswerText, StopStrings, TokenText
from worker.entry import Limits
from worker.jobs import AT_LENGTH, AT_STOP, GOES_ON, NO_TOKEN, Job, Prepared, Remove, Scored, Stepped
from worker.outbox import MAX_UNSENT_BYTES, Outbox
from worker.requests import Book

PROMPT = "ab"


class Letters:
    """A vocabulary whose token ids are characters."""

    def spell(self, scored: Scored) -> TokenLogprob:
        return TokenLogprob(chr(scored.token), scored.logprob, chr(scored.token).encode())

    def tokenize(self, submit: Submit) -> tuple[list[int], str]:
        (text,) = submit.inputs
        if not isinstance(text, str):
            raise LmxError("invalid_value", "prompt must be a text", param="prompt")
        return [ord(letter) for letter in text], text


class Desk:
    """A book of completions of "ab"."""

    def __init__(self, slots: int = 8) -> None:
        self.sent: list[Any] = []
        self.commands: list[Any] = []
        self.book = Book(
            Limits(slots, 0, 10.0),
            1,
            self.prepare,
            Letters(),
            send=lambda _, message: self.sent.append(message),
            command=self.commands.append,
        )

    def prepare(self, submit: Submit) -> Prepared:
        text = TokenText(lambda tokens: "".join(chr(token) for token in tokens), frozenset())
        answer = AnswerText(text, StopStrings(submit.sampling.stop))
        limit = submit.sampling.max_tokens
        return Prepared([ord(letter) for letter in PROMPT], 100 if limit is None else limit, answer, echo=PROMPT)

    def submit(
        self, rid: int, *, gateway: bytes = b"gw", kind: Kind = Kind.COMPLETION, **fields: Any
    ) -> None:  # fmt: skip
        names = ("echo", "group", "resume", "inputs")
        given = {name: fields.pop(name) for name in names if name in fields}
        self.book.submit(gateway, Submit(1, rid, kind, [], Sampling(**fields), 60.0, **given), 0.0)

    def jobs(self) -> list[Job]:
        return [command for command in self.commands if isinstance(command, Job)]

    def say(self, letter: str, end: int = GOES_ON, *, prompt: str = "", scored: bool = True) -> Delta:
        """Let the last job have a token, scored if asked, with the scores of a prompt before it."""
        job = self.jobs()[-1]
        token = ord(letter) if letter else NO_TOKEN
        scores = [Scored(ord(one), -1.0 if at else None, []) for at, one in enumerate(prompt)]
        if letter:
            scores.append(Scored(token, -2.0, []))
        self.book.on_steps([Stepped(5, [(job.id, token, end)], {job.id: scores} if scored else {})], 1.0)
        (delta,) = self.sent[-1].deltas
        assert isinstance(delta, Delta)
        return delta

    def deltas(self) -> list[Delta]:
        return [delta for message in self.sent if isinstance(message, Step) for delta in message.deltas]


def spelled(delta: Delta) -> str:
    return "".join(one.token for one in delta.logprobs)


def test_a_logprob_comes_with_its_token_also_when_its_text_is_held_back() -> None:
    desk = Desk()
    desk.submit(1, logprobs=0, stop=("xyz",))
    assert [(delta.text, spelled(delta)) for delta in map(desk.say, "axyb")] == [
        ("a", "a"),
        ("", "x"),
        ("", "y"),
        ("xyb", "b"),
    ]


def test_what_completes_a_stop_string_has_no_logprob_and_neither_has_an_end_token() -> None:
    desk = Desk()
    desk.submit(1, logprobs=0, stop=("yz",))
    deltas = [desk.say(letter) for letter in "ayz"]
    assert "".join(delta.text for delta in deltas) == "a"
    assert [spelled(delta) for delta in deltas] == ["a", "y", ""]
    assert (deltas[-1].token_ids, deltas[-1].finish) == ([ord("z")], Finish.STOP)
    assert [command.jobs for command in desk.commands if isinstance(command, Remove)] == [[1]]
    desk.submit(2, logprobs=0)
    last = desk.say("!", AT_STOP)
    assert (last.text, last.token_ids, last.logprobs, last.finish) == ("", [ord("!")], [], Finish.STOP)


def test_the_first_delta_begins_with_the_echo_and_its_logprobs() -> None:
    desk = Desk()
    desk.submit(1, logprobs=0, echo=True)
    assert desk.jobs()[0].scores_prompt
    first = desk.say("c", prompt=PROMPT)
    assert (first.text, first.token_ids, spelled(first)) == ("abc", [ord("c")], "abc")
    assert [one.logprob for one in first.logprobs] == [None, -1.0, -2.0]
    second = desk.say("d", AT_LENGTH)
    assert (second.text, spelled(second), second.usage) == ("d", "d", Usage(2, 2))


def test_an_echo_without_logprobs_costs_no_scores() -> None:
    desk = Desk()
    desk.submit(1, echo=True)
    assert not desk.jobs()[0].scores_prompt
    assert [desk.say(letter, scored=False).text for letter in "cd"] == ["abc", "d"]


def test_a_prompt_that_is_only_scored_ends_with_no_token() -> None:
    desk = Desk()
    desk.submit(1, logprobs=0, echo=True, max_tokens=0)
    last = desk.say("", AT_LENGTH, prompt=PROMPT)
    assert (last.text, last.token_ids, spelled(last)) == ("ab", [], "ab")
    assert (last.finish, last.usage) == (Finish.LENGTH, Usage(2, 0))
    assert desk.book.running == 0


@pytest.mark.parametrize(("fields", "text"), [({"echo": True}, "ab"), ({"logprobs": 3}, ""), ({}, "")])
def test_nothing_to_do_is_answered_without_the_engine(fields: dict[str, Any], text: str) -> None:
    desk = Desk()
    desk.submit(1, max_tokens=0, **fields)
    (delta,) = desk.deltas()
    assert (delta.text, delta.finish, delta.usage) == (text, Finish.LENGTH, Usage(2, 0))
    assert desk.commands == []


def test_what_goes_on_echoes_nothing() -> None:
    desk = Desk()
    desk.submit(1, echo=True, logprobs=0, resume=Resume([ord("c")]))
    assert not desk.jobs()[0].scores_prompt
    assert desk.say("d").text == "d"
    desk.submit(2, echo=True, max_tokens=1, resume=Resume([ord("c")]))
    assert desk.deltas()[-1].text == ""


def test_groups_of_two_gateways_are_two() -> None:
    desk = Desk()
    for gateway in (b"one", b"two"):
        for rid in (5, 6):
            desk.submit(rid, gateway=gateway, group=5)
    desk.submit(9)
    one, same, other, too, none = [job.group for job in desk.jobs()]
    assert one == same != other == too
    assert none == 0


def test_tokens_are_told_while_every_slot_is_taken() -> None:
    desk = Desk(slots=1)
    desk.submit(1)
    desk.submit(2, kind=Kind.TOKENIZE, inputs=["xy"])
    assert desk.sent[-1] == Tokenized(1, 2, [ord("x"), ord("y")], "xy")
    desk.submit(3, kind=Kind.DETOKENIZE, inputs=[[1]])
    assert (desk.sent[-1].code, desk.sent[-1].param) == ("invalid_value", "prompt")
    assert len(desk.jobs()) == desk.book.running == 1


def test_a_worker_that_ends_tells_no_tokens() -> None:
    desk = Desk()
    desk.book.close_admission(LmxError("model_restarting", "ending"), 0.0)
    desk.submit(1, kind=Kind.TOKENIZE, inputs=["x"])
    assert desk.sent[-1].code == "model_restarting"


def test_an_echoed_prompt_does_not_count_as_unread_and_its_answer_does() -> None:
    outbox = Outbox()
    prompt = [TokenLogprob("a", -1.0, b"a")] * (MAX_UNSENT_BYTES // 16)
    assert outbox.add(Step(1, 1, [Delta(7, "ab", [5], logprobs=prompt)])) == []
    more = [Delta(7, "", [5], logprobs=[TokenLogprob("a", -1.0, b"a", [TopLogprob("a", -1.0, b"a")] * 20)])]
    given_up = [outbox.add(Step(1, step, more)) for step in range(MAX_UNSENT_BYTES // 512)]
    assert given_up[0] == []
    assert [7] in given_up


def test_steps_that_are_taken_together_are_one_message_with_one_delta_for_each_request() -> None:
    desk = Desk()
    desk.submit(1, logprobs=0)
    desk.submit(2)
    first, second = (job.id for job in desk.jobs())
    scores = [{first: [Scored(ord(letter), -2.0, [])]} for letter in "abc"]
    desk.sent.clear()
    steps = [
        Stepped(5, [(first, ord("a"), GOES_ON), (second, ord("x"), GOES_ON)], scores[0]),
        Stepped(6, [(first, ord("b"), GOES_ON), (second, ord("y"), AT_LENGTH)], scores[1]),
        Stepped(7, [(first, ord("c"), GOES_ON)], scores[2]),
    ]
    desk.book.on_steps(steps, 1.0)
    (message,) = desk.sent
    assert isinstance(message, Step)
    assert message.step == 7
    one, two = message.deltas
    assert (one.rid, one.text, one.token_ids, spelled(one), one.finish) == (1, "abc", [97, 98, 99], "abc", None)
    assert (two.rid, two.text, two.token_ids, two.finish) == (2, "xy", [120, 121], Finish.LENGTH)
    assert two.usage is not None
    assert two.usage.completion_tokens == 2
