"""A radar plot as SVG: one axis a category, one polygon a model. Numbers in, text out; needs no plotting library."""

import html
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _RADIUS = 480, 400, 160
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
"""Okabe and Ito's, which people with any colour vision tell apart."""
_DASHES = ("", "7 4", "2 3", "10 3 2 3")  # a second mark beside the colour


def radar_svg(axes: Sequence[str], series: Mapping[str, Sequence[float | None]], *, highest: float = 10.0) -> str:
    """The plot of `series` (one value an axis, None where there is none) from 0 in the middle to `highest`."""
    centre_x, centre_y = _WIDTH / 2, _HEIGHT / 2
    height = _HEIGHT + 22 * len(series)
    described = "; ".join(
        f"{name}: " + ", ".join(f"{axis} {_number(value)}" for axis, value in zip(axes, values))
        for name, values in series.items()
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="13">',
        f"<title>Scores by category</title><desc>{html.escape(described)}</desc>",
    ]
    for level in range(2, int(highest) + 1, 2):
        ring = _points([level / highest] * len(axes), centre_x, centre_y)
        parts.append(f'<polygon points="{ring}" fill="none" stroke="#8886" stroke-width="1"/>')
        y = centre_y - _RADIUS * level / highest + 12  # below its ring, where no category's name is
        parts.append(f'<text x="{centre_x + 4:.1f}" y="{y:.1f}" fill="#777" font-size="10">{level}</text>')
    for index, axis in enumerate(axes):
        x, y = _point(index, len(axes), 1.0, centre_x, centre_y)
        parts.append(f'<line x1="{centre_x}" y1="{centre_y}" x2="{x:.1f}" y2="{y:.1f}" stroke="#8886"/>')
        x, y = _point(index, len(axes), 1.1, centre_x, centre_y)
        anchor = "middle" if abs(x - centre_x) < 8 else ("start" if x > centre_x else "end")
        parts.append(
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}" fill="currentColor">{html.escape(axis)}</text>'
        )
    for index, (name, values) in enumerate(series.items()):
        parts += _polygon(index, name, values, highest=highest, centre_x=centre_x, centre_y=centre_y)
    return "".join(parts) + "</svg>"


def _polygon(
    index: int, name: str, values: Sequence[float | None], *, highest: float, centre_x: float, centre_y: float
) -> list[str]:
    """A model's polygon, its corners, and its line in the legend. A missing value is drawn in the middle, hollow."""
    colour, dash = _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]
    shares = [(value or 0.0) / highest for value in values]
    parts = [
        f'<polygon points="{_points(shares, centre_x, centre_y)}" fill="{colour}" fill-opacity="0.12" '
        f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    ]
    for axis, (share, value) in enumerate(zip(shares, values)):
        x, y = _point(axis, len(values), share, centre_x, centre_y)
        fill = "none" if value is None else colour
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" stroke="{colour}"/>')
    y = _HEIGHT + 8 + 22 * index
    parts.append(
        f'<line x1="20" y1="{y}" x2="56" y2="{y}" stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"/>'
        f'<text x="64" y="{y + 4}" fill="currentColor">{html.escape(name)}</text>'
    )
    return parts


def _points(shares: Sequence[float], centre_x: float, centre_y: float) -> str:
    corners = (_point(index, len(shares), share, centre_x, centre_y) for index, share in enumerate(shares))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def _point(index: int, axes: int, share: float, centre_x: float, centre_y: float) -> tuple[float, float]:
    """The place of a value on an axis; the first axis points up, the others follow clockwise."""
    angle = 2 * math.pi * index / axes - math.pi / 2
    return centre_x + _RADIUS * share * math.cos(angle), centre_y + _RADIUS * share * math.sin(angle)


def _number(value: float | None) -> str:
    return "no rating" if value is None else f"{value:.2f}"
