"""`lm-evaluation-harness` through its clients of OpenAI's completions and chat completions.

Leaves what it asked and was answered in LMX_TEST_SAMPLES: the test compares it with the same model in-process.
"""

import json
import os
from pathlib import Path

from features import MODEL, URL, feature, run

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OPENAI_API_KEY="not-needed")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

HERE = Path(__file__).resolve().parents[1] / "tasks"
SAMPLES = Path(os.environ["LMX_TEST_SAMPLES"])
FOLDER = os.environ["LMX_TEST_FOLDER"]
common = f"model={MODEL},num_concurrent=4,max_retries=1,tokenizer_backend=huggingface,tokenizer={FOLDER}"


def evaluate(kind: str, endpoint: str, task: str, **more):
    os.chdir(HERE)  # the task names its data by a relative path
    return simple_evaluate(
        model=kind,
        model_args=f"{common},base_url={URL}{endpoint}",
        tasks=[task],
        task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **more,
    )


def keep(name: str, result, task: str) -> None:
    rows = [
        {
            "prompts": [[argument[0], argument[1]] for argument in sample["arguments"]],
            "answers": [response[0] for response in sample["resps"]],
        }
        for sample in result["samples"][task]
    ]
    scores = {key: value for key, value in result["results"][task].items() if isinstance(value, float)}
    (SAMPLES / f"{name}.json").write_text(json.dumps({"samples": rows, "scores": scores}, default=str))


@feature("log-likelihoods")
def _():
    keep("choices", evaluate("local-completions", "/completions", "lmx_choices"), "lmx_choices")


@feature("generation")
def _():
    result = evaluate("local-chat-completions", "/chat/completions", "lmx_capitals", apply_chat_template=True)
    keep("capitals", result, "lmx_capitals")


run()
