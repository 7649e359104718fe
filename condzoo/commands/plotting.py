"""The command `condzoo plot`: pictures of what was measured."""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from condzoo.commands import reproduce

RECORDS = "conditioning.jsonl"
DATA_FILE = re.compile(r"\.json(\.bak\d*)?$")  # an experiment's, or a copy of before; or a measurement


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, their conditioning.jsonl, or measurements of `condzoo probe --out`; or one data "
            "file of `condzoo reproduce`."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The picture. Default: beside what is drawn; of several runs comparison.png.")
    ] = None,
) -> None:
    """Draw the conditioning of one run, compare several side by side, or draw an experiment's figure again."""
    from condzoo.probe import plot_comparison, plot_records

    labels = labels_of(runs)
    with warnings_in_words():
        if len(runs) > 1:
            target = out or Path("comparison.png")
            plot_comparison(dict(zip(labels, runs, strict=True)), target)
        elif DATA_FILE.search(runs[0].name) and not is_measurement(runs[0]):
            target = reproduce.redraw(runs[0], out)
        else:
            target = out or (runs[0] / "conditioning.png" if runs[0].is_dir() else runs[0].with_suffix(".png"))
            plot_records(runs[0], target)
    typer.echo(f"wrote {target}")


@contextlib.contextmanager
def warnings_in_words() -> Iterator[None]:
    """Inside, a warning (of a torn last line) is a line like an error's, without the source that gives it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
        yield


def labels_of(runs: list[Path]) -> list[str]:
    """Runs and measurements by their `path_labels`.

    Raises:
        ValueError: one is given twice.
    """
    from condzoo.commands.display import path_labels

    labels = path_labels([run.parent if run.name == RECORDS else run for run in runs])
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    return labels


def is_measurement(path: Path) -> bool:
    """Whether a JSON file is what `condzoo probe --out` writes."""
    from condzoo.probe.serialization import SCHEMA

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # who reads it says what is wrong
    return isinstance(content, dict) and content.get("schema") == SCHEMA
