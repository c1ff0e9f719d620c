"""What is seen of a sensitivity: aligned lines, a Markdown table, a drawing, JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from optimizer.drawing import require_writable
from optimizer.errors import CommandError
from optimizer.sensitivity import LayerDamage, Sensitivity
from optimizer.sensitivity_report import MOST_LINES, lines, markdown, svg, write

WORST = LayerDamage(("model.embed_tokens", "lm_head"), "int8", 0.03, 0.002, 0.026, 0.034, 2_000_000)
SECOND = LayerDamage(("model.layers.0.mlp.up_proj",), "int4", 0.01, 0.001, 0.008, 0.012, 500_000)
LEAST = LayerDamage(("model.layers.1.mlp.up_proj",), "int4", 0.00004, 0.0, 0.00004, 0.00004, 500_000)
FOUND = Sensitivity(
    name="tiny",
    step="quantize_rtn",
    place=0,
    texts="2 of 9 texts of data.calibration",
    items=2,
    tokens=1024,
    unit="KL, nats per token",
    seconds=1.0,
    layers=(WORST, SECOND, LEAST),
)
BROKEN = replace(WORST, damage=math.nan, standard_error=math.nan, low=math.nan, high=math.nan)


def test_lines_are_aligned_with_bars_of_the_damage() -> None:
    assert list(lines(FOUND)) == [
        "quantize_rtn, each layer alone: KL, nats per token; 2 of 9 texts of data.calibration, 1,024 tokens",
        "layer                         format  damage            bounds  MB saved   share",
        "model.embed_tokens + lm_head  int8    0.0300  [0.0260, 0.0340]      2.00  74.9 %  " + "█" * 24,
        "model.layers.0.mlp.up_proj    int4    0.0100  [0.0080, 0.0120]      0.50  25.0 %  " + "█" * 8,
        "model.layers.1.mlp.up_proj    int4    0.0000  [0.0000, 0.0000]      0.50   0.1 %",
        "3 layers, 3.00 MB saved, damages add up to 0.0400",
    ]
    assert [line.count("#") for line in lines(FOUND, has_blocks=False)] == [0, 0, 24, 8, 0, 0]


def test_only_the_worst_are_shown_one_by_one() -> None:
    many = replace(FOUND, layers=(WORST, *[SECOND] * 60))
    shown = list(lines(many))
    assert len(shown) == MOST_LINES + 4
    assert shown[-2] == f"21 more layers, {100 * 0.21 / 0.63:.1f} % of the damage"
    assert markdown(many).count("up_proj") == 60


def test_markdown_holds_every_layer() -> None:
    assert markdown(FOUND).splitlines()[2:5] == [
        "| layer | format | damage | bounds | MB saved | share |",
        "|---|---|---:|---|---:|---:|",
        "| `model.embed_tokens + lm_head` | int8 | 0.0300 | [0.0260, 0.0340] | 2.00 | 74.9 % |",
    ]


@pytest.mark.parametrize("layers", [FOUND.layers, (BROKEN, SECOND), (BROKEN,), (replace(LEAST, damage=0.0),)])
def test_the_drawing_has_a_bar_for_each_layer_that_has_a_number(layers: tuple[LayerDamage, ...]) -> None:
    drawn = ElementTree.fromstring(svg(replace(FOUND, name="a<b", layers=layers)))
    bars = [rect for rect in drawn.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert len(bars) == sum(math.isfinite(layer.damage) for layer in layers)
    widths = [float(rect.get("width", "nan")) for rect in bars]
    assert widths == sorted(widths, reverse=True)
    assert all(math.isfinite(width) and width <= 420 for width in widths)
    assert any("model.layers" in (text.text or "") or layers == (BROKEN,) for text in drawn.iter())


def test_a_damage_without_a_number_is_shown_and_is_null_in_json() -> None:
    found = replace(FOUND, layers=(BROKEN, SECOND))
    assert list(lines(found))[2].split()[:4] == ["model.embed_tokens", "+", "lm_head", "int8"]
    assert list(lines(found))[-1] == "2 layers, 2.50 MB saved, damages add up to 0.0100"
    first, second = json.loads(found.to_json())["layers"]
    assert (first["damage"], first["share"]) == (None, None)
    assert (second["damage"], second["share"]) == (0.01, 1.0)


def test_a_name_that_says_nothing_of_the_form_is_refused(tmp_path: Path) -> None:
    suffixes = (".svg", ".md")
    with pytest.raises(CommandError, match=r"--output: got .*x\.png, expected a name that ends in \.svg or \.md"):
        require_writable("--output", tmp_path / "x.png", suffixes)
    with pytest.raises(CommandError, match=r"--output: got .*x\.svg, expected a place in a folder that is there"):
        require_writable("--output", tmp_path / "none" / "x.svg", suffixes)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(CommandError, match=r"folder\.svg: cannot be written, is a directory"):
        write(FOUND, tmp_path / "folder.svg")
    require_writable("--output", tmp_path / "x.svg", suffixes)
    write(FOUND, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text() == svg(FOUND)
