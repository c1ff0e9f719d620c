"""Layers that get another format than the rest of the model: an option that quantizers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FloatName = Literal["nvfp4", "mxfp4", "fp8"]
FormatName = Literal["int8", "int4", "int2", FloatName]
LayerFormat = Literal["float", FormatName]
Group = Literal[16, 32, 64, 128, 256, "channel"]


@dataclass(frozen=True, kw_only=True)
class Override:
    """Layers, by name, and the format they get instead of the pass's own."""

    layers: str | tuple[str, ...] = field(metadata={"help": "their names, or glob patterns such as '*.down_proj'"})
    format: LayerFormat = field(metadata={"help": "what their weights become; float leaves them alone"})

    group_size: Group | None = field(
        default=None, metadata={"help": "input features that share a scale; the pass's own if not given"}
    )

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: got none, expected a name or names")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Return the patterns, of which a layer's name matches one."""
        return (self.layers,) if isinstance(self.layers, str) else self.layers
