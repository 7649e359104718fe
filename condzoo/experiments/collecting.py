"""Running an experiment, and its data as JSON: what figures, verdicts and the report are made of."""

import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from condzoo.experiments.growth import collect_growth
from condzoo.experiments.initialization import collect_initialization
from condzoo.experiments.loading import labels_run, planned_runs, scale_of, training_of
from condzoo.experiments.schema import Experiment
from condzoo.experiments.theory import collect_theory
from condzoo.experiments.training import collect_trainings, digest, row_name, run_folder
from condzoo.training.environment import describe_environment
from condzoo.training.events import OnEvent
from condzoo.training.many_runs import ENGINES
from condzoo.training.precision import Numerics
from condzoo.training.run_directory import write_atomically

IMAGENET = (1000, 1_281_167)  # classes, training images
NOT_IMAGENET = "not ImageNet: "  # how the reduction begins that says so
SCHEMA = "condzoo.experiment/1"


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

    What an earlier call with other seeds or curves has written there is not run again; of runs that this one leaves out
    and whose folders are gone, the file that it replaces is kept as *.json.bak.

    Args:
        experiment: of `load_experiment`.
        scale: "paper" or "cpu".
        out: the folder of the runs (out/runs/) and of the results.
        seeds: in place of the scale's.
        data: fields of [data] in place of the experiment's, such as {"root": FOLDER}.
        only: patterns of the curves of an experiment that trains; default: those of the scale.
        engine: "local", or "ray" for many trainings at a time (`condzoo.training.sweep.run_all`).
        data_root, device, on_event: as for `condzoo.train`.

    Returns:
        A dict of JSON types; `made` says when, on what, of which source.

    Raises:
        ValueError, FileNotFoundError: a scale, curve or engine that there is not; data that are not there.
        Stopped: on a signal; the same call goes on.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, must be one of: {', '.join(ENGINES)}")
    chosen, out = scale_of(training_of(experiment), scale), Path(out)
    wanted = list(seeds or chosen.seeds)
    kept = finished(experiment, scale, out, seeds=seeds, only=only, fields=data)
    if kept is not None:
        return kept
    labels = curves(experiment, scale, only)
    before = data_before(experiment, scale, out)
    keep_what_is_left_out(experiment, scale, out, before, wanted, labels)
    if experiment.initialization is not None:
        settings = experiment.initialization.model_copy(update=chosen.settings)
        found = collect_initialization(settings, wanted, data_root, out / "runs" / f"{experiment.id}-{scale}")
    elif experiment.theory is not None:
        found = collect_theory(experiment.theory.model_copy(update=chosen.settings), wanted)
    elif experiment.growth is not None:
        found = collect_growth(experiment.growth.model_copy(update=chosen.settings))
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
            before=before.get("runs", []),
        )
    result: dict[str, Any] = {"schema": SCHEMA, "id": experiment.id, "scale": scale, "seeds": wanted}
    result |= {
        "reductions": [*reductions(experiment, scale, wanted, labels), *folder_reduction(data)],
        "made": made(found.pop("environment", None), before if found.pop("kept", 0) else None),
        **found,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        data_file(experiment, scale, out), (json.dumps(result, allow_nan=False, separators=(",", ":")) + "\n").encode()
    )
    return result


def keep_what_is_left_out(
    experiment: Experiment,
    scale: str,
    out: Path,
    before: dict[str, Any],
    seeds: Sequence[int],
    labels: Sequence[str] | None,
) -> None:
    """Copy the file that is going to be replaced to *.json.bak where it is all that is left of a run."""
    folder = out / "runs" / f"{training_of(experiment).id}-{scale}"
    rows = [row for row in before.get("runs", []) if row["chosen"] and row["status"] != "failed"]
    left_out = [row for row in rows if row["seed"] not in seeds or (labels is not None and row["label"] not in labels)]
    if any(not (folder / row_name(row)).is_dir() for row in left_out):
        path = data_file(experiment, scale, out)
        write_atomically(path.with_name(f"{path.name}.bak"), path.read_bytes())


def reductions(experiment: Experiment, scale: str, seeds: list[int], labels: list[str] | None) -> list[str]:
    """What is less than the paper's: the scale's own reductions, and what this call leaves out besides."""
    chosen = scale_of(training_of(experiment), scale)
    left_out = [] if labels is None else [x for x in labels_run(experiment, scale) if x not in labels]
    found = [*chosen.reductions]
    if left_out:
        found.append(f"without {', '.join(left_out)}")
    if len(seeds) < len(chosen.seeds):
        found.append(f"{len(seeds)} of {len(chosen.seeds)} seeds")
    return found


