"""The command `condzoo reproduce`; `condzoo.cli` adds it to its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condzoo import exit_codes

if TYPE_CHECKING:
    from condzoo.experiments import Experiment


def reproduce(
    ids: Annotated[list[str] | None, typer.Argument(help="Experiments: fig05, table_b, thm1 ... (--list).")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every experiment.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments and how long each takes.")] = False,
    scale: Annotated[str, typer.Option(help="paper: the appendix's own setup, for GPUs; cpu: two cores.")] = "cpu",
    seeds: Annotated[
        str | None, typer.Option(metavar="SEEDS", help="In place of the scale's own, e.g. 1-5 or 1,3.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only the curves whose name matches, e.g. `'*-20*'`; repeatable."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local: one training after the other; ray: as many at a time as a Ray cluster holds.")
    ] = "local",
    out: Annotated[Path, typer.Option(help="Folder of runs, data and figures.")] = Path("runs/reproduce"),
    imagenet: Annotated[
        Path | None, typer.Option(help="Folder with train/ and val/ class folders, for the ImageNet experiments.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with the data sets. Default: CONDZOO_DATA, then ~/.cache/condzoo/data.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU where there is one.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write docs/reproduction.md of docs/data/ instead of running.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 where a claim did not hold.")] = False,
) -> None:
    """Make a figure or table of arXiv:2002.10801's appendix again: the runs, the figure, and whether its claims held.

    A claim that does not hold is a result, not an error, and so is a run that diverges; exit 1 where one failed
    otherwise. The same command again goes on where it stopped, and runs nothing that is finished.
    """
    from condzoo.experiments import experiment_ids, load_experiment
    from condzoo.experiments.collecting import check_alone
    from condzoo.training import parse_seeds

    check_alone()
    if report:
        write_report(Path("docs"))
        return
    if list_:
        print_list([load_experiment(name) for name in experiment_ids()])
        return
    if every == bool(ids):
        raise ValueError("reproduce takes experiments by their id (--list shows them), or --all")
    experiments = [load_experiment(name) for name in (experiment_ids() if every else ids or [])]
    options: dict[str, Any] = {
        "seeds": parse_seeds(seeds) if seeds is not None else None,
        "only": only,
        "engine": engine,
        "data_root": data_root,
        "device": device,
    }
    experiments = with_images(experiments, imagenet, every)
    whole, held = run_experiments(experiments, scale, out, imagenet, options)
    if not whole or (strict and not held):
        raise typer.Exit(exit_codes.CHECK_FAILED)


def run_experiments(
    experiments: list["Experiment"], scale: str, out: Path, imagenet: Path | None, options: dict[str, Any]
) -> tuple[bool, bool]:
    """Run, draw and judge each experiment; returns whether no run failed, and whether no claim did not hold.

    Raises:
        ValueError, FileNotFoundError: an engine or a data set that is not there, or `out` is a file or cannot be made:
            before the first experiment begins.
        Stopped: on a signal, also one between two experiments; the same call goes on.
    """
    from condzoo.commands import display
    from condzoo.experiments.collecting import check_engine
    from condzoo.experiments.planning import one_seed_alone, read_data_sets
    from condzoo.experiments.stopping import stopping

    check_engine(options["engine"])
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file; it must be a folder, or not there yet")
    whole = held = True
    read: set[str] = set()
    with stopping("experiments") as stop_where_asked:
        display.console.print(time_ahead(experiments, scale, out, imagenet, options))
        if undecided := one_seed_alone(experiments, scale, options["seeds"]):
            what = f"one seed decides no claim: {', '.join(undecided)}; several do, e.g. by --seeds 1-3"
            display.console.print(what, style="yellow")
        for experiment in experiments:
            stop_where_asked()
            own = {key: value for key, value in own_options(experiment, imagenet, options).items() if key in DATA}
            read_data_sets(experiment, scale, out, read, **own)
        make_folder(out)
        for number, experiment in enumerate(experiments, start=1):
            stop_where_asked()
            display.console.print(f"[{number}/{len(experiments)}] {experiment.id}: {experiment.title}")
            ended = run_experiment(experiment, scale, out, own_options(experiment, imagenet, options))
            whole, held = whole and ended[0], held and ended[1]
    return whole, held


def make_folder(out: Path) -> None:
    """The folder of runs, data and figures: one that cannot be made is told before hours of work for it.

    Raises:
        ValueError: it cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: the folder cannot be made ({error}); name another one") from error


DATA = ("seeds", "only", "data", "data_root")  # the options that say which data sets are read


