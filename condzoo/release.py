"""`release`: a checkpoint's folder from finished runs; refused where anything about them is in doubt."""

import math
import re
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from condzoo.catalog import model_info, read_catalog
from condzoo.checkpoints.folder import CONDITIONING, METRICS, PICTURE, RECIPE, read_folder
from condzoo.checkpoints.records import Metrics, read_record
from condzoo.checkpoints.remeasuring import count_correct, initial_network, measure_conditioning
from condzoo.checkpoints.writing import (
    add_to_index,
    check_free,
    check_tag,
    default_root,
    serialize,
    timm_config,
    write_checkpoint,
    write_table,
)
from condzoo.data import DataSet, folder_view
from condzoo.models import released
from condzoo.models.weight_files import sha256
from condzoo.probe import Conditioning, plot_records
from condzoo.probe.serialization import to_record
from condzoo.training import Recipe, Run, dump_recipe, evaluate_run, load_recipe, load_run, recipe_files
from condzoo.training.data_sets import STORED, centre_share, read_data
from condzoo.training.environment import device_name, processor
from condzoo.training.run_directory import CONDITIONING as STEPS
from condzoo.training.run_directory import ENVIRONMENT, SUMMARY, read_json
from condzoo.training.runs import is_complete
from condzoo.training.schema import DataSection

RULE = "the lowest seed, fixed before any was trained"
OTHER_DEVICE = 0.002  # share of the images that the arithmetic of another device or CPU may decide otherwise
LABEL = re.compile(r"#\s*(Source|Departs):\s*(.*)")


def release(
    runs: str | Path | Sequence[str | Path],
    tag: str,
    *,
    out: str | Path | None = None,
    data_root: str | Path | None = None,
    default: bool = False,
) -> Path:
    """Make a checkpoint's folder from one or more finished runs of one recipe, which differ in their seed only.

    The lowest seed's weights are released; all seeds are listed. In the repository's own checkpoints/ the package's
    index and the table of all are brought up to date too.

    Args:
        runs: run directories.
        tag: what tells the model's releases apart, e.g. "authors".
        out: the folder that takes `arch.tag/`; default: the repository's checkpoints/, else ./checkpoints.
        data_root: where the data set is.
        default: let the model's name without a tag stand for this release. The first release always is.

    Returns:
        The folder.

    Raises:
        ValueError: a run that is unfinished, diverged, of changed source, or whose evaluation does not give the
            recorded result again; runs of different recipes; a model that is not registered; a bad tag.
        FileNotFoundError, FileExistsError: a run that is not there; a release that is.
    """
    paths = [Path(runs)] if isinstance(runs, str | Path) else [Path(path) for path in runs]
    check_tag(tag)
    run = checked_run(paths)
    root = Path(out) if out is not None else default_root()
    target = check_free(root / f"{run.recipe.model.name}.{tag}")
    check_evaluations(run, paths, data_root)
    data, recipe = read_data(run.recipe, data_root), dump_recipe(run.recipe)
    model, at_init = run.load_model(), initial_network(tomllib.loads(recipe), data)
    weights, config = serialize(model), timm_config(model, tag, input_fields(run.recipe, data))
    start, end = (measure_conditioning(net, data, run.recipe.data.batch_size) for net in (at_init, model))
    records = {
        RECIPE: recipe,
        METRICS: collect_metrics(run, paths, tag, sha256(weights), count_correct(model, data), data.size("test")),
        CONDITIONING: {"at_init": to_record(start), "at_end": to_record(end)},
        PICTURE: picture(run, f"{target.name}, seed {run.recipe.seed}", end),
    }
    write_checkpoint(target, model, weights, config, records)
    if root.resolve() == (released.PACKAGE.parent / "checkpoints").resolve():
        add_to_index(target.name, sha256(weights), config["pretrained_cfg"], default)
    write_table(root)
    return target


def released_before(runs: str | Path | Sequence[str | Path], tag: str, *, out: str | Path | None = None) -> Path | None:
    """The folder that `release` made of these runs before, as it is; None where there is none, or another's."""
    paths = [Path(runs)] if isinstance(runs, str | Path) else [Path(path) for path in runs]
    run = checked_run(paths)
    root = Path(out) if out is not None else default_root()
    target = root / f"{run.recipe.model.name}.{check_tag(tag)}"
    if not target.is_dir():
        return None
    made = read_record(read_folder(target), METRICS, Metrics)
    seeds = sorted((seed_result(Path(path)) for path in paths), key=lambda seed: seed["seed"])
    same = (made.released_seed, made.sha256) == (run.recipe.seed, sha256(serialize(run.load_model()))) and [
        result.model_dump() for result in made.seeds
    ] == seeds
    return target if same else None


