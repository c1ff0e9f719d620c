"""What a person sees of a sensitivity: a table with bars for the terminal, all of it in Markdown, a drawing in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from optimizer.drawing import page, write_text
from optimizer.sensitivity import LayerDamage, Sensitivity

MOST_LINES = 40
"""Layers that are shown one by one on a terminal and in a drawing."""
BAR = 24
"""Characters of the longest bar."""
DIGITS = 3
"""Of the largest damage; all have as many decimals."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_ROW, _WIDTH, _RIGHT, _LETTER = 20, 420, 220, 7  # of the drawing, in pixels


def lines(found: Sensitivity, *, has_blocks: bool = True) -> Iterator[str]:
    """Yield the table, worst first, with a bar for each layer; of `#` where block characters cannot be shown."""
    yield title(found)
    shown, rest = found.layers[:MOST_LINES], found.layers[MOST_LINES:]
    rows = [_cells(found, layer) for layer in shown]
    header = ("layer", "format", "damage", "bounds", "MB saved", "share")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    bars = ["", *(_bar(found, layer, has_blocks) for layer in shown)]
    for cells, bar in zip([header, *rows], bars, strict=True):
        aligned = [f"{cell:{'<<>>>>'[place]}{widths[place]}}" for place, cell in enumerate(cells)]
        yield "  ".join([*aligned, bar]).rstrip()
    if rest:
        yield f"{len(rest)} more layers, {_share(found, rest)} of the damage"
    yield total(found)


def markdown(found: Sensitivity) -> str:
    """Return all layers as a Markdown table."""
    rows = [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in (_cells(found, each) for each in found.layers)]
    head = ["| layer | format | damage | bounds | MB saved | share |", "|---|---|---:|---|---:|---:|"]
    return "\n".join([f"{title(found)}.", "", *head, *rows, "", f"{total(found)}."]) + "\n"


def svg(found: Sensitivity) -> str:
    """Return a drawing: a bar for each layer, worst first, with its bounds as a line."""
    shown, rest = found.layers[:MOST_LINES], found.layers[MOST_LINES:]
    finite = [layer.high for layer in shown if math.isfinite(layer.high)] or [layer.damage for layer in shown]
    scale = _WIDTH / max([value for value in finite if math.isfinite(value)], default=1.0)
    left = 20 + _LETTER * max(len(_cells(found, layer)[0]) for layer in shown)
    height, width = _ROW * (len(shown) + 4), left + _WIDTH + _RIGHT
    parts: list[str] = []
    for place, layer in enumerate(shown):
        parts += _row(found, layer, _ROW * (place + 2), left, scale)
    more = f"{len(rest)} more layers, {_share(found, rest)} of the damage; " if rest else ""
    parts.append(f'<text x="10" y="{height - _ROW // 2}">{escape(more + total(found))}</text>')
    return page(width, height, title(found), parts)


def write(found: Sensitivity, path: Path) -> None:
    """Write what the name asks for: .svg or .md.

    Raises:
        CommandError: another name, or a place that cannot be written.
    """
    write_text(path, {".svg": svg, ".md": markdown}[path.suffix](found))


def title(found: Sensitivity) -> str:
    """Say what was measured, how and with what."""
    return f"{found.step}, each layer alone: {found.unit}; {found.texts}, {found.tokens:,} tokens"


def total(found: Sensitivity) -> str:
    """Say what all layers come to."""
    damage = sum(layer.damage for layer in found.layers if math.isfinite(layer.damage))
    saved = sum(layer.saved_bytes for layer in found.layers)
    return f"{len(found.layers)} layers, {saved / 1e6:.2f} MB saved, damages add up to {_number(found, damage)}"


def _cells(found: Sensitivity, layer: LayerDamage) -> tuple[str, ...]:
    bounds = f"[{_number(found, layer.low)}, {_number(found, layer.high)}]"
    numbers = (_number(found, layer.damage), bounds, f"{layer.saved_bytes / 1e6:.2f}", _share(found, [layer]))
    return (" + ".join(layer.layers), layer.format, *numbers)


def _number(found: Sensitivity, value: float) -> str:
    """Write a damage with as many decimals as the largest needs for DIGITS digits."""
    largest = max((layer.damage for layer in found.layers if math.isfinite(layer.damage)), default=0.0)
    decimals = max(0, DIGITS - 1 - math.floor(math.log10(largest))) if largest > 0 else DIGITS
    return f"{value:.{decimals}f}"


def _share(found: Sensitivity, layers: Sequence[LayerDamage]) -> str:
    return f"{100 * sum(map(found.share, layers)):.1f} %"


def _bar(found: Sensitivity, layer: LayerDamage, has_blocks: bool) -> str:
    largest = max((each.damage for each in found.layers if math.isfinite(each.damage)), default=0.0)
    if not math.isfinite(layer.damage) or largest <= 0:
        return ""
    length = BAR * layer.damage / largest
    if not has_blocks:
        return "#" * round(length)
    whole, part = divmod(round(8 * length), 8)
    return "█" * whole + _EIGHTHS[part].strip()


def _row(found: Sensitivity, layer: LayerDamage, top: int, left: int, scale: float) -> Iterator[str]:
    name, form, damage, *_, saved, share = _cells(found, layer)
    middle, base = top + _ROW // 2, top + _ROW // 2 + 4
    yield f'<text x="{left - 8}" y="{base}" text-anchor="end">{escape(name)}</text>'
    right = left + 6.0
    if math.isfinite(layer.damage):
        yield (
            f'<rect x="{left}" y="{top + 4}" width="{scale * layer.damage:.1f}" height="{_ROW - 8}" fill="#3b6ea5">'
            f"<title>{escape(f'{name}, {form}: {damage}, {share}, {saved} MB saved')}</title></rect>"
        )
        right += scale * layer.damage
    if math.isfinite(layer.high):
        ends = [f"{left + scale * end:.1f}" for end in (layer.low, layer.high)]
        yield f'<path d="M{ends[0]} {middle}H{ends[1]}" stroke="black"/>'
        right = left + scale * layer.high + 6
    yield f'<text x="{right:.1f}" y="{base}">{escape(f"{damage} ({share}), {form}, {saved} MB")}</text>'