def own_options(experiment: "Experiment", imagenet: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of one experiment: the folder of images is for those alone that are on it."""
    from condzoo.experiments.planning import needs_folder

    if imagenet is None or not needs_folder(experiment):
        return options
    # the folder is part of the recipes: however it is written, it is the same one
    return {**options, "data": {"root": str(imagenet.resolve())}, "data_root": None}


def run_experiment(experiment: "Experiment", scale: str, out: Path, options: dict[str, Any]) -> tuple[bool, bool]:
    """Run, draw and judge one; returns whether no run failed, and whether no claim did not hold."""
    from condzoo.commands import display
    from condzoo.commands.progress import TrainingProgress
    from condzoo.experiments import collect, draw, judge, reductions_of, stem
    from condzoo.experiments.training import row_name

    with TrainingProgress(display.console) as progress:
        data = collect(experiment, scale, out, on_event=progress, **options)
    picture = out / f"{stem(experiment.id, scale)}.png"
    draw(experiment, data, picture)
    if less := reductions_of(experiment, data):
        display.console.print(f"less than the paper's: {'; '.join(less)}", style="yellow")
    verdicts = judge(experiment, data)
    display.print_verdicts(verdicts, picture)
    failed = [run for run in data.get("runs", []) if run["status"] == "failed"]
    for run in failed:
        display.console.print(f"failed: {row_name(run)}: {run['error']}", style="yellow")
    return not failed, all(verdict.outcome != "did not hold" for verdict in verdicts)


def time_ahead(
    experiments: list["Experiment"], scale: str, out: Path, imagenet: Path | None, options: dict[str, Any]
) -> str:
    """How many experiments there are, how long that takes which is not finished, and how many are."""
    from condzoo.experiments import estimated_minutes, finished

    chosen = {key: options[key] for key in ("seeds", "only")}
    ahead = []
    for experiment in experiments:
        folder = own_options(experiment, imagenet, options).get("data")
        if finished(experiment, scale, out, **chosen, fields=folder) is None:
            ahead.append(experiment)
    fields = None if imagenet is None else {"root": str(imagenet.resolve())}
    minutes = estimated_minutes(ahead, scale, **chosen, out=out, data=fields)
    length = f"{minutes / 60:.1f} hours" if minutes > 120 else f"{minutes:.3g} minutes"
    before = len(experiments) - len(ahead)
    count = f"{len(experiments)} experiment{'' if len(experiments) == 1 else 's'}"
    return f"{count} at scale {scale}: about {length} in all" + (f"; {before} finished before" if before else "")


def with_images(experiments: list["Experiment"], folder: Path | None, every: bool) -> list["Experiment"]:
    """The experiments that can be run: with --all and no folder of images, those on ImageNet are left out, aloud.

    Raises:
        ValueError: one that was asked for by its id needs a folder, and none was named; or it holds no such images.
    """
    from condzoo.commands import display
    from condzoo.experiments.planning import needs_folder

    on_images = [experiment.id for experiment in experiments if needs_folder(experiment)]
    if folder is not None and on_images:
        missing = [part for part in ("train/", "val/") if not any(path.is_dir() for path in folder.glob(f"{part}*"))]
        if missing:
            raise ValueError(
                f"--imagenet {folder}: no class folders in {' and '.join(missing)}; it must hold train/ and val/, each "
                "with a folder of images for every class"
            )
    if folder is not None or not on_images:
        return experiments
    what = f"{', '.join(on_images)}: on ImageNet; name a folder with train/ and val/ class folders by --imagenet FOLDER"
    if not every:
        raise ValueError(what)
    display.console.print(f"left out: {what}", style="yellow")
    return [experiment for experiment in experiments if experiment.id not in on_images]


def redraw(source: Path, target: Path | None) -> Path:
    """Draw an experiment's figure again, of its data file; returns the picture.

    Args:
        source: NAME.json, or a copy of before, NAME.json.bak.
        target: None for NAME.png, or NAME.bak.png, beside it.

    Raises:
        ValueError: another file, or a damaged one.
    """
    from condzoo.experiments import draw, load_experiment, read_data_file
    from condzoo.experiments.data_files import damage_told

    data = read_data_file(source)
    name, _, copy = source.name.rpartition(".json")
    target = target or source.with_name(f"{name}{copy}.png")
    with damage_told(source):
        draw(load_experiment(data["id"]), data, target)
    return target


def write_report(docs: Path) -> None:
    """docs/reproduction.md and docs/figures/ of docs/data/."""
    from condzoo.experiments import report

    data_folder = docs / "data"
    if not data_folder.is_dir():
        raise ValueError(f"{data_folder} is not there; --report is for the repository's own folder, and runs in it")
    for path in sorted(data_folder.glob("*.json")):
        redraw(path, docs / "figures" / f"{path.stem}.png")
    (docs / "reproduction.md").write_text(report(data_folder), encoding="utf-8")
    typer.echo(f"wrote {docs / 'reproduction.md'}")


def print_list(experiments: list["Experiment"]) -> None:
    """One line an experiment."""
    from condzoo.commands import display
    from condzoo.experiments import estimated_minutes
    from condzoo.experiments.loading import scale_of, training_of

    rows = []
    for experiment in experiments:
        owner = training_of(experiment)
        chosen = scale_of(owner, "cpu")
        shared = "" if owner is experiment else f" ({owner.id}'s runs)"
        seeds = ", ".join(map(str, chosen.seeds))
        minutes = f"{estimated_minutes([experiment], 'cpu'):.3g}"
        rows.append((experiment.id, experiment.title + shared, str(len(experiment.claims)), minutes, seeds))
    display.print_table(("id", "what", "claims", "minutes, cpu", "seeds, cpu"), rows, texts=["what"])
