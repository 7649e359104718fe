"""The commands of `condzoo` that train: recipes, train, sweep, eval; `condzoo.cli` adds them to its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from condzoo.training import Recipe, Run

EXIT_CHECK_FAILED, EXIT_DIVERGED = 1, 3

RecipeArg = Annotated[
    str, typer.Argument(help="A TOML file, or a recipe's name, e.g. cifar10/resnet20_lastbn (`condzoo recipes`).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe, e.g. optim.lr=0.05; repeatable."),
]
Seeds = Annotated[str | None, typer.Option(metavar="1-5|1,3", help="Several seeds, a run each.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Stop a run after this many steps, and evaluate it.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder with the data sets, as torchvision lays them out. Default: CONDZOO_DATA, then a cache."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def recipes(as_json: AsJson = False) -> None:
    """List the training recipes, with what each reproduces."""
    from condzoo import display
    from condzoo.training import recipe_headers

    display.print_recipes(recipe_headers(), as_json)


def train(
    recipe: RecipeArg,
    set_: Set = None,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    seeds: Seeds = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; with --seeds the folder of seed1/ ... Default: runs/DATA-MODEL-HASH-seedN."),
    ] = None,
    max_steps: MaxSteps = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Train a network by a recipe, probing it as it learns; the same command again goes on where it stopped.

    With --seeds each seed is a run, and mean +- standard deviation are printed and written to OUT/summary.json.
    """
    from condzoo.training import load_recipe

    if seed is not None and seeds is not None:
        raise ValueError("train takes --seed N or --seeds 1-5, not both")
    loaded = load_recipe(recipe, [*(set_ or ()), *([] if seed is None else [f"seed={seed}"])])
    options: dict[str, Any] = {"out": out, "max_steps": max_steps, "device": device, "data_root": data_root}
    if seeds is not None:
        train_several(loaded, seeds, options)
    else:
        train_one(loaded, options)


def train_one(recipe: "Recipe", options: dict[str, Any]) -> None:
    """One run, then its table."""
    from condzoo import display
    from condzoo.progress import TrainingProgress
    from condzoo.training import train as run_training

    with TrainingProgress(display.console) as progress:
        run = run_training(recipe, on_event=progress, **options)
    display.print_runs([run], picture=run.path / "conditioning.png")


def train_several(recipe: "Recipe", seeds: str, options: dict[str, Any]) -> None:
    """A run a seed, then their table and mean +- std; exit 3 where one diverged and the recipe does not allow it."""
    from condzoo import display
    from condzoo.progress import TrainingProgress
    from condzoo.training import parse_seeds, train_seeds

    with TrainingProgress(display.console) as progress:
        runs = train_seeds(recipe, parse_seeds(seeds), on_event=progress, **options)
    print_comparison(runs, runs[0].path.parent)
    if recipe.on_divergence == "stop" and any(run.summary["status"] == "diverged" for run in runs):
        raise typer.Exit(EXIT_DIVERGED)


def sweep(
    recipe: RecipeArg,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=A,B,...", help="Values of a field to try, e.g. optim.lr=0.1,0.01; repeatable."),
    ] = None,
    set_: Set = None,
    seeds: Seeds = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, one folder each in it.")] = Path("runs/sweep"),
    max_steps: MaxSteps = None,
    engine: Annotated[
        str, typer.Option(help="local: here, one run after the other. ray: on a Ray cluster, many at a time.")
    ] = "local",
    gpus_per_run: Annotated[
        float | None, typer.Option(help="Ray: GPUs of a run; 0.5 lets two share one. Default: 1 if there are any.")
    ] = None,
    cpus_per_run: Annotated[float, typer.Option(help="Ray: CPU cores of a run.")] = 1,
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
    from condzoo import display
    from condzoo.progress import TrainingProgress
    from condzoo.training import load_recipe, parse_grid, parse_seeds
    from condzoo.training import sweep as run_sweep

    base, values = load_recipe(recipe, set_ or ()), parse_grid(grid or ())
    numbers = parse_seeds(seeds) if seeds else None
    if dry_run:
        print_planned(base, values, numbers, out, shard, max_steps)
        return
    with TrainingProgress(display.console) as progress:
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
            on_event=progress,
            gpus_per_run=gpus_per_run,
            cpus_per_run=cpus_per_run,
        )
    print_comparison(runs, out)
    if any(run.summary["status"] == "failed" for run in runs):
        raise typer.Exit(EXIT_CHECK_FAILED)


def print_planned(
    recipe: "Recipe",
    grid: dict[str, list[Any]],
    seeds: list[int] | None,
    out: Path,
    shard: str | None,
    max_steps: int | None,
) -> None:
    """The runs of a sweep, and which are finished."""
    from condzoo.training import finished_among, plan_sweep, take_shard

    planned = take_shard(plan_sweep(recipe, grid, seeds), shard)
    done = finished_among(planned, out, max_steps)
    for name in planned:
        state = done[name].summary["status"] if name in done else "begun" if (out / name).exists() else "to do"
        typer.echo(f"{state:9} {out / name}")
    typer.echo(f"{len(planned)} runs, {len(planned) - len(done)} left to do")


def print_comparison(runs: "list[Run]", out: Path) -> None:
    """The table of several runs, mean +- std of each setting, and their pictures side by side."""
    from condzoo import display
    from condzoo.probe import plot_comparison
    from condzoo.training import summarize

    if not runs:
        typer.echo("no runs in this shard")
        return
    labels = display.run_labels(runs)
    probed = {label: run.path for label, run in labels.items() if (run.path / "conditioning.jsonl").exists()}
    if probed:
        plot_comparison(probed, out / "conditioning.png")
    display.print_runs(runs, out / "conditioning.png")
    display.print_settings(summarize({run.path.name: run for run in runs})["settings"])


def eval_command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    data_root: DataRoot = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a finished run on its test images again, to the last image."""
    from condzoo import display
    from condzoo.training import evaluate_run

    display.print_evaluation(evaluate_run(run, data_root=data_root, device=device), as_json)
