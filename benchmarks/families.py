"""Try to lower every family that transformers knows, and write docs/families.md: way, nodes, error, seconds.

Each family runs in a process of its own: its class's default configuration, shrunk to the twin that `export_onnx`
itself asks about an architecture before any work. The table is what that question answers.

    python benchmarks/families.py                  # the named families, then all others
    python benchmarks/families.py --named
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import machine, versions

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
LIMIT_S = 240
NAMED_DECODERS = """
    llama qwen2 qwen3 mistral gemma2 gemma3_text phi3 gpt2 opt gpt_neox smollm3 olmo2 granite stablelm
    qwen3_moe
"""
NAMED_ENCODERS = """
    bert distilbert roberta electra modernbert deberta-v2 mpnet
"""
OTHER_ENCODERS = """
    albert big_bird camembert canine convbert data2vec-text deberta ernie esm eurobert flaubert fnet
    funnel ibert layoutlm longformer luke megatron-bert mobilebert mra nomic_bert nystromformer rembert
    roberta-prelayernorm roformer splinter squeezebert xlm xlm-roberta xlnet yoso
"""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "deberta-v2": {  # as DeBERTa-v3 has them; the class's defaults switch its own attention off
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
}


INTRODUCTION = """# Families

Made by `python benchmarks/families.py`; do not edit. No family is named in the code: `export_onnx` asks about the
architecture of the model at hand, before any work, by lowering a shrunken *twin* of it: every kind of its layers, hard
weights, 48 tokens over windows and position limits in prefill, chunks and decode, and rows of different lengths in one
batch. What differs from torch's eager attention by more than 1e-4 of the logits' range takes the next route, or is
refused with the reason; the model itself is compared after its export as well. Here the twin is made of each class's
default configuration.

*Routes*: `fused` is GroupQueryAttention through transformers' attention interface, `plain` the family's own eager
attention over the cache. *Rows*: `one` where rows of different lengths cannot share a run; the graph then says so in
its signature. *Seconds*: twin made, lowered and compared, refused routes included, two families at a time.
"""


@dataclass(frozen=True)
class Row:
    """What became of one family; `refusal` is empty where it is lowered."""

    family: str
    architecture: str
    seconds: float
    route: str = ""
    takes_batches: bool = True
    nodes: int = 0
    error: float = 0.0
    refusal: str = ""


def main() -> None:
    """Fill the page, or answer for one family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--named", action="store_true", help="only the families that are promised")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "ARCHITECTURE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_answer(*given.one)))
        return
    named, others = list(_named()), [] if given.named else list(_others())
    with ThreadPoolExecutor(given.processes) as pool:
        rows = list(pool.map(lambda pair: _ask(*pair), named + others))
    PAGE.write_text(_page(rows[: len(named)], rows[len(named) :]), encoding="utf-8")


def _named() -> Iterator[tuple[str, str]]:
    from transformers.models.auto import modeling_auto as auto

    yield from ((family, _class(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, family)) for family in NAMED_DECODERS.split())
    for family in NAMED_ENCODERS.split():
        yield family, _class(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, family)
        yield family, _class(auto.MODEL_MAPPING_NAMES, family)


def _others() -> Iterator[tuple[str, str]]:
    from transformers.models.auto import modeling_auto as auto

    decoders = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for family in decoders:
        architecture = _class(decoders, family)
        if family not in (NAMED_DECODERS + NAMED_ENCODERS + OTHER_ENCODERS).split() and architecture.endswith("LM"):
            yield family, architecture
    for family in OTHER_ENCODERS.split():
        if family in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            yield family, _class(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, family)


def _class(names: Mapping[str, Any], family: str) -> str:
    found = names[family]
    return str(found if isinstance(found, str) else found[0])


def _ask(family: str, architecture: str) -> Row:
    """Try one family in a process of its own."""
    command = [sys.executable, __file__, "--one", family, architecture]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Row(family, architecture, LIMIT_S, refusal=f"not tried to the end: more than {LIMIT_S} s")
    print(family, architecture, f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Row(family, architecture, time.perf_counter() - start, refusal=f"ended by {last[:200]}")
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def _answer(family: str, architecture: str) -> dict[str, Any]:
    import torch
    from transformers import logging
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from passes._twin import choose_lowering
    from passes.base import TORCH, Context, Model, PassError

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    told: dict[str, Any] = {"family": family, "architecture": architecture}
    config = CONFIG_MAPPING[family](**SETTINGS.get(family, {})).to_dict() | {"architectures": [architecture]}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        model = Model(TORCH, Path(name), Path(name), config)
        try:
            way = choose_lowering(model, Context(workdir=Path(name), source=model))
        except PassError as error:
            reason = " ".join(str(error).removeprefix("export_onnx: ").split())
            return told | {"seconds": time.perf_counter() - start, "refusal": reason}
    return told | {
        "seconds": time.perf_counter() - start,
        "route": way.route,
        "takes_batches": way.takes_batches,
        "nodes": way.nodes,
        "error": way.error,
    }


def _page(named: list[Row], others: list[Row]) -> str:
    host, used = machine(), versions(("torch", "transformers", "onnx", "onnxruntime"))
    lowered = [row for row in others if not row.refusal]
    refused = [row for row in others if row.refusal]
    made = f"{time.strftime('%Y-%m-%d')}; {host['processor']}, {host['cores']} cores; "
    made += ", ".join(f"{package} {number}" for package, number in used.items())
    parts = [INTRODUCTION, f"{made}.", "", "## Promised", "", *_table(named), ""]
    if others:
        tried = f"{len(lowered)} of {len(others)} further classes are lowered, "
        parts += ["## Tried, named nowhere", "", f"{tried}{len(refused)} refused.", "", *_table(lowered), ""]
        parts += ["## Refused", "", "| family | class | reason |", "|---|---|---|"]
        parts += [f"| {row.family} | {row.architecture} | {row.refusal.replace('|', '/')[:300]} |" for row in refused]
        parts += [""]
    return "\n".join(parts)


def _table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| family | class | route | rows | nodes | error | seconds |"
    yield "|---|---|---|---|---:|---:|---:|"
    for row in rows:
        if row.refusal:
            yield f"| {row.family} | {row.architecture} | refused: {row.refusal[:200]} | | | | {row.seconds:.1f} |"
            continue
        way, width = row.route or "encoder", "any" if row.takes_batches else "one"
        numbers = f"{row.nodes} | {row.error:.1e} | {row.seconds:.1f}"
        yield f"| {row.family} | {row.architecture} | {way} | {width} | {numbers} |"


if __name__ == "__main__":
    main()
