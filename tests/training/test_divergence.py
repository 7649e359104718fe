"""A loss, gradient or running statistic that is not finite ends the run before the step, and is said or recorded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from condzoo.training import Diverged, loop, train
from condzoo.training.diagnosis import diagnose
from condzoo.training.distributed import Ranks
from condzoo.training.divergence import Guard, NonFinite
from condzoo.training.preparation import prepare, training_steps
from condzoo.training.rehearsal import rehearse
from condzoo.training.steps import take_step

WILD = {"optim.lr": 1e30, "optim.momentum": 0.0, "optim.nesterov": False, "probe.every": 5}


def test_divergence_stops_the_run_and_says_where(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"diverged: the loss of step \d is not finite, first in layers\.\d") as caught:
        train(tiny(**WILD), out=tmp_path / "run", device="cpu")
    assert caught.value.exit_code == 3
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary == caught.value.summary
    assert summary["status"] == "diverged"
    assert summary["diverged"]["step"] == summary["steps"] > 0
    assert summary["diverged"]["what"] == "loss"
    with pytest.raises(Diverged, match=r"lower optim\.lr"):  # and again, without training
        train(tiny(**WILD), out=tmp_path / "run", device="cpu")


def test_divergence_as_a_recorded_result(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(**WILD, on_divergence="record"), out=tmp_path / "run", device="cpu")
    assert run.summary["status"] == "diverged"
    assert run.test_error is not None
    assert run.test_error > 0.8
    assert (tmp_path / "run/model.safetensors").exists()
    again = train(tiny(**WILD, on_divergence="record"), out=tmp_path / "run", device="cpu")
    assert again == run


def test_the_step_that_diverges_is_not_taken(tiny: Any) -> None:
    training = prepare(tiny(), torch.device("cpu"))
    steps = training_steps(training, 0, 3)
    take_step(training, next(steps))
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    handle = training.model.get_parameter("layers.1.linear.weight").register_hook(lambda g: g * torch.inf)
    with pytest.raises(NonFinite, match="the loss, the gradient or a running statistic of step 1 is not finite"):
        take_step(training, next(steps))
    fault = diagnose(training, 1)
    assert fault.text == "the gradient of step 1 is not finite, first in layers.1.linear.weight"
    handle.remove()
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_last_checkpoint_before_divergence_is_kept_and_finite(tiny: Any, tmp_path: Path) -> None:
    schedule = {"name": "step", "milestones": [1], "gamma": 1e30}
    with pytest.raises(Diverged):
        train(tiny(schedule=schedule), out=tmp_path / "run", device="cpu")
    (newest,) = (tmp_path / "run/checkpoints").glob("*.safetensors")
    assert newest.stem == "step_0000000011"
    assert all(bool(value.isfinite().all()) for value in load_file(newest).values())


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_running_variance_that_overflows_is_divergence_and_is_nowhere_kept(
    ema: float | None, tiny: Any, tmp_path: Path
) -> None:
    """It does so in a step whose loss and gradient are still finite: what is normalized by the batch's own is."""
    changes = {"model.name": "mlp4x24_lastbn", "optim.lr": 3e4, "save_every": 0.01, "ema": ema}
    run = train(tiny(**changes, on_divergence="record"), out=tmp_path, device="cpu")
    assert run.summary["diverged"]["text"] == (
        f"the running statistic of step {run.summary['steps']} is not finite, first in last_bn.running_var"
    )
    kept = [tmp_path / "model.safetensors", *(tmp_path / "checkpoints").glob("*.safetensors")]
    assert len(kept) == 3
    for path in kept:
        assert all(bool(value.isfinite().all()) for value in load_file(path).values()), path


def test_a_buffer_that_holds_infinities_from_the_start_is_no_divergence(tiny: Any) -> None:
    training = prepare(tiny(), torch.device("cpu"))
    training.model.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan]))
    guarded = replace(training, guard=Guard(training.model, torch.device("cpu"), deferred=False))
    for batch in training_steps(guarded, 0, 2):
        take_step(guarded, batch)
    assert diagnose(guarded, 2).where == "the norm of all parameters together", "as where nothing is found"


