"""Before anything is run: how long experiments take, and whether the data sets that they need are there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condzoo.data import load_data
from condzoo.experiments.collecting import data_before, finished
from condzoo.experiments.loading import planned_runs, scale_of, settings_of, training_of
from condzoo.experiments.schema import Experiment, InitializationSettings
from condzoo.experiments.training import known_rows, run_folder, runs_folder
from condzoo.training.data_sets import read_data
from condzoo.training.many_runs import finished_among


def estimated_minutes(
    experiments: Sequence[Experiment],
    scale: str,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    *,
    out: Path | None = None,
    data: dict[str, Any] | None = None,
) -> float:
    """What the experiments take together by their files, by the share of the runs asked for; shared runs count once.

    Runs that are finished under `out` take no time; `data` are fields of [data], as for `collect`.
    """
    owners = {training_of(experiment).id: training_of(experiment) for experiment in experiments}
    shares = dict.fromkeys(owners, 0.0)
    for experiment in experiments:
        owner = training_of(experiment)
        shares[owner.id] = max(shares[owner.id], share_of_runs(experiment, owner, scale, seeds, only, out, data))
    return sum(scale_of(owner, scale).minutes * shares[name] for name, owner in owners.items())


def share_of_runs(
    experiment: Experiment,
    owner: Experiment,
    scale: str,
    seeds: Sequence[int] | None,
    only: Sequence[str] | None,
    out: Path | None,
    data: dict[str, Any] | None,
) -> float:
    """How many of the owner's runs at a scale are still to be made, as a share; else of its seeds are asked for."""
    usual = scale_of(owner, scale).seeds
    if experiment.training is None:
        return len(seeds or usual) / len(usual)
    fields = data if needs_folder(owner) else None
    asked = {run_folder(run): run.recipe for run in planned_runs(experiment, scale, seeds, fields, only)}
    ended = {} if out is None else finished_among(asked, runs_folder(experiment, scale, out))
    return (len(asked) - len(ended)) / len(planned_runs(owner, scale))


def one_seed_alone(experiments: Sequence[Experiment], scale: str, seeds: Sequence[int] | None = None) -> list[str]:
    """The ids of those of which one seed is run, which decides no claim: `judge` asks for several of what is random."""
    random = [each for each in experiments if each.training is not None or each.initialization is not None]
    return [each.id for each in random if len(seeds or scale_of(training_of(each), scale).seeds) == 1]


def needs_folder(experiment: Experiment) -> bool:
    """Whether the user names a folder of images."""
    settings = training_of(experiment).training
    return settings is not None and settings.recipe.get("data", {}).get("name") == "imagefolder"


def read_data_sets(
    experiment: Experiment,
    scale: str,
    out: Path,
    read: set[str],
    *,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    data: dict[str, Any] | None = None,
    data_root: str | Path | None = None,
) -> None:
    """Read each data set that an experiment still needs, so that one that is not there is told before hours of others.

    Args:
        read: what was read before; those sets are left out, the others put in.
        experiment, scale, out, seeds, only, data, data_root: as for `collect`.

    Raises:
        ValueError, FileNotFoundError: a set that is not there, or damaged.
    """
    if finished(experiment, scale, out, seeds=seeds, only=only, fields=data) is not None:
        return
    if experiment.training is not None:
        planned = {run_folder(run): run for run in planned_runs(experiment, scale, seeds, data, only)}
        known = known_rows(planned, data_before(experiment, scale, out).get("runs", []), experiment.training)
        for recipe in (run.recipe for name, run in planned.items() if name not in known):
            if (asked := f"{recipe.data.name} {data_root or recipe.data.root}") not in read:
                read_data(recipe, data_root)
                read.add(asked)
    elif isinstance(settings := settings_of(experiment, scale), InitializationSettings):
        fields = dict(settings.data)
        if (asked := f"{fields['name']} {data_root}") not in read:
            load_data(fields.pop("name"), data_root, **fields)
            read.add(asked)
