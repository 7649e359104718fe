"""What the command line shows: tables, and the progress of a training."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from condzoo.catalog import ModelInfo

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def number(value: float) -> str:
    """A count as people read it: 269.7K, 1.81G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def plain_table(title: str, *columns: str) -> Table:
    """A table without side borders, numbers to the right."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return table


def print_json(value: Any) -> None:
    """Strict JSON on stdout."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def print_models(infos: Sequence[tuple[str, ModelInfo]], as_json: bool) -> None:
    """One line a model."""
    if as_json:
        print_json([{**asdict(info), "name": name} for name, info in infos])
        return
    table = plain_table("", "model", "data", "depth", "parameters", "MACs", "last BN")
    for name, info in infos:
        sizes = (str(info.depth), f"{info.params:,}", number(info.macs), "yes" if info.last_bn else "")
        table.add_row(name, info.dataset, *sizes)
    console.print(table)


def print_info(info: ModelInfo, as_json: bool) -> None:
    """One line a field."""
    if as_json:
        print_json(asdict(info))
        return
    texts: dict[str, str] = {
        **{key: str(value) for key, value in asdict(info).items()},
        "input_size": " x ".join(map(str, info.input_size)),
        "last_bn": "yes" if info.last_bn else "no",
        "params": f"{info.params:,}",
        "macs": f"{info.macs:,} multiply-adds an image",
    }
    for key, text in texts.items():
        console.print(f"{key:12} {text}", soft_wrap=True)


def print_recipes(files: Mapping[str, Path], as_json: bool) -> None:
    """Each recipe's name and the first line of its header."""
    heads = {name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, path in files.items()}
    if as_json:
        print_json(heads)
        return
    table = plain_table("", "recipe", "what it is")
    table.columns[1].justify = "left"
    for name, head in heads.items():
        table.add_row(name, head)
    console.print(table)
