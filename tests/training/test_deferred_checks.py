"""Checks that stay on the device, as on a GPU, forced on the CPU: the same training, the same end at a bad step."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from condzoo.training import Diverged, loop, preparation, train
from condzoo.training.divergence import Averaging, Guard, NonFinite, update_average
from condzoo.training.preparation import Training, prepare, training_steps
from condzoo.training.progress import capture, start_of
from condzoo.training.steps import take_step

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "adam": {"name": "adam", "lr": 0.002},
    # With a smaller eps, Adam makes whole steps of the rounding errors that are the gradients of pixels always black.
    "adamw": {"name": "adamw", "lr": 0.002, "weight_decay": 0.1, "eps": 1e-4},
}
# The learning rate explodes at step 11: finite weights are far out after it, and step 12 is not finite.
EXPLODING = {
    "schedule": {"name": "step", "milestones": [11], "unit": "iteration", "gamma": 1e30},
    "model.name": "mlp4x24_bn",
    "ema": 0.9,
    "log_every": 50,
}


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(preparation, "checks_are_deferred", lambda device: True)


def gap(a: Path, b: Path) -> float:
    """The largest distance of a tensor of one run from the other's, relative to its norm."""
    first, second = (load_file(run / "model.safetensors") for run in (a, b))
    assert first.keys() == second.keys()
    distances = [(first[key].double() - second[key].double()).norm() / first[key].double().norm() for key in first]
    return float(max(distances))


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_deferred_checks_train_the_same_and_go_on_bitwise(
    optim: str, tiny: Any, tmp_path: Path, deferred: Callable[[], None]
) -> None:
    changes = {"model.name": "mlp4x24_bn", "ema": 0.8, "grad_clip": 1.0, "probe.every": 7}
    recipe = tiny(**{"optim": OPTIMIZERS[optim], **changes})
    train(recipe, out=tmp_path / "immediate", device="cpu")
    deferred()
    train(recipe, out=tmp_path / "deferred", device="cpu")
    assert gap(tmp_path / "immediate", tmp_path / "deferred") < 1e-3  # fused updates round differently
    for steps in (8, None):
        train(recipe, out=tmp_path / "pieces", max_steps=steps, device="cpu")
    assert gap(tmp_path / "deferred", tmp_path / "pieces") == 0.0


def test_waiting_for_the_device_is_time_of_the_steps(
    tiny: Any, tmp_path: Path, deferred: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launching takes no time, by this clock, and each wait a second."""
    deferred()
    waits: list[None] = []
    monkeypatch.setattr(Guard, "check", lambda guard: waits.append(None))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(len(waits))))
    run = train(tiny(), out=tmp_path, device="cpu")  # looked at after steps 1, 6, 10, 11 and 16, 20, 21, 22
    assert run.summary["seconds"] == len(waits) == 8.0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [(line["seconds"], line["images_per_second"]) for line in lines if line["kind"] == "epoch"]
    assert epochs == [(4.0, 11 * 128 / 4)] * 2


@pytest.mark.parametrize("probe", [0, 13], ids=["unprobed", "probed just after"])
def test_a_bad_step_ends_the_run_as_if_it_had_been_seen_at_once(
    probe: int, tiny: Any, tmp_path: Path, deferred: Callable[[], None]
) -> None:
    recipe = tiny(**EXPLODING, **{"probe.every": probe})
    for name in ("immediate", "deferred"):
        if name == "deferred":
            deferred()
        with pytest.raises(Diverged, match="diverged: the loss of step 12 is not finite"):
            train(recipe, out=tmp_path / name, device="cpu")
    ours, theirs = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("deferred", "immediate"))
    assert ours["diverged"] == theirs["diverged"]
    assert (ours["steps"], ours["test_correct"]) == (12, theirs["test_correct"])
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    assert gap(tmp_path / "immediate", tmp_path / "deferred") < 1e-4
    train(recipe, out=tmp_path / "before", max_steps=12, device="cpu")
    assert gap(tmp_path / "before", tmp_path / "deferred") == 0.0


def spoiled_loss(model: nn.Module) -> Any:
    return model.get_submodule("fc").register_forward_hook(lambda module, x, h: h * torch.inf)


def spoiled_gradient(model: nn.Module) -> Any:
    return model.get_parameter("layers.1.linear.weight").register_hook(lambda gradient: gradient * torch.inf)


def spoiled_statistics(model: nn.Module) -> Any:
    def overflow(norm: Any, x: Any) -> None:
        norm.running_var.data.fill_(torch.inf)  # as BatchNorm does, past autograd

    return model.get_submodule("layers.1.bn").register_forward_pre_hook(overflow)


def state(training: Training, folder: Path) -> dict[str, Tensor]:
    """Everything a checkpoint would hold, but for the number of times that the average was asked."""
    tensors = capture(training, start_of(training), folder).tensors
    return {key: value.clone() for key, value in tensors.items() if key != "average.n_averaged"}


@pytest.mark.parametrize("taken", [0, 3], ids=["from the first step", "in training"])
@pytest.mark.parametrize("spoil", [spoiled_loss, spoiled_gradient, spoiled_statistics])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_from_the_bad_step_on_none_changes_anything(
    optim: str, spoil: Callable[[nn.Module], Any], taken: int, tiny: Any, tmp_path: Path, deferred: Callable[[], None]
) -> None:
    deferred()
    recipe = tiny(**{"optim": OPTIMIZERS[optim], "model.name": "mlp4x24_bn", "ema": 0.8})
    training = prepare(recipe, torch.device("cpu"))
    steps = training_steps(training, 0, taken + 3)
    for _ in range(taken):
        take_step(training, next(steps))
    training.guard.check()
    before = state(training, tmp_path)
    handle = spoil(training.model)
    results = [take_step(training, next(steps))]
    handle.remove()
    results += [take_step(training, batch) for batch in steps]  # these two would be finite
    after = state(training, tmp_path)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert [(float(r.loss_sum), int(r.correct)) for r in results] == [(0.0, 0)] * 3
    with pytest.raises(NonFinite, match=f"of step {taken} is not finite"):
        training.guard.check()


class Copies(TorchDispatchMode):
    """Counts the operations that read tensors of one device and write to another."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += len({t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}) > 1
        return result


def test_checks_and_averaging_read_nothing_back_and_copy_nothing_to_the_device() -> None:
    """A copy of a number would wait for all that a GPU was given to do; the meta device stands for it."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to("meta")
    guard = Guard(model, torch.device("meta"), deferred=True)
    average = AveragedModel(model, multi_avg_fn=Averaging(guard, 0.9), use_buffers=True)
    with Copies() as copies:
        for step in range(3):
            guard.remember()
            loss = torch.zeros((), device="meta")
            guard.note(torch.isfinite(loss * guard.weight(loss)), step)
            update_average(average, model)
    assert (copies.count, int(average.n_averaged)) == (0, 3)
