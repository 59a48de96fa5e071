"""`llm`, the command line tool: models from its `extra-openai-models.yaml`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from features import KEY, MODEL, PERSON, URL, check_person, feature, run

folder = Path(tempfile.mkdtemp())
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: local\n  model_name: {MODEL}\n  api_base: {URL}\n  supports_schema: true\n  supports_tools: true\n"
)


def llm(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), "-m", "local", *arguments]
    environ = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": KEY}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


QUESTION = "What is the capital of France? Answer in one word."
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "60")


@feature("chat")
def _():
    assert "Paris" in llm(QUESTION, "--no-stream", *GREEDY)


@feature("streaming")
def _():
    assert llm(QUESTION, *GREEDY) == llm(QUESTION, "--no-stream", *GREEDY)


@feature("JSON schema")
def _():
    check_person(llm("Invent a person.", "--schema", json.dumps(PERSON), *GREEDY))


run()
