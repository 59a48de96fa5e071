"""Brings a model folder into memory, telling how many bytes are there. Main thread only.

Importing this module does not import MLX (that takes 2 s); `load` does.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import msgspec

from protocol.control import Capabilities
from protocol.encoder import Encoder
from protocol.kvsize import kv_shape
from protocol.logs import event, exception_event
from protocol.modelfolder import ModelFolder, ModelFolderError, inspect_model_folder, read_config
from protocol.spec import MemoryLimits, WorkerSpec
from protocol.states import WorkerExit
from worker.failures import FatalError, classify, describe
from worker.jobs import Job, Loaded, Relieve
from worker.versions import check_versions

if TYPE_CHECKING:
    from worker.batch import BatchBackend
    from worker.prefix_cache import PrefixCache

#: Bytes done, bytes in all, stage.
Report = Callable[[int, int, str], None]

#: Weights are read in pieces of about this size; each is one report.
_CHUNK_BYTES: Final = 32 * 1024 * 1024
_CANARY_TOKENS: Final = 8
_TIMED_STEPS: Final = 6
_FOLDER_EXITS: Final = {"missing": WorkerExit.MISSING_MODEL, "corrupt": WorkerExit.CORRUPT_MODEL}


def load_mlx(spec: WorkerSpec, report: Report) -> Loaded:
    """Load the model of `spec`; raise `FatalError` with an exit code and words for the operator."""
    folder = _inspect(Path(spec.path))
    check_versions()
    report(0, folder.weight_bytes, "imports")
    keep_to(spec.memory)
    if folder.encoder is not None:
        return _load_encoder(spec, folder, folder.encoder, report)
    import mlx.core as mx  # noqa: PLC0415 - takes 2 s with mlx_lm; the hello must be out before

    from worker.batch import BatchBackend  # noqa: PLC0415
    from worker.completions import CompletionMaker, Kinds  # noqa: PLC0415
    from worker.intake import pace_of_inputs  # noqa: PLC0415
    from worker.prefix_open import open_prefixes  # noqa: PLC0415
    from worker.prompt import PromptMaker, find_context  # noqa: PLC0415
    from worker.vocabulary import Words, special_ids  # noqa: PLC0415

    model, tokenizer = _read(folder)
    weight_bytes = _materialise(model, report)
    eos = frozenset(int(token) for token in tokenizer.eos_token_ids)
    context = find_context(folder.max_model_len, tokenizer)
    prompts = PromptMaker(tokenizer, max_model_len=context, eos=eos)
    prompts.warm_up()
    words = Words(tokenizer, _count_tokens(model, tokenizer), prompts.tokens)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    completions = CompletionMaker(words, max_model_len=context, special=eos | special_ids(tokenizer), begin=begin)
    slots = spec.models.max_concurrent_requests
    prefixes = open_prefixes(spec, model)
    prefill = spec.models.prefill_step_tokens
    backend = BatchBackend(model, eos, slots=slots, prefill_tokens=prefill, prefixes=prefixes)
    canary = Canary(backend, len(tokenizer))
    return Loaded(
        backend=backend,
        capabilities=Capabilities(
            max_model_len=context,
            weight_bytes=weight_bytes,
            kinds=["chat", "completion", "tokenize"],
            max_concurrent_requests=slots,
            has_chat_template=prompts.has_chat_template,
        ),
        prepare=Kinds(prompts.prepare, completions.prepare, words.size),
        pace=lambda submit: pace_of_inputs(submit) if submit.inputs else prompts.pace(submit),
        canary=canary,
        time_step=canary.time_step,
        memory=lambda: (mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory()),
        vocabulary=words,
        relieve=lambda command: relieve(command, prefixes),
        close=prefixes.close,
        abandon=prefixes.disown,
        cache=kv_shape(read_config(folder.path)),
    )


def keep_to(limits: MemoryLimits) -> None:
    """Tell MLX how much it may use: a guide, beyond which it frees sooner; it refuses nothing. Nothing is wired."""
    import mlx.core as mx  # noqa: PLC0415

    if limits.memory_bytes:
        mx.set_memory_limit(limits.memory_bytes)
    if limits.buffer_bytes:
        mx.set_cache_limit(limits.buffer_bytes)


def relieve(command: Relieve, prefixes: "PrefixCache | None" = None) -> None:
    """Give back what the command says: prefixes (of old ones, if it does not say so, what nobody uses), and buffers."""
    import mlx.core as mx  # noqa: PLC0415

    if prefixes is not None:
        gone = prefixes.clear() if command.caches else prefixes.drop_unused()
        if gone:
            event("prefixes_dropped", bytes=gone)
    kept = mx.get_cache_memory()
    if kept > command.above_bytes:
        try:
            mx.clear_cache()
        except Exception as error:
            exception_event("metal_cache_clear_failed", error)
            raise
        event("metal_cache_cleared", buffer_bytes=kept)


def _load_encoder(spec: WorkerSpec, folder: ModelFolder, encoder: Encoder, report: Report) -> Loaded:
    from worker.embedding import read_encoder_model, serve_encoder  # noqa: PLC0415 - the hello must be out before

    try:
        model, tokenizer = read_encoder_model(folder, encoder)
    except Exception as error:  # a broken folder raises anything: the boundary of loading
        raise _explain(error, folder) from error
    served = serve_encoder(spec, encoder, model, tokenizer, _materialise(model, report))
    return msgspec.structs.replace(served, relieve=relieve)


class Canary:
    """Generates a token from a short prompt: prefill and decode once. The first time that compiles what is compiled."""

    def __init__(self, backend: "BatchBackend", vocabulary: int) -> None:
        self._backend = backend
        self._prompt = [number % vocabulary for number in range(_CANARY_TOKENS)]
        self._first: list[int] | None = None

    def __call__(self) -> None:
        """Raise unless the token is a token, and the one of the first time: weights and GPU do not change."""
        tokens = self._backend.generate(self._prompt, max_tokens=1)
        if len(tokens) != 1 or tokens[0] < 0:
            msg = "[canary] the self-test gave no token"
            raise RuntimeError(msg)
        if self._first is None:
            self._first = tokens
        elif tokens != self._first:
            raise FatalError(WorkerExit.GPU_POISONED, "[canary] the self-test gave another token than the first time")

    def time_step(self) -> float:
        """Return the seconds of the quickest of a few decode steps; 0 if the model ends its answer at once.

        The quickest: what else the machine does makes a step slower, nothing makes one quicker.
        """
        self._backend.insert(Job(id=-1, prompt=self._prompt, max_tokens=_TIMED_STEPS))
        ends: list[float] = []
        while len(self._backend):
            if self._backend.step():
                ends.append(monotonic())
        return min((after - before for before, after in pairwise(ends)), default=0.0)


def _inspect(path: Path) -> ModelFolder:
    try:
        return inspect_model_folder(path)
    except ModelFolderError as error:
        if error.message.startswith("remote code refused"):
            raise FatalError(WorkerExit.REMOTE_CODE_REFUSED, error.message) from None
        raise FatalError(_FOLDER_EXITS.get(error.code, WorkerExit.CORRUPT_MODEL), error.message) from None


def _read(folder: ModelFolder) -> tuple[Any, Any]:
    """Build the model with its weights still on disk, and its tokenizer. Code of the model's author never runs."""
    from mlx_lm.utils import load_model, load_tokenizer  # noqa: PLC0415

    try:
        model, config = load_model(folder.path, lazy=True, trust_remote_code=False)
        tokenizer = load_tokenizer(
            folder.path, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id", None)
        )
    except Exception as error:  # a broken folder raises anything: the boundary of loading
        raise _explain(error, folder) from error
    return model, tokenizer


