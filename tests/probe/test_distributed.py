"""Data-parallel training over real processes: the numbers of one process with the whole batch."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, distributed, read_records
from condzoo.probe.capture import capture_of
from condzoo.probe.distributed import sum_over_ranks
from condzoo.probe.finishing import finish
from condzoo.probe.layer_sums import LayerSums

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="forks"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
EXACT = [
    "ddp",
    "ddp_uneven",
    "ddp_uneven_weighed",
    "ddp_accumulated",
    "fully_shard",
    "fully_shard_accumulated",
    "fully_shard_attention",
]
EXACT += ["fsdp", "fsdp_orig_params", "fsdp_orig_params_attention"]
ABSENT = ["absent", "absent_first_cross_attention"]
SPLIT = ["tensor_parallel", "tensor_parallel_own_samples"]


def run(world, folder, kinds):
    """The one record that each kind of training has written."""
    from tests.probe import processes  # here, since torch's wrappers take seconds to import

    processes.run(world, folder, kinds)
    found = {}
    for kind in kinds:
        (found[kind],) = read_records(folder / kind)
        assert len((folder / kind / "conditioning.jsonl").read_text().splitlines()) == 1
    return found


def expected(kit, kind, world):
    """The same from one process: the whole batch at once, and the processes' batches one after the other."""
    from tests.probe import processes

    x, y = kit.images(24)
    model = processes.network(kind)
    with Probe(model) as whole:
        F.cross_entropy(model(x), y).backward()
        whole.step()
    model.zero_grad()
    with Probe(model, loss_scale=1 / world) as in_turn:
        for rank in range(world):
            mine = processes.part(kind, rank, world)
            (F.cross_entropy(model(x[mine]), y[mine]) * processes.factor(kind, rank, world) / world).backward()
        in_turn.step()
    return whole.latest, in_turn.latest


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(pair_folder):
    return run(2, pair_folder, [*EXACT, *SPLIT, *ABSENT, "fully_shard_bf16"])


@pytest.mark.parametrize("kind", EXACT)
def test_two_processes_measure_what_one_measures_on_the_whole_batch(kit, pair, kind):
    same(pair[kind], *expected(kit, kind, 2))


def test_processes_that_weigh_their_losses_measure_the_whole_batchs_gradient_and_all_alike(kit, pair_folder, pair):
    """Each undoes its own factor; weighed by samples the mean of their gradients is that of the whole batch."""
    whole, _ = expected(kit, "ddp_uneven_weighed", 2)
    for name, layer in whole.items():
        assert pair["ddp_uneven_weighed"][name].weight_grad == pytest.approx(layer.weight_grad, rel=1e-10)
    first, second = ((pair_folder / "ddp_uneven_weighed" / f"rank{rank}.json").read_text() for rank in range(2))
    assert first == second


def test_four_processes_do_too(kit, tmp_path):
    for kind, record in run(4, tmp_path, ["ddp", "ddp_uneven"]).items():
        same(record, *expected(kit, kind, 4))


def same(record, whole, in_turn):
    assert (record.samples, record.neurons, record.skipped) == (24, whole.neurons, {})
    assert list(record) == list(whole)
    for name, layer in whole.items():
        for side in ("input", "output_grad"):
            a, b = getattr(record[name], side), getattr(layer, side)
            assert float((a.eigenvalues - b.eigenvalues).abs().max()) <= 1e-10 * b.lambda_max
            assert a.rows == b.rows
        assert record[name].weight == pytest.approx(layer.weight, rel=1e-10)
        assert record[name].weight_grad == pytest.approx(in_turn[name].weight_grad, rel=1e-10)
        assert (record[name].samples, record[name].positions) == (layer.samples, layer.positions)


