"""The blocks of keys and values that are in memory: a tree by prefix, bounded in bytes. Pure; main thread only.

A block is found by its name, which stands for everything before it too (`worker.prefix_chain`), so the tree needs no
edges. What is used moves to the end of the order, the deepest block first: a block is then always used later than those
that continue it, and taking away from the front never leaves one without what comes before it.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec


class Block(msgspec.Struct, eq=False):
    """Keys and values of `BLOCK_TOKENS` tokens in all layers. `depth`: how many blocks come before it."""

    name: bytes
    depth: int
    data: tuple[Any, ...]
    nbytes: int
    #: Monotonic seconds.
    used_at: float = 0.0
    #: Requests that began with it, besides the one that made it.
    hits: int = 0


class Tree:
    """Holds at most `limit_bytes`; whoever lowers that calls `shrink`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        #: Least recently used first.
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def recent(self) -> Iterator[Block]:
        """Return the blocks, most recently used first; none comes before what it continues."""
        return reversed(list(self._blocks.values()))

    def known(self, names: Sequence[bytes]) -> int:
        """Return how many blocks from the first on are here."""
        return next((count for count, name in enumerate(names) if name not in self._blocks), len(names))

    def find(self, names: Sequence[bytes], now: float) -> list[Block]:
        """Return the blocks that are here from the first on, and note that they were used."""
        found = [self._blocks[name] for name in names[: self.known(names)]]
        self._touch(found, now)
        return found

    def add(self, names: Sequence[bytes], blocks: Sequence[Block], now: float) -> bool:
        """Take in blocks that follow each other, of the sequence with these names; return whether they all are here.

        There is no room for one whose predecessor has none, nor for one that would push out its own.
        """
        if not blocks:
            return True
        before = self.find(names[: blocks[0].depth], now)
        if len(before) < blocks[0].depth:
            return False
        kept = {block.name for block in before}
        for block in blocks:
            if block.name in self._blocks:
                block = self._blocks[block.name]  # noqa: PLW2901 - the one that is here already
            elif self._make_room(block.nbytes, kept):
                self._blocks[block.name] = block
                self.bytes += block.nbytes
            else:
                break
            kept.add(block.name)
            before.append(block)
        self._touch(before, now)
        return before[-1:] == [self._blocks.get(blocks[-1].name)]

    def shrink(self, to_bytes: int) -> int:
        """Let the least recently used go until at most so many bytes are left; return how many bytes went."""
        had = self.bytes
        while self._blocks and self.bytes > to_bytes:
            self._pop(next(iter(self._blocks)))
        return had - self.bytes

    def drop_unused_since(self, then: float) -> int:
        """Let go what nobody used after `then`; return how many bytes went."""
        had = self.bytes
        for name in [block.name for block in self._blocks.values() if block.used_at < then]:
            self._pop(name)
        return had - self.bytes

    def drop(self, names: Sequence[bytes]) -> None:
        """Forget these blocks."""
        for name in names:
            if name in self._blocks:
                self._pop(name)

    def _make_room(self, nbytes: int, kept: set[bytes]) -> bool:
        while self._blocks and self.bytes + nbytes > self.limit_bytes:
            oldest = next(iter(self._blocks))
            if oldest in kept:
                return False
            self._pop(oldest)
        return self.bytes + nbytes <= self.limit_bytes

    def _pop(self, name: bytes) -> None:
        self.bytes -= self._blocks.pop(name).nbytes

    def _touch(self, blocks: list[Block], now: float) -> list[Block]:
        for block in reversed(blocks):
            block.used_at = now
            self._blocks.move_to_end(block.name)
        return blocks
