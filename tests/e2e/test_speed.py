"""What speed is made of must not change what clients get: real processes, real sockets."""

from pathlib import Path

import uvloop

from bench.alone import Alone
from bench.load import run_load, summary
from bench.workloads import Workload
from protocol.config import ModelsConfig
from tests.modelkit import make_tiny_model
from tests.workerkit import WorkerProcess

TOKENS = 96


def test_hundreds_of_connections_at_once_lose_none(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    try:
        workload = Workload("connections", 300, 8)
        found = summary(*uvloop.run(run_load(alone.url, "null", workload)))
    finally:
        alone.host.close()
    assert found["errors"] == {}
    assert (found["requests"], found["tokens"]) == (300, 2400)


def test_tokens_that_go_out_together_are_those_that_go_out_alone(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    answers, messages = {}, {}
    for gather_s in (0.0, 1.0):
        with WorkerProcess(model, module="worker", models=ModelsConfig(gather_s=gather_s)) as worker:
            gateway = worker.ready().gateway()
            rids = [gateway.submit(f"Hello {number}", max_tokens=TOKENS, stop=["zebra"]) for number in range(3)]
            answers[gather_s] = gateway.finish(*rids)
            messages[gather_s] = sum(count > 0 for _, count in gateway.steps)
    for alone, together in zip(answers[0.0], answers[1.0], strict=True):
        assert (together.text, together.tokens, together.usage) == (alone.text, alone.tokens, alone.usage)
        assert together.after_end == 0
    # A busy machine finds several steps at once without gathering too; half as many is far from what is expected.
    assert messages[1.0] < messages[0.0] / 2, messages
