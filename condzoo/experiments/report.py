"""docs/reproduction.md, of the experiments' files and data alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from condzoo.experiments.claims import Verdict, judge
from condzoo.experiments.collecting import read_data_file
from condzoo.experiments.loading import experiment_ids, load_experiment, training_of
from condzoo.experiments.schema import Experiment

INTRODUCTION = """# Reproduction of arXiv:2002.10801

Made by `condzoo reproduce --report` of the files in docs/data/; a test checks that it is up to date. Each claim is a
measure with a bound, written into recipes/paper/ before the run. **held**: every seed is within the bound; **did not
hold**: the median over seeds is not; **not decided**: only the median is, or a value is missing. Values are medians,
with the range over seeds. Scale `cpu` is a reduction, listed with each experiment; scale `paper` is the appendix's own
setup, for GPUs, and has not been run.
"""


def report(data_folder: str | Path, figures: str = "figures") -> str:
    """The page's text.

    Args:
        data_folder: with <id>.json of each experiment that was run.
        figures: the folder of the pictures, as the page links to it.
    """
    experiments = [load_experiment(name) for name in experiment_ids()]
    files = {e.id: Path(data_folder) / f"{e.id}.json" for e in experiments}
    found = {e.id: read_data_file(files[e.id]) for e in experiments if files[e.id].exists()}
    verdicts = {e.id: judge(e, found[e.id]) for e in experiments if e.id in found}
    parts = [INTRODUCTION, *overview(experiments, verdicts)]
    for experiment in experiments:
        parts += section(experiment, found.get(experiment.id), verdicts.get(experiment.id, []), figures)
    return "\n".join(parts)


def overview(experiments: list[Experiment], verdicts: dict[str, list[Verdict]]) -> Iterator[str]:
    """One row an experiment."""
    outcomes = ("held", "did not hold", "not decided")
    yield "| experiment | " + " | ".join(outcomes) + " |"
    yield "|---|---|---|---|"
    for experiment in experiments:
        own = verdicts.get(experiment.id)
        link = f"[{experiment.id}](#{experiment.id})"
        if own is None:
            yield f"| {link} {experiment.title} | not run yet | | |"
        else:
            counts = [sum(v.outcome == outcome for v in own) for outcome in outcomes]
            yield f"| {link} {experiment.title} | " + " | ".join(str(c or "") for c in counts) + " |"
    yield ""


def section(
    experiment: Experiment, data: dict[str, Any] | None, verdicts: list[Verdict], figures: str
) -> Iterator[str]:
    """An experiment: its setup, what was reduced, its claims, its figure."""
    yield f"## {experiment.id}"
    yield ""
    yield f"{experiment.title}. {experiment.setup}"
    if experiment.departs:
        yield f"Choices where the paper is silent: {experiment.departs}"
    yield ""
    command = f"condzoo reproduce {experiment.id}" + (" --imagenet FOLDER" if needs_folder(experiment) else "")
    if data is None:
        minutes = training_of(experiment).scales["cpu"].minutes
        yield f"Not run yet: `{command}` (about {minutes:g} minutes at scale cpu)."
        yield ""
        return
    made = data["made"]
    if data["reductions"]:
        yield f"Less than the paper's: {'; '.join(data['reductions'])}."
        yield ""
    seeds = ", ".join(map(str, data["seeds"]))
    yield (
        f"`{command}`: scale {data['scale']}, seeds {seeds}, {made['hardware']}, torch {made['torch']}, "
        f"{made['date']}, {data['seconds'] / 60:.1f} minutes in all."
    )
    yield ""
    yield "| claim | paper | measured | bound | verdict |"
    yield "|---|---|---|---|---|"
    for verdict in verdicts:
        yield claim_row(verdict)
    yield ""
    yield f"![{experiment.title}]({figures}/{experiment.id}.png)"
    yield ""


def needs_folder(experiment: Experiment) -> bool:
    """Whether the user names a folder of images."""
    settings = training_of(experiment).training
    return settings is not None and settings.recipe.get("data", {}).get("name") == "imagefolder"


def claim_row(verdict: Verdict) -> str:
    """One claim as a row of the table."""
    claim = verdict.claim
    unit = f" {claim.unit}" if claim.unit and verdict.values else ""
    why = f" ({verdict.why})" if verdict.why and verdict.values else ""
    cells = (
        claim.text,
        claim.paper,
        verdict.measured + unit,
        f"{verdict.bound}: {claim.reason}",
        f"**{verdict.outcome}**{why}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
