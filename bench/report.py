"""What was measured, as tables: medians over the rounds with the lowest and the highest, and ratios within a round."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, Final

from bench.measures import percentile, spread

Measured = dict[str, Any]
OURS: Final = "LMX"
_MIB: Final = 1024**2


def tokens_per_s(measured: Measured) -> float:
    """Return all tokens of all streams over the time from the first request to the last answer."""
    return float(measured["tokens"] / measured["seconds"])


def requests_per_s(measured: Measured) -> float:
    """Return answers over the same time."""
    return float(measured["requests"] / measured["seconds"])


def ttft_ms(share: float) -> Callable[[Measured], float]:
    """Return the reader of a percentile of the times to the first text."""
    return lambda measured: percentile(measured["ttft_s"], share) * 1000


def cpu_ms(part: str) -> Callable[[Measured], float]:
    """Return the reader of the CPU milliseconds that a process took for 1,000 tokens."""
    return lambda measured: measured["cpu_s"].get(part, 0.0) / max(1, measured["tokens"]) * 1e6


def good(rounds: Sequence[Measured]) -> list[Measured]:
    """Return the measurements with an answer in them."""
    return [measured for measured in rounds if measured["requests"]]


def ratios(rounds: dict[str, list[Measured]], ours: str, other: str, of: Callable[[Measured], float]) -> list[float]:
    """Return ours over the other's, round by round: what disturbs a round disturbs both."""
    pairs = zip(rounds.get(ours, ()), rounds.get(other, ()), strict=False)
    return [of(one) / of(two) for one, two in pairs if one["requests"] and two["requests"] and of(two)]


def markdown(report: dict[str, Any]) -> str:
    """Return the whole report of a comparison."""
    names: list[str] = []
    for result in report["results"]:
        names += [name for name in result["rounds"] if name not in names]
    lines = [f"LMX {report['version']}, {report['machine']}, model {report['model']}.", ""]
    threads = report["blas_threads"]
    lines += [f"{report['rounds']} rounds in alternating order, {threads} threads of the matrix library.", ""]
    lines += ["Medians over the rounds (lowest to highest)."]
    chat = [each for each in report["results"] if each["workload"]["kind"] == "chat"]
    vectors = [each for each in report["results"] if each["workload"]["kind"] != "chat"]
    lines += _section("Tokens per second, all streams", names, chat, lambda r: _cell(r, tokens_per_s))
    lines += _ratios(names, chat)
    lines += _section("Time to the first text, ms: p50, p95, p99", names, chat, _three_ttft)
    lines += _section("Between two pieces of text, ms: p50, p99; tokens per second of one stream", names, chat, _gaps)
    lines += _section("Failed requests of all rounds", names, report["results"], _errors)
    if vectors:
        lines += _section("Embeddings: requests per second", names, vectors, lambda r: _cell(r, requests_per_s))
    lines += _cpu(names, chat)
    lines += _memory(names, report["results"])
    return "\n".join(lines)


def _section(
    title: str, names: Sequence[str], results: Sequence[dict[str, Any]], cell: Callable[[Sequence[Measured]], str]
) -> list[str]:
    lines = ["", f"**{title}**", "", "| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for result in results:
        cells = [cell(result["rounds"].get(name, [])) for name in names]
        lines.append(f"| {result['workload']['name']} | " + " | ".join(cells) + " |")
    return lines


def _cell(rounds: Sequence[Measured], of: Callable[[Measured], float]) -> str:
    found = spread([of(measured) for measured in good(rounds)])
    return "–" if found is None else f"{found.median:,.0f} ({found.low:,.0f} to {found.high:,.0f})"


def _three_ttft(rounds: Sequence[Measured]) -> str:
    usable = good(rounds)
    if not usable:
        return "–"
    return " · ".join(f"{median(map(ttft_ms(share), usable)):,.1f}" for share in (0.5, 0.95, 0.99))


def _gaps(rounds: Sequence[Measured]) -> str:
    usable = [measured for measured in good(rounds) if measured["gap_p50_s"] is not None]
    if not usable:
        return "–"
    middle = [median(measured[key] or 0.0 for measured in usable) for key in ("gap_p50_s", "gap_p99_s")]
    pace = median(measured["stream_tokens_per_s"] or 0.0 for measured in usable)
    return " · ".join(f"{value * 1000:,.1f}" for value in middle) + f"; {pace:,.0f}"


def _errors(rounds: Sequence[Measured]) -> str:
    found: dict[str, int] = {}
    for measured in rounds:
        for what, count in measured["errors"].items():
            found[what] = found.get(what, 0) + count
    total = sum(found.values()) + sum(measured["requests"] for measured in rounds)
    if not rounds:
        return "–"
    return ", ".join(f"{count} × {what}" for what, count in found.items()) + f" of {total}" if found else "0"


def _ratios(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[str]:
    others = [name for name in names if name != OURS]
    if OURS not in names or not others:
        return []
    lines = ["", f"**{OURS} over each: tokens per second (median of the rounds' ratios), time to first text p50**", ""]
    lines += ["| | " + " | ".join(others) + " |", "|---|" + "---|" * len(others)]
    for result in results:
        cells = []
        for name in others:
            speed = ratios(result["rounds"], OURS, name, tokens_per_s)
            first = ratios(result["rounds"], OURS, name, ttft_ms(0.5))
            cells.append(f"**{median(speed):.2f}** · {median(first):.2f}" if speed and first else "–")
        lines.append(f"| {result['workload']['name']} | " + " | ".join(cells) + " |")
    return lines


def _cpu(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", "**CPU ms per 1,000 tokens; the share of the machine that others took, at most**", ""]
    parts = list(dict.fromkeys(_parts(names, results)))
    lines += ["| | " + " | ".join(f"{name}: {part}" for name, part in parts) + " | others |"]
    lines += ["|---|" + "---|" * (len(parts) + 1)]
    for result in results:
        cells = []
        for name, part in parts:
            usable = good(result["rounds"].get(name, []))
            cells.append(f"{median(map(cpu_ms(part), usable)):,.0f}" if usable else "–")
        others = max((m["others"] for rounds in result["rounds"].values() for m in rounds), default=0.0)
        lines.append(f"| {result['workload']['name']} | " + " | ".join(cells) + f" | {others:.0%} |")
    return lines


def _parts(names: Sequence[str], results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for name in names:
        for result in results:
            for measured in result["rounds"].get(name, ()):
                for part in measured["cpu_s"]:
                    if part != "client" or name == OURS:
                        yield name, part


def _memory(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[str]:
    peaks: dict[tuple[str, str], int] = {}
    for result in results:
        for name in names:
            for measured in result["rounds"].get(name, ()):
                for part, peak in measured["peak_bytes"].items():
                    peaks[name, part] = max(peak, peaks.get((name, part), 0))
    lines = ["", "**Most memory each process had, MiB**", "", "| process | MiB |", "|---|---|"]
    return lines + [f"| {name}: {part} | {peak / _MIB:,.0f} |" for (name, part), peak in peaks.items()]
