"""What a capture keeps of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from condzoo.probe.moments import RunningMoment


@dataclass(eq=False)
class LayerSums:
    """What one layer has shown so far; `hidden`: why its rows cannot be seen, if so."""

    input: RunningMoment = field(default_factory=RunningMoment)
    output_grad: RunningMoment = field(default_factory=RunningMoment)
    samples: int = 0
    hidden: str | None = None
