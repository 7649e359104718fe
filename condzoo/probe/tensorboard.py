"""TensorBoard scalars and histograms of measurements; needs the `tensorboard` extra.

A tag is a quantity with the layer behind a slash ("input_lambda_max/conv1"), so that TensorBoard shows one of all
layers together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from condzoo.probe.conditioning import Conditioning
from condzoo.probe.files import expanded
from condzoo.probe.records import Fractions, Records, fractions, loaded

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SIDES = ("input", "output_grad")
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32, which scalars are stored in


def settled(writer: SummaryWriter | str | Path | None) -> SummaryWriter | str | Path | None:
    """A folder wherever a loop moves to from here; addresses ("s3://"), and what is no folder, stay.

    Raises:
        TypeError: it is neither a folder nor writes scalars.
    """
    if not (writer is None or isinstance(writer, (str, Path)) or hasattr(writer, "add_scalar")):
        raise TypeError(f"tensorboard must be a folder or an open SummaryWriter, got {writer!r:.60}")
    if not isinstance(writer, (str, Path)) or "://" in str(writer):
        return writer
    return expanded(writer).absolute()


def open_writer(folder: str | Path, *, start_step: int | None) -> SummaryWriter:
    """A writer into a folder; what was written there from `start_step` on is no longer shown (None: all still is).

    Raises:
        ModuleNotFoundError: TensorBoard is not installed; says how to.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("TensorBoard is not installed; pip install 'condzoo[tensorboard]'") from error
    # Not by way of a Path, which "s3://" leaves as "s3:/". 0 also marks: a folder's first mark only begins it.
    return SummaryWriter(os.path.expanduser(folder), purge_step=start_step)


def write_tensorboard(
    records: Records,
    writer: SummaryWriter | str | Path,
    p: Fractions = (0.5, 1.0),
) -> None:
    """Write measurements as TensorBoard scalars and histograms, each at its step (0 where it has none).

    A condition number that is not known (inf) is left out; the rank beside it says how much is. So is a number that
    float32, in which TensorBoard has its scalars, does not hold; of lambda_max the log10 is there, too.

    Args:
        records: a `conditioning.jsonl`, its run directory, one measurement, or several.
        writer: an open `SummaryWriter`, which is flushed; or a folder for a new one, which is closed. What the
            folder has already stays, and is shown, too.
        p: the fraction, or the fractions, of the spectrum that the condition numbers span.

    Raises:
        FileNotFoundError, ValueError: as `read_records`.
        TypeError: what is no measurement.
        ModuleNotFoundError: TensorBoard is not installed.
    """
    measured, asked = loaded(records), fractions(p)
    own = open_writer(writer, start_step=None) if isinstance(writer, (str, Path)) else None
    target = writer if own is None else own
    assert not isinstance(target, (str, Path))
    for record in measured:
        step = record.step or 0
        for tag, value in scalars(record, asked):
            target.add_scalar(tag, value, step)
        for name, layer in record.items():
            for side in SIDES:
                s = getattr(layer, side)
                known = s.eigenvalues[s.eigenvalues > s.noise_floor]
                if known.numel():
                    target.add_histogram(f"{side}_log10_eigenvalues/{name}", known.log10().numpy(), step)
    target.flush()
    if own is not None:
        own.close()


def scalars(record: Conditioning, p: tuple[float, ...] = (0.5, 1.0)) -> Iterator[tuple[str, float]]:
    """(tag, value) of every known number of one measurement that float32 holds; of lambda_max also the log10."""
    for tag, value in _numbers(record, p):
        if value == 0 or SMALLEST <= abs(value) <= LARGEST:
            yield tag, value


def _numbers(record: Conditioning, p: tuple[float, ...]) -> Iterator[tuple[str, float]]:
    for name, layer in record.items():
        for side in SIDES:
            s = getattr(layer, side)
            yield f"{side}_lambda_max/{name}", s.lambda_max
            if s.lambda_max > 0:
                yield f"{side}_log10_lambda_max/{name}", math.log10(s.lambda_max)
            yield f"{side}_rank/{name}", float(s.rank)
            for q in p:
                if s.status(q) == "ok":
                    yield f"{side}_kappa{100 * q:g}/{name}", s.condition_number(q)
        for quantity in ("weight", "weight_grad", "weight_domination"):
            if (value := getattr(layer, quantity)) is not None:
                yield f"{quantity}/{name}", value
    for name, units in record.neurons.items():
        yield f"dying_share/{name}", units.dying_share
        yield f"full_share/{name}", units.full_share
