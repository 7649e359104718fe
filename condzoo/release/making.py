"""`release`: a checkpoint's folder from finished runs, as `condzoo.release.checks` lets pass."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from condzoo.checkpoints.folder import CARD, CONDITIONING, CONFIG, METRICS, PICTURE, RECIPE, read_folder
from condzoo.checkpoints.records import Config, Metrics, read_record
from condzoo.checkpoints.remeasuring import count_correct, initial_network, measure_conditioning
from condzoo.checkpoints.writing import (
    add_to_index,
    check_free,
    check_tag,
    default_root,
    root_of,
    serialize,
    timm_config,
    write_checkpoint,
    write_table,
)
from condzoo.models import released
from condzoo.models.weight_files import sha256
from condzoo.probe.files import expanded
from condzoo.probe.serialization import to_record
from condzoo.release.checks import check_evaluations, check_every_seed, checked_run
from condzoo.release.records import collect_metrics, input_fields, picture, seed_results
from condzoo.training import dump_recipe
from condzoo.training.data_sets import read_data
from condzoo.training.precision import usual_torch


@usual_torch()
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
    index and the table of all are brought up to date too; a call that was stopped before that is finished by the same
    call again, and `default=True` of a release that is there makes it the default.

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
            recorded result again; runs of different recipes; a seed trained beside them that was not given; a model
            that is not registered; a bad tag.
        FileNotFoundError, FileExistsError: a run that is not there; a release that is.
    """
    paths = paths_of(runs)
    check_tag(tag)
    run = checked_run(paths)
    check_every_seed(run.recipe, paths)
    root = root_of(out, default_root())
    target = root / f"{run.recipe.model.name}.{tag}"
    if (default or not is_listed(target)) and released_before(paths, tag, out=root) == target:
        return enlist(target, default)  # stopped after the folder was there, or to be the default from now on
    check_free(target)
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
    write_checkpoint(target, model, weights, config, records, own=in_repository(target) or None)
    return enlist(target, default)


def is_listed(target: Path) -> bool:
    """Whether a release stands in the table beside it and, in the repository's checkpoints/, in the package's index."""
    table = target.parent / CARD
    in_table = table.is_file() and f"[{target.name}]" in table.read_text(encoding="utf-8", errors="replace")
    return in_table and (not in_repository(target) or target.name in released.read_index())


def enlist(target: Path, default: bool) -> Path:
    """Bring the table, and the repository's index, up to date with a release whose folder is there."""
    if in_repository(target):
        folder = read_folder(target)
        cfg = read_record(folder, CONFIG, Config).pretrained_cfg.model_dump()
        add_to_index(target.name, read_record(folder, METRICS, Metrics).sha256, cfg, default)
    write_table(target.parent)
    return target


def in_repository(target: Path) -> bool:
    """Whether a release's folder is among the repository's own."""
    return target.parent.resolve() == (released.PACKAGE.parent / "checkpoints").resolve()


def released_before(runs: str | Path | Sequence[str | Path], tag: str, *, out: str | Path | None = None) -> Path | None:
    """The folder that `release` made of these runs before, as it is; None where there is none, or another's."""
    paths = paths_of(runs)
    run = checked_run(paths)
    root = root_of(out, default_root())
    target = root / f"{run.recipe.model.name}.{check_tag(tag)}"
    if not target.is_dir():
        return None
    made = read_record(read_folder(target), METRICS, Metrics)
    there = made.released_seed, made.sha256, [result.model_dump() for result in made.seeds]
    here = run.recipe.seed, sha256(serialize(run.load_model())), seed_results(paths)
    return target if here == there else None


def paths_of(runs: str | Path | Sequence[str | Path]) -> list[Path]:
    """One run directory or several, as paths."""
    return [expanded(path) for path in ([runs] if isinstance(runs, str | Path) else runs)]
