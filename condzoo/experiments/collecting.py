"""Running an experiment, and its data as JSON: what figures, verdicts and the report are made of."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condzoo.experiments.data_files import SCHEMA, read_data_file
from condzoo.experiments.growth import collect_growth
from condzoo.experiments.initialization import collect_initialization
from condzoo.experiments.keeping import write_data
from condzoo.experiments.loading import labels_run, planned_runs, scale_of, settings_of, training_of
from condzoo.experiments.made import by_this_version, joined, made_here
from condzoo.experiments.reductions import NOT_IMAGENET, folder_read, folder_reduction, reductions
from condzoo.experiments.schema import Experiment, InitializationSettings, Settings, TheorySettings
from condzoo.experiments.theory import collect_theory
from condzoo.experiments.training import collect_trainings, digest, row_name, run_folder, runs_folder
from condzoo.probe.files import expanded
from condzoo.training.distributed import launched
from condzoo.training.events import OnEvent
from condzoo.training.many_runs import ENGINES


def collect(
    experiment: Experiment,
    scale: str,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    data: dict[str, Any] | None = None,
    only: Sequence[str] | None = None,
    engine: str = "local",
    data_root: str | Path | None = None,
    device: str | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Run what of an experiment is missing under `out`, and return its data; also written to out (`data_file`).

    What an earlier call with other seeds or curves has written there is not run again. Where the file that it replaces
    is all that is left of something, a copy is kept as *.json.bak, *.json.bak2 ...; where a run fails that this file
    has, the file stays.

    Args:
        experiment: of `load_experiment`.
        scale: "paper" or "cpu".
        out: the folder of the runs (out/runs/) and of the results.
        seeds: in place of the scale's.
        data: fields of [data] in place of the experiment's, such as {"root": FOLDER}.
        only: patterns of the curves of an experiment that trains; default: those of the scale.
        engine: "local", or "ray" for many trainings at a time (`condzoo.training.many_runs.run_all`).
        data_root, device, on_event: as for `condzoo.train`.

    Returns:
        A dict of JSON types; `made` says when, on what, of which source.

    Raises:
        ValueError, FileNotFoundError: a scale, curve or engine that there is not; data that are not there; torchrun
            started several of this process.
        OSError: `out` cannot be made; before anything is run.
        Stopped: on a signal; the same call goes on.
    """
    check_alone()
    check_engine(engine)
    chosen, out = scale_of(training_of(experiment), scale), expanded(out)
    wanted = list(seeds or chosen.seeds)
    kept = finished(experiment, scale, out, seeds=seeds, only=only, fields=data)
    if kept is not None:
        return kept
    labels = curves(experiment, scale, only)
    before = data_before(experiment, scale, out)
    out.mkdir(parents=True, exist_ok=True)  # where it cannot be made, that is told before hours of work for it
    settings, folder = settings_of(experiment, scale), runs_folder(experiment, scale, out)
    if settings is not None:
        found = collect_settings(settings, wanted, data_root, folder, on_event, before)
        found["settings"] = digest(settings)
    else:
        found = collect_trainings(
            experiment,
            scale,
            out,
            seeds=wanted,
            data=data,
            only=only,
            engine=engine,
            data_root=data_root,
            device=device,
            on_event=on_event,
            before=before,
        )
    result: dict[str, Any] = {"schema": SCHEMA, "id": experiment.id, "scale": scale, "seeds": wanted}
    kept_runs = found.pop("kept", 0)
    if kept_runs and kept_runs == len(found["runs"]):  # nothing was read now
        marks = [text for text in before["reductions"] if text.startswith(NOT_IMAGENET)]
    else:
        marks = folder_reduction(folder_read(experiment, scale, data, data_root))
    result |= {
        "reductions": [*reductions(experiment, scale, wanted, labels), *marks],
        "made": joined(found.pop("made", []) or [made_here()]),
        **found,
    }
    write_data(data_file(experiment, scale, out), before, result, folder, on_event)
    return result


