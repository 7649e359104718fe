"""docs/reproduction.md, of the experiments' files and data alone."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from condzoo.experiments.claims import Verdict, judge
from condzoo.experiments.collecting import stem
from condzoo.experiments.data_files import damage_told, read_data_file
from condzoo.experiments.loading import experiment_ids, labels_run, load_experiment, scale_of, training_of
from condzoo.experiments.made import made_on
from condzoo.experiments.planning import estimated_minutes, needs_folder
from condzoo.experiments.reductions import NOT_IMAGENET, reductions_of
from condzoo.experiments.schema import SCALES, Experiment

INTRODUCTION = """# Reproduction of arXiv:2002.10801

Made by `condzoo reproduce --report` of the files in docs/data/; a test checks that it is up to date. Each claim is a
measure with a bound, written into recipes/paper/ before the run, but for those that are marked as written down after
the data were seen. **held**: every seed is within the bound; **did not hold**: the median over seeds is not; **not
decided**: only the median is, a value is missing, or of what is random one seed alone was run. Values are medians, with
the range over seeds. A condition number that is not known counts as infinite, for its smallest eigenvalue is under the
noise: a ratio of 0 says that most of the other network's are. This rule, and that the final loss of a run within an
epoch is its last and not its mean, were written down on 28 November 2026, when the data of figs. VI, VII and X had been
seen: values moved by them, bounds and verdicts did not. Scale `paper` is the appendix's own setup, for GPUs; scale
`cpu` is what two cores can do, and what it leaves out is listed with each experiment.
"""
HEAD = (
    "| experiment | held | did not hold | not decided | scale | seeds | minutes | hardware | date | command |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
OUTCOMES = ("held", "did not hold", "not decided")


def report(data_folder: str | Path, figures: str = "figures") -> str:
    """The page's text.

    Args:
        data_folder: with the data file of each experiment that was run (`condzoo.experiments.stem`).
        figures: the folder of the pictures, as the page links to it.

    Raises:
        ValueError: a damaged file; it is named.
    """
    rows: list[str] = []
    sections: list[str] = []
    for experiment in map(load_experiment, experiment_ids()):
        own_rows: list[str] = []
        own_parts: list[str] = []
        for scale in SCALES:
            path = Path(data_folder) / f"{stem(experiment.id, scale)}.json"
            if path.exists():
                data = read_data_file(path)
                with damage_told(path):
                    own_rows.append(overview_row(experiment, data))
                    own_parts += scale_section(experiment, data, figures)
        rows += own_rows or [f"| {link_to(experiment)} | not run yet | | | | | | | | `{command(experiment, 'cpu')}` |"]
        sections += section(experiment, own_parts)
    return "\n".join([INTRODUCTION, *HEAD, *rows, "", *sections])


def link_to(experiment: Experiment) -> str:
    """Its name and title, with a link to its section."""
    return f"[{experiment.id}](#{experiment.id}) {experiment.title}"


def overview_row(experiment: Experiment, data: dict[str, Any]) -> str:
    """The row of an experiment at one scale."""
    verdicts: list[str] = [verdict.outcome for verdict in judge(experiment, data)]
    counts = " | ".join(str(verdicts.count(outcome) or "") for outcome in OUTCOMES)
    how = f"{data['scale']} | {numbers(data['seeds'])} | {minutes(data)} | {made_on(data)} | {data['made']['date']}"
    elsewhere = " (**not on ImageNet**)" * any(text.startswith(NOT_IMAGENET) for text in data["reductions"])
    return f"| {link_to(experiment)}{elsewhere} | {counts} | {how} | `{command(experiment, data['scale'], data)}` |"


def section(experiment: Experiment, found: list[str]) -> Iterator[str]:
    """An experiment: its setup, and the lines found of each scale that was run (`scale_section`)."""
    yield f"## {experiment.id}"
    yield ""
    yield f"{experiment.title}. {experiment.setup}"
    if experiment.departs:
        yield f"Choices and departures: {experiment.departs}."
    yield ""
    yield from found
    if not found:
        about = estimated_minutes([experiment], "cpu")
        yield f"Not run yet: `{command(experiment, 'cpu')}` (about {about:.3g} minutes)."
        yield ""


def scale_section(experiment: Experiment, data: dict[str, Any], figures: str) -> Iterator[str]:
    """What was reduced, how it was run, its claims, its figure."""
    made = data["made"]
    if less := reductions_of(experiment, data):
        yield f"Less than the paper's: {'; '.join(less)}."
        yield ""
    yield (
        f"`{command(experiment, data['scale'], data)}`: scale {data['scale']}, seeds {numbers(data['seeds'])}, "
        f"{made_on(data)}, torch {made['torch']}, {made['date']}, {minutes(data)} minutes in all."
    )
    yield ""
    yield "| claim | paper | measured | bound | verdict |"
    yield "|---|---|---|---|---|"
    for verdict in judge(experiment, data):
        yield claim_row(verdict)
    yield ""
    if experiment.figure.kind == "errors":
        yield from error_table(experiment, data)
    if remark := experiment.remarks.get(data["scale"]):
        yield remark
        yield ""
    yield f"![{experiment.title}]({figures}/{stem(experiment.id, data['scale'])}.png)"
    yield ""


def error_table(experiment: Experiment, data: dict[str, Any]) -> Iterator[str]:
    """Each network's test error beside the paper's: median, range and number of the seeds that did not diverge."""
    assert experiment.training is not None
    yield "| network | paper, % | measured, % | diverged |"
    yield "|---|---|---|---|"
    for spec in experiment.training.runs:
        runs = [run for run in data["runs"] if run["label"] == spec.label and run["chosen"]]
        errors = sorted(100 * run["test_error"] for run in runs if run["test_error"] is not None)
        measured = "-" if runs else "not run"
        if errors:
            spread = f"{errors[0]:.2f} to {errors[-1]:.2f}, " if len(errors) > 1 else ""
            measured = f"{statistics.median(errors):.2f} ({spread}n = {len(errors)})"
        diverged = sum(run["status"] == "diverged" for run in runs)
        yield f"| {spec.label} | {spec.paper} | {measured} | {f'{diverged} of {len(runs)}' if diverged else ''} |"
    yield ""


def command(experiment: Experiment, scale: str, data: dict[str, Any] | None = None) -> str:
    """What a user types, for the seeds and curves of `data` where they are not all of the scale's."""
    parts = ["condzoo reproduce", experiment.id]
    parts += ["--scale", scale] if scale != "cpu" else []
    owner = training_of(experiment)
    if data is not None and data["seeds"] != scale_of(owner, scale).seeds:
        parts += ["--seeds", ",".join(map(str, data["seeds"]))]
    if data is not None and owner.training is not None:
        labels = list(dict.fromkeys(run["label"] for run in data["runs"]))
        every = labels_run(experiment, scale)
        parts += [f"--only '{label}'" for label in labels] if set(labels) < set(every) else []
    parts += ["--imagenet FOLDER"] if needs_folder(experiment) else []
    return " ".join(parts)


def numbers(values: list[int]) -> str:
    """Seeds in words."""
    return ", ".join(map(str, values))


def minutes(data: dict[str, Any]) -> str:
    """Time spent on an experiment, all runs together."""
    return f"{data['seconds'] / 60:.1f}"


def claim_row(verdict: Verdict) -> str:
    """One claim as a row of the table."""
    claim = verdict.claim
    unit = f" {claim.unit}" if claim.unit and verdict.values else ""
    why = f" ({verdict.why})" if verdict.why and verdict.values else ""
    cells = (
        claim.text,
        claim.paper or "no number given",
        verdict.measured + unit,
        f"{verdict.bound}: {claim.reason}{'; written down after the data were seen' if claim.after else ''}",
        f"**{verdict.outcome}**{why}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
