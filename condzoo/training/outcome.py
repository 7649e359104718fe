"""How a run ends: finished, or diverged."""

from pathlib import Path
from typing import Any

from condzoo.training.diagnosis import Fault
from condzoo.training.events import OnEvent
from condzoo.training.preparation import Training
from condzoo.training.progress import Progress
from condzoo.training.reports import record_epoch, write_results
from condzoo.training.run_directory import METRICS, MODEL, SUMMARY, read_metrics, read_summary
from condzoo.training.runs import Diverged, Run
from condzoo.training.schema import Recipe
from condzoo.training.steps import learning_rate_of


def earlier_summary(path: Path) -> dict[str, Any] | None:
    """What an earlier call left as its summary; None where its weights are lost: the last checkpoint has them."""
    return read_summary(path) if all((path / name).is_file() for name in (SUMMARY, MODEL)) else None


def finish(training: Training, progress: Progress, path: Path, notify: OnEvent) -> dict[str, Any]:
    """Evaluate where the last step has not been (unless the recipe says never), and write the results.

    A run cut short by max_steps gets its evaluation as a line of kind "end", after its last
    checkpoint: a longer call cuts the line off and goes on. Where an epoch has just ended, the training
    loss stays that of its own line.
    """
    ranks = training.ranks
    record = ranks.first_does(lambda: last_epoch(path))
    evaluated = "test_error" in record or training.recipe.eval_every == 0
    if record.get("step") != progress.step or not evaluated:
        lr = learning_rate_of(training, progress.step - 1)
        record |= record_epoch(training, progress, path, lr, kind="end")
    return write_results(training, progress, path, record, {"status": "done"}, notify)


def last_epoch(path: Path) -> dict[str, Any]:
    """The newest line of metrics.jsonl that is an epoch's; empty where there is none."""
    lines = (record for record in reversed(read_metrics(path / METRICS)) if record["kind"] != "step")
    return next(lines, {})


def record_divergence(
    training: Training, progress: Progress, path: Path, fault: Fault, notify: OnEvent
) -> dict[str, Any]:
    """Write down where the run diverged; its weights are those before the step, which was not taken.

    Where an epoch has just ended, the training loss is that of its line, as in `finish`.
    """
    status = {
        "status": "diverged",
        "diverged": {"step": fault.step, "what": fault.what, "where": fault.where, "text": fault.text},
    }
    before = training.ranks.first_does(lambda: last_epoch(path))
    record = before if before.get("step") == progress.step else {}
    record |= record_epoch(training, progress, path, learning_rate_of(training, fault.step), kind="end")
    return write_results(training, progress, path, record, status, notify)


def end_diverged(path: Path, recipe: Recipe, summary: dict[str, Any]) -> Run:
    """A diverged run as a result, where the recipe says that it is one.

    Raises:
        Diverged: it does not.
    """
    if recipe.on_divergence == "record":
        return Run(path, recipe, summary)
    text = summary["diverged"]["text"]
    raise Diverged(f'diverged: {text}; lower optim.lr, or record it by on_divergence = "record" ({path})', summary)
