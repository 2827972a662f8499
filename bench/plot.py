"""Bar charts as SVG, by a few lines of our own: no plotting library is needed where results are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#2060c0", "#9a9a9a", "#c8c8c8", "#d08020", "#40a060", "#a060a0")
BAR, GAP, LEFT, PIXELS = 7, 8, 330, 5.0
"""Height of a bar, gap between points, where bars begin, and pixels of a percent."""


def plot(points: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Bars of the percent of the bound that each form reaches, point by point."""
    body, top = [], 24.0
    colours = dict(zip(titles, COLOURS, strict=False))
    for column, (name, title) in enumerate(titles.items()):
        body.append(_box(LEFT + 160 * column, 8, 10, 8, colours[name]))
        body.append(_text(LEFT + 160 * column + 14, 16, title, "start"))
    for one in points:
        body.append(_text(LEFT - 6, top + BAR * len(titles) / 2 + 10, one["name"], "end"))
        for name in titles:
            reached = one["forms"].get(name, {}).get("of_bound")
            if reached is not None:
                body.append(_box(LEFT, top + 6, min(reached, 110) * PIXELS, BAR - 1, colours[name]))
            top += BAR
        top += GAP
    for percent in (25, 50, 75, 100):
        at = LEFT + percent * PIXELS
        body.append(f'<path d="M{at:g} 24V{top:g}" stroke="#999" stroke-dasharray="2 3"/>')
        body.append(_text(at, top + 12, f"{percent}%", "middle"))
    return _svg(LEFT + max(115 * PIXELS, 160 * len(titles)), top + 20, body)


@dataclass(frozen=True, slots=True)
class Bar:
    """One measured figure with its range; `ours` has the colour of loramill's."""

    name: str
    low: float
    median: float
    high: float
    ours: bool = True


def bars(title: str, found: Sequence[Bar], form: str = ",.0f") -> str:
    """A bar for each figure, from its median, a line over it from low to high, and the median in numbers."""
    top, height = 24.0, 14
    scale = 100 * PIXELS / max(bar.high for bar in found)
    body = [_text(LEFT, 16, title, "start")]
    for bar in found:
        body.append(_text(LEFT - 6, top + 10, bar.name, "end"))
        body.append(_box(LEFT, top, bar.median * scale, height - 2, COLOURS[0 if bar.ours else 1]))
        low, high, middle = LEFT + bar.low * scale, LEFT + bar.high * scale, top + height / 2 - 1
        body.append(f'<path d="M{low:.1f} {middle:g}H{high:.1f}" stroke="#000"/>')
        body.append(_text(high + 6, top + 10, f"{bar.median:{form}}", "start"))
        top += height + 4
    return _svg(LEFT + 115 * PIXELS, top + 8, body)


def _svg(width: float, height: float, body: Sequence[str]) -> str:
    size = f'width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">'
    return "\n".join([head, f'<rect {size} fill="white"/>', *body, "</svg>\n"])


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text.replace("&", "&amp;").replace("<", "&lt;")}</text>'