def test_weights_that_the_last_step_spoils_are_divergence(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss and gradient are finite, and no step follows whose are not."""
    at_once = tiny(iterations=1, **{"model.init": "scaled:1e6", "optim.lr": 1e30})
    first = r"diverged: the weight after step 0 is not finite, first in layers\.0\.linear\.weight"
    with pytest.raises(Diverged, match=first):
        train(at_once, out=tmp_path / "at once", device="cpu")
    with pytest.raises(Diverged, match=first):
        rehearse(at_once, device="cpu")

    def spoil(training: Any, batch: Any, probe: Any) -> Any:
        result = take_step(training, batch, probe)
        if batch.step == 10:
            training.model.get_parameter("fc.bias").data[3] = torch.nan
        return result

    monkeypatch.setattr(loop, "take_step", spoil)
    run = train(tiny(epochs=1, save_every=0.5, on_divergence="record"), out=tmp_path / "run", device="cpu")
    assert (run.summary["status"], run.summary["steps"]) == ("diverged", 11)
    assert run.summary["diverged"]["text"] == "the weight after step 10 is not finite, first in fc.bias"
    newest = max((run.path / "checkpoints").glob("*.safetensors"))
    assert newest.stem == "step_0000000006", "what is not finite is not saved"


def test_a_run_that_diverges_right_after_an_epoch_keeps_the_training_loss_of_its_line(
    tiny: Any, tmp_path: Path
) -> None:
    schedule = {"name": "step", "unit": "iteration", "milestones": [10], "gamma": 1e30}
    with pytest.raises(Diverged) as caught:
        train(tiny(schedule=schedule), out=tmp_path, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (epoch,) = [line for line in lines if line["kind"] == "epoch"]
    assert caught.value.summary["diverged"]["step"] == epoch["step"] == 11
    assert {name: caught.value.summary[name] for name in ("train_loss", "train_accuracy")} == {
        name: epoch[name] for name in ("train_loss", "train_accuracy")
    }


def test_a_network_that_overflows_at_once_diverges_in_epoch_0(tiny: Any, tmp_path: Path) -> None:
    """Its every record is without a layer, of which no picture can be drawn."""
    recipe = tiny(**{"model.init": "scaled:1e30", "probe.every": 1}, on_divergence="record")
    run = train(recipe, out=tmp_path / "run", device="cpu")
    assert (run.summary["status"], run.summary["steps"]) == ("diverged", 0)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0]


def test_a_run_whose_probe_sees_no_gradient_ends_without_a_picture(tiny: Any, tmp_path: Path) -> None:
    changes = {"model.name": "cifar_resnet8", "freeze": ["conv1.*", "bn1.*"], "probe.layers": ["conv1"]}
    run = train(tiny(**changes, **{"probe.every": 5}), out=tmp_path / "run", max_steps=6, device="cpu")
    assert run.summary["status"] == "done"
    assert (run.path / "conditioning.jsonl").exists()
    assert not (run.path / "conditioning.png").exists()


def test_a_gradient_that_a_layer_spoils_on_the_way_down_is_named_where_it_is_first_met(tiny: Any) -> None:
    training = prepare(tiny(accumulate=2), torch.device("cpu"))
    spoil = training.model.get_submodule("layers.2").register_full_backward_hook(lambda _m, g, _h: (g[0] * torch.inf,))
    assert diagnose(training, 0).where.startswith("layers.1.linear."), "all of layers.0 is NaN, too"
    spoil.remove()
    assert diagnose(training, 0).where == "the norm of all parameters together", "nothing is left hooked"


def test_with_sync_bn_a_loss_that_is_bad_in_one_process_is_looked_at_by_all(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SyncBatchNorm waits for all of them: this one, whose own loss is finite, makes the other's passes, too."""
    training = replace(prepare(tiny(), torch.device("cpu")), recipe=tiny(sync_bn=True), ranks=Ranks(0, 2))
    monkeypatch.setattr(Ranks, "largest", lambda ranks, number: 1)
    monkeypatch.setattr(Ranks, "gather", lambda ranks, mine: [mine, ("loss", "fc")])
    passes: list[bool] = []
    training.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    backwards: list[str] = []
    training.model.get_parameter("layers.0.linear.weight").register_hook(lambda g: backwards.append("one"))
    assert diagnose(training, 0).text == "the loss of step 0 is not finite, first in fc"
    assert (passes, backwards) == ([True, False], [])
