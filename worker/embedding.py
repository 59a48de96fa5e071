"""Brings an encoder into memory: a model folder of the BERT family, for embeddings and ranking. Main thread only."""

import math
from collections.abc import Callable
from struct import iter_unpack

import mlx.core as mx
from tokenizers import Tokenizer

from protocol.control import Capabilities
from protocol.encoder import Encoder
from protocol.modelfolder import ModelFolder
from protocol.spec import WorkerSpec
from protocol.states import WorkerExit
from worker.bert import Bert, rename
from worker.embedding_batch import EmbeddingBackend
from worker.embedding_inputs import InputMaker
from worker.failures import FatalError
from worker.intake import pace_of_inputs
from worker.jobs import EncodeJob, Loaded, Whole

_CANARY_TOKENS = 8
#: How far a vector or score of the same input may move between two runs of the canary, and a norm from 1.
_TOLERANCE = 1e-3


def read_encoder_model(folder: ModelFolder, encoder: Encoder) -> tuple[Bert, Tokenizer]:
    """Build the model with its weights still on disk, and its tokenizer. A broken folder raises anything."""
    model = Bert(encoder)
    weights: dict[str, mx.array] = {}
    for name in folder.weight_files:
        weights |= mx.load(str(folder.path / name))  # type: ignore[arg-type]
    # Without Metal float32 is the one type whose matrix products are fast.
    keep = mx.metal.is_available()
    named = [
        (name, array if keep else array.astype(mx.float32))
        for name, array in rename(weights.items(), scores_pairs=encoder.scores_pairs)
    ]
    model.load_weights(named)
    model.eval()
    return model, Tokenizer.from_file(str(folder.path / "tokenizer.json"))


def serve_encoder(spec: WorkerSpec, encoder: Encoder, model: Bert, tokenizer: Tokenizer, weight_bytes: int) -> Loaded:
    """Return the encoder as the engine and the IO thread use it; its weights are in memory."""
    inputs = InputMaker(tokenizer, encoder)
    backend = EmbeddingBackend(model, scores_pairs=encoder.scores_pairs, step_tokens=spec.models.prefill_step_tokens)
    return Loaded(
        backend=backend,
        capabilities=Capabilities(
            max_model_len=encoder.max_tokens,
            weight_bytes=weight_bytes,
            kinds=inputs.kinds,
            max_concurrent_requests=spec.models.max_concurrent_requests,
            has_chat_template=False,
        ),
        prepare=inputs.prepare,
        pace=pace_of_inputs,
        canary=EmbeddingCanary(backend.run, encoder),
        memory=lambda: (mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory()),
        vocabulary=inputs,
        answers_whole=True,
    )


class EmbeddingCanary:
    """Encodes a short sequence; the first time that compiles what is compiled."""

    def __init__(self, run: Callable[[EncodeJob], Whole], encoder: Encoder) -> None:
        self._run = run
        length = min(_CANARY_TOKENS, encoder.max_tokens)
        tokens = [number % encoder.shape.vocab_size for number in range(length)]
        self._job = EncodeJob(id=-1, prompt=tokens, max_tokens=1, ends=[length], seconds=[length])
        self._first: list[float] | None = None

    def __call__(self) -> None:
        """Raise unless a vector is finite and of length 1, and that of the first time: weights and GPU do not change.

        Of a model that scores pairs: unless the score is finite and that of the first time.
        """
        answer = self._run(self._job)
        vector = answer.scores or [number for row in answer.vectors for (number,) in iter_unpack("<f", row)]
        norm = 1.0 if answer.scores else math.hypot(*vector)
        if not all(map(math.isfinite, vector)) or abs(norm - 1) > _TOLERANCE:
            msg = "[canary] the self-test gave no vector of length 1"
            raise RuntimeError(msg)
        if self._first is None:
            self._first = vector
        elif math.dist(vector, self._first) > _TOLERANCE:
            raise FatalError(WorkerExit.GPU_POISONED, "[canary] the self-test gave another vector than the first time")
