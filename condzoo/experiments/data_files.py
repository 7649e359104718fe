"""An experiment's data file, read back: what it must hold before anything is drawn or judged of it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from condzoo.experiments.loading import experiment_ids, load_experiment

SCHEMA = "condzoo.experiment/1"
AGAIN = "delete it, and give the `reproduce` command again"
KEYS = ("id", "scale", "seeds", "made", "reductions", "seconds")
ENTRIES = {"training": "runs", "initialization": "networks", "theory": "trials", "growth": "points"}
ENTRY_KEYS = {
    "runs": (
        *("label", "variant", "seed", "status", "chosen", "train_loss", "test_error"),
        *("loss", "epochs", "probed", "quantities"),
    ),
    "networks": ("label", "seed", "matrices"),
    "trials": ("seed", "errors"),
    "points": ("varied", "examples", "layers", "widths", "seconds"),
}


def read_data_file(path: str | Path) -> dict[str, Any]:
    """An experiment's data as `collect` wrote it.

    Raises:
        ValueError: another file, or one that lacks a piece; the file and the piece are named.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; if it is damaged, {AGAIN}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not an experiment's data: expected schema {SCHEMA!r}")
    if lacking := next(missing_pieces(data), None):
        raise ValueError(f"{path} is damaged: it has no {lacking}; {AGAIN}")
    return data


@contextlib.contextmanager
def damage_told(path: str | Path) -> Iterator[None]:
    """Of what is drawn or judged inside: errors that come of data that are not as `collect` writes them, as one line.

    Raises:
        ValueError: names the file.
    """
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {what}; {AGAIN}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def missing_pieces(data: dict[str, Any]) -> Iterator[str]:
    """What is missing of an experiment's data, by its kind."""
    yield from (key for key in KEYS if key not in data)
    if data["id"] not in experiment_ids():
        yield f"known experiment's id, but {data['id']!r}"
    kind = load_experiment(data["id"]).kind
    name = ENTRIES[kind]
    if not isinstance(data.get(name), list) or not data[name]:
        yield name
    if kind == "initialization" and "p" not in data:
        yield "p"
    for number, entry in enumerate(data[name]):
        if not isinstance(entry, dict):
            yield f"table {name}[{number}]"
        yield from (f"{key} in {name}[{number}]" for key in ENTRY_KEYS[name] if key not in entry)
