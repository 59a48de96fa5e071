"""A worker process with an encoder: its vectors are the model's, alone and among others, and it refuses in words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol import control, data
from protocol.config import ModelsConfig
from protocol.states import Phase
from tests.encoderkit import Reference
from tests.modelkit import WORDS, make_tiny_encoder
from tests.workerkit import INCARNATION, Gateway, WorkerProcess

NOISE = 2e-5


class EmbeddingGateway:
    """Asks for embeddings and rankings over the harness's gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._rid = 0
        self.results: dict[int, Any] = {}
        # The harness follows streams; what comes as one message is of interest here.
        gateway._on_frame = self._on_frame  # type: ignore[method-assign]

    def _on_frame(self, frame: bytes) -> None:
        message = self._gateway._decoder.decode(frame)
        assert message.incarnation == INCARNATION
        if isinstance(message, data.Step):
            assert message.deltas == []
        elif not isinstance(message, data.Accepted):
            assert message.rid not in self.results, "answered twice"
            self.results[message.rid] = message

    def submit(self, kind: data.Kind, inputs: list[Any], *, deadline_s: float = 60.0, dimensions: int = 0) -> int:
        self._rid += 1
        self._gateway.send(
            data.Submit(
                INCARNATION, self._rid, kind, [], data.Sampling(), deadline_s, inputs=inputs, dimensions=dimensions
            )
        )
        return self._rid

    def wait(self, *rids: int) -> list[Any]:
        self._gateway.until(lambda: all(rid in self.results for rid in rids))
        return [self.results[rid] for rid in rids]

    def abort(self, *rids: int) -> None:
        self._gateway.abort(*rids)

    def embed(self, *inputs: Any, dimensions: int = 0) -> Any:
        (result,) = self.wait(self.submit(data.Kind.EMBED, list(inputs), dimensions=dimensions))
        assert isinstance(result, data.Embedded), result
        return vectors(result)

    def rank(self, query: str, *documents: str) -> list[float]:
        (result,) = self.wait(self.submit(data.Kind.RERANK, [query, *documents]))
        assert isinstance(result, data.Ranked), result
        return result.scores

    def refused(self, kind: data.Kind, *inputs: Any, dimensions: int = 0) -> data.Refused:
        (result,) = self.wait(self.submit(kind, list(inputs), dimensions=dimensions))
        assert isinstance(result, data.Refused), result
        return result


def vectors(result: data.Embedded) -> Any:
    return np.array([np.frombuffer(vector, "<f4") for vector in result.vectors])


