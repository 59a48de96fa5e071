"""Which turns of a conversation go first when it does not fit. Pure."""

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from protocol.data import ChatMessage

_KEPT_ROLES: Final = frozenset({"system", "developer"})

Fitted = TypeVar("Fitted")


def droppable(messages: Sequence[ChatMessage]) -> list[list[int]]:
    """Return what may be left out, oldest first, as groups of indices that go together.

    First whole turns: a user's message with everything up to the next one. Then, of the last turn, what the assistant
    did: each time its calls together with their results. The last user's message, what came last, and system messages
    stay.
    """
    turns: list[list[int]] = []
    for index, message in enumerate(messages):
        if message.role in _KEPT_ROLES:
            continue
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(index)
    if not turns:
        return []
    exchanges: list[list[int]] = []
    for index in turns[-1]:
        if messages[index].role == "user":
            continue
        if messages[index].role != "tool" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(index)
    return turns[:-1] + exchanges[:-1]


def drop_oldest(messages: Sequence[ChatMessage], fit: Callable[[list[ChatMessage]], Fitted | None]) -> Fitted | None:
    """Return what `fit` makes of the messages with as few of the oldest left out as it needs; None if it never fits.

    `fit` is asked about log2 of the number of groups times.
    """
    groups = droppable(messages)

    def without(count: int) -> Fitted | None:
        gone = {index for group in groups[:count] for index in group}
        return fit([message for index, message in enumerate(messages) if index not in gone])

    fitted = without(0)
    if fitted is not None or not groups:
        return fitted
    low, high = 1, len(groups)
    best = without(high)
    if best is None:
        return None
    while low < high:
        middle = (low + high) // 2
        fitted = without(middle)
        if fitted is None:
            low = middle + 1
        else:
            best, high = fitted, middle
    return best


def keep_last(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages without all that may be left out."""
    gone = {index for group in droppable(messages) for index in group}
    return [message for index, message in enumerate(messages) if index not in gone]
