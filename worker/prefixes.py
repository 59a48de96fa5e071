"""What the batch asks about prefixes: have we processed the beginning of this prompt before? Main thread only.

Keys and values are taken out of the running batch block by block (`worker.prefix_kv`), kept in memory
(`worker.prefix_tree`) and on disk (`worker.prefix_disk`), and given to the next request that begins the same.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from protocol.logs import event
from worker.prefix_chain import BLOCK_TOKENS, Chain, root_name
from worker.prefix_disk import PrefixDisk
from worker.prefix_kv import Layout
from worker.prefix_stats import UNUSED_S, Reporter, Stats, allowed
from worker.prefix_tree import Block, Tree
from worker.prefix_wear import Wear

#: Answers are looked at for new blocks every so many steps: taking them waits for the step that is under way.
_ANSWERS_EVERY: Final = 32
#: A disk that is slower than this is not waited for.
_DISK_WAIT_S: Final = 2.0
#: Bytes that are taken over from the disk between two steps of the batch.
_TAKE_BYTES: Final = 64 * 1024 * 1024
#: The disk learns this often that a prefix is in use.
_TOUCH_EVERY_S: Final = 300.0
_MAX_TOUCHED: Final = 4096
_CLOSE_S: Final = 1.5


class Search(msgspec.Struct):
    """What is looked for: at most `most` tokens of a sequence. `ticket` 0: all there is, is in memory."""

    chain: Chain
    most: int
    ticket: int = 0
    give_up_at: float = 0.0
    #: Where the batch has to stop for a moment: nowhere, blocks are taken wherever it does.
    stop_at: int = 0

    @property
    def names(self) -> list[bytes]:
        """The blocks that could be of use."""
        return self.chain.names[: -(-self.most // BLOCK_TOKENS)]


class _Row(msgspec.Struct):
    """A sequence in the batch, and how many of its blocks are kept or were given up."""

    chain: Chain
    done: int


class Prefixes:
    """`spare` returns how many bytes more the process may use; negative when it uses too many already."""

    def __init__(
        self,
        layout: Layout,
        binding: bytes,
        limit_bytes: int,
        *,
        disk: PrefixDisk | None = None,
        wear: Wear | None = None,
        spare: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = layout
        self._binding = binding
        self._limit_bytes = limit_bytes
        self._tree = Tree(limit_bytes)
        self._disk = disk
        self._wear = wear
        self._spare = spare
        self._clock = clock
        self._rows: dict[int, _Row] = {}
        self._open: set[int] = set()
        self._touched: dict[bytes, float] = {}
        self._steps = 0
        self.stats = Stats()
        self._reporter = Reporter(clock)

    @property
    def bytes(self) -> int:
        """What is kept in memory."""
        return self._tree.bytes

    @property
    def limit_bytes(self) -> int:
        """What may be kept in memory now: less than was configured while the process is short of it."""
        return self._tree.limit_bytes

    # -- a request begins -------------------------------------------------------------------------------------

    def search(self, tokens: Sequence[int], salt: str, most: int) -> Search:
        """Begin to look for the first `most` tokens of a sequence; what lies on disk is sent for."""
        self.stats.requests += 1
        search = Search(Chain(root_name(self._binding, salt)), most)
        search.chain.extend(tokens)
        names, disk = search.names, self._disk
        if disk is None:
            return search
        here = self._tree.known(names)
        room = here + max(0, self._tree.limit_bytes // self._layout.block_bytes - here)
        wanted = []
        for name in names[here:room]:
            if name not in disk:
                break
            wanted.append(name)
        search.ticket = disk.load(wanted) if wanted else 0
        if search.ticket:
            search.give_up_at = self._clock() + _DISK_WAIT_S
            self._open.add(search.ticket)
        return search

    def arrived(self, search: Search) -> bool:
        """Return whether there is nothing more to wait for."""
        return search.ticket not in self._open or self._clock() >= search.give_up_at

    def take_in(self, searches: Sequence[Search], wait_s: float = 0.0) -> None:
        """Take over what the disk has brought, so much at a time; wait for it if nothing else is to be done."""
        if self._disk is None:
            return
        by_ticket = {search.ticket: search for search in searches}
        taken = 0
        while taken < _TAKE_BYTES:
            loaded = self._disk.poll(wait_s)
            if loaded is None:
                return
            wait_s = 0.0
            if loaded.last:
                self._open.discard(loaded.ticket)
            search = by_ticket.get(loaded.ticket)
            if search is None or loaded.payload is None:
                continue
            taken += loaded.payload.nbytes
            depth = search.names.index(loaded.name)
            try:
                data = self._layout.from_bytes(loaded.payload)
            except ValueError:
                continue
            block = Block(loaded.name, depth, data, self._layout.block_bytes)
            if self._tree.add(search.names, [block], self._clock()):
                self.stats.tokens_from_disk += BLOCK_TOKENS

    def give(self, search: Search) -> tuple[list[Any] | None, int]:
        """Return a cache of the beginning of the sequence and how many tokens are in it, at most those asked for."""
        self.abandon(search)
        now = self._clock()
        found = self._tree.find(search.names, now)
        tokens = min(len(found) * BLOCK_TOKENS, search.most)
        if tokens <= 0:
            return None, 0
        layers = self._layout.join([block.data for block in found], tokens)
        if not self._layout.holds(layers, tokens):
            self._tree.drop(search.names)
            self.stats.rejected += 1
            event("prefix_rejected", level="WARNING", tokens=tokens)
            return None, 0
        self.stats.hits += 1
        self.stats.tokens_reused += tokens
        for block in found:
            block.hits += 1
            self._save(block, now)
        self._touch(found, now)
        return layers, tokens

    def abandon(self, search: Search) -> None:
        """Wait no longer for what was sent for."""
        if self._disk is not None and search.ticket in self._open:
            self._open.remove(search.ticket)
            self._disk.forget(search.ticket)

    # -- while it runs ----------------------------------------------------------------------------------------

    def follow(self, uid: int, search: Search, tokens: int) -> None:
        """Keep what this sequence of the batch brings beyond its first `tokens`, which it was given."""
        self._rows[uid] = _Row(search.chain, tokens // BLOCK_TOKENS)

    def leave(self, uid: int) -> None:
        """Forget a sequence that has left the batch."""
        self._rows.pop(uid, None)

    def harvest(self, prompts: Any, answers: Any, *, prefilled: bool) -> None:
        """Take new full blocks out of the two batches of mlx-lm, after a step of them."""
        self._steps += 1
        answers_due = self._steps % _ANSWERS_EVERY == 0
        if not self._rows or not (prefilled or answers_due):
            return
        self._yield()
        if prefilled:
            self._cut(prompts)
        if answers_due:
            self._cut(answers)
            self._reporter.report(self.stats, self.bytes, self.limit_bytes, len(self._tree))

    def _cut(self, batch: Any) -> None:
        now = self._clock()
        for index, uid in enumerate(batch.uids):
            row = self._rows.get(uid)
            tokens = batch.tokens[index]
            if row is None or len(tokens) < (row.done + 1) * BLOCK_TOKENS:
                continue
            names = row.chain.names
            row.chain.extend(tokens)
            first, end = row.done, len(tokens) // BLOCK_TOKENS
            row.done = end
            while first < end and names[first] in self._tree:
                first += 1
            if first == end or (first and names[first - 1] not in self._tree):
                continue
            cut = self._layout.cut(batch.prompt_cache, index, len(tokens), first, end - first)
            size = self._layout.block_bytes
            blocks = [Block(names[first + n], first + n, data, size) for n, data in enumerate(cut)]
            self._tree.add(names, blocks, now)
            for block in blocks:
                if block.name in self._tree:
                    self._save(block, now)

    def _yield(self) -> None:
        """Give way: what the requests need comes before what may be needed again."""
        self._tree.limit_bytes = allowed(self._limit_bytes, self._tree.bytes, self._spare)
        self._tree.shrink(self._tree.limit_bytes)

    # -- memory and the end -----------------------------------------------------------------------------------

    def clear(self) -> int:
        """Keep nothing in memory; return how many bytes went. What is on disk stays."""
        self.take_in(())
        return self._tree.shrink(0)

    def drop_unused(self) -> int:
        """Let go what nobody has used for an hour; return how many bytes went."""
        return self._tree.drop_unused_since(self._clock() - UNUSED_S)

    def close(self) -> None:
        """Write what is in memory and not on disk, as much as goes in a moment: the next process begins with it."""
        if self._disk is None:
            return
        for block in self._tree.recent():
            if not self._disk.save(block.name, block.depth, self._layout.to_bytes(block.data), block, block.nbytes):
                break
        self._disk.close(_CLOSE_S)

    def disown(self) -> None:
        """Drop everything this process made: its engine failed, and nobody knows since when."""
        self._tree.shrink(0)
        if self._disk is not None:
            self._disk.disown()

    # -- the disk ---------------------------------------------------------------------------------------------

    def _save(self, block: Block, now: float) -> None:
        disk = self._disk
        if disk is None or block.name in disk:
            return
        if block.hits or self._wear is None or self._wear.allows(block.nbytes, now):
            disk.save(block.name, block.depth, self._layout.to_bytes(block.data), block, block.nbytes)

    def _touch(self, blocks: list[Block], now: float) -> None:
        if self._disk is None or now - self._touched.get(blocks[-1].name, float("-inf")) < _TOUCH_EVERY_S:
            return
        if len(self._touched) >= _MAX_TOUCHED:
            self._touched.clear()
        self._touched[blocks[-1].name] = now
        self._disk.touch([(block.name, block.depth) for block in blocks])
