"""mlx-lm's generation batch without what nobody reads. Main thread only.

`GenerationBatch` normalises the logits of all rows, cuts them into an array per row and hands these out, in each step:
a quarter of the time of a step of 16 rows of a small model. It also takes the whole batch apart when one row has a
logits processor or a sampler of its own. `LeanBatch` chooses the same tokens: its specification is the batch it
derives from, which `install` leaves in place where mlx-lm is not the one this was written for.
"""

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch

from protocol.logs import event
from worker.logprobs import Recorder, arrays_of, record
from worker.penalties import Constrained, Penalties, PenaltyGroup
from worker.sampling import Sampler, SeededSampler, draw_seeded

#: What we take over from mlx-lm, as far as it can be seen from outside.
_KNOWN_ARGUMENTS: Final = (
    "model",
    "uids",
    "inputs",
    "prompt_cache",
    "tokens",
    "samplers",
    "fallback_sampler",
    "logits_processors",
    "stop_sequences",
    "max_tokens",
)
_KNOWN_STATE: Final = frozenset(_KNOWN_ARGUMENTS) - {"inputs"} | {
    "_current_tokens",
    "_current_logprobs",
    "_next_tokens",
    "_next_logprobs",
    "_token_context",
    "_num_tokens",
    "_matchers",
}
#: What a batch of prompts has for each of its sequences.
_PROMPT_LISTS: Final = (
    "uids",
    "prompt_cache",
    "tokens",
    "samplers",
    "logits_processors",
    "stop_sequences",
    "max_tokens",
)
_KNOWN_PROMPT_STATE: Final = frozenset(_PROMPT_LISTS) | {"model", "prefill_step_size", "fallback_sampler"}
#: Free memory that is kept after a chunk for the next steps: to ask the system for it again takes longer than a small
#: model's step.
_KEPT_BYTES: Final = 64 * 1024**2


class Plan:
    """What has to be done to the rows of one batch; the same until a row joins or leaves."""

    def __init__(self, samplers: Sequence[Sampler], processors: Sequence[Sequence[Any]]) -> None:
        #: Rows to be scored, and how many of the likeliest tokens with each.
        self.recorded: list[tuple[int, int]] = []
        #: Rows with anything to do before the choice, and what; penalties, which come first, are done together.
        self._processed: list[tuple[int, list[Any]]] = []
        penalised: list[tuple[int, Penalties]] = []
        for row, of_row in enumerate(processors):
            self.recorded += [(row, one.top) for one in of_row if isinstance(one, Recorder)]
            penalised += [(row, one) for one in of_row if isinstance(one, Penalties)]
            rest = [one for one in of_row if not isinstance(one, Recorder | Penalties)]
            if rest:
                self._processed.append((row, rest))
        self._penalties = PenaltyGroup([one for _, one in penalised]) if penalised else None
        self._penalised = mx.array([row for row, _ in penalised], dtype=mx.int32)
        self._waits = any(isinstance(one, Constrained) for _, rest in self._processed for one in rest)
        groups: dict[Any, list[int]] = {}
        for row, sampler in enumerate(samplers):
            groups.setdefault(sampler.spread if isinstance(sampler, SeededSampler) else sampler, []).append(row)
        self._groups = [([samplers[row] for row in rows], mx.array(rows)) for rows in groups.values()]
        order = [row for rows in groups.values() for row in rows]
        self._places = mx.array(sorted(range(len(order)), key=order.__getitem__))

    def process(self, inputs: Any, logits: Any) -> Any:
        """Return the logits with the processors of the rows that have any applied."""
        if self._penalties is None and not self._processed:
            return logits
        tokens: list[int] = []
        if self._waits:
            # The model works on while the constraints look at the tokens that went into it.
            _begin(logits)
            tokens = inputs.tolist()
        # The other rows choose the same from float32; rounding back would undo small penalties.
        logits = logits.astype(mx.float32)
        if self._penalties is not None:
            rows = self._penalised
            if rows.size == logits.shape[0]:
                logits = self._penalties(inputs, logits)
            else:
                logits[rows] = self._penalties(inputs[rows], logits[rows])
        if not self._processed:
            return logits
        changed = []
        for row, processors in self._processed:
            one = logits[row : row + 1]
            for processor in processors:
                if isinstance(processor, Constrained):
                    one = processor.after(tokens[row], one)
                else:
                    one = processor(inputs[row : row + 1], one)
            changed.append(one)
        logits[mx.array([row for row, _ in self._processed])] = mx.concatenate(changed, axis=0)
        return logits

    def release(self) -> None:
        """Give the rows back what was kept for all of them together."""
        if self._penalties is not None:
            self._penalties.release()

    def choose(self, logits: Any) -> Any:
        """Return one token for each row, (rows,)."""
        if len(self._groups) == 1:
            return _draw(self._groups[0][0], logits)
        drawn = [_draw(samplers, logits[rows]) for samplers, rows in self._groups]
        return mx.concatenate(drawn, axis=0)[self._places]


def _draw(samplers: Sequence[Sampler], logits: Any) -> Any:
    first = samplers[0]
    return draw_seeded(samplers, logits) if isinstance(first, SeededSampler) else first(logits)  # type: ignore[arg-type]


def _begin(*arrays: Any) -> None:
    """Let the device compute these while we go on."""
    mx.async_eval(*arrays)  # type: ignore[no-untyped-call]


