"""An average is evaluated and written with BatchNorm's statistics under its own weights."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode

from condzoo.training import Notice, Recipe, evaluate_run, norm_statistics, train
from condzoo.training.distributed import Ranks
from condzoo.training.evaluation import evaluate
from condzoo.training.preparation import Training, prepare, training_steps
from condzoo.training.recipe import parse_recipe
from condzoo.training.resume import newest_checkpoint
from condzoo.training.steps import take_step
from tests.training import rank_runs

AVERAGED = {"model.name": "cifar_resnet8_lastbn", "ema": 0.95, "precision": "fp32"}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@torch.no_grad()
def statistics_under(weights: dict[str, Tensor], recipe: Recipe, batches: int, parts: int = 1) -> dict[str, Tensor]:
    """Of every BatchNorm, from what it reads: the mean over batches and parts of the mean and unbiased variance."""
    training = prepare(recipe, torch.device("cpu"))
    model = training.model
    model.load_state_dict(weights)
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def reader(name: str) -> Any:
        def read(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            rows = args[0].double().movedim(1, -1).flatten(0, -2)
            seen[f"{name}.running_mean"].append(rows.mean(0))
            seen[f"{name}.running_var"].append(rows.var(0))

        return read

    for name, module in model.named_modules():
        if isinstance(module, NORMS):
            module.register_forward_hook(reader(name))
    for part in range(parts):
        plan = replace(training.plan, part=part, parts=parts)
        for (x, _), _ in zip(training.data.train_batches(plan, 0), range(batches), strict=False):
            model(x)
    assert {len(found) for found in seen.values()} == {batches * parts}
    return {key: torch.stack(found).mean(0) for key, found in seen.items()}


def assert_statistics(written: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {key for key in written if "running" in key} == set(expected)
    for key, value in expected.items():
        assert torch.allclose(written[key].double(), value, rtol=1e-4, atol=1e-5), key


def test_the_written_average_has_statistics_of_its_own_weights(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_statistics, "IMAGES", 700)  # five whole batches of 128
    recipe = tiny(**AVERAGED)
    run = train(recipe, out=tmp_path / "run", max_steps=9, device="cpu")
    written = load_file(run.path / "model.safetensors")
    assert_statistics(written, statistics_under(written, recipe, batches=5))
    state = newest_checkpoint(run.path / "checkpoints", print)
    assert state is not None
    far = [key for key in written if "running_var" in key]
    drift = [written[key] / state.tensors[f"average.module.{key}"] for key in far]
    assert max(float((ratio - 1).abs().max()) for ratio in drift) > 0.1  # the average of the statistics is another


def test_statistics_are_measured_on_the_pieces_that_are_trained_on(tiny: Any) -> None:
    """A whole batch at once may not fit where a third of it does."""
    training = prepare(tiny(**AVERAGED, accumulate=3), torch.device("cpu"))
    trained = [x for batch in training_steps(training, 0, 2) for x, _ in batch.chunks]
    measured = [x for x, _ in norm_statistics.statistics_batches(training)]
    assert [len(x) for x in trained] == [43, 43, 42] * 2
    assert len(measured) == 3 * 11
    assert all(torch.equal(x, other) for x, other in zip(trained, measured, strict=False))


class Reads(TorchDispatchMode):
    """Counts the numbers that are read, each of which makes the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_statistics_are_torchs_to_the_last_bit_and_no_number_is_read(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_statistics, "seed_step", lambda *_: None)
    training = prepare(tiny(**AVERAGED), torch.device("cpu"))
    network, batches = training.result, list(norm_statistics.statistics_batches(training))
    update_bn(batches, network)
    expected = {key: value.clone() for key, value in network.state_dict().items()}
    network.train(False)
    with Reads() as reads:
        norm_statistics.measure_statistics(training, network, batches)
    assert reads.count == 0
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    assert not network.training


def test_a_batch_that_cannot_be_read_leaves_the_network_as_it_was_built(tiny: Any) -> None:
    training = prepare(tiny(**AVERAGED), torch.device("cpu"))
    network = training.result.eval()

    def damaged() -> Iterator[Any]:
        yield next(norm_statistics.statistics_batches(training))
        raise OSError("damaged image")

    with pytest.raises(OSError, match="damaged image"):
        norm_statistics.measure_statistics(training, network, damaged())
    norms = [module for module in network.modules() if isinstance(module, NORMS)]
    assert {norm.momentum for norm in norms} == {0.1}
    assert not any(norm.training or norm._forward_pre_hooks for norm in norms)


class Far:
    """A batch on a GPU, which a network here cannot take."""

    def __init__(self, values: Tensor) -> None:
        self.cpu = lambda: values


