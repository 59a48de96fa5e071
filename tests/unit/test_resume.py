"""An answer cut at any token and continued is the answer: text, stops, characters, counts. No MLX, no sockets."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from protocol.data import Accepted, ChatMessage, Delta, Finish, Kind, Resume, Sampling, Step, Submit, Usage
from worker.detok import AnswerText, StopStrings, TokenText
from worker.entry import Limits
from worker.jobs import AT_LENGTH, AT_STOP, GOES_ON, Job, Prepared, Remove, Stepped
from worker.requests import Book

END = 256
PROMPT = [1, 2, 3]


def byte_tokenizer() -> Tokenizer:
    """256 tokens, one per byte, in GPT-2's spelling, and one special token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    vocab = {chr(byte) if byte in printable else chr(next(spare)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


class Life:
    """One process: generates what is wanted of it, and keeps what it sent."""

    def __init__(self, tokens: list[int], stops: tuple[str, ...], max_tokens: int, said: list[int]) -> None:
        self.sent: list[Any] = []
        self.commands: list[Any] = []
        self._tokens = tokens
        self._max_tokens = max_tokens
        self.book = Book(
            Limits(4, 4, 10.0), 1, self._prepare, send=lambda _, m: self.sent.append(m), command=self.commands.append
        )
        sampling = Sampling(max_tokens=max_tokens, stop=stops)
        resume = Resume(said) if said else None
        submit = Submit(1, 1, Kind.CHAT, [ChatMessage("user", "x")], sampling, 9.0, resume=resume)
        self.book.submit(b"gw", submit, 0.0)

    def _prepare(self, submit: Submit) -> Prepared:
        text = TokenText(lambda tokens: TOKENIZER.decode(tokens, skip_special_tokens=False), {END})
        return Prepared(PROMPT, self._max_tokens, AnswerText(text, StopStrings(submit.sampling.stop)))

    def run(self, steps: int) -> None:
        """What an engine does: the tokens behind those that were said, for so many steps."""
        jobs = [command for command in self.commands if isinstance(command, Job)]
        if not jobs:
            return
        (job,) = jobs
        at, left = len(job.said), job.max_tokens
        assert self._tokens[:at] == job.said
        for step in range(steps):
            if any(isinstance(command, Remove) for command in self.commands) or left == 0:
                return
            token = self._tokens[at] if at < len(self._tokens) else END
            left -= 1
            end = AT_STOP if token == END else AT_LENGTH if left == 0 else GOES_ON
            self.book.on_steps([Stepped(step, [(job.id, token, end)])], 1.0)
            at += 1
            if end != GOES_ON:
                return

    def deltas(self) -> list[Delta]:
        return [delta for message in self.sent if isinstance(message, Step) for delta in message.deltas]


def heard(*lives: Life) -> tuple[str, list[int], Finish | None, Usage | None]:
    """What the gateway has of an answer over its lives."""
    deltas = [delta for life in lives for delta in life.deltas()]
    tokens = [token for delta in deltas for token in delta.token_ids]
    ends = [(delta.finish, delta.usage) for delta in deltas if delta.finish is not None]
    assert len(ends) <= 1
    return "".join(delta.text for delta in deltas), tokens, *(ends[0] if ends else (None, None))


def check_all_cuts(text: str, stops: tuple[str, ...], max_tokens: int) -> None:
    tokens = list(text.encode())
    whole = Life(tokens, stops, max_tokens, [])
    whole.run(10_000)
    expected = heard(whole)
    assert expected[2] is not None
    for cut in range(len(expected[1]) + 1):
        first = Life(tokens, stops, max_tokens, [])
        first.run(cut)
        said = heard(first)[1]
        if heard(first)[2] is not None:
            assert heard(first) == expected
            continue
        second = Life(tokens, stops, max_tokens, said)
        assert second.sent[0] == Accepted(1, 1, len(PROMPT))
        half = (len(expected[1]) - cut) // 2
        second.run(half)
        if heard(first, second)[2] is not None:
            assert heard(first, second) == expected
            continue
        third = Life(tokens, stops, max_tokens, heard(first, second)[1])
        third.run(10_000)
        assert heard(first, second, third) == expected


TRICKY = [
    "plain words and no more",
    "naïve café, Zürich, 日本語, 😀 and 👩‍👩‍👧‍👦 to the end",
    "almost EN, nearly END! then STOP and more",
    "日本語が終わり。続く",
    "aaab aab ab b",
    "\ufffd real replacement \ufffd",
]


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("stops", [(), ("END",), ("STOP", "OP"), ("終わり。",), ("b",), ("aab", "ab"), ("😀 a",)])
@pytest.mark.parametrize("max_tokens", [7, 1000])
def test_every_cut_of_a_text(text: str, stops: tuple[str, ...], max_tokens: int) -> None:
    check_all_cuts(text, stops, max_tokens)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="abé🌍 ", max_size=14),
    stops=st.lists(st.text(alphabet="abé🌍", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 40),
)
def test_every_cut_of_any_text(text: str, stops: list[str], max_tokens: int) -> None:
    check_all_cuts(text, tuple(stops), max_tokens)


def test_of_a_resumed_answer_everything_is_counted_once() -> None:
    life = Life(list(b"abcdef"), (), 6, list(b"abcd"))
    (job,) = life.commands
    assert (job.prompt, job.said, job.max_tokens) == (PROMPT, list(b"abcd"), 2)
    life.run(9)
    assert heard(life) == ("ef", list(b"ef"), Finish.LENGTH, Usage(3, 6))


def test_an_answer_that_had_reached_its_length_ends_at_once() -> None:
    life = Life(list(b"abcdEN"), ("END",), 6, list(b"abcdEN"))
    assert life.commands == []
    # What was held back for the stop string had not been sent: it comes with the end.
    assert life.sent[1:] == [Step(1, 0, [Delta(1, "EN", [], Finish.LENGTH, Usage(3, 6))])]
    assert (life.book.running, life.book.waiting, life.book.gateways) == (0, 0, set())


def test_an_answer_that_had_met_its_stop_string_ends_at_once() -> None:
    life = Life(list(b"abcdEND"), ("END",), 50, list(b"abcdEND"))
    assert life.commands == []
    assert life.sent[1:] == [Step(1, 0, [Delta(1, "", [], Finish.STOP, Usage(3, 7))])]
