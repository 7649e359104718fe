"""What an exact curvature matrix will cost, estimated on this machine before it is computed.

Counted are the products that form the matrix (on its smaller Gram side) and its eigenvalues; seconds come
from the rate of one float64 product of 512 x 512 matrices (of a GPU 2048 x 2048), timed when it is first asked for
(about 10 ms), once a number of threads and a device.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from functools import cache

import torch

LONG = 60.0  # seconds from which on a computation is announced
MUCH = 1 << 29  # numbers from which on what is held is announced: 4 GB
LARGEST = 20_000  # side of a matrix that is decomposed, at most: 3.2 GB and about ten minutes
EIGENVALUES = 4.0  # how much slower per operation than a product: half of the reduction is bound by memory
PROBED_SIDE = 512
PROBED_SIDE_OF_A_GPU = 2048  # whose smaller ones are over before they have been started
CPU = torch.device("cpu")
A_CLASS = "one a class"
A_SAMPLE_AND_CLASS = "one a sample and class"
BATCH_STATISTICS = f"{A_SAMPLE_AND_CLASS}: in train mode BatchNorm makes a sample's gradient depend on all labels"


@dataclass(frozen=True)
class Cost:
    """The cost of one spectrum.

    Attributes:
        side: of the matrix that is decomposed.
        operations: floating-point operations of the products that form it.
        seconds: of all of it, on this machine as it was when it was first asked for a cost; right within a factor of
            about two.
        held: numbers that the backward passes hold at once, about.
    """

    side: int
    operations: float
    seconds: float
    held: int = 0

    @property
    def bytes(self) -> int:
        """Memory for the matrix and the solver's copy of it, and for what is held, in float64."""
        return 8 * (2 * self.side**2 + self.held)


def cost(side: int, operations: float, passes: float = 0.0, held: int = 0, device: torch.device = CPU) -> Cost:
    """The cost of a matrix of this side formed with so many operations, after `passes` seconds of backward passes.

    `device`: where it is formed and decomposed.
    """
    eigenvalues = EIGENVALUES * 4 / 3 * side**3
    seconds = passes + (operations + eigenvalues) / products_a_second(torch.get_num_threads(), device)
    return Cost(side, operations, seconds, held)


@cache
def products_a_second(threads: int, device: torch.device) -> float:
    """Floating-point operations a second of float64 products there, with so many threads, the best of three."""
    side = PROBED_SIDE if device.type == "cpu" else PROBED_SIDE_OF_A_GPU
    a = torch.ones((side, side), dtype=torch.float64, device=device)
    best = float("inf")
    for _ in range(3):
        began = now(device)
        a @ a
        best = min(best, now(device) - began)
    return 2 * side**3 / best


def now(device: torch.device) -> float:
    """Seconds on a clock, once a GPU has done what it was given: until then a pass has only been started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def announce(expected: Cost, what: str) -> None:
    """Warn, before it starts, of a computation that takes over a minute."""
    if expected.seconds > LONG:
        warnings.warn(
            f"{what}: about {expected.seconds / 60:.1f} minutes and {expected.bytes / 1e9:.1f} GB for a matrix of "
            f"side {expected.side:,}; fewer samples or block='<layer>' (of a report layers=['<layer>']) cost less, "
            "and top_curvature(...) gives the largest eigenvalues without the matrix",
            UserWarning,
            stacklevel=4,
        )


def announce_passes(seconds: float, passes: int, numbers: int = 0, each: str = BATCH_STATISTICS) -> None:
    """Warn of backward passes that take over a minute together, or whose gradients are more than 4 GB.

    Args:
        seconds: of all.
        passes: how many; `each`: what each is of.
        numbers: in the gradients that are kept of them.
    """
    if seconds > LONG or numbers > MUCH:
        held = f" and {8 * numbers / 1e9:.1f} GB" if numbers > MUCH else ""
        warnings.warn(
            f"exact curvature: about {seconds / 60:.1f} minutes{held} for {passes:,} backward passes, {each}; fewer "
            "samples cost less",
            UserWarning,
            stacklevel=6,
        )


def too_large(side: int) -> bool:
    """Whether a matrix is too large to be decomposed."""
    return side > LARGEST


def check_side(side: int) -> None:
    """A ValueError where a matrix is too large to be decomposed."""
    if too_large(side):
        raise ValueError(
            f"the matrix to decompose has side {side:,}, at most {LARGEST:,} is possible; pass fewer samples, "
            "or block='<layer>' for one layer's block; condzoo.probe.top_curvature has the largest eigenvalues alone"
        )
