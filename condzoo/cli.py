"""The `condzoo` command: parses, calls, prints. What it calls is the public API; each command imports only
what it needs, so that `condzoo --help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from condzoo import checkpoint_commands, reproduce_commands

EXIT_CHECK_FAILED, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_STOPPED = 1, 2, 3, 75

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Why does this network train badly, and which layer is it?\n\n"
    "A zoo of networks in timm's registry, a probe of each layer's conditioning, training recipes, checkpoints.\n\n"
    "Exit codes: 0 done, 1 a check did not hold, 2 bad input, 3 the training diverged, "
    "75 stopped on a signal with everything saved (run the same command again to go on).",
)

Name = Annotated[str, typer.Argument(help="A model's name, e.g. cifar_resnet20_lastbn; `condzoo list` shows them.")]
RecipeArg = Annotated[
    str, typer.Argument(help="A TOML file, or a recipe's name, e.g. cifar10/resnet20_lastbn (`condzoo recipes`).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe, e.g. optim.lr=0.05; repeatable."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder with the data sets, as torchvision lays them out. Default: CONDZOO_DATA, then a cache."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Wildcards, e.g. '*resnet20*'.")] = "",
    family: Annotated[str | None, typer.Option(help="One family only, e.g. cifar_vgg.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only models with released weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the models of the zoo with their sizes."""
    from condzoo import display
    from condzoo.catalog import list_models, model_info

    infos = [(name, model_info(name)) for name in list_models(pattern, family=family, pretrained=pretrained)]
    if not infos:
        raise ValueError(f"no model matches {pattern!r}" if pattern else "no model matches")
    display.print_models(infos, as_json)


@app.command()
def info(name: Name, as_json: AsJson = False) -> None:
    """Show what a model is: family, depth, input, parameters, multiply-adds, source."""
    from condzoo import display
    from condzoo.catalog import model_info

    display.print_info(model_info(name), as_json)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the training recipes, with what each reproduces."""
    from condzoo import display
    from condzoo.training import recipe_files

    display.print_recipes(recipe_files(), as_json)


@app.command()
def train(
    recipe: RecipeArg,
    set_: Set = None,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/DATA-MODEL-HASH-seedN.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps, and evaluate.")] = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Train a network by a recipe, probing it as it learns; the same command again goes on where it stopped."""
    from condzoo import display
    from condzoo.progress import TrainingProgress
    from condzoo.training import load_recipe
    from condzoo.training import train as run_training

    with TrainingProgress(display.console) as progress:
        run = run_training(
            load_recipe(recipe, set_ or ()),
            out=out,
            seed=seed,
            device=device,
            max_steps=max_steps,
            data_root=data_root,
            on_event=progress,
        )
    display.print_runs([run], picture=run.path / "conditioning.png")


@app.command()
def sweep(
    recipe: RecipeArg,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=A,B,...", help="Values of a field to try, e.g. optim.lr=0.1,0.01; repeatable."),
    ] = None,
    set_: Set = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, e.g. 1-5 or 1,3. Default: the recipe's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, one folder each in it.")] = Path("runs/sweep"),
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop each run after this many steps.")] = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Train every combination of a grid and seeds, one after the other, and compare them.

    A finished run is not trained again; a run that diverges is recorded and the others go on.
    """
    from condzoo import display
    from condzoo.probe import plot_comparison
    from condzoo.progress import TrainingProgress
    from condzoo.training import load_recipe, parse_grid, parse_seeds
    from condzoo.training import sweep as run_sweep

    with TrainingProgress(display.console) as progress:
        runs = run_sweep(
            load_recipe(recipe, set_ or ()),
            parse_grid(grid or ()),
            parse_seeds(seeds) if seeds else None,
            out=out,
            max_steps=max_steps,
            device=device,
            data_root=data_root,
            on_event=progress,
        )
    picture = out / "conditioning.png"
    labels = display.run_labels(runs)
    probed = {label: run.path for label, run in labels.items() if (run.path / "conditioning.jsonl").exists()}
    if probed:
        plot_comparison(probed, picture)
    display.print_runs(runs, picture)
    if any(run.summary["status"] == "failed" for run in runs):
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command("eval")
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


@app.command()
def probe(
    target: Annotated[str, typer.Argument(metavar="NAME_OR_RUN", help="A model's name or a run directory.")],
    data: Annotated[str | None, typer.Option(help="Data set; a run knows its own. Default: the model's.")] = None,
    data_root: DataRoot = None,
    batches: Annotated[int, typer.Option(min=1, help="Training batches to measure.")] = 4,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples in a batch.")] = 128,
    labels: Annotated[str, typer.Option(help="data, model or sample.")] = "data",
    conv: Annotated[str, typer.Option(help="What is a row of a convolution: channels or patches.")] = "channels",
    precision: Annotated[str, typer.Option(help="auto, fast or float64.")] = "auto",
    init: Annotated[str | None, typer.Option(help="Initializer, for a model by name.")] = None,
    eval_mode: Annotated[bool, typer.Option("--eval-mode", help="Measure in eval mode, not train mode.")] = False,
    seed: Annotated[int, typer.Option(help="Of the initialization and the measurement.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the measurement here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the measurement here, as PNG.")] = None,
    device: Device = None,
) -> None:
    """Measure each layer's conditioning: second moments, lambda_max, kappa, dying and full neurons."""
    from condzoo.probing import Question, answer

    conditioning = answer(
        Question(target, data, data_root, batches, batch_size, labels, conv, precision, init, eval_mode, seed, device)
    )
    typer.echo(conditioning.table())
    if out is not None:
        conditioning.to_json(out)
        typer.echo(f"wrote {out}")
    if plot is not None:
        conditioning.plot(plot)
        typer.echo(f"wrote {plot}")


