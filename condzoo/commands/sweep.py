"""The command `condzoo sweep`: many runs of a recipe, and which of them are left to do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condzoo import exit_codes
from condzoo.commands.training import DataRoot, Device, MaxSteps, RecipeArg, Seeds, Set, print_comparison, reporting

if TYPE_CHECKING:
    from condzoo.training import Recipe


def sweep(
    recipe: RecipeArg,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=A,B,...",
            help="Values of a field to try, e.g. optim.lr=0.1,0.01; repeatable, and every combination is a run. `none` "
            "takes the field out, `'\"none\"'` is the text.",
        ),
    ] = None,
    set_: Set = None,
    seeds: Seeds = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, one folder each in it.")] = Path("runs/sweep"),
    max_steps: MaxSteps = None,
    engine: Annotated[
        str, typer.Option(help="local: here, one run after the other. ray: on a Ray cluster, many at a time.")
    ] = "local",
    gpus_per_run: Annotated[
        float | None,
        typer.Option(min=0, help="Ray: GPUs of a run; 0.5 lets two share one. Default: 1 if there are any."),
    ] = None,
    cpus_per_run: Annotated[float, typer.Option(min=0, help="Ray: CPU cores of a run.")] = 1,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only the I-th of N parts of the runs, for N machines without a cluster."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and which are left to do.")] = False,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Train every combination of a grid and seeds, and compare them: OUT/summary.json has mean +- std over the seeds.

    A finished run is not trained again; a run that diverges or fails is recorded and the others go on. Exit 1
    where one failed. The ray engine joins RAY_ADDRESS or the cluster this machine is in, else uses this machine;
    OUT and the data must be where every machine sees them.
    """
    from condzoo.training import load_recipe, parse_grid, parse_seeds
    from condzoo.training import sweep as run_sweep

    base, values = load_recipe(recipe, set_ or ()), parse_grid(grid or ())
    numbers = parse_seeds(seeds) if seeds is not None else None
    if dry_run:
        print_planned(base, values, numbers, out, shard, max_steps)
        return
    with reporting(tensorboard=False) as on_event:
        runs = run_sweep(
            base,
            values,
            numbers,
            out,
            shard=shard,
            engine=engine,
            max_steps=max_steps,
            device=device,
            data_root=data_root,
            on_event=on_event,
            gpus_per_run=gpus_per_run,
            cpus_per_run=cpus_per_run,
        )
    print_comparison(runs, out, shard)
    if any(run.summary["status"] == "failed" for run in runs):
        raise typer.Exit(exit_codes.CHECK_FAILED)


def print_planned(
    recipe: "Recipe",
    grid: dict[str, list[Any]],
    seeds: list[int] | None,
    out: Path,
    shard: str | None,
    max_steps: int | None,
) -> None:
    """The runs of a sweep, which are finished, and which would fail as their folder is taken.

    Raises:
        RunDirectoryError: the sweep would not begin in this folder; said once the runs are listed.
    """
    from condzoo.training import plan_sweep, state_of, take_shard
    from condzoo.training.many_runs import unclaimed
    from condzoo.training.summaries import check_folder

    planned = take_shard(plan_sweep(recipe, grid, seeds), shard)
    states = {name: state_of(each, out / name, max_steps) for name, each in planned.items()}
    for name, state in states.items():
        word, _, why = state.partition(": ")
        typer.echo(f"{word:9} {out / name}" + (f"  ({why})" if why else ""))
    left = sum(state in ("begun", "to do") for state in states.values())
    blocked = sum(state.startswith("blocked") for state in states.values())
    typer.echo(f"{len(planned)} runs, {left} left to do" + (f", {blocked} blocked" if blocked else ""))
    check_folder(unclaimed(out), planned)
