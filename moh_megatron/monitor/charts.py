"""Draws curves and head maps as self-contained SVG that can be read in black and white."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from html import escape

Series = tuple[str, list[tuple[float, float | None]]]
"""A name, and points (x, y) in order; y is None where nothing was measured."""

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 12, 42
_DASHES = ("", "7 4", "2 4", "10 3 2 3", "1 2", "12 5")
_SHADES = ("#000000", "#0b5394", "#a61c00", "#38761d", "#674ea7")
_MARKS = ("", "●", "■", "▲", "◆")
"""Lines with the same dashes differ in their marks."""
_POINTS, _MARKED = 400, 8
"""The most points of a line, and the most marks."""


def curves(title: str, unit: str, series: Sequence[Series]) -> str:
    """One chart of all ``series`` with a finite point; empty where there is none.

    Lines differ in dashes, marks and colour. These follow from the index in ``series``, whether or not the series
    before are shown. A single point is drawn as a dot beside its name.
    """
    finite = [(name, [(x, y) for x, y in points if y is not None and math.isfinite(y)]) for name, points in series]
    shown = {number: (name, _thinned(points)) for number, (name, points) in enumerate(finite) if points}
    if not shown:
        return ""
    xs, ys = ([point[axis] for _, points in shown.values() for point in points] for axis in (0, 1))
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    left, right = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    low, high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def pixel(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = []
    for tick in y_ticks:
        _, y = pixel(left, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in x_ticks:
        x, _ = pixel(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">tokens</text>')
    keys = []
    for number, (name, points) in shown.items():
        shade, mark = _SHADES[number % len(_SHADES)], _MARKS[number // len(_DASHES) % len(_MARKS)]
        style = f'stroke="{shade}" stroke-dasharray="{_DASHES[number % len(_DASHES)]}"'
        pixels = [pixel(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        parts.append(f'<polyline class="curve" {style} points="{line}"/>')
        if len(pixels) == 1:
            ((x, y),) = pixels
            side = ("start", 8) if x < _WIDTH / 2 else ("end", -8)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{shade}"/>')
            parts.append(f'<text x="{x + side[1]:.1f}" y="{y - 6:.1f}" text-anchor="{side[0]}">{escape(name)}</text>')
        if mark:
            stride = math.ceil(len(pixels) / _MARKED)
            parts += [
                f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{mark}</text>' for x, y in pixels[::stride]
            ]
        keys.append(
            f'<span class="key"><svg width="34" height="10"><line x1="0" x2="34" y1="5" y2="5" stroke-width="2" '
            f"{style}/></svg>{mark} {escape(name)}</span>"
        )
    return (
        f'<figure><figcaption>{escape(title)} <span class="unit">{escape(unit)}</span></figcaption>'
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'</svg><div class="keys">{"".join(keys)}</div></figure>'
    )


def head_map(title: str, load: Sequence[Sequence[float]]) -> str:
    """One row per layer, one column per head; the darker, the more tokens used the head. Empty without layers."""
    if not load:
        return ""
    cell, margin = 18, 30
    heads = max(len(row) for row in load)
    width, height = margin + cell * heads + 4, cell * len(load) + margin
    parts = []
    for layer, row in enumerate(load):
        parts.append(f'<text x="{margin - 5}" y="{cell * layer + 13}" text-anchor="end">{layer}</text>')
        for head, share in enumerate(row):
            shade = round(255 * (1 - min(max(share, 0.0), 1.0)))
            parts.append(
                f'<rect x="{margin + cell * head}" y="{cell * layer}" width="{cell}" height="{cell}" '
                f'fill="rgb({shade},{shade},{shade})"><title>layer {layer} head {head}: {share:.3f}</title></rect>'
            )
    for head in range(0, heads, max(1, heads // 8)):
        x = margin + cell * head + cell / 2
        parts.append(f'<text x="{x}" y="{cell * len(load) + 14}" text-anchor="middle">{head}</text>')
    legend = "layers down, heads across; black is every token"
    return (
        f'<figure class="map"><figcaption>{escape(title)} <span class="unit">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.6:.0f}px" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``_POINTS`` points, each the mean of a group of neighbours."""
    width = math.ceil(len(points) / _POINTS) or 1
    groups = (points[start : start + width] for start in range(0, len(points), width))
    return [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    rough = (high - low) / 5
    if not rough > sys.float_info.min:  # Of a smaller range no power of ten is left.
        return [low]
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """A number in a few characters, such as 1.2M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
