"""Many runs of one recipe: every seed, every combination of a grid."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from condzoo.probe.files import expanded
from condzoo.training.attempts import RunOptions, train_to_any_end
from condzoo.training.events import OnEvent
from condzoo.training.many_runs import run_all, run_all_here, unclaimed
from condzoo.training.recipe import RecipeError, override_field, parse_override, parse_recipe
from condzoo.training.runs import Run, default_seeds_directory
from condzoo.training.schema import Recipe
from condzoo.training.summaries import check_folder, write_summary

LONGEST_NAME = 255  # bytes, of a file or folder on most file systems
MOST_SEEDS = 10_000  # of a range: where a digit too many was typed, no list of billions


def sweep(
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] | None = None,
    out: str | Path = "runs/sweep",
    *,
    shard: str | None = None,
    **options: Any,
) -> list[Run]:
    """Train every combination, each in a folder of its own under `out`; finished ones are not trained again.

    What they came to, with mean +- std over seeds, is written to out/summary.json: see `summarize`.

    Args:
        recipe: what all runs share.
        grid: field's path -> its values, e.g. {"optim.lr": [0.1, 0.01], "model.name": [...]}.
        seeds: default: the recipe's own.
        out: the folder of the runs.
        shard: "2/4": of four parts the second, for as many machines without a cluster.
        options: engine, max_steps, device, data_root, on_event ...: as for `run_all`.

    Returns:
        The runs in the grid's order, the last field and then the seed fastest. A diverged run is among
        them with summary["status"] "diverged", one that failed otherwise with "failed" and its error.

    Raises:
        RecipeError: a combination that is no valid recipe, before anything is trained.
        RunDirectoryError: `out` holds another's summary.json, or runs of another recipe.
    """
    planned = take_shard(plan_sweep(recipe, grid, seeds), shard)
    folder = expanded(out)
    check_folder(unclaimed(folder), planned)
    runs = run_all(planned, folder, **options)
    write_summary(folder, dict(zip(planned, runs, strict=True)), shard)
    return runs


def train_seeds(
    recipe: Recipe,
    seeds: Sequence[int],
    out: str | Path | None = None,
    *,
    max_steps: int | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> list[Run]:
    """Train a recipe once a seed, in out/seedN; mean +- std are written to out/summary.json: see `summarize`.

    A finished seed is not trained again, one that diverges is recorded and the others go on. Arguments and
    other errors are those of `train`; the default of `out` is `default_run_directory(recipe)` less the seed.
    """
    folder = expanded(out) if out is not None else default_seeds_directory(recipe)
    planned = plan_sweep(recipe, {}, seeds)
    options = RunOptions(max_steps, device, data_root, on_event)
    check_folder(unclaimed(folder), planned)
    runs = run_all_here(planned, folder, options, one=train_to_any_end)
    write_summary(folder, dict(zip(planned, runs, strict=True)))
    return runs


def plan_sweep(
    recipe: Recipe, grid: Mapping[str, Sequence[Any]], seeds: Sequence[int] | None = None
) -> dict[str, Recipe]:
    """Folder name ("optim.lr=0.1-seed1") -> recipe of every run, in their order.

    Raises:
        RecipeError: a combination that is no valid recipe; two that would be in one folder; a field, or seeds, without
            a value.
    """
    tried = {field: list(values) for field, values in grid.items()}  # numpy's arrays are neither true nor false
    if seeds is not None:
        if "seed" in tried:
            raise RecipeError("grid: seed: got both this and seeds, give one")
        tried["seed"] = list(seeds)
    for field, values in tried.items():
        if not values:
            raise RecipeError(f"{field}: got no values, of which every one makes a run; give some, or leave it out")
    numbers = tried.pop("seed", [recipe.seed])
    planned: dict[str, Recipe] = {}
    for combination in itertools.product(*tried.values()):
        chosen = dict(zip(tried, combination, strict=True))
        for seed in numbers:
            # as given, not as resolved: defaults of one optimizer or schedule are no fields of another
            tables = recipe.model_dump(exclude_unset=True, exclude_none=True)
            for field, value in [*chosen.items(), ("seed", seed)]:
                override_field(tables, field, value)
            name = "-".join([*(f"{field}={value}" for field, value in chosen.items()), f"seed{seed}"])
            folder = re.sub(r"[^\w.=+-]+", "_", name)
            if (size := len(folder.encode())) > LONGEST_NAME:
                raise RecipeError(
                    f"grid: a run's folder is called by its values, and {folder[:60]}... has {size} bytes, more than "
                    f"the {LONGEST_NAME} that a name may have; sweep shorter values"
                )
            made = parse_recipe(tables, source=name)
            if planned.setdefault(folder, made) != made:
                raise RecipeError(f"grid: {name!r} and another run would both be in {folder!r}; sweep them apart")
    return planned


def take_shard(planned: Mapping[str, Recipe], shard: str | None) -> dict[str, Recipe]:
    """The runs of shard "i/n": every n-th, from the i-th on, so that each run is in one of the n; None: all.

    Raises:
        RecipeError: no such shard.
    """
    if shard is None:
        return dict(planned)
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"shard {shard!r}: must be I/N with I from 1 to N, e.g. 2/4")
    first, parts = int(match[1]) - 1, int(match[2])
    return dict(list(planned.items())[first::parts])


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """The grid of "optim.lr=0.1,0.01", "freeze=[],['conv1.*']": a field's path and TOML values or bare words.

    Raises:
        RecipeError: no field, no value, or a field twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        if not equals or not field.strip() or not values.strip():
            raise RecipeError(f"grid {text!r}: must be FIELD=A,B,..., e.g. optim.lr=0.1,0.01")
        if field.strip() in grid:
            raise RecipeError(f"grid {text!r}: {field.strip()} came before; give all of its values at once, as A,B,...")
        grid[field.strip()] = [parse_override(f"{field}={value}")[1] for value in split_values(values)]
    return grid


def split_values(text: str) -> list[str]:
    """The values of "a,b": cut at the commas that are not within quotes, brackets or braces."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        depth += 0 if quote else (sign in "[{") - (sign in "]}")
        if sign == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def parse_seeds(text: str) -> list[int]:
    """The seeds of "1-5", "1,3" or "1-3,7", each once.

    Raises:
        RecipeError: neither, or more than `MOST_SEEDS`.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise RecipeError(f"seeds {text!r}: must be like 1-5 or 1,3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= MOST_SEEDS:
            raise RecipeError(f"seeds {text!r}: {part.strip()} are {last - first + 1}, must be at most {MOST_SEEDS}")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)
