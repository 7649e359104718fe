"""The commands of `condzoo` that train: recipes, train, eval; `condzoo.cli` adds them to its own."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condzoo import exit_codes

MOST_DRAWN = 20  # runs of a comparison; a picture of more is too wide to read

if TYPE_CHECKING:
    from condzoo.training import Recipe, Run
    from condzoo.training.events import Event, OnEvent

RecipeArg = Annotated[
    str, typer.Argument(help="A TOML file, or a recipe's name, e.g. cifar10/resnet20_lastbn (`condzoo recipes`).")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the recipe, e.g. optim.lr=0.05; repeatable. `none` takes the field out, `'\"none\"'` "
        "is the text.",
    ),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="SEEDS", help="Several seeds, a run each, e.g. 1-5 or 1,3. Default: the recipe's.")
]
MaxSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Stop a run after this many steps, and evaluate it; the same command without it goes on."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the data sets as torchvision lays them out, or with train/ and val/ class folders. "
        "Default: CONDZOO_DATA, then ~/.cache/condzoo/data."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")]
Board = Annotated[bool, typer.Option("--tensorboard", help="Also write RUN/tensorboard (extra `tensorboard`).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print every field of a recipe instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --schema JSON Schema.")] = False,
) -> None:
    """List the training recipes with what each reproduces, or every field that a recipe has."""
    from condzoo.commands import display

    if schema:
        from condzoo.training.documentation import json_schema, schema_text

        display.print_json(json_schema()) if as_json else typer.echo(schema_text(), nl=False)
        return
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
    tensorboard: Board = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Build everything, read the data (decode every image of a set on disk), take one step; write nothing.",
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print steps, FLOPs, memory, communication and time; run nothing.")
    ] = False,
    gpu: Annotated[
        str, typer.Option(help="Of --plan: cpu (this one), t4, v100, l4, rtx3090, rtx4090, a100, h100, h200.")
    ] = "cpu",
    gpus: Annotated[int, typer.Option(help="Of --plan: how many of them.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print --plan or --dry-run as JSON.")] = False,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Train a network by a recipe, probing it as it learns; the same command again goes on where it stopped.

    With --seeds each seed is a run, and mean +- standard deviation are printed and written to OUT/summary.json.

    In many processes: torchrun --nproc-per-node 8 -m condzoo train RECIPE (docs/training.md).
    """
    from condzoo.training import load_recipe, parse_seeds, plan_sweep

    if plan and dry_run:
        raise ValueError("train takes --plan or --dry-run, not both")
    if not plan and (gpu != "cpu" or gpus != 1):
        raise ValueError("--gpu and --gpus are what --plan plans for; a training takes --device")
    if as_json and not (plan or dry_run):
        raise ValueError("--json goes with --plan or --dry-run; a training writes OUT/summary.json")
    if seed is not None and seeds is not None:
        raise ValueError("train takes --seed N or --seeds 1-5, not both")
    if tensorboard and (plan or dry_run):
        typer.echo("note: --tensorboard is of a training; --plan and --dry-run write nothing", err=True)
    several = None if seeds is None else parse_seeds(seeds)
    loaded = load_recipe(recipe, [*(set_ or ()), *([] if seed is None else [f"seed={seed}"])])
    if several is not None:
        plan_sweep(loaded, {}, [max(several)])  # a seed that no recipe takes is an error of a plan, too
    if plan:
        print_plan(loaded, Aim(gpu, gpus, len(several or [0]), max_steps), data_root, as_json)
        return
    if dry_run:
        print_rehearsal(loaded, device, data_root, as_json)
        return
    options: dict[str, Any] = {"out": out, "max_steps": max_steps, "device": device, "data_root": data_root}
    if several is not None:
        train_several(loaded, several, options, tensorboard)
    else:
        train_one(loaded, options, tensorboard)


@dataclass(frozen=True)
class Aim:
    """What --plan plans: `runs` trainings, one after the other, each on `gpus` devices."""

    gpu: str
    gpus: int
    runs: int
    max_steps: int | None


def print_plan(recipe: "Recipe", aim: Aim, data_root: Path | None, as_json: bool) -> None:
    """What the training will take on paper."""
    from condzoo.commands import planning_display
    from condzoo.training.accelerators import accelerator
    from condzoo.training.planning import plan_training

    plan = plan_training(recipe, accelerator(aim.gpu), aim.gpus, data_root=data_root, max_steps=aim.max_steps)
    planning_display.print_plan(plan, aim.runs, as_json)


