"""The callbacks under data-parallel training: two processes record what a plain loop does on the whole batch."""

import os

import pytest
import torch
import torch.nn.functional as F

from condzoo.probe import Probe, read_records
from tests.integrations import fit
from tests.training.rank_runs import in_processes

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="forks"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def plain_loop(out):
    model, (x, y) = fit.network(), fit.examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=fit.RATE)
    with Probe(model, every=1, out=out) as probe:
        for _ in range(fit.STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            probe.step()
    return list(read_records(out / "conditioning.jsonl"))


@pytest.mark.parametrize(("library", "module"), [("lightning", "lightning"), ("transformers", "transformers.trainer")])
def test_two_processes_record_what_a_plain_loop_does(library, module, tmp_path):
    pytest.importorskip(module)  # before the processes are forked
    assert in_processes(2, lambda rank: fit.fit(library, str(tmp_path)), tmp_path) == [["done"], ["done"]]
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