def collect_settings(
    settings: Settings,
    seeds: list[int],
    data_root: str | Path | None,
    folder: Path,
    on_event: OnEvent | None,
    before: dict[str, Any],
) -> dict[str, Any]:
    """What is measured where nothing is trained, by the settings' kind; networks are kept in the folder."""
    if isinstance(settings, InitializationSettings):
        return collect_initialization(settings, seeds, data_root, folder, on_event, before)
    if isinstance(settings, TheorySettings):
        return collect_theory(settings, seeds, on_event)
    return collect_growth(settings, seeds, on_event)


def check_engine(engine: str) -> None:
    """ValueError where there is no such engine."""
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, must be one of: {', '.join(ENGINES)}")


def check_alone() -> None:
    """ValueError in one of several processes that torchrun started: each would write the same files."""
    if launched() and os.environ["WORLD_SIZE"] != "1":
        raise ValueError(
            f"`reproduce` is one process, and torchrun has started {os.environ['WORLD_SIZE']}; leave torchrun out "
            "(--engine ray trains many runs at a time)"
        )


def stem(name: str, scale: str) -> str:
    """What the files of an experiment are called: "fig05" at scale cpu, "fig05.paper" at scale paper."""
    return name if scale == "cpu" else f"{name}.{scale}"


def data_file(experiment: Experiment, scale: str, out: Path) -> Path:
    """Where an experiment's data are."""
    return out / f"{stem(experiment.id, scale)}.json"


def curves(experiment: Experiment, scale: str, only: Sequence[str] | None) -> list[str] | None:
    """The labels of an experiment's runs; None where nothing is trained.

    Raises:
        ValueError: `only` for an experiment that trains nothing, or that matches none of its curves.
    """
    if experiment.training is not None:
        return labels_run(experiment, scale, only)
    if only is not None:
        raise ValueError(f"{experiment.id} trains nothing, so there is no run to choose; leave --only out")
    return None


def finished(
    experiment: Experiment,
    scale: str,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    fields: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The data already there for the same seeds, scale, curves and recipes; not where a run failed or lacks a quantity.

    `fields` are of [data], as in `collect`: another folder of images is another experiment.

    Raises:
        ValueError: a scale or curve that there is not.
    """
    wanted = list(seeds or scale_of(training_of(experiment), scale).seeds)
    labels = curves(experiment, scale, only)
    target = data_file(experiment, scale, expanded(out))
    if not target.exists():
        return None
    data = read_data_file(target)
    same = (data["id"], data["scale"], data["seeds"]) == (experiment.id, scale, wanted)
    same = same and (labels is None or labels == list(dict.fromkeys(run["label"] for run in data["runs"])))
    failed = any(run["status"] == "failed" for run in data.get("runs", []))
    return data if same and not failed and not outdated(experiment, scale, data, fields) else None


def outdated(experiment: Experiment, scale: str, data: dict[str, Any], fields: dict[str, Any] | None) -> bool:
    """Whether other recipes, settings or quantities are asked for than these data are of, as far as they say which.

    Networks at initialization are measured again by another version of condzoo, as `collect_initialization` has it.
    """
    if (settings := settings_of(experiment, scale)) is not None:
        other = isinstance(settings, InitializationSettings) and not by_this_version(data["made"])
        return other or data.get("settings") not in (None, digest(settings))
    assert experiment.training is not None
    asked = set(experiment.training.quantities)
    if any(run["chosen"] and not asked <= run["quantities"].keys() for run in data["runs"]):
        return True
    if not any("recipe" in run for run in data.get("runs", [])):
        return False
    roots = [run["root"] for run in data["runs"] if run.get("root") is not None]
    fields = fields or ({"root": roots[0]} if roots else None)
    planned = planned_runs(experiment, scale, data["seeds"], fields)
    recipes = {run_folder(run): digest(run.recipe) for run in planned}
    return any(run.get("recipe") not in (None, recipes.get(row_name(run))) for run in data["runs"])


def data_before(experiment: Experiment, scale: str, out: Path) -> dict[str, Any]:
    """What a call with other seeds or curves has written; empty where there is nothing of this experiment and scale."""
    target = data_file(experiment, scale, out)
    data = read_data_file(target) if target.exists() else {}
    return data if (data.get("id"), data.get("scale")) == (experiment.id, scale) else {}
