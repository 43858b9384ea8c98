"""Two small plots as SVG text: dots with intervals in rows, and gain against a number, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from unime_ray.report.charts import axis

WIDTH, LEFT, RIGHT, ROW = 720, 190, 30, 24
INK, GREY, LINE = "#24292f", "#8c959f", "#d0d7de"
COLOURS = ("#0969da", "#bc4c00", "#1a7f37")
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    'font-family="system-ui, sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="#ffffff"/>'
)


@dataclass(frozen=True)
class Point:
    """A value in percentage points with its interval; `x` where there is a second axis."""

    name: str
    x: float
    value: float
    low: float
    high: float


def dots_with_intervals(points: Sequence[Point], label: str) -> str:
    """One row a point, from top to bottom as given; the line at 0 is no gain."""
    along = axis(min(0.0, *(p.low for p in points)), max(0.0, *(p.high for p in points)), wanted=6)
    height = ROW * len(points) + 60

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * along.place(value) / 100

    parts = [HEAD.format(width=WIDTH, height=height)]
    bottom = ROW * len(points) + 12
    for place, text in along.ticks:
        x = LEFT + (WIDTH - LEFT - RIGHT) * place / 100
        parts += [_line(x, 8, x, bottom, LINE), _text(x, bottom + 16, text, GREY, "middle")]
    parts += [_line(at(0.0), 8, at(0.0), bottom, INK), _text(LEFT, bottom + 36, label, INK, "start")]
    for row, point in enumerate(points):
        y = 22 + ROW * row
        colour = COLOURS[0] if point.low > 0 or point.high < 0 else GREY
        parts += [
            _text(LEFT - 10, y + 4, point.name, INK, "end"),
            _line(at(point.low), y, at(point.high), y, colour, 2),
        ]
        parts.append(_dot(at(point.value), y, colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def scatter(series: Mapping[str, Sequence[Point]], level: float, labels: tuple[str, str, str]) -> str:
    """Points with vertical intervals, joined in order of x, one colour a series; a dashed line at `level`.

    `labels`: x axis, y axis, the dashed line.
    """
    points = [point for one in series.values() for point in one]
    across = axis(min((p.x for p in points), default=0.5), max((p.x for p in points), default=1.0), wanted=5)
    up = axis(min([0.0, level, *(p.low for p in points)]), max([level, *(p.high for p in points)]), wanted=6)
    left, top, right, bottom, height = 60, 24, WIDTH - 140, 320, 380

    def xy(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * across.place(x) / 100, bottom - (bottom - top) * up.place(y) / 100

    parts = [HEAD.format(width=WIDTH, height=height)]
    for place, text in across.ticks:
        x = left + (right - left) * place / 100
        parts += [_line(x, top, x, bottom, LINE), _text(x, bottom + 18, text, GREY, "middle")]
    for place, text in up.ticks:
        y = bottom - (bottom - top) * place / 100
        parts += [_line(left, y, right, y, LINE), _text(left - 8, y + 4, text, GREY, "end")]
    for value, text, dash in ((level, labels[2], "6 4"), (0.0, "base", "")):
        y = xy(across.low, value)[1]
        parts += [_line(left, y, right, y, INK, 1, dash), _text(right + 8, y + 4, text, INK, "start")]
    for number, (name, one) in enumerate(series.items()):
        parts += _curve(name, one, xy, COLOURS[number % len(COLOURS)], top + 18 * number)
    parts += [_text(left, bottom + 44, labels[0], INK, "start"), _text(left, top - 9, labels[1], INK, "start")]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _curve(name: str, points: Sequence[Point], xy, colour: str, legend_y: float) -> list[str]:  # type: ignore[no-untyped-def]
    places = [xy(point.x, point.value) for point in points]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-opacity="0.4"/>']
    for point, (x, y) in zip(points, places, strict=True):
        parts += [_line(x, xy(point.x, point.low)[1], x, xy(point.x, point.high)[1], colour, 2), _dot(x, y, colour)]
        if "tiny" in point.name:
            parts.append(_text(x + 6, y - 6, point.name.rpartition("/")[2], colour, "start"))
    parts += [_dot(WIDTH - 124, legend_y, colour), _text(WIDTH - 114, legend_y + 4, name, INK, "start")]
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
