"""SVG of our own: the page that every drawing stands on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

from optimizer.errors import CommandError


def page(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """Return an SVG document: a white page of so many pixels with a title at its top and these elements."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def require_writable(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a name that says nothing of the form, or a folder that is not there, before any work."""
    if path.suffix not in suffixes:
        raise CommandError(f"{option}: got {path}, expected a name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise CommandError(f"{option}: got {path}, expected a place in a folder that is there")


def write_text(path: Path, text: str) -> None:
    """Write a file, or say in one line why it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path}: cannot be written, {(error.strerror or str(error)).lower()}") from None
