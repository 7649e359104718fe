"""What many runs came to: each one's result, and mean +- standard deviation over the seeds of a setting."""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from condzoo.training.distributed import writes
from condzoo.training.run_directory import RECIPE, SUMMARY, RunDirectoryError, begun, write_json
from condzoo.training.runs import Run
from condzoo.training.schema import Recipe

MEASURES = tuple(f"{split}_{what}" for split in ("test", "val", "train") for what in ("error", "accuracy", "loss"))
SUMMARIZED = (*MEASURES, "seconds")
OUTCOMES = ("done", "diverged", "failed")
KEPT = ("status", "seed", "steps", *SUMMARIZED, "diverged", "error")


def summarize(runs: Mapping[str, Run]) -> dict[str, Any]:
    """The results of runs by folder name, as strict JSON.

    Returns:
        `runs`: folder -> its summary in short; `settings`: what is the same but for the seed ("" where there
        is nothing else) -> how many runs are done, diverged and failed, and of each number {"mean", "std",
        "n"} over those that are done. std is the sample's, with n - 1 below; None for one run.
    """
    short = {name: {key: run.summary[key] for key in KEPT if key in run.summary} for name, run in runs.items()}
    settings: dict[str, list[dict[str, Any]]] = {}
    for name, summary in short.items():
        settings.setdefault(setting_of(name), []).append(summary)
    return {"settings": {name: spread(group) for name, group in settings.items()}, "runs": short}


def check_folder(out: Path, planned: Mapping[str, Recipe]) -> None:
    """See that the summary of these runs would take the place of no other's.

    Raises:
        RunDirectoryError: out/summary.json is none of many runs, or a run there is of another recipe than the planned
            ones of its setting.
    """
    summary = out / SUMMARY
    if summary.is_file() and not is_of_many_runs(summary):
        raise RunDirectoryError(f"{summary} is not of several runs, whose summary would replace it; use another --out")
    recipes = {setting_of(name): recipe for name, recipe in planned.items()}
    for run in sorted(path.parent for path in out.glob(f"*/{RECIPE}")):
        seed = re.search(r"seed(\d+)$", run.name)
        if seed and setting_of(run.name) in recipes:
            begun(run, recipes[setting_of(run.name)].model_copy(update={"seed": int(seed[1])}))


def is_of_many_runs(summary: Path) -> bool:
    """Whether a file is what `write_summary` writes."""
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and "settings" in found


def setting_of(folder: str) -> str:
    """ "optim.lr=0.1" of "optim.lr=0.1-seed3"; "" of "seed3"."""
    return re.sub(r"-?seed\d+$", "", folder)


def spread(group: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of outcomes, and mean and sample standard deviation of each number over the runs that are done."""
    result: dict[str, Any] = {
        "seeds": [summary["seed"] for summary in group],
        **{outcome: sum(summary["status"] == outcome for summary in group) for outcome in OUTCOMES},
    }
    for key in SUMMARIZED:
        values = [summary[key] for summary in group if summary["status"] == "done" and summary.get(key) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            result[key] = {"mean": statistics.fmean(values), "std": std, "n": len(values)}
    return result


def write_summary(out: str | Path, runs: Mapping[str, Run], shard: str | None = None) -> dict[str, Any]:
    """Write `summarize(runs)` to out/summary.json, or the part of a shard to out/summary-2of4.json; returns it.

    Of torchrun's processes the first one writes.
    """
    summary = summarize(runs)
    if not writes():
        return summary
    name = SUMMARY if shard is None else f"{Path(SUMMARY).stem}-{shard.replace('/', 'of')}.json"
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / name, summary)
    return summary