def print_rehearsal(recipe: "Recipe", device: str | None, data_root: Path | None, as_json: bool) -> None:
    """One step of the training, of which nothing is kept."""
    from condzoo.commands import planning_display
    from condzoo.training.rehearsal import rehearse

    on_event = None if as_json else tell
    found = rehearse(recipe, device=device, data_root=data_root, on_event=on_event)
    planning_display.print_rehearsal(found, as_json)


def tell(event: "Event") -> None:
    """Print a message; other events have no place in one step."""
    from condzoo.training.events import Message

    if isinstance(event, Message):
        typer.echo(event.text)


@contextlib.contextmanager
def reporting(tensorboard: bool) -> "Iterator[OnEvent]":
    """Where the events of trainings go: to the bar or the lines, and where asked for to TensorBoard."""
    from condzoo.commands import display
    from condzoo.commands.progress import TrainingProgress

    with TrainingProgress(display.console) as progress:
        if not tensorboard:
            yield progress
            return
        from condzoo.training.tensorboard import TensorBoard

        with TensorBoard(then=progress) as board:
            yield board


def complete_board(on_event: "OnEvent", runs: "Sequence[Run]") -> None:
    """Write the event files that runs lack which were finished by an earlier call."""
    from condzoo.training.distributed import writes
    from condzoo.training.tensorboard import TensorBoard

    if isinstance(on_event, TensorBoard) and writes():
        for run in runs:
            on_event.complete(run.path)


def train_one(recipe: "Recipe", options: dict[str, Any], tensorboard: bool) -> None:
    """One run, then its table."""
    from condzoo.commands import display
    from condzoo.training import train as run_training

    with reporting(tensorboard) as on_event:
        run = run_training(recipe, on_event=on_event, **options)
        complete_board(on_event, [run])
    display.print_runs([run])
    display.print_places([run], run.path / "conditioning.png")


def train_several(recipe: "Recipe", seeds: list[int], options: dict[str, Any], tensorboard: bool) -> None:
    """A run a seed, then their table and mean +- std; exit 3 where one diverged and the recipe does not allow it."""
    from condzoo.training import train_seeds

    with reporting(tensorboard) as on_event:
        runs = train_seeds(recipe, seeds, on_event=on_event, **options)
        complete_board(on_event, runs)
    print_comparison(runs, runs[0].path.parent)
    if recipe.on_divergence == "stop" and any(run.summary["status"] == "diverged" for run in runs):
        raise typer.Exit(exit_codes.DIVERGED)


def print_comparison(runs: "list[Run]", out: Path, shard: str | None = None) -> None:
    """The table of several runs, mean +- std of each setting, and then their pictures side by side, which take longer.

    Runs of earlier calls are among them, as they are in the summary that was written.
    """
    from condzoo.commands import display
    from condzoo.probe import plot_comparison
    from condzoo.training import summarize
    from condzoo.training.distributed import writes
    from condzoo.training.reports import shows_layers
    from condzoo.training.summaries import earlier_runs

    if not runs:
        typer.echo("no runs in this shard")
        return
    named = earlier_runs(out, shard) | {run.path.name: run for run in runs}
    runs = list(named.values())
    labels = display.run_labels(runs)
    display.print_runs(runs)
    display.print_settings(summarize(named)["settings"])
    probed = [(label, run.path) for label, run in labels.items() if shows_layers(run.path)]
    if probed and writes():
        plot_comparison(dict(probed[:MOST_DRAWN]), out / "conditioning.png")
    if len(probed) > MOST_DRAWN:
        typer.echo(
            f"drawn: the first {MOST_DRAWN} of {len(probed)} probed runs; `condzoo plot RUN RUN ...` draws others"
        )
    display.print_places(runs, out / "conditioning.png")


def eval_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run directory, a checkpoint's folder, a released name, or one of timm's, e.g. resnet50.a1_in1k.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set of a converted checkpoint, or of a network of timm's (default: imagefolder); runs and "
            "releases know their own."
        ),
    ] = None,
    data_root: DataRoot = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the accuracy on the test images again, every one of them, and say whether it is as recorded.

    Exit 1 where it is not: on another device, or another number of threads, an image may fall the other way.
    """
    from condzoo.commands import display
    from condzoo.evaluating import evaluate_again

    found = evaluate_again(target, data, data_root, device)
    display.print_evaluation(found, as_json)
    if found.as_recorded is False:
        raise typer.Exit(exit_codes.CHECK_FAILED)