def folder_reduction(data: dict[str, Any] | None) -> list[str]:
    """What the user's folder of images is, where it is not ImageNet: nobody may take the result for ImageNet's."""
    if data is None or "root" not in data:
        return []
    train = Path(data["root"]) / "train"
    folders = [folder for folder in train.iterdir() if folder.is_dir()]
    images = sum(1 for folder in folders for file in folder.rglob("*") if file.is_file())
    if (len(folders), images) == IMAGENET:
        return []
    return [f"{NOT_IMAGENET}{len(folders)} classes and {images:,} training images in place of 1,000 and 1,281,167"]


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
    """The data already there for the same seeds, scale, curves and recipes; not where a run had failed.

    `fields` are of [data], as in `collect`: another folder of images is another experiment.

    Raises:
        ValueError: a scale or curve that there is not.
    """
    wanted = list(seeds or scale_of(training_of(experiment), scale).seeds)
    labels = curves(experiment, scale, only)
    target = data_file(experiment, scale, Path(out))
    if not target.exists():
        return None
    data = read_data_file(target)
    same = (data["id"], data["scale"], data["seeds"]) == (experiment.id, scale, wanted)
    same = same and (labels is None or labels == list(dict.fromkeys(run["label"] for run in data["runs"])))
    failed = any(run["status"] == "failed" for run in data.get("runs", []))
    return data if same and not failed and not outdated(experiment, scale, data, fields) else None


def outdated(experiment: Experiment, scale: str, data: dict[str, Any], fields: dict[str, Any] | None) -> bool:
    """Whether other recipes are asked for than these runs had, as far as they say which."""
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


def read_data_file(path: str | Path) -> dict[str, Any]:
    """An experiment's data as `collect` wrote it.

    Raises:
        ValueError: another file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not an experiment's data: expected schema {SCHEMA!r}")
    if lacking := [key for key in ("id", "scale", "seeds", "made", "reductions") if key not in data]:
        raise ValueError(
            f"{path} is damaged: it has no {lacking[0]}; delete it, and give the `reproduce` command again"
        )
    return data


def made(environment: dict[str, Any] | None, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """When, on what and of which source; of the first run where there are runs.

    Args:
        environment: of that run; None where nothing was trained.
        before: the data of an earlier call of which runs were kept: their hardware is named, too.
    """
    if environment is None and before is not None:
        return before["made"]
    if environment is None:
        numerics = Numerics("fp32", channels_last=False, device=torch.device("cpu"))
        environment = describe_environment(numerics)
    hardware = f"{environment['processor']}, {environment['threads']} thread(s), {environment['device']}"
    earlier = [] if before is None else before["made"]["hardware"].split("; ")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {
        "date": today,
        "hardware": "; ".join(dict.fromkeys([*earlier, hardware])),
        "torch": environment["packages"]["torch"],
        "python": platform.python_version(),
        "commit": (environment["source"] or {}).get("commit"),
    }


def estimated_minutes(
    experiments: Sequence[Experiment], scale: str, seeds: Sequence[int] | None = None, only: Sequence[str] | None = None
) -> float:
    """What the experiments take together by their files, by the share of the runs asked for; shared runs count once."""
    owners = {training_of(experiment).id: training_of(experiment) for experiment in experiments}
    shares = dict.fromkeys(owners, 0.0)
    for experiment in experiments:
        owner = training_of(experiment)
        shares[owner.id] = max(shares[owner.id], share_of_runs(experiment, owner, scale, seeds, only))
    return sum(scale_of(owner, scale).minutes * shares[name] for name, owner in owners.items())


def share_of_runs(
    experiment: Experiment, owner: Experiment, scale: str, seeds: Sequence[int] | None, only: Sequence[str] | None
) -> float:
    """How many of the owner's runs at a scale are asked for, as a share; of its seeds where nothing is trained."""
    usual = scale_of(owner, scale).seeds
    if experiment.training is None:
        return len(seeds or usual) / len(usual)
    return len(planned_runs(experiment, scale, seeds, only=only)) / len(planned_runs(owner, scale))
