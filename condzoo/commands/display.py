"""What the command line shows: tables, and the progress of a training."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from condzoo.catalog import ModelInfo, read_catalog

if TYPE_CHECKING:  # these import torch, and listing models does not need it
    from condzoo.evaluating import Evaluated
    from condzoo.experiments import Verdict
    from condzoo.training import Run

MEANS = (  # of a setting's runs: key of their summaries, what to call it, scale, unit
    ("val_error", "val error", 100, " %"),
    ("test_error", "test error", 100, " %"),
    ("train_loss", "train loss", 1, ""),
)
NAME_WIDTH, TEXT_WIDTH = 24, 10  # letters that stand in one line of a table, however narrow the terminal is
# Names and paths are printed as they are: rich would take [a] in them for its markup, and :x: for a picture.
console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def number(value: float) -> str:
    """A count as people read it: 269.7K, 1.81G."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{short(value / size)}{unit}"
    return short(value)


def short(value: float) -> str:
    """Three digits, or all before the point: 0.123, 12.3, 1,000; never a power of ten of what is large."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Sequence[str] = (), apart: int = 0
) -> None:
    """Print rows with every letter of them, whatever the width of the terminal; in a file each is one line.

    On a terminal names (the first column) and the columns `texts` take several lines where they have to, numbers never
    do. Where these leave too little room for names, the last `apart` columns become a table of their own.
    """
    rows = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *rows, strict=True)]
    folds = [i == 0 or column in texts for i, column in enumerate(columns)]
    floors = [NAME_WIDTH, *(TEXT_WIDTH if fold else width for width, fold in zip(widths[1:], folds[1:], strict=True))]
    frame = 3 * len(columns) - 1  # what rich puts around and between columns
    whole, least = frame + sum(widths), frame + sum(map(min, widths, floors))
    room = console.width if console.is_terminal else whole
    if least > room and apart:
        print_table(columns[:-apart], [row[:-apart] for row in rows], texts=texts)
        print_table([columns[0], *columns[-apart:]], [[row[0], *row[-apart:]] for row in rows])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=min(whole, max(least, room)))
    for column, fold in zip(columns, folds, strict=True):
        table.add_column(column, justify="left" if fold else "right", no_wrap=not fold, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, crop=False)


def print_json(value: Any) -> None:
    """Strict JSON on stdout."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def print_models(infos: Sequence[tuple[str, ModelInfo]], as_json: bool) -> None:
    """One line a model."""
    if as_json:
        print_json([{**asdict(info), "name": name} for name, info in infos])
        return
    rows = [
        (name, info.dataset, str(info.depth), f"{info.params:,}", number(info.macs), "yes" if info.last_bn else "")
        for name, info in infos
    ]
    print_table(("model", "data", "depth", "parameters", "MACs", "last BN"), rows)


def print_info(info: ModelInfo, released: Sequence[str], as_json: bool) -> None:
    """One line a field, and the released weights, the default first."""
    if as_json:
        print_json({**asdict(info), "released": list(released)})
        return
    weights = ", ".join(released)
    if len(released) > 1:
        weights = weights.replace(",", " (default),", 1)
    elif not released:
        own = info.family == "timm" or info.name in read_catalog()[1]
        weights = f"timm's: timm.list_pretrained({info.name + '.*'!r})" if own else "none released"
    texts: dict[str, str] = {
        **{key: str(value) for key, value in asdict(info).items()},
        "input_size": " x ".join(map(str, info.input_size)),
        "last_bn": "yes" if info.last_bn else "no",
        "params": f"{info.params:,}",
        "macs": f"{info.macs:,} multiply-adds an image",
        "weights": weights,
    }
    for key, text in texts.items():
        console.print(f"{key:12} {text}", soft_wrap=True)


def print_recipes(headers: Mapping[str, str], as_json: bool) -> None:
    """Each recipe's name and the first line of its header."""
    if as_json:
        print_json(headers)
        return
    print_table(("recipe", "what it is"), list(headers.items()), texts=["what it is"])