@app.command()
def validate(
    name: Annotated[str | None, typer.Argument(help="A model's name; or --all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every model of the zoo (minutes).")] = False,
    seed: Annotated[int, typer.Option(help="Of the initialization and the images.")] = 0,
) -> None:
    """Hold a model against what its family promises: size, initial weights, signals, scale invariance, last BN.

    One line a check; exit 1 where one does not hold.
    """
    from condzoo.catalog import list_models
    from condzoo.validation import validate as validate_model

    if every == (name is not None):
        raise ValueError("validate takes a model's name, or --all")
    failed = False
    for each in list_models() if name is None else [name]:
        validation = validate_model(each, seed=seed)
        typer.echo(validation.table())
        failed |= not validation.ok
    if failed:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command("plot")
def plot_command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run directories or their conditioning.jsonl; or one data file of `condzoo reproduce`."),
    ],
    out: Annotated[Path | None, typer.Option(help="The picture. Default: beside what is drawn.")] = None,
) -> None:
    """Draw the conditioning of one run, compare several side by side, or draw an experiment's figure again."""
    from condzoo.probe import plot_comparison, plot_records

    if len(runs) == 1 and runs[0].suffix == ".json":
        target = reproduce_commands.redraw(runs[0], out)
    elif len(runs) == 1:
        folder = runs[0] if runs[0].is_dir() else runs[0].parent
        target = out or folder / "conditioning.png"
        plot_records(runs[0], target)
    else:
        target = out or Path("comparison.png")
        plot_comparison({run_label(run, runs): run for run in runs}, target)
    typer.echo(f"wrote {target}")


def run_label(run: Path, runs: list[Path]) -> str:
    """A run's folder name; its whole path where two have the same."""
    name = (run if run.is_dir() else run.parent).name
    return str(run) if sum((r if r.is_dir() else r.parent).name == name for r in runs) > 1 else name


for command in (
    checkpoint_commands.release,
    checkpoint_commands.verify,
    checkpoint_commands.convert,
    reproduce_commands.reproduce,
):
    app.command()(command)


def main(args: list[str] | None = None) -> None:
    """Run the command line; every foreseen failure is one line on stderr and an exit code, not a traceback."""
    try:
        app(args)
    except Exception as error:
        code = exit_code(error)
        if code is None or os.environ.get("CONDZOO_TRACEBACK"):
            raise
        print(error if code == EXIT_STOPPED else f"error: {error}", file=sys.stderr)
        sys.exit(code)


def exit_code(error: Any) -> int | None:
    """The exit code an error stands for; None for one that nobody foresaw, which deserves its traceback."""
    code = getattr(error, "exit_code", None)  # Diverged and Stopped bring their own
    if isinstance(code, int):
        return code
    return EXIT_BAD_INPUT if isinstance(error, ValueError | TypeError | OSError) else None
