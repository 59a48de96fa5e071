"""What the batch asks of a prefix cache, whichever kind of it a model can have. Called by the main thread only."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

from worker.prefix_stats import Stats


class _Nothing:
    """A search that finds nothing."""

    stop_at = 0


_NOTHING: Final = _Nothing()


class PrefixCache(Protocol):
    """`worker.prefixes` for caches that can be cut into blocks, `worker.prefix_boundary` for all others.

    What `search` returns is passed back as it is; its `stop_at` says where the processing of the rest has to stop.
    """

    stats: Stats

    @property
    def bytes(self) -> int:
        """What is kept in memory."""

    def search(self, tokens: Sequence[int], salt: str, most: int, /) -> Any:
        """Begin to look for the first `most` tokens of a sequence, or as many of them as there are."""

    def arrived(self, search: Any, /) -> bool:
        """Return whether there is nothing more to wait for."""

    def take_in(self, searches: Sequence[Any], wait_s: float = 0.0, /) -> None:
        """Take over what has arrived for these searches."""

    def give(self, search: Any, /) -> tuple[list[Any] | None, int]:
        """Return a cache of the beginning of the sequence, to be copied, and how many tokens are in it."""

    def abandon(self, search: Any, /) -> None:
        """Learn that nobody wants the result of a search any more."""

    def follow(self, uid: int, search: Any, tokens: int, /) -> None:
        """Learn from this sequence of the batch, which was given so many tokens."""

    def leave(self, uid: int) -> None:
        """Forget a sequence that has left the batch."""

    def harvest(self, prompts: Any, answers: Any, /, *, prefilled: bool) -> None:
        """Take what is new out of the two batches of mlx-lm, after a step; `prefilled`: there were prompts in it."""

    def clear(self) -> int:
        """Keep nothing in memory; return how many bytes went."""

    def drop_unused(self) -> int:
        """Let go what nobody has used for long; return how many bytes went."""

    def close(self) -> None:
        """Keep what the next process can use."""

    def disown(self) -> None:
        """Drop everything: the engine failed."""


class NoPrefixes:
    """Keeps nothing."""

    bytes = 0

    def __init__(self) -> None:
        self.stats = Stats()

    def search(self, _tokens: Sequence[int], _salt: str, _most: int) -> Any:
        """Find nothing."""
        return _NOTHING

    def arrived(self, _search: Any) -> bool:
        """Nothing is waited for."""
        return True

    def take_in(self, _searches: Sequence[Any], _wait_s: float = 0.0) -> None:
        """Nothing arrives."""

    def give(self, _search: Any) -> tuple[list[Any] | None, int]:
        """Give nothing."""
        return None, 0

    def abandon(self, _search: Any) -> None:
        """Nothing was sent for."""

    def follow(self, uid: int, search: Any, tokens: int) -> None:
        """Learn nothing."""

    def leave(self, uid: int) -> None:
        """Forget nothing."""

    def harvest(self, prompts: Any, answers: Any, *, prefilled: bool) -> None:
        """Take nothing."""

    def clear(self) -> int:
        """There is nothing."""
        return 0

    def drop_unused(self) -> int:
        """There is nothing."""
        return 0

    def close(self) -> None:
        """There is nothing."""

    def disown(self) -> None:
        """There is nothing."""