def test_sync_bn_keeps_its_batches_beside_the_gpu(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand of ImageNet's images are 6 GB in float32."""
    training = prepare(tiny(**AVERAGED), torch.device("cpu"))
    training = replace(training, recipe=tiny(**AVERAGED, sync_bn=True))
    batches = list(norm_statistics.statistics_batches(training))
    monkeypatch.setattr(norm_statistics, "statistics_batches", lambda _: ((Far(x), Far(y)) for x, y in batches))
    with norm_statistics.evaluated(training) as network:
        assert int(network.get_buffer("bn1.num_batches_tracked")) == len(batches)


def test_an_average_errs_less_by_statistics_of_its_own(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**AVERAGED, **{"optim.lr": 0.3, "epochs": 4})
    run = train(recipe, out=tmp_path / "run", device="cpu")
    state = newest_checkpoint(run.path / "checkpoints", print)
    assert state is not None
    training = prepare(recipe, torch.device("cpu"))
    prefix = "average.module."
    tensors = {key.removeprefix(prefix): value for key, value in state.tensors.items() if key.startswith(prefix)}
    training.model.load_state_dict(tensors)
    averaged = evaluate(training.model, training.data, training.numerics)
    assert run.test_error is not None
    assert run.test_error < averaged.error


def test_a_network_that_is_not_averaged_is_evaluated_as_it_is(tiny: Any) -> None:
    training = prepare(tiny(**AVERAGED | {"ema": None}), torch.device("cpu"))
    before = training.model.get_buffer("bn1.running_var").clone()
    with norm_statistics.evaluated(training) as network:
        assert network is training.model
        assert torch.equal(network.get_buffer("bn1.running_var"), before)


@pytest.mark.parametrize("changes", [{"drop_last": False, "batch_size": 1000}, {"batch_size": 1437}], ids=str)
def test_only_whole_batches_are_measured(changes: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**AVERAGED, **{f"data.{key}": value for key, value in changes.items()}, epochs=1)
    run = train(recipe, out=tmp_path / "run", device="cpu")
    written = load_file(run.path / "model.safetensors")
    assert_statistics(written, statistics_under(written, recipe, batches=1))


def test_evaluating_is_no_part_of_the_training(tiny: Any, tmp_path: Path) -> None:
    states = []
    for every in (0, 1):
        recipe = tiny(**AVERAGED, **{"model.drop_rate": 0.3}, eval_every=every)
        run = train(recipe, out=tmp_path / str(every), device="cpu")
        state = newest_checkpoint(run.path / "checkpoints", print)
        assert state is not None
        states.append(state.tensors)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_what_is_written_was_evaluated_where_layers_draw_before_a_norm(tiny: Any, tmp_path: Path) -> None:
    """Stochastic depth draws in train mode, in which statistics are measured: once evaluated, once written."""
    dropped = {"model.name": "test_resnet", "model.args": {"drop_path_rate": 0.5}, "data.resize": 16, "epochs": 1}
    run = train(tiny(**AVERAGED | dropped), out=tmp_path / "run", device="cpu")
    again = evaluate_run(run.path, device="cpu")
    assert (again.correct, again.loss) == (run.summary["test_correct"], run.summary["test_loss"])


class Meeting(Ranks):
    """Refuses that processes meet in what one of them may fail to do: the others would wait for it."""

    apart = False

    def all_do(self, action: Any) -> Any:
        Meeting.apart = True
        try:
            return action()
        finally:
            Meeting.apart = False

    def sum_(self, values: Tensor) -> Tensor:
        assert not Meeting.apart
        return values


def test_processes_share_statistics_once_all_have_read_their_images(tiny: Any) -> None:
    training = replace(prepare(tiny(**AVERAGED), torch.device("cpu")), ranks=Meeting())
    with norm_statistics.evaluated(training) as network:
        assert network is training.result


@pytest.mark.parametrize(("decay", "steps", "share"), [(0.99, 22, "81%"), (0.9, 22, "11%"), (0.9, 8, "48%")])
def test_a_run_too_short_for_its_average_says_so(
    decay: float, steps: int, share: str, tiny: Any, tmp_path: Path
) -> None:
    events: list[Any] = []
    train(tiny(ema=decay), out=tmp_path / "run", device="cpu", max_steps=steps, on_event=events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert notices[0].startswith(f"ema = {decay}: after {steps} steps {share} of the average")


def test_a_run_long_enough_for_its_average_says_nothing(tiny: Any, tmp_path: Path) -> None:
    events: list[Any] = []
    train(tiny(ema=0.85), out=tmp_path, device="cpu", on_event=events.append)
    train(tiny(), out=tmp_path / "none", device="cpu", on_event=events.append)
    assert not [event for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize(("sync_bn", "passes"), [(True, 0), (False, 1)])
def test_sync_bn_begins_once_all_have_read_their_images(
    sync_bn: bool, passes: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward passes wait for each other: a process that fails between two of them would leave the others there."""
    training = prepare(tiny(**AVERAGED), torch.device("cpu"))
    training = replace(training, recipe=tiny(**AVERAGED, sync_bn=sync_bn))
    whole, seen = training.data.train_batches, list[Tensor]()

    def damaged(plan: Any, epoch: int) -> Iterator[Any]:
        yield next(whole(plan, epoch))
        raise OSError("damaged image")

    monkeypatch.setattr(type(training.data), "train_batches", lambda data, plan, epoch: damaged(plan, epoch))
    training.result.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with pytest.raises(OSError, match="damaged image"), norm_statistics.evaluated(training):
        pytest.fail("evaluated")
    assert len(seen) == passes


def fail_while_evaluating(training: Training) -> None:
    before = training.result.get_buffer("bn1.running_var").clone()
    with norm_statistics.evaluated(training) as network:
        assert not torch.equal(network.get_buffer("bn1.running_var"), before)
        raise OSError("full")


def test_what_fails_while_evaluating_leaves_the_average_as_it_was(tiny: Any) -> None:
    training = prepare(tiny(**AVERAGED), torch.device("cpu"))
    for batch in training_steps(training, 0, 3):
        take_step(training, batch)
    before = {key: value.clone() for key, value in training.result.state_dict().items()}
    with pytest.raises(OSError, match="full"):
        fail_while_evaluating(training)
    assert all(torch.equal(value, before[key]) for key, value in training.result.state_dict().items())
    assert {module.momentum for module in training.result.modules() if isinstance(module, NORMS)} == {0.1}


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_several_processes_measure_their_parts_and_share_the_mean(tmp_path: Path) -> None:
    assert rank_runs.CASES["averaged"](tmp_path) == {"two": [["done"], ["done"]]}
    recipe = parse_recipe(rank_runs.AVERAGED)
    written = load_file(tmp_path / "two" / "model.safetensors")
    assert_statistics(written, statistics_under(written, recipe, batches=11, parts=2))