def _count_tokens(model: Any, tokenizer: Any) -> int:
    """Return how many ids are tokens to both: a tokenizer may know tokens that the model has no row for."""
    known = max(tokenizer.get_vocab().values(), default=0) + 1
    rows = getattr(getattr(model, "args", None), "vocab_size", None)
    return min(known, rows) if isinstance(rows, int) else known


def _materialise(model: Any, report: Report) -> int:
    """Read all parameters into memory, piece by piece; return their bytes."""
    import mlx.core as mx  # noqa: PLC0415
    from mlx.utils import tree_flatten  # noqa: PLC0415

    flat: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    arrays = [array for _, array in flat]
    total = sum(int(array.nbytes) for array in arrays)
    done = 0
    chunk: list[Any] = []
    waiting = 0
    try:
        for array in arrays:
            chunk.append(array)
            waiting += array.nbytes
            if waiting >= _CHUNK_BYTES:
                mx.eval(chunk)
                done += waiting
                chunk, waiting = [], 0
                report(done, total, "weights")
        mx.eval(chunk)
    except RuntimeError as error:
        code = classify(error)
        if code is WorkerExit.BUG:
            code = WorkerExit.CORRUPT_MODEL
        raise FatalError(code, f"reading the weights failed: {describe(error)}") from error
    report(total, total, "weights")
    return total


def _explain(error: Exception, folder: ModelFolder) -> FatalError:
    exception_event("load_failed", error, path=str(folder.path))
    code = classify(error)
    if code is not WorkerExit.BUG:
        return FatalError(code, f"loading {folder.path} failed: {describe(error)}")
    text = str(error)
    if "trust_remote_code" in text:
        return FatalError(
            WorkerExit.REMOTE_CODE_REFUSED, f"remote code refused: {folder.path} needs code of its author to be run"
        )
    if "not supported" in text and folder.model_type in text:
        return FatalError(
            WorkerExit.CORRUPT_MODEL, f"this version of mlx-lm does not know the model type {folder.model_type!r}"
        )
    if isinstance(error, ImportError):
        return FatalError(WorkerExit.BUG, f"loading needs a module that is not installed: {describe(error)}")
    return FatalError(WorkerExit.CORRUPT_MODEL, f"{folder.path} does not load: {describe(error)}")
