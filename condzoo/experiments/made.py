"""When, on what and of which source data were made: of one run, of one network, or of all that a file holds."""

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import condzoo
from condzoo.training.environment import describe_environment
from condzoo.training.precision import Numerics

FIELDS = ("hardware", "torch", "python", "commit", "condzoo")
APART = "; "  # between the texts of a field whose runs differ in it


def made_here() -> dict[str, Any]:
    """Of what this process measures on its CPU now."""
    numerics = Numerics("fp32", channels_last=False, device=torch.device("cpu"))
    return made_of(describe_environment(numerics)) | {"condzoo": condzoo.__version__}


def made_of(environment: dict[str, Any]) -> dict[str, Any]:
    """Of a run, by a record of its environment.json; the date is today's, when its numbers are taken."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{environment['processor']}, {environment['threads']} thread(s), {environment['device']}",
        "torch": environment["packages"]["torch"],
        "python": environment["python"],
        "commit": (environment["source"] or {}).get("commit"),
        "condzoo": environment["packages"].get("condzoo"),
    }


def by_this_version(made: dict[str, Any]) -> bool:
    """Whether something was made by this version of condzoo, and by no other; what does not say by which was not."""
    return made.get("condzoo") == condzoo.__version__


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several as one: the last date, and of every other field all texts that differ; None where no part says it."""
    fields = {field: distinct(part.get(field) for part in parts) for field in FIELDS}
    return {"date": max(part["date"] for part in parts), **fields}


def distinct(texts: Iterable[str | None]) -> str | None:
    """Each text once, in their order; one may be of several already."""
    return APART.join(dict.fromkeys(each for text in texts if text for each in text.split(APART))) or None


def made_on(data: dict[str, Any]) -> str:
    """The hardware of an experiment's data, and the precision of its runs where they differ in it.

    Data of before rows had one say nothing of it.
    """
    hardware: str = data["made"]["hardware"]
    counts = Counter(run["precision"] for run in data.get("runs", []) if run.get("precision"))
    if len(counts) < 2:
        return hardware
    parts = [f"{count} run{'' if count == 1 else 's'} in {precision}" for precision, count in counts.items()]
    return f"{hardware} ({', '.join(parts)})"
