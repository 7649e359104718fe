"""The layers of a run, over records that need not all hold the same ones."""

from __future__ import annotations

from collections.abc import Sequence

from condzoo.probe.conditioning import Conditioning
from condzoo.probe.spectra import Spectrum


def forward_order(records: Sequence[Conditioning]) -> list[str]:
    """The layers of all records, each before those that follow it in the record where it first is."""
    order: list[str] = []
    for record in records:
        if record.layers.keys() <= set(order):
            continue
        place = len(order)
        for name in reversed(list(record)):
            if name in order:
                place = order.index(name)
            else:
                order.insert(place, name)
    return order


def last_inputs(records: Sequence[Conditioning]) -> list[Spectrum | None]:
    """Of every record its last layer's input; None where that layer was skipped: the one before it is another."""
    order = forward_order(records)[::-1]
    inputs = []
    for record in records:
        last = next((name for name in order if name in record or name in record.skipped), None)
        inputs.append(None if last is None or last in record.skipped else record[last].input)
    return inputs
