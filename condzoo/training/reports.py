"""What a run writes down of itself: lines of metrics, the summary, the picture, the weights."""

import contextlib
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from condzoo.data import Split
from condzoo.models.weight_files import as_safetensors, sha256
from condzoo.probe import Probe, plot_records, read_records
from condzoo.training.data_sets import class_names
from condzoo.training.evaluation import evaluate
from condzoo.training.events import Notice, OnEvent
from condzoo.training.norm_statistics import evaluated
from condzoo.training.preparation import Training
from condzoo.training.progress import Progress
from condzoo.training.run_directory import (
    CONDITIONING,
    METRICS,
    MODEL,
    PICTURE,
    SUMMARY,
    append_record,
    read_json,
    write_atomically,
    write_json,
)
from condzoo.training.steps import StepResult

PREFIXES: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}


def record_step(path: Path, step: int, epoch: int, result: StepResult) -> None:
    """A line of metrics.jsonl for one step: `loss` is the mean over its images, before the update."""
    record = {"kind": "step", "step": step, "epoch": epoch, "loss": float(result.loss_sum) / result.images}
    append_record(path / METRICS, record | {"lr": result.lr, "grad_norm": float(result.grad_norm)})


def record_epoch(training: Training, progress: Progress, path: Path, lr: float, kind: str = "epoch") -> dict[str, Any]:
    """A line of metrics.jsonl for the epoch that ended (or that a run stopped in: kind "end"), with its evaluation."""
    record: dict[str, Any] = {
        "kind": kind,
        "epoch": max(0, progress.step - 1) // training.steps_per_epoch,
        "step": progress.step,
        "lr": lr,
    }
    if progress.images:  # none where a run ends right after an epoch: that epoch has its line
        record |= {
            "train_loss": progress.loss,
            "train_accuracy": progress.accuracy,
            "images_per_second": progress.images_per_second,
            "seconds": progress.epoch_seconds,
        }
    if due := splits_due(training, progress.step, kind == "end"):
        with evaluated(training) as network:
            for split in due:
                record |= measure_split(training, network, split)
    training.ranks.first_does(lambda: append_record(path / METRICS, record))
    return record


def splits_due(training: Training, step: int, ending: bool) -> list[Split]:
    """What the network is evaluated on after `step` steps: every eval_every epochs and at the end.

    Where validation images are held out, the test images wait for the end.
    """
    every = training.recipe.eval_every
    if not every:
        return []
    epochs, rest = divmod(step, training.steps_per_epoch)
    ending = ending or step == training.total_steps
    held_out: list[Split] = ["validation"] if training.recipe.data.validation is not None else []
    if ending:
        return [*held_out, "test"]
    return (held_out or ["test"]) if rest == 0 and epochs % every == 0 else []


def measure_split(training: Training, network: nn.Module, split: Split) -> dict[str, Any]:
    """Loss and error over every image of a split, and what measuring took."""
    began = time.perf_counter()
    found = evaluate(network, training.data, training.numerics, split, training.ranks)
    numbers = {
        "loss": found.loss,
        "error": found.error,
        "accuracy": found.accuracy,
        "correct": found.correct,
        "images": found.total,
        "seconds": time.perf_counter() - began,
    }
    return {f"{PREFIXES[split]}_{name}": number for name, number in numbers.items()}


def write_results(
    training: Training, progress: Progress, path: Path, record: dict[str, Any], status: dict[str, Any], notify: OnEvent
) -> dict[str, Any]:
    """Write conditioning.png, model.safetensors and, last, summary.json; returns the summary in every process.

    The picture takes seconds: it is drawn first, so that the weights of a run that is killed then are still those of
    the summary beside them.
    """
    ranks = training.ranks
    ranks.first_does(lambda: draw_picture(path, notify))
    with evaluated(training) as network:
        digest = ranks.first_does(lambda: write_weights(network, path / MODEL))
    known = {**status, "weights_sha256": digest}
    return ranks.first_does(lambda: write_summary(training, progress, path, record, known))


def write_weights(network: nn.Module, path: Path) -> str:
    """Every parameter and buffer, as safetensors; returns the file's SHA-256."""
    content = as_safetensors(network.state_dict())
    write_atomically(path, content)
    return sha256(content)


def draw_picture(path: Path, notify: OnEvent) -> None:
    """Write conditioning.png, where there is something to draw; where that fails, say so: the results stand without."""
    try:
        if shows_layers(path):
            plot_records(path / CONDITIONING, path / PICTURE)
    except Exception as error:  # of matplotlib, fonts, a disk: none may cost the result of a training
        why = f"{type(error).__name__}: {error}"
        notify(Notice(f"{path / PICTURE} was not drawn, {why}; `condzoo plot {path}` draws it again"))


def write_summary(
    training: Training, progress: Progress, path: Path, record: dict[str, Any], status: dict[str, Any]
) -> dict[str, Any]:
    """Write summary.json; returns it."""
    summary = {
        **status,
        "model": training.recipe.model.name,
        "data": training.recipe.data.name,
        "num_classes": training.data.num_classes,
        **({"class_names": names} if (names := class_names(training.data)) else {}),
        "seed": training.recipe.seed,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": progress.step,
        "epochs": progress.step / training.steps_per_epoch,
        **{key: value for key, value in record.items() if key.startswith(("train_", "val_", "test_"))},
        "seconds": progress.seconds,
        "device": str(training.numerics.device),
        "processes": training.ranks.world,
        "precision": training.numerics.precision,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(path / SUMMARY, summary)
    return read_json(path / SUMMARY)


def shows_layers(path: Path) -> bool:
    """Whether any record of a run holds a layer: where all were skipped, there is nothing to draw."""
    return (path / CONDITIONING).exists() and any(len(record) for record in read_records(path / CONDITIONING))


@contextlib.contextmanager
def opened_probe(training: Training, path: Path | None, start_step: int) -> Iterator[Probe | None]:
    """The probe the recipe asks for, writing into the run directory where there is one; None: it asks for none.

    It takes the loss as a sum over images with a scale, which is exact for chunks of any sizes; the
    scale is set with each step.
    """
    section = training.recipe.probe
    if section.every == 0:
        yield None
        return
    with Probe(
        training.model,
        every=section.every,
        out=path,
        layers=section.layers,
        conv=section.conv,
        precision=section.precision,
        bias=section.bias,
        kappa=section.kappa,
        neurons=section.neurons,
        weights=section.weights,
        start_step=start_step,
        reduction="sum",
        softmax=True,
    ) as probe:
        yield probe


def last_layer(probe: Probe | None) -> dict[str, float] | None:
    """lambda_max and kappa of the last layer's input when it was last measured.

    kappa at p = 0.5: over the whole spectrum it is infinite wherever the batch is smaller than the layer is wide.
    """
    if probe is None or not probe.latest:
        return None
    spectrum = probe.latest.last.input
    kappa = {"kappa 50%": spectrum.condition_number(0.5)} if spectrum.status(0.5) != "not computed" else {}
    return {"lambda_max": spectrum.lambda_max, **kappa}
