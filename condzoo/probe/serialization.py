"""Measurements as JSON and back, exactly: Python writes a float64 so that it reads back as the same one.

Schema (version 1) in docs/probe.md. Strict JSON: there is no NaN or Infinity in it.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from condzoo.probe.conditioning import Conditioning, LayerConditioning
from condzoo.probe.files import write_whole
from condzoo.probe.neurons import Neurons
from condzoo.probe.spectra import Spectrum

SCHEMA = "condzoo.conditioning/1"

_PLAIN = [f.name for f in fields(Conditioning) if f.name not in ("layers", "neurons")]

_LATER = ("certificate", "kappa", "random_signs")  # fields that the first records of this schema do not have


def to_record(conditioning: Conditioning) -> dict[str, Any]:
    """A measurement as a dict of JSON types."""
    record: dict[str, Any] = {"schema": SCHEMA}
    record |= {name: getattr(conditioning, name) for name in _PLAIN}
    record["layers"] = {name: _layer_record(layer) for name, layer in conditioning.items()}
    record["neurons"] = {name: vars(n) for name, n in conditioning.neurons.items()}
    return record


def from_record(record: dict[str, Any]) -> Conditioning:
    """The measurement that `to_record` wrote.

    Raises:
        ValueError: not such a record, or of a schema that this version does not know.
    """
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"not a conditioning record: expected schema {SCHEMA!r}, got {found!r}")
    step = record.get("step")
    if not (step is None or type(step) is int):  # no bool, which is an int, too
        raise ValueError(
            f"conditioning record: step must be a whole number or null, got {step!r}; was the file edited?"
        )
    try:
        return Conditioning(
            layers={name: _layer(name, entry) for name, entry in record["layers"].items()},
            neurons={name: Neurons(**entry) for name, entry in record["neurons"].items()},
            **{name: record[name] for name in _PLAIN if name in record or name not in _LATER},
        )
    except KeyError as missing:
        raise ValueError(f"conditioning record lacks the field {missing}; was the file edited?") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"conditioning record does not fit its schema: {error}; was the file edited?") from None


def strict_json(text: str) -> Any:
    """Parsed JSON; ValueError for the NaN and Infinity that Python reads, and `dumps` does not write."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:  # of brackets, which no record has more than a few of in one another
        raise ValueError("it is nested too deep for a record") from None


def dumps(conditioning: Conditioning) -> str:
    """A measurement as one line of JSON."""
    return json.dumps(to_record(conditioning), allow_nan=False, separators=(",", ":"))


def write_json(conditioning: Conditioning, path: Path) -> None:
    """Write a measurement to a file of its own, in a folder that is made if need be."""
    write_whole(path, f"{dumps(conditioning)}\n".encode())


def read_json(path: Path) -> Conditioning:
    """Read a measurement from a file of its own; errors name the file."""
    try:
        return from_record(strict_json(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _layer_record(layer: LayerConditioning) -> dict[str, Any]:
    record: dict[str, Any] = {f.name: getattr(layer, f.name) for f in fields(LayerConditioning)}
    record["input"] = _spectrum_record(layer.input)
    record["output_grad"] = _spectrum_record(layer.output_grad)
    if not layer.frozen:  # most are not: records stay as they were
        del record["frozen"]
    return record


def _layer(name: str, record: dict[str, Any]) -> LayerConditioning:
    spectra = {}
    for side in ("input", "output_grad"):
        try:
            spectra[side] = _spectrum(record[side])
        except ValueError as error:
            raise ValueError(f"conditioning record, {side} of {name!r}: {error}; was the file edited?") from None
    return LayerConditioning(**{**record, **spectra})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which no record has")


def _spectrum_record(s: Spectrum) -> dict[str, Any]:
    values = s.eigenvalues if s.blocks is None else s.blocks
    record = {"eigenvalues": values.tolist(), "noise_floor": s.noise_floor, "rows": s.rows}
    record |= {"nulls": s.nulls, "null_reason": s.null_reason, "arithmetic": s.arithmetic}
    return record if s.size is None else record | {"size": s.size}


def _spectrum(record: dict[str, Any]) -> Spectrum:
    values = torch.tensor(record["eigenvalues"], dtype=torch.float64, device="cpu")
    if values.ndim not in (1, 2):
        raise ValueError("eigenvalues must be a list of numbers, or one list a group")
    grouped = values.ndim == 2
    _check_numbers(record["eigenvalues"] if grouped else [record["eigenvalues"]], record.get("noise_floor", 0.0))
    eigenvalues = values.flatten().sort(descending=True).values if grouped else values
    return Spectrum(**{**record, "eigenvalues": eigenvalues, "blocks": values if grouped else None})


def _check_numbers(blocks: list[Any], noise_floor: Any) -> None:
    # by lists, not tensors: the log of a deep network has thousands of short spectra a step
    for values in blocks:
        falling = not values or (values == sorted(values, reverse=True) and 0 <= values[-1] <= values[0] < math.inf)
        if not falling or math.isnan(sum(values)):
            raise ValueError("eigenvalues must be finite, at least 0, and descending")
    if not isinstance(noise_floor, int | float) or not 0 <= noise_floor < math.inf:
        raise ValueError(f"noise_floor must be a finite number, at least 0, got {noise_floor!r}")
