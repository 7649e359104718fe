"""Writing a data file over an earlier call's: nothing that was measured may be gone with it.

An entry is what a data file lists: a run, a network, a trial, a point.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from condzoo.experiments.data_files import ENTRY_KEYS
from condzoo.experiments.initialization import network_file, read_kept
from condzoo.experiments.training import row_name
from condzoo.training.events import Notice, OnEvent
from condzoo.training.run_directory import read_summary, write_atomically

NUMBERS = ("status", "steps", "train_loss")  # which tell a run that was made again from the first one


def write_data(
    path: Path, before: dict[str, Any], data: dict[str, Any], folder: Path, on_event: OnEvent | None = None
) -> None:
    """Write an experiment's data, unless a run failed that the file in their place has finished.

    Of what is in that file alone a copy is kept, and of another experiment's file, which was put there: *.json.bak, or
    the first of *.json.bak2, *.json.bak3 ... that is free.

    Args:
        path: of the file.
        before: what it holds; empty where it holds nothing of this experiment and scale.
        data: what it is going to hold.
        folder: of the runs, or of the networks measured.
        on_event: is told that the file stays, or where the copy is.
    """
    notify = on_event or (lambda _: None)
    if count := failed_over(before, data):
        what = f"{count} run{'' if count == 1 else 's'} that failed now"
        notify(Notice(f"{path} stays as it is, for it has {what}; `condzoo plot {path}` draws it again"))
        return
    other = path.exists() and not before
    if other or any(is_lost(key, entry, data, folder) for key in ENTRY_KEYS for entry in before.get(key, [])):
        names = (f"{path.name}.bak{number}" for number in itertools.chain([""], itertools.count(2)))
        copy = next(target for name in names if not (target := path.with_name(name)).exists())
        write_atomically(copy, path.read_bytes())
        which = "of another experiment or scale" if other else "and is nowhere else"
        notify(Notice(f"{copy}: what was in {path.name} {which}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n").encode())


def failed_over(before: dict[str, Any], data: dict[str, Any]) -> int:
    """How many runs came to an end before, and failed now."""
    ended = {row_name(row) for row in before.get("runs", []) if row["status"] != "failed"}
    return sum(row["status"] == "failed" and row_name(row) in ended for row in data.get("runs", []))


def is_lost(key: str, entry: dict[str, Any], data: dict[str, Any], folder: Path) -> bool:
    """Whether an entry of an earlier call's data is neither in the new ones nor in the folder.

    Args:
        key: where it is listed: "runs", "networks", "trials" or "points".
        entry: with what was measured; a run that failed has nothing to lose.
        data, folder: see `write_data`.
    """
    if key == "runs":
        if entry["status"] == "failed":
            return False
        now = [row for row in data.get(key, []) if row_name(row) == row_name(entry)]
        return not any(same_run(entry, other) for other in [*now, summary_in(folder, entry)])
    if entry in data.get(key, []):
        return False
    return key != "networks" or read_kept(network_file(folder, entry["label"], entry["seed"])).get("network") != entry


def same_run(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of one recipe; where one does not say of which, whether they came to the same numbers."""
    recipes = row.get("recipe"), other.get("recipe")
    return recipes[0] == recipes[1] if all(recipes) else all(row.get(key) == other.get(key) for key in NUMBERS)


def summary_in(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The summary in the run directory of a row; empty where there is none, or a damaged one."""
    try:
        return read_summary(folder / row_name(row))
    except (OSError, ValueError):
        return {}
