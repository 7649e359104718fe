"""Both callbacks under their trainers' own DDP: the numbers of one process on the processes' batches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from condzoo.probe import Probe, read_records

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def in_turn(model, batches, loss_of):
    """The first step's record from one process, which takes the batches one after the other."""
    model.train()
    with Probe(model, loss_scale=1 / len(batches)) as probe:
        for batch in batches:
            probe.begin(batch)
            (loss_of(batch) / len(batches)).backward()
        probe.step()
    return probe.latest


def same(found, expected):
    assert list(found) == list(expected)
    assert (found.samples, found.skipped, found.neurons) == (expected.samples, {}, expected.neurons)
    for name in found:
        for side in ("input", "output_grad"):
            a, b = getattr(found[name], side), getattr(expected[name], side)
            assert a.rows == b.rows
            assert float((a.eigenvalues - b.eigenvalues).abs().max()) <= 1e-5 * b.lambda_max
        assert found[name].weight == pytest.approx(expected[name].weight, rel=1e-6)
        assert found[name].weight_grad == pytest.approx(expected[name].weight_grad, rel=1e-5)


def test_the_processes_of_ddp_are_measured_together(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_lightning
    import test_transformers

    script = Path(__file__).parent / "processes.py"
    run = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]

    records = read_records(tmp_path / "lightning")
    assert [record.step for record in records] == [0, 2, 4]
    module = test_lightning.Module()
    x, y = test_lightning.loader().dataset.tensors
    batches = [(x[rank:8:2], y[rank:8:2]) for rank in range(2)]  # Lightning deals the samples out in turn
    same(records[0], in_turn(module, batches, lambda batch: module.training_step(batch, 0)))

    records = read_records(tmp_path / "trainer")
    assert [record.step for record in records] == [0, 2, 4]
    model = test_transformers.Tiny()
    model.drop.p = 0.0
    batches = [torch.load(tmp_path / f"batches{rank}.pt")[0] for rank in range(2)]
    same(records[0], in_turn(model, batches, lambda batch: model(**batch)["loss"]))