def print_runs(runs: "Sequence[Run]") -> None:
    """What each run came to: accuracy, and the conditioning of the last layer's input."""
    held_out = any(run.summary.get("val_error") is not None for run in runs)
    errors = ("val error", "test error") if held_out else ("test error",)
    columns = ("run", *errors, "train loss", "minutes", "lambda_max", "kappa 50%")
    rows = [(label, *result_texts(run, held_out)) for label, run in run_labels(runs).items()]
    print_table(columns, rows, apart=2)
    for label, run in run_labels(runs).items():
        if run.summary["status"] != "done":
            console.print(f"{label} {ending_text(run.summary)}", soft_wrap=True)
    for text in cut_short_texts(runs):
        console.print(text, soft_wrap=True)


def print_places(runs: "Sequence[Run]", picture: Path) -> None:
    """Where runs and their picture are, if there is one, and what their table says of the conditioning."""
    if picture.exists():
        console.print(
            "lambda_max and kappa are of the last linear layer's input, first -> last measurement: how large its "
            "largest direction is, and how many times larger than the median one. A large one limits the "
            "learning rate; near 0 no signal arrives; inf: not known, or zeros in the spectrum."
        )
        console.print(f"picture: {picture}", soft_wrap=True)
    console.print(f"runs:    {runs[0].path if len(runs) == 1 else runs[0].path.parent}", soft_wrap=True)


def result_texts(run: "Run", held_out: bool) -> list[str]:
    """A run's row: errors (of the held-out images, too, where there are any), loss, minutes, last layer."""
    summary = run.summary
    if summary["status"] == "failed":
        return [*([""] if held_out else []), "failed"]
    error, loss = summary.get("test_error"), summary.get("train_loss")
    loss_text = "" if loss is None else f"{loss:.4f}" if loss < 1e6 else f"{loss:.4g}"
    row = [summary["status"] if error is None else f"{error:.2%}", loss_text]
    if held_out:
        validation = summary.get("val_error")
        row.insert(0, "" if validation is None else f"{validation:.2%}")
    seconds = summary["seconds"]
    return [*row, f"{seconds / 60:.1f}" if seconds >= 60 else f"{seconds:.1f} s", *last_layer_texts(run)]


def ending_text(summary: Mapping[str, Any]) -> str:
    """Why a run did not come to its last step."""
    if summary["status"] == "failed":
        return f"failed: {summary['error']}"
    return f"diverged: {summary['diverged']['text']}"


def cut_short_texts(runs: "Sequence[Run]") -> list[str]:
    """A line for the runs that --max-steps ended before their recipe does, by how many steps they took."""
    from condzoo.training.runs import is_complete

    by_length: dict[tuple[int, str], list[str]] = {}
    for label, run in run_labels(runs).items():
        summary, recipe = run.summary, run.recipe
        # of runs by an earlier version a summary of many does not say how many epochs they took
        known = recipe.iterations is not None or "epochs" in summary
        if summary["status"] == "done" and known and not is_complete(recipe, summary):
            whole = f"{recipe.iterations:,} steps" if recipe.iterations else f"{recipe.epochs:,} epochs"
            by_length.setdefault((summary["steps"], whole), []).append(label)
    return [
        f"{', '.join(labels)}: stopped after {steps:,} steps, of {whole}; the same command without --max-steps goes on"
        for (steps, whole), labels in by_length.items()
    ]