def checked_run(paths: Sequence[Path]) -> Run:
    """The run with the lowest seed, every run being finished and of one recipe that a name rebuilds."""
    if not paths:
        raise ValueError("no run was given; give at least one run directory")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"a run was given twice: {', '.join(map(str, paths))}; a seed counts once")
    recipes = {path: read_finished(path) for path in paths}
    check_same_recipe(recipes)
    run = load_run(min(recipes, key=lambda path: recipes[path].seed))
    check_model(run.recipe)
    return run


def read_finished(path: Path) -> Recipe:
    """The recipe of a run that came to its end, from source that was committed.

    Raises:
        FileNotFoundError: no finished run.
        ValueError: stopped early, or the source had uncommitted changes.
    """
    for name in (RECIPE, SUMMARY, ENVIRONMENT):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no finished run: it has no {name}; finish it by `condzoo train`")
    recipe, summary = load_recipe(path / RECIPE), read_json(path / SUMMARY)
    if recipe.eval_every == 0:
        raise ValueError(f"{path} was never evaluated (eval_every = 0), and a release says how well it does")
    if summary["status"] == "done" and not is_complete(recipe, summary):
        length = f"{recipe.iterations} steps" if recipe.iterations else f"{recipe.epochs} epochs"
        raise ValueError(
            f"{path} was stopped after {summary['epochs']:g} epochs ({summary['steps']} steps) of {length}; "
            "the same `condzoo train` without --max-steps goes on"
        )
    for part in read_json(path / ENVIRONMENT):  # one for each time the run went on
        source = part["source"]
        if source and source.get("error"):
            raise ValueError(
                f"{path} was trained from a clone whose state git did not tell ({source['error']}): nobody could say "
                "from which source; mend that, and train it again"
            )
        if source and source["changed"]:
            raise ValueError(
                f"{path} was trained from source with uncommitted changes (on {source['commit'][:12]}): nobody could "
                "train it again; commit, and train it again"
            )
    return recipe


def check_same_recipe(recipes: dict[Path, Recipe]) -> None:
    """ValueError unless the runs are of one recipe, each with a seed of its own."""
    (first, recipe), *others = recipes.items()
    for path, other in others:
        if other.model_copy(update={"seed": recipe.seed}) != recipe:
            raise ValueError(f"{path} and {first} differ in more than their seed; release them under two tags")
    seeds = [recipe.seed for recipe in recipes.values()]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two runs have the same seed: {sorted(seeds)}")


def check_model(recipe: Recipe) -> None:
    """ValueError for a network that its name alone does not rebuild."""
    name, args = recipe.model.name, recipe.model.args
    if name not in read_catalog()[0]:
        raise ValueError(f"{name} is not one of condzoo's registered models; only those are released by name")
    if args:
        raise ValueError(f"model.args = {args}: a released model is what its name builds; leave them out")
    if recipe.freeze:
        raise ValueError(f"freeze = {recipe.freeze}: part of the network kept its random weights; not released")


def check_evaluations(run: Run, paths: Sequence[Path], data_root: str | Path | None) -> None:
    """`check_evaluation` of the run that is released, and of each other one that has a result."""
    check_evaluation(run, data_root)
    for other in (load_run(path) for path in paths if path != run.path):
        if other.summary["status"] == "done":
            check_evaluation(other, data_root)


def check_evaluation(run: Run, data_root: str | Path | None) -> None:
    """Check that the run ended well and that evaluating it again gives its result.

    To the last image on the GPU, or the CPU and number of threads, that it ran on; where only another is here, to
    `OTHER_DEVICE` of them.

    Raises:
        ValueError: it does not.
    """
    summary = run.summary
    if summary["status"] != "done":
        raise ValueError(f"{run.path} {summary['status']}; its weights are not released ({RULE})")
    kind = str(summary["device"]).partition(":")[0]
    here = kind == "cpu" or torch.cuda.is_available()
    again = evaluate_run(run.path, data_root=data_root, device=kind if here else "cpu")
    same = here and same_arithmetic(read_json(run.path / ENVIRONMENT)[-1], kind)
    allowed = 0 if same else OTHER_DEVICE * again.total
    if again.total != summary["test_images"] or abs(again.correct - summary["test_correct"]) > allowed:
        raise ValueError(
            f"{run.path} recorded {summary['test_correct']} of {summary['test_images']} test images right, "
            f"evaluating it again gives {again.correct} of {again.total}: the weights, the data or the code changed"
        )
    error = 1 - summary["test_correct"] / summary["test_images"]
    if not math.isclose(summary["test_error"], error, abs_tol=1e-9):
        raise ValueError(f"{run.path} recorded a test error of {summary['test_error']}; its right answers make {error}")


