"""Bars as SVG, by hand: groups of workloads, a bar for each contender, whiskers from the lowest to the highest."""

from collections.abc import Callable, Sequence
from html import escape
from math import floor, log10
from typing import Any, Final

from bench.measures import Spread, spread
from bench.report import Measured, good

_COLOURS: Final = ("#8d99ae", "#5c677d", "#0077b6", "#e07a5f", "#f2cc8f", "#81b29a")
_LEFT, _TOP, _BOTTOM, _HEIGHT = 64, 56, 64, 260
_BAR: Final = 16
_GAP: Final = 22
_TICKS: Final = 5
_STEPS: Final = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def bars(title: str, results: Sequence[dict[str, Any]], names: Sequence[str], of: Callable[[Measured], float]) -> str:
    """Return an SVG document that reads on white and on dark."""
    groups = [
        (str(each["workload"]["name"]), [spread([of(m) for m in good(each["rounds"].get(name, ()))]) for name in names])
        for each in results
    ]
    top = nice(max((one.high for _, spreads in groups for one in spreads if one), default=1.0))
    step = len(names) * _BAR + _GAP
    width = max(_LEFT + step * len(groups) + 24, _LEFT + 130 * len(names))
    height = _TOP + _HEIGHT + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>text {{ font: 11px sans-serif }}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for number, name in enumerate(names):
        x = _LEFT + number * 130.0
        parts.append(f'<rect x="{x:.0f}" y="30" width="10" height="10" fill="{_COLOURS[number % len(_COLOURS)]}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="39">{escape(name)}</text>')
    for tick in range(_TICKS + 1):
        y = _TOP + _HEIGHT - _HEIGHT * tick / _TICKS
        parts.append(f'<line x1="{_LEFT}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * tick / _TICKS:,.5g}</text>')
    for place, (label, spreads) in enumerate(groups):
        left = _LEFT + _GAP / 2 + place * step
        for number, one in enumerate(spreads):
            parts += _bar(left + number * _BAR, one, top, _COLOURS[number % len(_COLOURS)])
        x, y = left + len(names) * _BAR / 2, _TOP + _HEIGHT + 14.0
        turned = f'text-anchor="end" transform="rotate(-20 {x:.1f} {y})"'
        parts.append(f'<text x="{x:.1f}" y="{y}" {turned}>{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bar(x: float, one: Spread | None, top: float, colour: str) -> list[str]:
    if one is None:
        return []

    def y(value: float) -> float:
        return _TOP + _HEIGHT - _HEIGHT * value / top

    height = _TOP + _HEIGHT - y(one.median)
    middle = x + _BAR / 2
    return [
        f'<rect x="{x:.1f}" y="{y(one.median):.1f}" width="{_BAR - 2}" height="{height:.1f}" fill="{colour}"/>',
        f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y(one.high):.1f}" y2="{y(one.low):.1f}" stroke="#222"/>',
    ]


def nice(value: float) -> float:
    """Return the next round number that is not below the value."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** floor(log10(value))
    return next((unit * one for one in _STEPS if unit * one >= value), unit * 10)