class LeanBatch(GenerationBatch):
    """`GenerationBatch` whose responses carry a `Record` as logprobs, or None for rows that did not ask."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._plan: Plan | None = None
        super().__init__(*args, **kwargs)

    def extend(self, batch: GenerationBatch) -> None:
        """Take in the rows of another batch."""
        for one in (self, batch):
            if isinstance(one, LeanBatch):
                one.drop_plan()
        super().extend(batch)  # type: ignore[no-untyped-call]

    def filter(self, keep: list[int]) -> None:
        """Keep only these rows."""
        self.drop_plan()
        super().filter(keep)

    def drop_plan(self) -> None:
        """Forget what depends on which rows there are."""
        if self._plan is not None:
            self._plan.release()
            self._plan = None

    def _step(self) -> tuple[list[int], list[Any]]:
        plan = self._plan
        if plan is None:
            plan = self._plan = Plan(self.samplers or (), self.logits_processors or ())
        inputs: Any = self._next_tokens
        done: list[Any] = self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, done
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        chosen = self._next_tokens = plan.choose(plan.process(inputs, logits))
        if plan.recorded:
            records = record(logits, chosen, plan.recorded)
            self._next_logprobs = records
            _begin(chosen, *arrays_of(records))
            mx.eval(inputs, *arrays_of(done))
        else:
            self._next_logprobs: list[Any] = [None] * len(self.uids)
            _begin(chosen)
            mx.eval(inputs)  # releases the GIL while it waits
        tokens: list[int] = inputs.tolist()
        for sequence, token in zip(self.tokens, tokens, strict=True):
            sequence.append(token)
        return tokens, done


class LeanPrompts(PromptProcessingBatch):
    """`PromptProcessingBatch` whose sequences go on in a `LeanBatch`."""

    def prompt(self, tokens: list[list[int]]) -> None:
        """Process more of each prompt: what mlx-lm does, but waits for the device once, and keeps some free memory."""
        if len(tokens) != len(self.uids):
            msg = f"{len(tokens)} pieces of {len(self.uids)} prompts"
            raise ValueError(msg)
        if not tokens:
            return
        for known, piece in zip(self.tokens, tokens, strict=True):
            known.extend(piece)
        lengths = [len(piece) for piece in tokens]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        if any(padding):
            for layer in self.prompt_cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        inputs = mx.array([piece + [0] * missing for piece, missing in zip(tokens, padding, strict=True)])
        for start in range(0, longest, self.prefill_step_size):
            if start:
                mx.eval([layer.state for layer in self.prompt_cache])
            self.model(inputs[:, start : start + self.prefill_step_size], cache=self.prompt_cache)
        if any(padding):
            for layer in self.prompt_cache:
                layer.finalize()
        mx.eval([layer.state for layer in self.prompt_cache])
        if mx.get_cache_memory() > _KEPT_BYTES:
            mx.clear_cache()

    def split(self, indices: list[int]) -> PromptProcessingBatch:
        """Take some sequences out; all of them without copying what they share."""
        if len(indices) < len(self.uids):
            return super().split(indices)  # type: ignore[no-any-return]
        whole: PromptProcessingBatch = LeanPrompts.empty(
            self.model, self.fallback_sampler, prefill_step_size=self.prefill_step_size
        )
        for name in _PROMPT_LISTS:
            setattr(whole, name, getattr(self, name))
            setattr(self, name, [])
        return whole

    def generate(self, tokens: list[list[int]]) -> LeanBatch:
        """Hand over all sequences; `tokens` are the last of each prompt."""
        if any(len(last) > 1 for last in tokens):
            self.prompt([last[:-1] for last in tokens])
        generation = LeanBatch(
            self.model,
            self.uids,
            mx.array([last[-1] for last in tokens]),
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )
        for name in _PROMPT_LISTS:
            setattr(self, name, [])
        return generation


def install(generator: BatchGenerator, model: Any) -> bool:
    """Let a generator that has no sequences yet work with lean batches; return whether mlx-lm is one we know."""
    if not _is_known(generator):
        event("batch_is_plain", level="WARNING", mlx_lm=version("mlx-lm"))
        return False
    step_tokens = generator.prefill_step_size
    generator._prompt_batch = LeanPrompts.empty(  # noqa: SLF001 - it has no other place to say so
        model, generator.sampler, prefill_step_size=step_tokens
    )
    generator._generation_batch = LeanBatch.empty(model, generator.sampler)  # noqa: SLF001
    return True


def can_copy_caches(generator: BatchGenerator) -> bool:
    """Return whether one sequence's cache can be taken out of the batches; not every kind of cache knows how."""
    batches = (generator._prompt_batch, generator._generation_batch)  # noqa: SLF001
    return all(hasattr(layer, "extract") for batch in batches for layer in batch.prompt_cache)


def batches_of(generator: BatchGenerator) -> tuple[PromptProcessingBatch, GenerationBatch]:
    """Return the batch of prompts and that of answers."""
    return generator._prompt_batch, generator._generation_batch  # noqa: SLF001 - it has no other place to ask


def _is_known(generator: Any) -> bool:
    batch = getattr(generator, "_generation_batch", None)
    prompts = getattr(generator, "_prompt_batch", None)
    return (
        type(batch) is GenerationBatch
        and type(prompts) is PromptProcessingBatch
        and tuple(inspect.signature(GenerationBatch).parameters) == _KNOWN_ARGUMENTS
        and vars(batch).keys() == _KNOWN_STATE
        and vars(prompts).keys() == _KNOWN_PROMPT_STATE
    )