def same_arithmetic(environment: dict[str, Any], kind: str) -> bool:
    """Whether this machine adds up as the one that a run's environment.json describes."""
    if kind == "cpu":
        return (environment["processor"], environment["threads"]) == (processor(), torch.get_num_threads())
    return bool(environment["device"] == device_name(torch.device(kind)))


def input_fields(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    """What timm is to know of the input: size, constants of images in [0, 1], the share that a crop keeps."""
    info = model_info(recipe.model.name)
    if info.family == "mlp" and data.image_shape != info.input_size:
        raise ValueError(f"{info.name} takes {info.input_size} by its name, the recipe's data is {data.image_shape}")
    view = (
        {"interpolation": folder_view(interpolation=recipe.data.interpolation).interpolation}
        if recipe.data.name in STORED
        else {}
    )
    return {
        **view,
        "input_size": list(data.image_shape),
        "mean": [value / 255 for value in data.mean],
        "std": [value / 255 for value in data.std],
        "crop_pct": centre_share(recipe.data),
    }


def collect_metrics(
    run: Run, paths: Sequence[Path], tag: str, weights_sum: str, correct: int, images: int
) -> dict[str, Any]:
    """metrics.json: see `condzoo.checkpoints.records.Metrics`."""
    parts = read_json(run.path / ENVIRONMENT)
    environment = parts[-1]
    commits = dict.fromkeys(part["source"]["commit"] for part in parts if part["source"])
    name, header = repository_recipe(run.recipe)
    section = run.recipe.data
    threads = f"{environment['threads']} thread" + "s" * (environment["threads"] > 1)
    return {
        "model": run.recipe.model.name,
        "tag": tag,
        "sha256": weights_sum,
        "parameters": run.summary["parameters"],
        "released_seed": run.recipe.seed,
        "rule": RULE,
        "test_correct": correct,
        "test_images": images,
        "seeds": sorted((seed_result(path) for path in paths), key=lambda seed: seed["seed"]),
        "recipe": name,
        "source": header.get("Source", "not stated"),
        "departs": header.get("Departs", "not stated"),
        "data": described_data(section),
        "hardware": f"{environment['processor']}, {threads}, {environment['device']}",
        "packages": environment["packages"],
        "commit": ", ".join(commits) or None,
        "date": run.summary["finished"][:10],
    }


def described_data(section: DataSection) -> dict[str, str | int | None]:
    """The data set, and how its images were prepared."""
    fields: dict[str, str | int | None] = {
        "name": section.name,
        "crop": section.crop,
        "resize": section.resize,
        "augment": section.augment,
    }
    if section.name in STORED:
        view = folder_view(section.image_size, section.eval_resize, section.interpolation)
        fields |= {"image_size": view.size, "eval_resize": view.resize, "interpolation": view.interpolation}
    return fields


def seed_result(path: Path) -> dict[str, Any]:
    """One training's last epoch."""
    summary = read_json(path / SUMMARY)
    return {
        "seed": summary["seed"],
        "status": summary["status"],
        "test_error": summary["test_error"] if summary["status"] == "done" else None,
        "train_loss": summary.get("train_loss"),
        "epochs": float(summary["epochs"]),
        "steps": summary["steps"],
        "seconds": float(summary["seconds"]),
        "precision": summary["precision"],
    }


def repository_recipe(recipe: Recipe) -> tuple[str | None, dict[str, str]]:
    """(name, its header's Source and Departs) of condzoo's own recipe that equals this one but for the seed."""
    for name, path in recipe_files().items():
        if load_recipe(name).model_copy(update={"seed": recipe.seed}) == recipe:
            return name, header_fields(path.read_text(encoding="utf-8"))
    return None, {}


def header_fields(text: str) -> dict[str, str]:
    """The labelled paragraphs of a recipe's leading comment."""
    fields: dict[str, str] = {}
    label = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        match = LABEL.match(line)
        if match:
            label = match[1]
            fields[label] = match[2].strip()
        elif label and line.startswith("#   "):
            fields[label] += " " + line.lstrip("# ").strip()
        else:
            label = None
    return fields


def picture(run: Run, title: str, end: Conditioning) -> bytes:
    """The run's conditioning over its steps, as PNG; of the record at the end where the run was not probed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PICTURE
        if (run.path / STEPS).is_file():
            plot_records(run.path / STEPS, file, title=title)
        else:
            end.plot(file)
        return file.read_bytes()
