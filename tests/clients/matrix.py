"""Which client must be able to do what, and the page that says so, `docs/clients.md`."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "clients.md"


class Client(NamedTuple):
    """A client: its environment under `envs/`, its program under `programs/`, and what it must be able to do."""

    name: str
    package: str
    environment: str
    program: str
    features: tuple[str, ...]
    interpreter: str = "python"
    arguments: tuple[str, ...] = ()


_COMMON: Final = ("chat", "streaming", "JSON schema", "tools", "tools, streaming")
CLIENTS: Final = (
    Client(
        "openai (Python)",
        "openai",
        "openai",
        "openai_python.py",
        (
            "models",
            "chat",
            "streaming",
            "stop",
            "seed",
            "n",
            "logprobs",
            "logprobs, streaming",
            "JSON schema",
            "JSON object",
            "tools",
            "tools, streaming",
            "tool results",
            "completions",
            "echo and logprobs",
            "embeddings",
            "errors",
        ),
    ),
    Client(
        "openai (Node)",
        "openai",
        "node",
        "node.mjs",
        ("models", *_COMMON, "completions", "embeddings", "errors"),
        "node",
        ("openai",),
    ),
    Client(
        "langchain-openai",
        "langchain-openai",
        "langchain",
        "langchain_python.py",
        (*_COMMON, "tool results", "logprobs", "embeddings"),
    ),
    Client("litellm", "litellm", "litellm", "litellm_python.py", (*_COMMON, "completions", "embeddings", "errors")),
    Client("llm", "llm", "llm", "llm_python.py", ("chat", "streaming", "JSON schema")),
    Client(
        "Vercel ai with @ai-sdk/openai-compatible",
        "ai",
        "node",
        "node.mjs",
        (*_COMMON, "embeddings"),
        "node",
        ("ai",),
    ),
    Client("lm-evaluation-harness", "lm-eval", "lm-eval", "lm_eval_python.py", ("log-likelihoods", "generation")),
)


def version_of(client: Client) -> str:
    """Return the version of a client's package that its lock names."""
    folder = Path(__file__).resolve().parent / "envs" / client.environment
    if client.interpreter == "node":
        package = json.loads((folder / "package.json").read_text())
        return str(package["dependencies"][client.package])
    found = re.search(
        rf"^{client.package}(?:\[.*?\])?==(\S+)", (folder / "requirements.lock").read_text(), re.MULTILINE
    )
    assert found is not None, f"{client.package} is not in its own lock"
    return found[1]


def rows_of(client: Client, lines: Sequence[dict[str, Any]]) -> None:
    """Keep what a run said, if one collects it for the page (LMX_CLIENT_RESULTS names the file)."""
    file = os.environ.get("LMX_CLIENT_RESULTS")
    if not file:
        return
    with Path(file).open("a", encoding="utf-8") as stream:
        for line in lines:
            row = {"client": client.name, "feature": line["feature"], "ok": line["ok"]}
            stream.write(json.dumps(row) + "\n")


def page(results: dict[tuple[str, str], bool]) -> str:
    """Return the page: clients by features. A feature that a client does not have, or that was not tried, is empty."""
    features = list(dict.fromkeys(feature for client in CLIENTS for feature in client.features))
    head = "| | " + " | ".join(f"{client.name} {version_of(client)}" for client in CLIENTS) + " |"
    lines = [
        "# Clients",
        "",
        "Real clients in environments of their own, against a real LMX with the default chat model and the default",
        "embedding model. Written by `scripts/clients --page` from a run of `tests/clients`; do not edit.",
        "",
        "An empty cell: the client has no such feature, or it is not tried with it.",
        "",
        head,
        "|---|" + "---|" * len(CLIENTS),
    ]
    for feature in features:
        cells = []
        for client in CLIENTS:
            ok = results.get((client.name, feature))
            cells.append("" if ok is None else "yes" if ok else "**no**")
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The log-likelihoods and the greedy answers that the harness is given are also compared, one by one, with",
        "those of the same model in-process (`tests/clients/reference.py`): equal within 0.002, and word for word.",
        "",
    ]
    return "\n".join(lines)


def write_page(file: Path) -> None:
    """Write `docs/clients.md` from the results that a run left in `file`."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    PAGE.write_text(page({(row["client"], row["feature"]): row["ok"] for row in rows}), encoding="utf-8")
