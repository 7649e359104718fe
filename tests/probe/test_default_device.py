"""Under another default device, as a notebook sets it: "meta" has no numbers, so that what lands there is an error."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import condzoo
from condzoo.probe import Conditioning, Probe, curvature, curvature_blocks, measure, read_records, top_curvature


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


class Tied(nn.Module):
    """Its weight is used twice, and so its curvature has no factors."""

    def __init__(self):
        super().__init__()
        self.own, self.head = nn.Linear(5, 5, device="cpu"), nn.Linear(5, 3, device="cpu")

    def forward(self, x):
        return self.head(self.own(self.own(x).tanh()))


def batch(width=5, samples=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((samples, width), generator=generator, device="cpu")
    return x, torch.arange(samples, device="cpu") % 3


def mlp(width=5, hidden=6):
    layers = [nn.Linear(width, hidden), nn.Threshold(0.1, 0.0), nn.BatchNorm1d(hidden), nn.Linear(hidden, 3)]
    return nn.Sequential(*layers).to_empty(device="cpu").apply(start)


def start(module):
    if isinstance(module, nn.BatchNorm1d):
        module.reset_parameters()
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.1, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(module.bias)


LOSSES = {None: None, "nll": nn.NLLLoss(), "mse": nn.MSELoss(), "bce": nn.BCEWithLogitsLoss()}


@pytest.mark.parametrize("labels", ["data", "model", "sample"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_labels_of_every_distribution(elsewhere, labels, loss):
    x, y = batch()
    targets = y if loss in (None, "nll") else F.one_hot(y, 3).float()
    assert list(measure(mlp(), (x, targets), labels=labels, loss=LOSSES[loss])) == ["0", "3"]


def test_random_signs_over_large_batches(elsewhere):
    assert measure(mlp(), batch(samples=200), labels="model").random_signs


def test_lambda_max_alone_and_large_weights(elsewhere):
    x, y = batch(300, samples=320)
    assert list(measure(mlp(300), (x, y), kappa=False)) == ["0", "3"]
    x, y = batch(1025, samples=3)
    assert measure(mlp(1025, hidden=1025), (x, y), layers=["0"])["0"].weight > 0


def test_a_training_step_its_records_and_their_pictures(elsewhere, tmp_path):
    model, (x, y) = mlp(), batch()
    with Probe(model, out=tmp_path) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    probe.latest.to_json(tmp_path / "c.json")
    for read in (Conditioning.from_json(tmp_path / "c.json"), *read_records(tmp_path)):
        assert read["0"].input.eigenvalues.device.type == "cpu"
        assert read["0"].input.lambda_max == probe.latest["0"].input.lambda_max
        read.plot(tmp_path / "c.png")


def test_numbers_of_the_callers(elsewhere):
    assert condzoo.condition_number([4.0, 2.0]) == 2.0
    assert condzoo.spectrum(np.diag([4.0, 2.0])).lambda_max == 4.0


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
def test_exact_curvature(elsewhere, matrix):
    model, (x, y) = Tied().apply(start), batch()
    whole = curvature(model, x, y, matrix)
    assert curvature_blocks(model, x, y, matrix)[None].lambda_max == pytest.approx(whole.lambda_max, rel=1e-9)
    assert float(top_curvature(model, x, y, matrix).values[0]) == pytest.approx(whole.lambda_max, rel=1e-4)
