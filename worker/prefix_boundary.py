"""Prefixes of models whose caches cannot be trimmed: whole states, of use only where they were taken.

What a sliding window or a recurrent layer holds says nothing of earlier positions. So a state is kept at the end of
each prompt, which the next turn of a conversation passes, and where two prompts were found to part, which is mostly the
end of a system prompt. In memory only. Main thread only.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import mlx.core as mx
import msgspec
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

from protocol.logs import event
from worker.prefix_stats import UNUSED_S, Reporter, Stats, allowed

#: A shorter one costs less to process than to keep.
MIN_TOKENS: Final = 64
#: States that are looked through for each request.
_MAX_STATES: Final = 256
#: Of those, the most recently used ones are compared to find where prompts part.
_MAX_COMPARED: Final = 32


class Sought(msgspec.Struct):
    """What is looked for: at most `most` tokens of a sequence."""

    salt: str
    tokens: "array[int]"
    most: int
    #: Where a state will be taken, besides the end of the prompt.
    stop_at: int = 0


class _State(msgspec.Struct, eq=False):
    """The caches of all layers after these tokens."""

    tokens: "array[int]"
    layers: list[Any]
    nbytes: int
    used_at: float


class Boundaries:
    """The counterpart of `worker.prefixes.Prefixes`; `spare` as there."""

    def __init__(
        self, limit_bytes: int, *, spare: Callable[[], int] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._configured = limit_bytes
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._spare = spare
        self._clock = clock
        #: By salt and tokens; least recently used first.
        self._states: OrderedDict[tuple[str, bytes], _State] = OrderedDict()
        self._rows: dict[int, Sought] = {}
        self.stats = Stats()
        self._reporter = Reporter(clock)

    # -- a request begins -------------------------------------------------------------------------------------

    def search(self, tokens: Sequence[int], salt: str, most: int) -> Sought:
        """Return what is looked for."""
        self.stats.requests += 1
        return Sought(salt, array("I", tokens), most)

    def arrived(self, _sought: Sought) -> bool:
        """Everything there is, is here."""
        return True

    def take_in(self, _searches: Sequence[Sought], _wait_s: float = 0.0) -> None:
        """Nothing is ever on its way."""

    def abandon(self, _sought: Sought) -> None:
        """Nothing was sent for."""

    def give(self, sought: Sought) -> tuple[list[Any] | None, int]:
        """Return the longest state that the sequence passes, and its number of tokens."""
        now = self._clock()
        whole = sought.tokens[: sought.most].tobytes()
        passed = [key for key in self._states if key[0] == sought.salt and whole.startswith(key[1])]
        best = max(passed, key=lambda key: len(key[1]), default=None)
        done = 0
        layers: list[Any] | None = None
        if best is not None:
            state = self._states[best]
            done, layers = len(state.tokens), state.layers
            if not _at(layers, done):
                self._drop(best)
                self.stats.rejected += 1
                event("prefix_rejected", level="WARNING", tokens=done)
                done, layers = 0, None
            else:
                state.used_at = now
                self._states.move_to_end(best)
                self.stats.hits += 1
                self.stats.tokens_reused += done
        sought.stop_at = self._parting(sought, done)
        return layers, done

    def _parting(self, sought: Sought, done: int) -> int:
        """Return how far the sequence goes along with another one, if that is worth a state of its own; else 0."""
        mine = np.frombuffer(sought.tokens, dtype=np.uint32)
        longest = 0
        for key in list(reversed(self._states))[:_MAX_COMPARED]:
            state = self._states[key]
            if key[0] != sought.salt:
                continue
            theirs = np.frombuffer(state.tokens, dtype=np.uint32)
            length = min(len(mine), len(theirs))
            differ = np.flatnonzero(mine[:length] != theirs[:length])
            longest = max(longest, int(differ[0]) if differ.size else length)
        return longest if done + MIN_TOKENS <= longest < sought.most else 0

    # -- while it runs ----------------------------------------------------------------------------------------

    def follow(self, uid: int, sought: Sought, _tokens: int) -> None:
        """Take a state of this sequence of the batch where one is wanted."""
        self._rows[uid] = sought

    def leave(self, uid: int) -> None:
        """Forget a sequence that has left the batch."""
        self._rows.pop(uid, None)

    def harvest(self, prompts: Any, _answers: Any, *, prefilled: bool) -> None:
        """Take states out of mlx-lm's batch of prompts, after a step of it."""
        if not prefilled or not self._rows:
            return
        self.limit_bytes = allowed(self._configured, self.bytes, self._spare)
        self._shrink(self.limit_bytes)
        for index, uid in enumerate(prompts.uids):
            sought, tokens = self._rows.get(uid), prompts.tokens[index]
            if sought is None or len(tokens) < MIN_TOKENS:
                continue
            if len(tokens) in {sought.stop_at, len(sought.tokens) - 1}:
                self._keep(sought.salt, array("I", tokens), [layer.extract(index) for layer in prompts.prompt_cache])
        self._reporter.report(self.stats, self.bytes, self.limit_bytes, len(self._states))

    def _keep(self, salt: str, tokens: "array[int]", layers: list[Any]) -> None:
        key = salt, tokens.tobytes()
        if key in self._states or not _at(layers, len(tokens)):
            return
        for layer in layers:
            # A copy: a view would keep the whole batch in memory.
            layer.state = tree_map(_own, layer.state)
        flat: list[tuple[str, Any]] = tree_flatten([layer.state for layer in layers])  # type: ignore[assignment]
        arrays = [value for _, value in flat if isinstance(value, mx.array)]
        nbytes = sum(value.nbytes for value in arrays)
        if nbytes > self.limit_bytes:
            return
        mx.eval(arrays)
        self._shrink(self.limit_bytes - nbytes, _MAX_STATES - 1)
        self._states[key] = _State(tokens, layers, nbytes, self._clock())
        self.bytes += nbytes

    # -- memory and the end -----------------------------------------------------------------------------------

    def clear(self) -> int:
        """Keep nothing; return how many bytes went."""
        return self._shrink(0)

    def drop_unused(self) -> int:
        """Let go what nobody has used for an hour; return how many bytes went."""
        had, then = self.bytes, self._clock() - UNUSED_S
        for key in [key for key, state in self._states.items() if state.used_at < then]:
            self._drop(key)
        return had - self.bytes

    def close(self) -> None:
        """Nothing outlives the process."""

    def disown(self) -> None:
        """Drop everything."""
        self._shrink(0)

    def _shrink(self, to_bytes: int, to_states: int = _MAX_STATES) -> int:
        had = self.bytes
        while self._states and (self.bytes > to_bytes or len(self._states) > to_states):
            self._drop(next(iter(self._states)))
        return had - self.bytes

    def _drop(self, key: tuple[str, bytes]) -> None:
        self.bytes -= self._states.pop(key).nbytes


def can_keep_states(model: Any) -> bool:
    """Return whether states of this model's caches can be taken out of a batch and put into another one."""
    layers = make_prompt_cache(model)
    return bool(layers) and all(hasattr(layer, "merge") for layer in layers)


def _at(layers: Sequence[Any], tokens: int) -> bool:
    """Return whether every layer that counts its tokens has so many."""
    for layer in layers:
        inner = getattr(layer, "caches", None)
        if inner is not None:
            if not _at(inner, tokens):
                return False
        elif getattr(layer, "offset", tokens) != tokens:
            return False
    return True


def _own(value: Any) -> Any:
    """Return an array with memory of its own; anything else as it is."""
    if not isinstance(value, mx.array):
        return value
    axis = next((axis for axis, length in enumerate(value.shape) if length > 1), None)
    if axis is None:
        return value + mx.zeros_like(value)
    first, rest = mx.split(value, [1], axis=axis)
    return mx.concatenate([first, rest], axis=axis)
