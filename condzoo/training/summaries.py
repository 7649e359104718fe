"""What many runs came to: each one's result, and mean +- standard deviation over the seeds of a setting."""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from condzoo.training.distributed import writes
from condzoo.training.recipe import RecipeError, load_recipe, parse_recipe, set_field
from condzoo.training.run_directory import (
    RECIPE,
    SUMMARY,
    RunDirectoryError,
    begun,
    read_json,
    read_summary,
    write_json,
)
from condzoo.training.runs import Run, is_complete
from condzoo.training.schema import Recipe

MEASURES = tuple(f"{split}_{what}" for split in ("test", "val", "train") for what in ("error", "accuracy", "loss"))
SUMMARIZED = (*MEASURES, "seconds")
OUTCOMES = ("done", "diverged", "failed")
KEPT = ("status", "seed", "steps", "epochs", *SUMMARIZED, "diverged", "error")


def summarize(runs: Mapping[str, Run]) -> dict[str, Any]:
    """The results of runs by folder name, as strict JSON.

    Returns:
        `runs`: folder -> its summary in short; `settings`: what is the same but for the seed ("" where there
        is nothing else) -> how many runs are done, diverged and failed, how many of those done are shorter
        than the longest, and of each number {"mean", "std", "n"} over the others that are done. std is the
        sample's, with n - 1 below; None for one run.
    """
    return summary_of(in_short(runs))


def in_short(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Folder name -> what a summary of many keeps of a run's own."""
    return {name: kept(run.summary) for name, run in runs.items()}


def kept(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary in short."""
    return {key: summary[key] for key in KEPT if key in summary}


def summary_of(short: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`summarize` of runs in short."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for name, summary in short.items():
        settings.setdefault(setting_of(name), []).append(summary)
    return {"settings": {name: spread(group) for name, group in settings.items()}, "runs": short}


def check_folder(out: Path, planned: Mapping[str, Recipe]) -> None:
    """See that the summary of these runs would take the place of no other's, and what it keeps compares with them.

    Raises:
        RunDirectoryError: out/summary.json is none of many runs, or a run there is of another recipe than the planned
            ones of its setting; or one of a summary there is so in more than its seed and what is swept.
    """
    summary = out / SUMMARY
    if summary.is_file() and not is_of_many_runs(summary):
        raise RunDirectoryError(f"{summary} is not of several runs, whose summary would replace it; use another --out")
    recipes = {setting_of(name): recipe for name, recipe in planned.items()}
    for run in sorted(path.parent for path in out.glob(f"*/{RECIPE}")):
        seed = re.search(r"seed(\d+)$", run.name)
        if seed and setting_of(run.name) in recipes:
            begun(run, recipes[setting_of(run.name)].model_copy(update={"seed": int(seed[1])}))
    for file in sorted(out.glob(f"{summary.stem}*.json")):  # a shard's, too
        for name in sorted(earlier(file).keys() - planned.keys()):
            check_beside(file, name, planned)


def check_beside(summary: Path, name: str, planned: Mapping[str, Recipe]) -> None:
    """See that a run of a summary differs from the planned ones in nothing but its seed and what they or it sweep.

    Raises:
        RunDirectoryError: it does.
    """
    run, here = summary.parent / name, next(iter(planned.values()), None)
    if here is None:  # a shard without runs
        return
    there = load_recipe(run / RECIPE)
    tables = here.model_dump(exclude_unset=True, exclude_none=True)  # as given: see `plan_sweep`
    try:
        for field in sorted({"seed"}.union(*map(swept, (name, *planned)))):
            set_field(tables, field, value_of(there, field))
        begun(run, parse_recipe(tables))
    except RunDirectoryError as error:
        raise RunDirectoryError(f"{summary} is of other runs, too: {error}") from error
    except RecipeError as error:
        raise RunDirectoryError(
            f"{summary} is of other runs, too: {run} belongs to another recipe; use another --out"
        ) from error


def swept(folder: str) -> list[str]:
    """The fields of a grid, by a run's folder: optim.lr and model.name of "optim.lr=1e-05-model.name=mlp4x24-seed1"."""
    return re.findall(r"(?:^|-)([a-z_]+(?:\.\w+)*)=", folder)


def value_of(recipe: Recipe, field: str) -> Any:
    """A field's value by its path; None where there is no such field."""
    value: Any = recipe.model_dump()
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def earlier(summary: Path) -> dict[str, dict[str, Any]]:
    """The runs of a summary, in short, that still lie beside it, as they are now; none where it is not of many runs."""
    if not summary.is_file() or not is_of_many_runs(summary):
        return {}
    runs = read_json(summary).get("runs", {})
    here = ((name, summary.parent / name, run) for name, run in runs.items())
    return {name: as_it_is(folder, run) for name, folder, run in here if (folder / RECIPE).is_file()}


def as_it_is(folder: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """What a run's own summary says, in short: since a call of many recorded it, it may have been trained by itself.

    What a run that failed had left before is none of its failure's; one that has come to its end since is done.
    """
    try:
        own = read_summary(folder)
    except (OSError, RunDirectoryError):  # it has none, or `condzoo train` says what to do with it
        return recorded
    ended = own["status"] == "diverged" or is_complete(load_recipe(folder / RECIPE), own)
    return kept(own) if ended or recorded.get("status") != "failed" else recorded


def summary_file(out: str | Path, shard: str | None = None) -> Path:
    """Where the summary of many runs is: out/summary.json, of a shard out/summary-2of4.json."""
    return Path(out) / (SUMMARY if shard is None else f"{Path(SUMMARY).stem}-{shard.replace('/', 'of')}.json")


def earlier_runs(out: str | Path, shard: str | None = None) -> dict[str, Run]:
    """Folder name -> run, its summary in short, of what a summary of many holds."""
    path = summary_file(out, shard)
    return {
        name: Run(path.parent / name, load_recipe(path.parent / name / RECIPE), run)
        for name, run in earlier(path).items()
    }


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
    """Counts of outcomes, and mean and sample standard deviation of each number over the whole runs.

    Those are the runs that are done and no shorter than another: an earlier call may have cut some short (max_steps).
    """
    done = [summary for summary in group if summary["status"] == "done"]
    longest = max((summary["steps"] for summary in done), default=0)
    whole = [summary for summary in done if summary["steps"] == longest]
    result: dict[str, Any] = {
        "seeds": [summary["seed"] for summary in group],
        **{outcome: sum(summary["status"] == outcome for summary in group) for outcome in OUTCOMES},
        "shorter": len(done) - len(whole),
    }
    for key in SUMMARIZED:
        values = [summary[key] for summary in whole if summary.get(key) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            result[key] = {"mean": statistics.fmean(values), "std": std, "n": len(values)}
    return result


def write_summary(out: str | Path, runs: Mapping[str, Run], shard: str | None = None) -> dict[str, Any]:
    """Write `summarize(runs)` to out/summary.json, or the part of a shard to out/summary-2of4.json; returns it.

    Earlier runs that are written there stay, as long as they lie in `out`: seeds 4 and 5 join 1 to 3.
    Of several processes the first one writes; of several calls one at a time reads and writes.
    """
    if not writes():
        return summarize(runs)
    path = summary_file(out, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        summary = summary_of(earlier(path) | in_short(runs))
        write_json(path, summary)
    return summary
