"""`python -m condzoo.validation.record_zoo [NAME ...]`: measure again what `validate` holds the zoo's models against.

Conditioning at initialization (models/conditioning.json) and fingerprints (models/fingerprints.json). Without names
it is that of every model of the zoo (about twenty minutes); with names, theirs alone.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

from condzoo.catalog import list_models, model_info
from condzoo.validation import fingerprint, initial_conditioning
from condzoo.validation.initial_conditioning import InitialConditioning, combine, measure_initial
from condzoo.validation.subject import prepare, small_input

SEEDS = range(8)


def conditioning(name: str) -> InitialConditioning:
    """A model's record: over `SEEDS`, each with weights and images of its own."""
    numbers = []
    for seed in SEEDS:
        subject = prepare(name, seed)
        numbers.append(measure_initial(subject.model, subject.x, subject.y))
    return combine(numbers)


def logits(name: str) -> list[float] | None:
    """A model's fingerprint, eight digits of each logit and nine of the largest."""
    found = fingerprint.fingerprint(prepare(name, 0).model, small_input(model_info(name)))
    return None if found is None else [*(round(value, 8) for value in found[:-1]), float(f"{found[-1]:.9g}")]


def dump_conditioning(records: dict[str, InitialConditioning]) -> str:
    """models/conditioning.json: a line a model, four digits of each mean and two of its spread."""
    lines = {}
    for name, record in records.items():
        rows = {
            layer: [rounded(value, 4) for value in record.mean[layer]]
            + [rounded(value, 2) for value in record.spread[layer]]
            for layer in record.mean
        }
        lines[name] = json.dumps(rows, separators=(",", ":"))
    columns = "means, then spreads, of condzoo.validation.initial_conditioning.QUANTITIES"
    head = f'"seeds": {len(SEEDS)}, "columns": "{columns}"'
    return f'{{"schema": 1, {head},\n"models": {line_by_line(lines)}}}\n'


def line_by_line(values: dict[str, str]) -> str:
    """A JSON object of values that are JSON already, one a line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {value}" for name, value in values.items()) + "\n}"


def rounded(value: float | None, digits: int) -> float | None:
    """A number with so many significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def in_order(values: dict[str, Any]) -> dict[str, Any]:
    """The registered models' values, in the zoo's order."""
    return {name: values[name] for name in list_models() if name in values}


def main(names: Iterable[str]) -> None:
    """Measure model by model, and write both files after each."""
    prints, records = dict(fingerprint.read_fingerprints()), dict(initial_conditioning.initial_records())
    for name in list(names) or list_models():
        prints[name], records[name] = logits(name), conditioning(name)
        text = line_by_line({name: json.dumps(value) for name, value in in_order(prints).items()})
        fingerprint.RECORD.write_text(text + "\n", encoding="utf-8")
        initial_conditioning.RECORD.write_text(dump_conditioning(in_order(records)), encoding="utf-8")
        print(f"recorded {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
