"""Many runs of one recipe: every combination of a grid, every seed, one after the other."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from condzoo.training.attempts import attempt, finished_run
from condzoo.training.events import OnEvent
from condzoo.training.recipe import RecipeError, parse_override, parse_recipe, recipe_tables, set_field
from condzoo.training.runs import Run
from condzoo.training.schema import Recipe

ENGINES = ("local", "ray")


def sweep(
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] | None = None,
    out: str | Path = "runs/sweep",
    *,
    max_steps: int | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> list[Run]:
    """Train every combination, each in a folder of its own under `out`; finished ones are not trained again.

    Args:
        recipe: what all runs share.
        grid: field's path -> its values, e.g. {"optim.lr": [0.1, 0.01], "model.name": [...]}.
        seeds: default: the recipe's own.
        out: the folder of the runs.
        max_steps, device, data_root, on_event: as for `train`.

    Returns:
        The runs in the grid's order, the last field and then the seed fastest. A diverged run is among
        them with summary["status"] "diverged", one that failed otherwise with "failed" and its error.

    Raises:
        RecipeError: a combination that is no valid recipe, before anything is trained.
    """
    planned = plan_sweep(recipe, grid, seeds)
    return run_all(planned, out, max_steps=max_steps, device=device, data_root=data_root, on_event=on_event)


def run_all(
    planned: Mapping[str, Recipe],
    out: str | Path,
    *,
    engine: str = "local",
    max_steps: int | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    on_event: OnEvent | None = None,
    gpus_per_run: float | None = None,
    cpus_per_run: float = 1,
) -> list[Run]:
    """Train each recipe in its folder under `out`, whatever becomes of the others; finished ones are left alone.

    Args:
        planned: folder name -> recipe.
        out: the folder of the runs.
        engine: "local": here, one after the other; "ray": see `condzoo.training.ray_engine`.
        max_steps, device, data_root, on_event: as for `train`.
        gpus_per_run, cpus_per_run: what Ray sets apart for a run; the local engine has no use for them.

    Returns:
        The runs in the order planned; see `sweep`.

    Raises:
        ValueError: an engine that there is not.
        Stopped: on a signal; the same call goes on.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, must be one of: {', '.join(ENGINES)}")
    done = {name: finished_run(recipe, Path(out) / name, max_steps) for name, recipe in planned.items()}
    missing = {name: recipe for name, recipe in planned.items() if done[name] is None}
    options: dict[str, Any] = {"max_steps": max_steps, "device": device, "data_root": data_root, "on_event": on_event}
    if engine == "ray" and missing:
        from condzoo.training.ray_engine import run_all_on_ray

        room: dict[str, Any] = {"gpus_per_run": gpus_per_run, "cpus_per_run": cpus_per_run}
        return in_order(planned, done | run_all_on_ray(missing, out, **options, **room))
    return in_order(planned, done | {n: attempt(recipe, Path(out) / n, **options) for n, recipe in missing.items()})


def in_order(planned: Mapping[str, Recipe], runs: Mapping[str, Run | None]) -> list[Run]:
    """The runs as they were planned."""
    return [run for name in planned if (run := runs[name]) is not None]


def plan_sweep(
    recipe: Recipe, grid: Mapping[str, Sequence[Any]], seeds: Sequence[int] | None = None
) -> dict[str, Recipe]:
    """Folder name ("optim.lr=0.1-seed1") -> recipe of every run, in their order."""
    planned = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        for seed in seeds or [recipe.seed]:
            tables = recipe_tables(recipe)
            for field, value in [*chosen.items(), ("seed", seed)]:
                set_field(tables, field, value)
            name = "-".join([*(f"{field}={value}" for field, value in chosen.items()), f"seed{seed}"])
            planned[re.sub(r"[^\w.=+-]+", "_", name)] = parse_recipe(tables, source=name)
    return planned


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """The grid of "optim.lr=0.1,0.01" and the like: a field's path and TOML values or bare words.

    Raises:
        RecipeError: no field, or no value.
    """
    grid = {}
    for text in texts:
        field, equals, values = text.partition("=")
        if not equals or not field.strip() or not values.strip():
            raise RecipeError(f"grid {text!r}: must be FIELD=A,B,..., e.g. optim.lr=0.1,0.01")
        grid[field.strip()] = [parse_override(f"{field}={value}")[1] for value in values.split(",")]
    return grid


def parse_seeds(text: str) -> list[int]:
    """The seeds of "1-5", "1,3" or "1-3,7".

    Raises:
        RecipeError: neither.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise RecipeError(f"seeds {text!r}: must be like 1-5 or 1,3,7")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds
