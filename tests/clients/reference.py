"""What the harness asked, answered by the same model in-process: no server, no batch, float32 log-probabilities."""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Return the sum of the log-probabilities of the continuation's tokens behind the context."""
    whole, before = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    logits = model(mx.array([whole[:-1]]))[0].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(whole[1:])[:, None], axis=-1)[:, 0]
    logprobs = chosen - mx.logsumexp(logits, axis=-1)
    return float(logprobs[before - 1 :].sum().item())


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_tokens: int) -> str:
    """Return the greedy answer."""
    prompt = mx.array(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    tokens: list[int] = []
    for token, _ in generate_step(prompt, model, max_tokens=max_tokens):
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(int(token))
    return str(tokenizer.decode(tokens))


def main() -> None:
    """Read the samples of a folder, write what the model itself says to each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(str(args.model))[:2]
    choices = json.loads((args.samples / "choices.json").read_text())["samples"]
    likelihoods = [[log_likelihood(model, tokenizer, *prompt) for prompt in row["prompts"]] for row in choices]
    capitals = json.loads((args.samples / "capitals.json").read_text())["samples"]
    answers = []
    for row in capitals:
        conversation = row["prompts"][0][0]
        # The harness hands its JSON over in a list.
        messages = json.loads(conversation[0] if isinstance(conversation, list) else conversation)
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        answers.append(answer(model, tokenizer, turns, 16))
    (args.samples / "reference.json").write_text(json.dumps({"choices": likelihoods, "capitals": answers}))


if __name__ == "__main__":
    main()
