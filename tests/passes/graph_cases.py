"""What the tests of graph rewrites share: the text of a refusal, and the room that weights take."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import Workshop

from passes._graph import DATA, load_graph
from passes.base import GraphPass, Model, PassError

SMALL = 256
"""Bytes by which stored weights may differ: constants of shapes and axes, and padding to multiples of 64."""


def refusal(workshop: Workshop, step: GraphPass, model: Model, folder: Path) -> str:
    """Return why a pass refuses a model; it must not have written anything."""
    with pytest.raises(PassError) as raised:
        step.run(model, workshop.context(folder, model))
    assert list(folder.iterdir()) == []
    return str(raised.value)


def stored_bytes(model: Model) -> int:
    """Return the size of the data file and of the constants inside the graph, which are those below a kilobyte."""
    constants = [value.const_value for value in load_graph(model.folder).graph.initializers.values()]
    inline = sum(tensor.nbytes for tensor in constants if tensor is not None and tensor.nbytes < 1024)
    return inline + (model.folder / DATA).stat().st_size