def sentences(count: int, longest: int = 20) -> list[str]:
    random = np.random.default_rng(7)
    return [" ".join(random.choice(WORDS, size=random.integers(1, longest + 1))) for _ in range(count)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def worker(tiny: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(tiny, module="worker", models=ModelsConfig(prefill_step_tokens=64)) as started:
        yield started.ready()


@pytest.fixture
def gateway(worker: WorkerProcess) -> EmbeddingGateway:
    return EmbeddingGateway(worker.gateway())


def test_it_says_what_it_is_for(worker: WorkerProcess) -> None:
    assert worker.supervisor is not None
    (ready,) = [message for message in worker.supervisor.messages if isinstance(message, control.Ready)]
    known = ready.capabilities
    assert (known.kinds[:2], known.max_model_len, known.has_chat_template) == (["embedding", "rerank"], 24, False)
    assert known.weight_bytes > 0


def test_vectors_are_those_of_a_float64_reference(gateway: EmbeddingGateway, tiny: Path) -> None:
    reference = Reference(tiny)
    texts = sentences(12)
    assert np.abs(gateway.embed(*texts) - [reference.vector(text) for text in texts]).max() < NOISE


def test_a_vector_is_the_same_alone_and_in_any_company(gateway: EmbeddingGateway) -> None:
    texts = sentences(200)
    together = gateway.embed(*texts)
    rids = [gateway.submit(data.Kind.EMBED, [text]) for text in texts[:30]]
    alone = np.concatenate([vectors(result) for result in gateway.wait(*rids)])
    assert np.abs(together[:30] - alone).max() < NOISE
    assert np.abs(gateway.embed(*reversed(texts))[::-1] - together).max() < NOISE
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < NOISE


@pytest.mark.parametrize("options", [{"cls": True}, {"model_type": "roberta"}, {"model_type": "xlm-roberta"}])
def test_other_poolings_and_families(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", **options)
    texts = sentences(5)
    reference = Reference(folder)
    with WorkerProcess(folder, module="worker") as worker:
        got = EmbeddingGateway(worker.ready().gateway()).embed(*texts)
    assert np.abs(got - [reference.vector(text) for text in texts]).max() < NOISE


def test_shorter_vectors_are_cut_and_of_length_1_again(gateway: EmbeddingGateway) -> None:
    texts = sentences(4)
    whole, short = gateway.embed(*texts), gateway.embed(*texts, dimensions=8)
    cut = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    assert short.shape == (4, 8)
    assert np.abs(short - cut).max() < NOISE
    assert np.array_equal(gateway.embed(*texts, dimensions=32), gateway.embed(*texts))


def test_tokens_are_taken_as_they_are(gateway: EmbeddingGateway, tiny: Path) -> None:
    reference = Reference(tiny)
    text = sentences(1)[0]
    tokens = reference.tokenizer.encode(text).ids
    assert np.array_equal(gateway.embed(tokens), gateway.embed(text))
    assert np.abs(gateway.embed(tokens, text, [5]) - [reference.vector(x) for x in (tokens, text, [5])]).max() < NOISE


def test_texts_become_tokens_and_tokens_texts(gateway: EmbeddingGateway, tiny: Path) -> None:
    text = "over the sea"
    (said,) = gateway.wait(gateway.submit(data.Kind.TOKENIZE, [text]))
    assert isinstance(said, data.Tokenized)
    assert (said.tokens, said.text) == (Reference(tiny).tokenizer.encode(text).ids, text)
    assert np.array_equal(gateway.embed(said.tokens), gateway.embed(text))
    (back,) = gateway.wait(gateway.submit(data.Kind.DETOKENIZE, [said.tokens]))
    assert (back.tokens, back.text) == (said.tokens, "[CLS] over the sea [SEP]")
    assert gateway.refused(data.Kind.DETOKENIZE, [10**6]).code == "invalid_value"
    assert gateway.refused(data.Kind.TOKENIZE).param == "prompt"


def test_documents_are_ranked_by_their_cosine(gateway: EmbeddingGateway) -> None:
    query, *documents = sentences(9)
    embedded = gateway.embed(query, *documents)
    assert np.abs(np.array(gateway.rank(query, *documents)) - embedded[1:] @ embedded[0]).max() < NOISE


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_cross_encoder_scores_pairs(model_type: str, tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", pairs=True, model_type=model_type)
    query, *documents = sentences(40, 9)
    reference = Reference(folder)
    with WorkerProcess(folder, module="worker", models=ModelsConfig(prefill_step_tokens=64)) as worker:
        gateway = EmbeddingGateway(worker.ready().gateway())
        got = gateway.rank(query, *documents)
        assert gateway.refused(data.Kind.EMBED, "the").param == "model"
        long = gateway.refused(data.Kind.RERANK, "the", "of", "and " * 22)
    assert np.abs(np.array(got) - [reference.score(query, document) for document in documents]).max() < NOISE
    assert (long.code, long.param) == ("context_length_exceeded", "documents[1]")
    assert "26 tokens" in long.message
    assert "at most 24" in long.message


@pytest.mark.parametrize(
    ("kind", "inputs", "dimensions", "code", "param"),
    [
        (data.Kind.EMBED, [], 0, "invalid_value", "input"),
        (data.Kind.EMBED, ["the", []], 0, "invalid_value", "input[1]"),
        (data.Kind.EMBED, [[1], [10**6]], 0, "invalid_value", "input[1]"),
        (data.Kind.EMBED, [[-1]], 0, "invalid_value", "input[0]"),
        (data.Kind.EMBED, ["the"], 33, "invalid_value", "dimensions"),
        (data.Kind.EMBED, ["the", "of " * 23], 0, "context_length_exceeded", "input[1]"),
        (data.Kind.EMBED, [[5] * 25], 0, "context_length_exceeded", "input[0]"),
        (data.Kind.EMBED, ["x" * 100_000], 0, "context_length_exceeded", "input[0]"),
        (data.Kind.RERANK, ["the"], 0, "invalid_value", "documents"),
        (data.Kind.RERANK, ["the " * 30, "of"], 0, "context_length_exceeded", "query"),
        (data.Kind.CHAT, [], 0, "invalid_value", "model"),
        (data.Kind.COMPLETION, ["the"], 0, "invalid_value", "model"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    gateway: EmbeddingGateway, kind: data.Kind, inputs: list[Any], dimensions: int, code: str, param: str
) -> None:
    refused = gateway.refused(kind, *inputs, dimensions=dimensions)
    assert (refused.code, refused.param) == (code, param)
    assert gateway.embed("the").shape == (1, 32)


def test_the_longest_input_fits(gateway: EmbeddingGateway, tiny: Path) -> None:
    text = "of " * 22
    assert np.abs(gateway.embed(text)[0] - Reference(tiny).vector(text)).max() < NOISE


def test_a_small_request_does_not_wait_for_a_large_one(worker: WorkerProcess, gateway: EmbeddingGateway) -> None:
    # They take turns: even if it comes late, all of them are still under way.
    large = [gateway.submit(data.Kind.EMBED, ["of " * 20] * 2000) for _ in range(4)]
    worker.heartbeat(lambda beat: beat.running > 1)  # prepared: a small one would overtake them before that
    small = gateway.submit(data.Kind.EMBED, ["the"])
    gateway.wait(small)
    assert not gateway.results.keys() & set(large)
    gateway.abort(*large[1:])
    gateway.wait(large[0])


def test_what_is_aborted_or_late_stops_within_a_step(worker: WorkerProcess, gateway: EmbeddingGateway) -> None:
    inputs = ["of " * 20] * 2000
    gone = [gateway.submit(data.Kind.EMBED, inputs) for _ in range(4)]  # they take turns, and end long after this
    late = gateway.submit(data.Kind.EMBED, inputs, deadline_s=0.05)
    worker.heartbeat(lambda beat: beat.phase is Phase.PREFILL and beat.running > 0)
    gateway.abort(*gone)
    (failed,) = gateway.wait(late)
    assert failed.code == "timeout"
    worker.heartbeat(lambda beat: (beat.running, beat.waiting, beat.phase) == (0, 0, Phase.IDLE))
    assert not gateway.results.keys() & set(gone)
    gateway.embed("the")


def test_its_steps_are_counted_while_it_works(worker: WorkerProcess, gateway: EmbeddingGateway) -> None:
    before = worker.heartbeat().step
    gateway.embed(*["of " * 20] * 100)
    assert worker.heartbeat().step - before >= 100 * 22 // 64


def test_slots_and_queue_are_bounded(tiny: Path) -> None:
    models = ModelsConfig(prefill_step_tokens=16, max_concurrent_requests=1, queue_depth=1)
    with WorkerProcess(tiny, module="worker", models=models) as worker:
        gateway = EmbeddingGateway(worker.ready().gateway())
        first, second, *more = [gateway.submit(data.Kind.EMBED, ["of " * 20] * 2000) for _ in range(6)]
        refused = gateway.wait(*more)
        gateway.abort(second)
        (result,) = gateway.wait(first)
    assert [(type(one), one.code) for one in refused] == [(data.Refused, "server_busy")] * 4
    assert isinstance(result, data.Embedded)
    assert second not in gateway.results


def test_damaged_weights_are_told_before_anyone_asks(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with WorkerProcess(folder, module="worker") as worker:
        assert worker.supervisor is not None
        dying = worker.supervisor.wait(control.Dying)
        assert worker.exit_code() == 65
    assert "does not load" in dying.message


@pytest.mark.real_model
def test_the_real_models_similarities_are_the_published_ones(embedding_model: Path) -> None:
    """Of its card at sentence-transformers; and its vectors are those of a float64 forward of the same weights."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    reference = Reference(embedding_model)
    with WorkerProcess(embedding_model, module="worker") as worker:
        gateway = EmbeddingGateway(worker.ready().gateway())
        got = gateway.embed(*texts)
        ranked = gateway.rank(*texts)
    similar = got @ got.T
    assert [round(float(similar[pair]), 4) for pair in ((0, 1), (0, 2), (1, 2))] == [0.6660, 0.1046, 0.1411]
    assert np.abs(np.array(ranked) - similar[0, 1:]).max() < NOISE
    assert np.abs(got - [reference.vector(text) for text in texts]).max() < NOISE
