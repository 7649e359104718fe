"""Data-parallel training over real processes: the numbers of one process with the whole batch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from condzoo.probe import Probe, read_records

WORKER = """
import sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from condzoo.probe import Probe
sys.path.insert(0, sys.argv[5])
from conftest import build, images

torch.set_num_threads(1)
rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
model = DistributedDataParallel(build("conv"))
x, y = images(24)
mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
with Probe(model, every=1, out=out) as probe:
    F.cross_entropy(model(x[mine]), y[mine]).backward()
    probe.step()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_measure_what_one_measures_on_the_whole_batch(kit, world, tmp_path, request):
    model = kit.build("conv")
    x, y = kit.images(24)
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    here = str(request.path.parent)
    command = [sys.executable, "-c", WORKER]
    runs = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store"), str(tmp_path), here])
        for rank in range(world)
    ]
    assert [run.wait(timeout=300) for run in runs] == [0] * world
    (record,) = read_records(tmp_path)
    assert len((tmp_path / "conditioning.jsonl").read_text().splitlines()) == 1
    assert (record.samples, record.neurons) == (24, probe.latest.neurons)
    assert list(record) == list(probe.latest)
    for name, layer in probe.latest.items():
        for side in ("input", "output_grad"):
            a, b = getattr(record[name], side), getattr(layer, side)
            assert float((a.eigenvalues - b.eigenvalues).abs().max()) <= 1e-10 * b.lambda_max
            assert a.rows == b.rows
        assert record[name].weight_grad == pytest.approx(layer.weight_grad, rel=1e-10)
        assert (record[name].samples, record[name].positions) == (layer.samples, layer.positions)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_runs_eagerly_in_the_steps_that_are_due(kit):
    model = kit.build("mlp", torch.float32)
    x, y = kit.images(dtype=torch.float32)
    with Probe(model, every=2) as plain:
        F.cross_entropy(model(x), y).backward()
        plain.step()
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counting)
    with Probe(compiled, every=2) as probe:
        for _ in range(2):
            F.cross_entropy(compiled(x), y).backward()
            assert bool(calls) != probe.due
            probe.step()
    assert list(probe.latest) == list(plain.latest)
    for name, layer in plain.latest.items():
        assert torch.equal(probe.latest[name].input.eigenvalues, layer.input.eigenvalues)


def test_a_grad_scaler_is_undone(kit):
    model = kit.build("conv")
    x, y = kit.images()
    with Probe(model) as plain:
        F.cross_entropy(model(x), y).backward()
        plain.step()
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    with Probe(model) as probe:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        probe.loss_scale = scaler.get_scale()
        probe.step()
    for name, layer in plain.latest.items():
        found = probe.latest[name]
        assert torch.allclose(found.output_grad.eigenvalues, layer.output_grad.eigenvalues, rtol=1e-10, atol=1e-18)
        assert found.weight_grad == pytest.approx(layer.weight_grad, rel=1e-12)
    with Probe(model, loss_scale=0.0) as probe:
        model(x).sum().backward()
        with pytest.raises(ValueError, match=r"loss_scale must be above 0, got 0"):
            probe.step()
