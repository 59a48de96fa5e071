"""Which turns go first."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.data import ChatMessage, ToolCall
from worker.truncation import drop_oldest, droppable, keep_last


def says(letters: str) -> list[ChatMessage]:
    """Make messages of s(ystem), d(eveloper), u(ser), a(ssistant), c(alling assistant) and t(ool)."""
    roles = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}
    call = (ToolCall("call_1", "look", "{}"),)
    return [
        ChatMessage(roles[letter], str(number), tool_calls=call if letter == "c" else ())
        for number, letter in enumerate(letters)
    ]


def letters(messages: list[ChatMessage]) -> str:
    return "".join("c" if message.tool_calls else message.role[0] for message in messages)


def kept(text: str, most: int) -> str | None:
    """Return what is left when at most so many messages fit."""
    left = drop_oldest(says(text), lambda messages: messages if len(messages) <= most else None)
    return None if left is None else letters(left)


def test_turns_go_whole_and_oldest_first() -> None:
    assert kept("suauau", 6) == "suauau"
    assert kept("suauau", 5) == "suau"
    assert kept("suauau", 3) == "su"
    assert kept("suauau", 1) is None


def test_system_messages_stay_wherever_they_are() -> None:
    assert kept("suadauau", 5) == "sduau"
    assert kept("suadauau", 4) == "sdu"
    assert kept("susa", 3) is None


def test_calls_stay_with_their_results() -> None:
    assert kept("uacttau", 3) == "u"
    assert kept("sucttctcta", 8) == "suctcta"
    assert kept("sucttctcta", 4) == "sua"
    assert kept("sucttctct", 4) == "suct"
    assert kept("sucttctct", 3) is None


@given(st.text(alphabet="sduact", max_size=40), st.integers(0, 40))
def test_as_much_as_fits_is_kept_and_no_result_loses_its_call(text: str, most: int) -> None:
    messages = says(text)
    asked: list[int] = []

    def fit(left: list[ChatMessage]) -> list[ChatMessage] | None:
        asked.append(len(left))
        return left if len(left) <= most else None

    left = drop_oldest(messages, fit)
    assert len(asked) <= 9
    groups = droppable(messages)
    assert len({index for group in groups for index in group}) == sum(map(len, groups))
    if left is None:
        assert len(keep_last(messages)) > most
        return
    assert letters(left).replace("u", "").count("s") == text.count("s")
    dropped = len(messages) - len(left)
    sizes = [sum(map(len, groups[:count])) for count in range(len(groups) + 1)]
    assert dropped == min(size for size in sizes if len(messages) - size <= most)
    # A result is preceded by what it was preceded by.
    order = [int(message.content) for message in left]
    for before, here in zip([-1, *order], order, strict=False):
        if text[here] == "t" and here > 0 and text[here - 1] in "ct":
            assert before == here - 1
