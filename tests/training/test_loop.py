"""`train` against a plain PyTorch loop, and what a run leaves behind."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from condzoo.commands.display import last_layer_texts
from condzoo.data import BatchPlan, load_data
from condzoo.models import create_model
from condzoo.probe import read_records
from condzoo.training import (
    EpochDone,
    Finished,
    Message,
    Notice,
    Recipe,
    RecipeError,
    Started,
    StepDone,
    evaluate_run,
    load_recipe,
    load_run,
    reports,
    train,
)
from condzoo.training.accelerators import GPUS
from condzoo.training.planning import plan_training
from condzoo.training.preparation import prepare
from condzoo.training.rehearsal import rehearse
from condzoo.training.reports import opened_probe
from tests.training.timeless import timeless

CONV = {"model.name": "cifar_resnet8_lastbn", "data.augment": "standard", "epochs": 1}


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without what the clock decides."""
    return timeless(path / "metrics.jsonl")


def plain_loop(recipe: Recipe, steps: int) -> nn.Module:
    """The same training, written out for an MLP on digits with SGD."""
    data = load_data("digits")
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model.name, num_classes=10, input_size=(1, 8, 8)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    plan = BatchPlan(128, recipe.data.augment, recipe.seed)
    taken = 0
    for epoch in range(10):
        for x, y in data.train_batches(plan, epoch):
            if taken == steps:
                return model
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            taken += 1
    raise AssertionError("more steps than batches")


def test_train_equals_a_plain_loop_bitwise(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny()
    run = train(recipe, out=tmp_path / "run", device="cpu")
    assert run.summary["steps"] == 22
    assert equal(weights(run.path), plain_loop(recipe, 22).state_dict())


@pytest.mark.run_pictures
def test_the_run_directory_is_complete_and_strict_json(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"probe.every": 10})
    run = train(recipe, out=tmp_path / "run", device="cpu")
    held = {p.name for p in run.path.iterdir()}
    assert held >= {
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "conditioning.jsonl",
        "conditioning.png",
        "checkpoints",
        "model.safetensors",
    }

    def forbidden(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for path in [*run.path.glob("*.json"), *run.path.glob("*.jsonl")]:
        lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        for line in lines:
            json.loads(line, parse_constant=forbidden)
    assert load_recipe(run.path / "recipe.toml") == recipe
    assert [line["step"] for line in map(json.loads, (run.path / "conditioning.jsonl").read_text().splitlines())] == [
        0,
        10,
        20,
    ]


def test_a_picture_that_cannot_be_drawn_costs_no_result(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("Failed to process string with tex because latex could not be found")

    monkeypatch.setattr(reports, "plot_records", fail)
    events: list[Any] = []
    run = train(tiny(**{"probe.every": 5}), out=tmp_path, max_steps=2, device="cpu", on_event=events.append)
    assert load_run(tmp_path) == run
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert notice == (
        f"{tmp_path / 'conditioning.png'} was not drawn, RuntimeError: Failed to process string with tex because latex "
        f"could not be found; `condzoo plot {tmp_path}` draws it again"
    )


def test_a_run_killed_at_its_picture_still_has_the_weights_of_its_summary(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*arguments: Any) -> None:
        raise Killed

    recipe = tiny(**{"probe.every": 5})
    train(recipe, out=tmp_path, max_steps=5, device="cpu")
    before = {name: (tmp_path / name).read_bytes() for name in ("model.safetensors", "summary.json")}
    monkeypatch.setattr(reports, "plot_records", kill)
    with pytest.raises(Killed):
        train(recipe, out=tmp_path, device="cpu")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_metrics_hold_steps_and_epochs(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(), out=tmp_path / "run", device="cpu")
    lines = metrics(run.path)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [0, 5, 10, 15, 20]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["step"] for line in epochs] == [11, 22]
    assert epochs[-1]["test_error"] == run.test_error == run.summary["test_error"]
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    assert epochs[-1]["test_images"] == 360


def test_epoch_metrics_are_means_over_the_epochs_images(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(log_every=1, epochs=1), out=tmp_path / "run", device="cpu")
    lines = metrics(run.path)
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == 11
    assert lines[-1]["train_loss"] == pytest.approx(sum(losses) / 11, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {**CONV, "model.drop_rate": 0.5}], ids=["mlp", "resnet with dropout"])
