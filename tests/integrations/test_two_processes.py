"""The callbacks under data-parallel training: two processes record what a plain loop does on the whole batch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from condzoo.probe import Probe, read_records

FIT = Path(__file__).with_name("fit.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def plain_loop(out):
    spec = importlib.util.spec_from_file_location("fit", FIT)
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    model, (x, y) = fit.network(), fit.examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=fit.RATE)
    with Probe(model, every=1, out=out) as probe:
        for _ in range(fit.STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            probe.step()
    return list(read_records(out / "conditioning.jsonl"))


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_two_processes_record_what_a_plain_loop_does(library, tmp_path):
    pytest.importorskip(library)
    ended = subprocess.run([*TORCHRUN, str(FIT), library, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    expected = plain_loop(tmp_path / "plain")
    for folder in (tmp_path, tmp_path / "undivided") if library == "transformers" else (tmp_path,):
        found = list(read_records(folder / "conditioning.jsonl"))
        assert [r.step for r in found] == [0, 1, 2]
        for one, two in zip(expected, found, strict=True):
            same(one, two)


def same(one, two):
    assert two.samples == one.samples == 16
    layers = {name.removeprefix("body."): layer for name, layer in two.items()}
    assert list(layers) == list(one)
    for name, layer in one.items():
        assert layers[name].weight_grad == pytest.approx(layer.weight_grad, rel=1e-10)
        for side in ("input", "output_grad"):
            theirs, ours = getattr(layer, side), getattr(layers[name], side)
            assert ours.lambda_max == pytest.approx(theirs.lambda_max, rel=1e-10)
            assert ours.condition_number(0.5) == pytest.approx(theirs.condition_number(0.5), rel=1e-7)