def print_settings(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Mean +- sample standard deviation over the seeds of each setting that has several."""
    for name, group in settings.items():
        if len(group["seeds"]) == 1:
            continue
        lost = [f"{group[outcome]} {outcome}" for outcome in ("diverged", "failed") if group[outcome]]
        lost += [f"{group['shorter']} cut short, not in the mean"] if group["shorter"] else []
        parts = [f"{group['done']} of {len(group['seeds'])} seeds" + (f" ({', '.join(lost)})" if lost else "")]
        for key, label, scale, unit in MEANS:
            if key in group:
                parts.append(f"{label} {spread_text(group[key], scale)}{unit}")
        console.print(f"{name or 'mean +- std'}: {', '.join(parts)}", soft_wrap=True)


def spread_text(number: Mapping[str, Any], scale: float) -> str:
    """mean +- std, with the digits that std leaves meaningful."""
    mean, std = number["mean"] * scale, number["std"]
    if std is None:
        return f"{mean:.4g}"
    digits = 2 if std == 0 else max(2, 1 - math.floor(math.log10(std * scale)))
    return f"{mean:.{digits}f} +- {std * scale:.{digits}f}"


def run_labels(runs: "Sequence[Run]") -> "dict[str, Run]":
    """Runs by the short name that tells them apart: the model where it differs, else the folder."""
    models = {run.recipe.model.name: run for run in runs}
    return models if len(models) == len(runs) else dict(zip(path_labels([r.path for r in runs]), runs, strict=True))


def path_labels(paths: "Sequence[Path]") -> list[str]:
    """Folders by their names, files by theirs without the suffix; by the whole paths where two have the same."""
    whole = [Path(os.path.abspath(path)) for path in paths]  # "." has no name
    names = [path.stem if path.is_file() else path.name for path in whole]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def last_layer_texts(run: "Run") -> tuple[str, str]:
    """lambda_max and kappa at p = 0.5 of the last layer's input, first and last measurement where there are two."""
    if not (run.path / "conditioning.jsonl").exists():
        return "", ""
    from condzoo.probe import read_records
    from condzoo.probe.layer_order import last_inputs

    inputs = [spectrum for spectrum in last_inputs(read_records(run.path)) if spectrum is not None]
    if not inputs:  # every layer was skipped in every measurement
        return "", ""
    spectra = inputs[:1] if len(inputs) == 1 else (inputs[0], inputs[-1])  # one measurement is no course
    kappas = [spectrum.condition_number(0.5) for spectrum in spectra]
    return (
        " -> ".join(f"{spectrum.lambda_max:.3g}" for spectrum in spectra),
        "not computed" if any(map(math.isnan, kappas)) else " -> ".join(f"{kappa:.3g}" for kappa in kappas),
    )


def print_evaluation(again: "Evaluated", as_json: bool) -> None:
    """Error, accuracy and loss over every image, whether it is what was recorded, and what is doubtful about it."""
    evaluation, recorded = again.evaluation, again.recorded
    if as_json:
        found = {**asdict(evaluation), "error": evaluation.error, "accuracy": evaluation.accuracy}
        found |= {"loss": evaluation.loss if math.isfinite(evaluation.loss) else None}  # a diverged run's
        found |= {"recorded_correct": recorded and recorded[0], "recorded_total": recorded and recorded[1]}
        print_json(found | {"note": again.note})
        return
    if again.note:
        console.print(f"note: {again.note}", soft_wrap=True)
    wrong = evaluation.total - evaluation.correct
    before = ""
    if recorded is not None:
        same = recorded == (evaluation.correct, evaluation.total)
        before = ", as recorded" if same else f"; recorded: {recorded[1] - recorded[0]} of {recorded[1]} wrong"
    found_text = f"test error {evaluation.error:.2%} ({wrong} of {evaluation.total} wrong), loss {evaluation.loss:.4f}"
    console.print(found_text + before, soft_wrap=True)


def print_verdicts(verdicts: "Sequence[Verdict]", picture: Path) -> None:
    """One line a claim: the measured value, the bound, its verdict, and why it is not decided."""
    columns = ("claim", "measured", "bound", "verdict")
    rows = []
    for each in verdicts:
        measured = f"{each.measured} {each.claim.unit}" if each.values else each.why
        why = f" ({each.why})" if each.values and each.why else ""
        rows.append((each.claim.text, measured, each.bound, each.outcome + why))
    print_table(columns, rows, texts=columns)
    console.print(f"figure: {picture}", soft_wrap=True)