def test_what_no_process_sees_whole_is_skipped(kit, pair):
    """The rest is counted once, though each process computes it on all samples; or on its own ones."""
    (whole, _), split = expected(kit, "tensor_parallel", 2), pair["tensor_parallel"]
    assert list(split) == ["4"]
    assert (split.samples, split["4"].samples, split["4"].input.rows) == (24, 24, 24)
    for quantity in ("weight_grad", "weight"):
        assert getattr(split["4"], quantity) == pytest.approx(getattr(whole["4"], quantity), rel=1e-10)
    assert split["4"].output_grad.lambda_max == pytest.approx(whole["4"].output_grad.lambda_max, rel=1e-10)
    parts = pair["tensor_parallel_own_samples"]
    assert (list(parts), parts.samples, parts["3"].input.rows) == (["1", "3"], 24, 24)
    assert parts["3"].input.lambda_max == pytest.approx(whole["3"].input.lambda_max, rel=1e-10)
    assert set(split.skipped) == {"1", "2", "3"}
    assert "split over processes in the forward pass (tensor parallelism)" in split.skipped["1"]
    assert split.neurons == {}


@pytest.mark.parametrize("kind", ABSENT)
def test_a_process_without_a_batch_adds_nothing(kit, pair, kind):
    from tests.probe import processes

    model, (x, y) = processes.network(kind), kit.images(24)
    with Probe(model) as probe:
        F.cross_entropy(model(x[:10]), y[:10]).backward()
        probe.step()
    alone = pair[kind]
    assert list(alone) == list(probe.latest)
    assert (alone.samples, alone.neurons) == (10, probe.latest.neurons)
    for name, layer in probe.latest.items():
        assert alone[name].output_grad.lambda_max == pytest.approx(layer.output_grad.lambda_max, rel=1e-10)
        assert (alone[name].weight_grad or 0.0) == pytest.approx(layer.weight_grad or 0.0, rel=1e-10)
        assert (alone[name].weight, alone[name].weight_frobenius) == (layer.weight, layer.weight_frobenius)


def test_sharded_weights_in_bf16_are_measured_as_the_forward_pass_sees_them(kit, pair):
    whole, _ = expected(kit, "fully_shard", 2)
    coarse = pair["fully_shard_bf16"]
    assert coarse.dtype == "bfloat16"
    for name, layer in whole.items():
        for quantity in ("weight", "weight_grad"):
            assert getattr(coarse[name], quantity) == pytest.approx(getattr(layer, quantity), rel=0.05)
        assert coarse[name].input.lambda_max == pytest.approx(layer.input.lambda_max, rel=0.05)
        assert coarse[name].output_grad.lambda_max == pytest.approx(layer.output_grad.lambda_max, rel=0.05)


def test_fewer_rows_than_coordinates_are_gathered_and_their_large_moment_is_not_formed(process_group):
    model = nn.Linear(7, 3)
    capture = capture_of(model, {"": model})
    rows = torch.randn((1, 1, 7, 4), generator=torch.Generator().manual_seed(0))
    capture.sums[""] = LayerSums(samples=4)
    capture.sums[""].input.add(rows, "auto")
    capture.sums[""].output_grad.add(rows[:, :, :3], "auto")
    sum_over_ranks(capture, model)
    merged = capture.sums[""]
    assert merged.input.total is None, "4 rows of 7 coordinates"
    assert merged.output_grad.total is not None, "4 rows of 3"
    expected = rows[0, 0].double().T @ rows[0, 0].double() / 4
    assert torch.allclose(merged.input.decomposable()[0], expected)


