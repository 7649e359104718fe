"""`conditioning.jsonl`: one measurement a line, written so that a crash costs at most the last one.

The file is a log: a record at step s takes the place of all earlier lines with a step >= s, as after a
run went on from an older checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from condzoo.probe.conditioning import Conditioning
from condzoo.probe.files import expanded, naming
from condzoo.probe.serialization import dumps, from_record, strict_json

if TYPE_CHECKING:
    import pandas

FILE_NAME = "conditioning.jsonl"

Column = np.ndarray
Records = str | Path | Conditioning | Iterable[Conditioning]
Fractions = float | Iterable[float]


def append_record(path: str | Path, conditioning: Conditioning) -> None:
    """Append one measurement and wait until it is on the disk.

    Raises:
        OSError: it cannot be written; names the file.
    """
    path = expanded(path)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(dumps(conditioning) + "\n")
        file.flush()
        os.fsync(file.fileno())


def drop_torn_line(path: str | Path) -> None:
    """Cut off a last line that a crash left without its end, so that appending is safe."""
    path = expanded(path)
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)


def read_records(path: str | Path) -> list[Conditioning]:
    """The measurements of a run, by increasing step.

    Args:
        path: a `conditioning.jsonl`, or the run directory that holds it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is not a record; names file and line. A torn last line only warns.
    """
    path = expanded(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        within = sorted(str(each.parent) for each in path.parent.glob(f"*/{FILE_NAME}") if path.name == FILE_NAME)
        if within:
            raise FileNotFoundError(f"{path.parent} is a folder of several runs; name some: {' '.join(within)}")
        run = path.name == FILE_NAME and path.parent.exists()
        why = "; was the run probed (probe.every > 0)?" if run else ": there is no such file or folder"
        raise FileNotFoundError(f"no conditioning records at {path}{why}")
    records: list[Conditioning] = []
    *lines, rest = path.read_bytes().split(b"\n")  # of text, other letters (U+2028) would end a line, too
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        try:
            record = from_record(strict_json(line.decode()))
        except ValueError as error:
            other = isinstance(error, UnicodeDecodeError) and error.reason != "unexpected end of data"
            if number > len(lines) and not other:
                warnings.warn(f"{path}:{number}: skipped a torn last line", stacklevel=2)
                break
            if isinstance(error, UnicodeDecodeError):
                raise ValueError(f"{path} is no file of conditioning records: line {number}: {error}") from None
            raise ValueError(f"{path}:{number}: {error}") from None
        while records and record.step is not None and (records[-1].step or 0) >= record.step:
            records.pop()
        records.append(record)
    return records


def loaded(records: Records) -> list[Conditioning]:
    """The measurements of a `conditioning.jsonl` or its run directory; one measurement; or several.

    Raises:
        FileNotFoundError, ValueError: as `read_records`.
        TypeError: what is no measurement.
    """
    if isinstance(records, (str, Path)):
        return read_records(records)
    one = isinstance(records, Conditioning)  # which is iterable, too
    several: list[Any] = [records] if one else list(records)
    for record in several:
        if not isinstance(record, Conditioning):
            path = isinstance(record, (str, Path))
            hint = " among several; read_records(path) reads one, plot_comparison draws {label: path, ...}" * path
            raise TypeError(
                f"records must be a conditioning.jsonl or measurements, got a {type(record).__name__}{hint}"
            )
    return several


def fractions(p: Fractions) -> tuple[float, ...]:
    """Fractions of a spectrum, from one or several."""
    return tuple(p) if isinstance(p, Iterable) else (float(p),)


def record_columns(records: Records, p: Fractions = (0.5, 1.0)) -> dict[str, Column]:
    """Measurements as columns: one entry a step and layer, ready for numpy or `pandas.DataFrame`.

    Columns: step (-1 for a measurement at rest), layer, depth (the layer's place in the forward pass), kind, samples;
    for `input` and `output_grad` {..}_lambda_max, {..}_rank, {..}_dim, and for each p {..}_kappa{100 p} with
    {..}_status{100 p}; weight, weight_grad and their {..}_frobenius (NaN where there is none).

    Args:
        records: a `conditioning.jsonl`, its run directory, one measurement, or several.
        p: the fraction, or the fractions, of the spectrum for which kappa_p gets a column.

    Raises:
        FileNotFoundError, ValueError: as `read_records`.
        TypeError: what is no measurement.
    """
    rows: list[dict[str, object]] = []
    asked = fractions(p)
    for record in loaded(records):
        for depth, (name, layer) in enumerate(record.items()):
            row: dict[str, object] = {"step": -1 if record.step is None else record.step, "layer": name}
            row |= {"depth": depth, "kind": layer.kind, "samples": layer.samples}
            for side in ("input", "output_grad"):
                s = getattr(layer, side)
                row |= {f"{side}_lambda_max": s.lambda_max, f"{side}_rank": s.rank, f"{side}_dim": s.dim}
                for q in asked:
                    row[f"{side}_kappa{100 * q:g}"] = s.condition_number(q)
                    row[f"{side}_status{100 * q:g}"] = s.status(q)
            for value in ("weight", "weight_grad", "weight_frobenius", "weight_grad_frobenius"):
                number = getattr(layer, value)
                row[value] = np.nan if number is None else number
            rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else {})}


def to_pandas(records: Records, p: Fractions = (0.5, 1.0)) -> pandas.DataFrame:
    """`record_columns` as a DataFrame, one row a step and layer; arguments as there.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise ImportError("to_pandas needs pandas (pip install pandas); record_columns does without") from None
    return DataFrame(record_columns(records, p))