def test_one_seed_gives_one_result_and_another_gives_another(
    changes: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(len(runs))  # the caller's random numbers must not matter
        runs.append(train(tiny(**changes), seed=seed, out=tmp_path / name, max_steps=6, device="cpu"))
    assert equal(weights(runs[0].path), weights(runs[1].path))
    assert metrics(runs[0].path) == metrics(runs[1].path)
    assert not equal(weights(runs[0].path), weights(runs[2].path))
    assert load_recipe(runs[2].path / "recipe.toml").seed == 2


def test_the_callers_random_numbers_are_left_alone(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(tiny(), out=tmp_path / "run", max_steps=2, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
        (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
    ],
    ids=["float64", "bfloat16", "meta", "no gradients"],
)
def test_what_a_notebook_has_set_changes_no_run_and_stays(change: Any, back: Any, tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"epochs": 1, "probe.every": 4})
    wanted = train(recipe, out=tmp_path / "usual", device="cpu")
    change()
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    try:
        found = train(recipe, out=tmp_path / "changed", device="cpu")
        again = evaluate_run(found.path, device="cpu")
        rehearse(recipe, device="cpu")
        plan = plan_training(recipe, GPUS["t4"])
        after = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    finally:
        back()
    assert equal(weights(found.path), weights(wanted.path))
    assert metrics(found.path) == metrics(wanted.path)
    assert again.correct == wanted.summary["test_correct"]
    assert plan.parameters == wanted.summary["parameters"]
    assert before == after


def test_a_rehearsal_takes_a_compiled_step_beside_one_that_is_measured(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def stand_in(model: nn.Module) -> Any:
        return lambda x: runs.append("compiled") or model(x)

    monkeypatch.setattr(torch, "compile", stand_in)
    for every, expected in ((0, 1), (1, 0), (5, 1)):
        runs.clear()
        found = rehearse(tiny(**CONV, compile=True, **{"probe.every": every}), device="cpu")
        assert len(runs) == expected
        assert (found.probed > 0) == (every > 0)
    usual = rehearse(tiny(**CONV, **{"probe.every": 5}), device="cpu")
    assert (usual.loss, usual.grad_norm) == (found.loss, found.grad_norm)  # of the first step


def test_a_trainings_probe_knows_that_its_loss_is_a_softmaxs(tiny: Any) -> None:
    with opened_probe(prepare(tiny(**{"probe.every": 1}), torch.device("cpu")), None, 0) as probe:
        assert probe is not None
        assert probe.softmax


@pytest.mark.run_pictures
def test_the_probe_does_not_change_the_weights(tiny: Any, tmp_path: Path) -> None:
    plain = train(tiny(**CONV), out=tmp_path / "plain", max_steps=5, device="cpu")
    probed = train(tiny(**CONV, **{"probe.every": 2}), out=tmp_path / "probed", max_steps=5, device="cpu")
    assert equal(weights(plain.path), weights(probed.path))
    assert (probed.path / "conditioning.png").stat().st_size > 1000
    assert not (plain.path / "conditioning.png").exists()


def test_the_recipes_probe_section_is_the_probes_settings(tiny: Any, tmp_path: Path) -> None:
    settings = {"probe.every": 2, "probe.bias": True, "probe.kappa": False, "probe.precision": "float64"}
    assert read_records(train(tiny(**settings), out=tmp_path / "all", max_steps=1, device="cpu").path)[0].neurons
    settings |= {"probe.neurons": False, "probe.weights": False}
    events: list[Any] = []
    run = train(tiny(**settings), out=tmp_path / "run", max_steps=3, device="cpu", on_event=events.append)
    record = read_records(run.path)[-1]
    assert (record.step, record.bias, record.kappa, record.precision) == (2, True, False, "float64")
    assert record["fc"].input.status(0.5) == "not computed"
    assert (record.neurons, record["fc"].weight, record["fc"].weight_grad) == ({}, None, None)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert list(steps[-1].last_layer) == ["lambda_max"]
    assert last_layer_texts(run)[1] == "not computed"


def test_events_tell_the_whole_story(tiny: Any, tmp_path: Path) -> None:
    events: list[Any] = []
    run = train(tiny(**{"probe.every": 4}), out=tmp_path / "run", device="cpu", on_event=events.append)
    assert isinstance(events[0], Started)
    assert (events[0].start_step, events[0].last_step, events[0].steps_per_epoch) == (0, 22, 11)
    assert [e.step for e in events if isinstance(e, StepDone)] == list(range(22))
    assert [e.epoch for e in events if isinstance(e, EpochDone)] == [0, 1]
    assert isinstance(events[-1], Finished)
    assert events[-1].summary == run.summary
    last = [e for e in events if isinstance(e, StepDone)][-1]
    assert last.last_layer is not None
    assert last.last_layer["lambda_max"] > 0


def test_max_steps_evaluates_where_it_stops(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(), out=tmp_path / "run", max_steps=3, device="cpu")
    assert (run.summary["steps"], run.summary["status"]) == (3, "done")
    assert metrics(run.path)[-1]["kind"] == "end"
    assert evaluate_run(run.path, device="cpu").error == run.test_error
    for wrong, said in ((0, "at least 1, got 0"), (2.5, "a whole number, got 2.5"), ("3", "a whole number, got '3'")):
        with pytest.raises(ValueError, match=f"max_steps must be {said}"):
            train(tiny(), out=tmp_path / "other", max_steps=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, CONV, {"ema": 0.9}], ids=["mlp", "resnet", "average"])
def test_evaluating_a_run_again_gives_the_same_accuracy(changes: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(**changes), out=tmp_path / "run", device="cpu", max_steps=8)
    again = evaluate_run(run.path / "model.safetensors", device="cpu")
    assert (again.correct, again.total, again.loss) == (
        run.summary["test_correct"],
        360,
        run.summary["test_loss"],
    )
    assert load_run(run.path) == run


def test_a_finished_run_is_not_trained_again(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(), out=tmp_path / "run", device="cpu")
    events: list[Any] = []
    assert train(tiny(), out=tmp_path / "run", device="cpu", on_event=events.append) == run
    text = f"{tmp_path / 'run'} was trained to step 22 before; nothing is left to train"
    assert events == [Message(text)]


def test_iterations_in_place_of_epochs(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(iterations=14), out=tmp_path / "run", device="cpu")
    assert run.summary["steps"] == 14
    assert run.summary["epochs"] == pytest.approx(14 / 11)
    assert run.test_error is not None


def test_evaluation_every_few_epochs_and_at_the_end(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(epochs=5, eval_every=2), out=tmp_path / "run", device="cpu")
    evaluated = [line["epoch"] for line in metrics(run.path) if "test_error" in line]
    assert evaluated == [1, 3, 4]


def test_never_evaluated_where_the_recipe_says_so(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condzoo.training.reports.evaluate", lambda *_: pytest.fail("evaluated"))
    run = train(tiny(eval_every=0), out=tmp_path / "never")
    assert run.summary["status"] == "done"
    assert run.test_error is None
    assert run.summary["train_loss"] > 0
    assert train(tiny(eval_every=0), out=tmp_path / "never").summary == run.summary


def test_a_recipe_whose_parts_contradict_is_refused_before_a_folder_is_made(tiny: Any, tmp_path: Path) -> None:
    broken = tiny().model_copy(update={"epochs": None})
    with pytest.raises(RecipeError, match="got neither of epochs and iterations, give exactly one"):
        train(broken, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no finished run: it has no recipe.toml"):
        load_run(tmp_path)


@pytest.mark.run_pictures
def test_what_cannot_be_written_is_named(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = tiny(**{"probe.every": 1, "iterations": 1})
    events: list[Any] = []
    monkeypatch.setattr(Path, "write_bytes", full)
    run = train(recipe, out=tmp_path / "png", device="cpu", on_event=events.append)
    assert load_run(tmp_path / "png") == run, "a picture costs no result"
    (said,) = [event.text for event in events if isinstance(event, Notice)]
    assert "No space left on device: '" in said
    assert said.startswith(f"{tmp_path / 'png/conditioning.png'} was not drawn")
    monkeypatch.setattr("condzoo.probe.records.dumps", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/conditioning\.jsonl'"):
        train(recipe, out=tmp_path / "jsonl", device="cpu")
