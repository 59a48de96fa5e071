"""`python -m bench`: LMX beside the same engine in-process and beside other servers, on this machine.

The report goes to stdout as Markdown, progress to stderr; with --out also JSON and plots into a folder.
`lmx-supervisor bench MODEL` runs it on a model of yours, `make bench` on a tiny random one.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from bench import peers
from bench.compare import Comparison, Progress, head
from bench.contenders import Contender, InProcess, Lmx, MlxLmServer, VllmMlx
from bench.options import at_least_one, end_cleanly, numbers
from bench.plot import bars
from bench.report import markdown, tokens_per_s, ttft_ms
from bench.workloads import Workload, standard
from supervisor.platform.blas import Preload, find_blas

_KINDS: Final = ("in-process", "lean", "lmx", "mlx_lm.server", "vllm-mlx")
#: Weights in memory, and what each process needs besides: if all that does not fit, they take turns in memory too.
_BESIDES: Final = 1.5


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; ends the program for wrong ones."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: a tiny random one, from a checkout)")
    parser.add_argument("--embedder", type=Path, help="an embedding model's folder, measured on LMX alone")
    parser.add_argument("--who", help="of " + ", ".join(_KINDS) + " (default: all there are)")
    parser.add_argument(
        "--streams", type=numbers, default="1,4,16,32,64", help="numbers of streams (default: 1,4,16,32,64)"
    )
    parser.add_argument("--tokens", type=at_least_one, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument(
        "--total", type=at_least_one, default=2048, help="tokens of a measurement, about (default: 2048)"
    )
    parser.add_argument("--rounds", type=at_least_one, default=3, help="alternating rounds (default: 3)")
    parser.add_argument("--no-long", action="store_true", help="leave out the prompts of 2,000 tokens")
    parser.add_argument("--blas-threads", type=at_least_one, default=1, help="of the CPU matrix library (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md, report.json and plots there")
    args = parser.parse_args(argv)
    args.told_who = args.who is not None
    args.who = args.who.split(",") if args.told_who else list(_KINDS)
    if unknown := set(args.who) - set(_KINDS):
        parser.error(f"--who: there is no {', '.join(sorted(unknown)) or 'name'}: one of {', '.join(_KINDS)}")
    for option, folder in (("--model", args.model), ("--embedder", args.embedder)):
        if folder is not None and not (folder / "config.json").is_file():
            parser.error(f"{option}: {folder} is no model folder: there is no config.json in it")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file, not a folder")
    return args


def contenders(args: argparse.Namespace, folder: Path, preload: Preload | None) -> list[Contender]:
    """Return those that are wanted and there."""
    threads = args.blas_threads
    found: list[Contender] = []
    if "in-process" in args.who:
        found.append(InProcess(folder, preload, threads, lean=False))
    if "lean" in args.who:
        found.append(InProcess(folder, preload, threads, lean=True))
    if "lmx" in args.who:
        found.append(Lmx(folder, preload, threads))
    if "mlx_lm.server" in args.who:
        found.append(MlxLmServer(folder, preload, threads))
    if "vllm-mlx" in args.who:
        python = peers.vllm_mlx()
        if python is None and args.told_who:  # who has installed LMX has no such script
            sys.stderr.write("bench: without vllm-mlx: scripts/bench-peers makes its environment\n")
        elif python is not None:
            found.append(VllmMlx(folder, preload, threads, python))
    return found


def too_large(folder: Path, count: int) -> bool:
    """Return whether `count` copies of the model do not fit into what is free."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return weights * _BESIDES * count > psutil.virtual_memory().available


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure; return the report."""
    folder = args.model.resolve() if args.model else peers.tiny_model(work / "tiny")
    preload = find_blas(work / "blas")
    found = contenders(args, folder, preload)
    workloads = standard(args.streams, args.tokens, args.total, long_prompts=not args.no_long)
    progress: Progress | None = None

    def say(text: str) -> None:
        if progress is not None:
            progress.say(text)

    taking_turns = too_large(folder, len(found))
    comparison = Comparison(found, rounds=args.rounds, one_at_a_time=taking_turns, say=say)
    embedding = None
    if args.embedder:
        embedding = Comparison(
            [Lmx(args.embedder.resolve(), preload, args.blas_threads)], rounds=args.rounds, vectors=True, say=say
        )
    vectors = [Workload("16 clients, texts of 100 words", 16, 0, 8, prompt_words=100, kind="embeddings")]
    progress = Progress(comparison.steps(workloads) + (args.rounds if embedding else 0))
    if taking_turns:
        progress.say("the models do not fit into memory side by side: each is loaded for its turn")
    results = comparison.run(workloads, progress.step)
    if embedding is not None:
        results += embedding.run(vectors, progress.step)
    progress.end()
    report = {
        **head(),
        "model": folder.name,
        "blas_threads": args.blas_threads,
        "rounds": args.rounds,
        "results": results,
    }
    return dict(msgspec.to_builtins(report))


def write(report: dict[str, Any], text: str, out: Path) -> None:
    """Write the report into a folder, as Markdown, JSON and plots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text + "\n")
    (out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    streams = [each for each in report["results"] if each["workload"]["name"].endswith(" streams")]
    names = list(dict.fromkeys(name for each in streams for name in each["rounds"]))
    (out / "tokens.svg").write_text(bars("Tokens per second, all streams", streams, names, tokens_per_s))
    (out / "ttft.svg").write_text(bars("Time to the first text, ms, p50", streams, names, ttft_ms(0.5)))


def main() -> int:
    """Run the bench; the exit code is 1 if nothing could be measured."""
    args = parse()
    end_cleanly()
    with tempfile.TemporaryDirectory(prefix="lmx-bench-", dir="/tmp") as work:
        report = run(args, Path(work))
    if not any(
        measured["requests"] for each in report["results"] for some in each["rounds"].values() for measured in some
    ):
        sys.stderr.write("bench: nothing was answered, so there is nothing to report\n")
        return 1
    text = markdown(report)
    sys.stdout.write(text + "\n")
    if args.out is not None:
        write(report, text, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