def test_layers_that_processes_call_at_other_widths_are_skipped(process_group, monkeypatch):
    """Their sums have no common shape, and who added them up would wait for the others."""
    model = nn.Linear(7, 3)
    capture = capture_of(model, {"": model})
    capture.sums[""] = LayerSums(samples=9)
    for moment, width in ((capture.sums[""].input, 7), (capture.sums[""].output_grad, 3)):
        moment.add(torch.ones((1, 1, width, 9)), "auto")
    gathered = distributed._gathered

    def two(mine, device):
        if mine is None:  # the layer of the first NaN
            return [None, None]
        (layers, *seen), *_ = gathered(mine, device)
        other = {**layers[""], "input": {**layers[""]["input"], "shape": (1, 5, 5)}}
        return [(layers, *seen), ({"": other}, *seen)]

    monkeypatch.setattr(distributed, "_gathered", two)
    sum_over_ranks(capture, model)
    _, skipped, _ = finish(capture, {}, {})
    assert skipped == {"": "called at several widths, whose rows cannot be added up"}


def test_layers_that_another_process_does_not_have_are_skipped(process_group, monkeypatch):
    """As the stages of a pipeline: what a layer is cannot be told where it is not."""
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 2))
    capture = capture_of(model, dict(model.named_children()))
    for name in ("0", "1"):
        capture.sums[name] = LayerSums(samples=9)
        for moment, width in ((capture.sums[name].input, 7), (capture.sums[name].output_grad, 3)):
            moment.add(torch.ones((1, 1, width, 9)), "auto")
    gathered = distributed._gathered

    def two(mine, device):
        found = gathered(mine, device)
        if not isinstance(mine, tuple):  # the layer of the first NaN
            return found * 2
        (layers, units, dtypes, had, *rest), *_ = found
        others = {"0": layers["0"], "2": layers["1"]}
        return [(layers, units, dtypes, had, *rest), (others, units, dtypes, {"0", "2"}, *rest)]

    monkeypatch.setattr(distributed, "_gathered", two)
    sum_over_ranks(capture, model)
    layers, skipped, _ = finish(capture, {}, {})
    assert list(layers) == ["0"]
    assert set(skipped) == {"1", "2"}
    assert "the models of some processes have no such layer" in skipped["1"]


def test_a_process_without_a_batch_knows_the_precision_of_the_others():
    """A small sum of float32 gradients is zero there, too; of float64 ones it would be a number."""
    model, generator = nn.Linear(7, 6), torch.Generator().manual_seed(0)
    capture = capture_of(model, {"": model})
    g = torch.randn((64, 6), generator=generator)
    g += 1e-4 - g.mean(1, keepdim=True)
    capture.sums[""] = LayerSums(samples=64)
    capture.sums[""].input.add(torch.randn((1, 1, 7, 64), generator=generator), "auto")
    capture.sums[""].output_grad.add(g.T[None, None], "auto")
    layers, _, _ = finish(capture, {}, {})
    assert not capture.dtypes
    assert layers[""].output_grad.null_reason == "1: rows sum to 0 (softmax, LayerNorm)"


def test_unequal_numbers_of_steps_are_refused(process_group):
    """In DDP's join() a process that is done waits in other calls than a Probe's sums: all hung, or were aborted."""
    x, ddp = torch.randn(4, 7), nn.parallel.DistributedDataParallel(nn.Linear(7, 3))
    with pytest.raises(ValueError, match=r"join\(\) .* as many steps in each process"), Probe(ddp), ddp.join():
        ddp(x)
    with ddp.join():
        ddp(x).sum().backward()


def test_under_nccl_the_models_own_device_is_taken(process_group, monkeypatch):
    """The current one is the machine's first in every process that has not set it (no GPU is here to run it on)."""
    entered = []

    @contextmanager
    def current(device):
        entered.append(device)
        yield

    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", current)
    third, cpu = torch.device("cuda", 2), torch.device("cpu")
    model = nn.Linear(2, 2)
    for devices, expected in (([cpu, third], third), ([cpu], torch.device("cuda", 0))):  # offloaded between the steps
        monkeypatch.setattr(model, "parameters", lambda devices=devices: [SimpleNamespace(device=d) for d in devices])
        assert distributed._device(model) == expected
    assert distributed._gathered("mine", third) == ["mine"]
    assert entered == [third]
