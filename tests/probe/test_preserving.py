"""What a measurement leaves as it was, also in the middle of a training step."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import curvature, curvature_blocks, kronecker_report, measure, top_curvature
from condzoo.probe.preserving import outside_torch


@pytest.mark.parametrize("labels", ["data", "model"])
def test_a_measurement_between_forward_and_backward_leaves_the_step_as_it_was(kit, labels):
    x, y = kit.images()
    grads = []
    for between in (False, True):
        model = kit.build("residual")
        loss = F.cross_entropy(model(x), y)
        if between:
            measure(model, (x[:5], y[:5]), labels=labels)
            curvature(model, x[:3], y[:3], "grad_moment", block="7")
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Graph(nn.Module):
    """A convolution over a graph, which changes its adjacency in place while it trains."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(0)
        adjacency = (torch.rand(12, 12) < 0.3).float() + torch.eye(12)
        self.register_buffer("adjacency", adjacency.to_sparse(layout=layout))
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        if self.training:
            self.adjacency.mul_(0.5)
        return self.last(F.gelu(self.norm(self.adjacency @ self.first(x))))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_put_back(layout):
    model, batch = Graph(layout), (torch.randn(12, 5), torch.arange(12) % 3)
    before = {name: value.to_dense().clone() for name, value in model.state_dict().items()}
    assert list(measure(model, batch)) == ["first", "last"]
    assert all(torch.equal(value.to_dense(), before[name]) for name, value in model.state_dict().items())


class Shrinks(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("memory", torch.zeros(2))

    def forward(self, x):
        self.memory.set_(torch.ones(1).expand(2))
        return x


def test_a_buffer_that_cannot_be_put_back_keeps_no_other_from_it(kit):
    x, y = kit.images(dtype=torch.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4), Shrinks(), nn.BatchNorm1d(4))
    before = [value.clone() for name, value in model.state_dict().items() if "memory" not in name]
    with pytest.raises(RuntimeError, match="single memory location"):
        measure(model, (x, y))
    after = [value for name, value in model.state_dict().items() if "memory" not in name]
    assert all(map(torch.equal, before, after))


class Observed(nn.Module):
    """Learns the range of its outputs, as quantization-aware training does, and makes buffers as it first runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("low", torch.tensor([]))
        self.register_buffer("high", torch.tensor([7.0]))
        self.register_buffer("mask", None)

    def forward(self, x):
        h = self.layer(x)
        for buffer, value in ((self.low, h.detach().amin(0)), (self.high, h.detach().amax(0))):
            buffer.resize_(value.shape)
            buffer.copy_(value)
        if self.mask is None:
            self.mask = torch.ones(3)
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(1), persistent=False)
        return h * self.mask * self.scale


def test_buffers_that_a_pass_resizes_or_makes_are_put_back():
    model, batch = Observed(), (torch.randn(8, 5), torch.arange(8) % 3)
    measure(model, batch)
    curvature(model, *batch, "grad_moment")
    assert [*model._buffers] == ["low", "high", "mask"]
    assert model.mask is None
    assert (model.low.tolist(), model.high.tolist()) == ([], [7.0])
    assert not model._non_persistent_buffers_set


class Rotary(nn.Module):
    """Lengthens its frequencies with its input as Hugging Face's dynamic RoPE does, and keeps its outputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.ones(3))
        self.longest, self.cache, self.outputs = 4, {"kept": 1}, []

    def forward(self, h):
        if len(h) > self.longest:
            self.longest, self.grown = len(h), True
            self.register_buffer("frequencies", torch.full((3,), 2.0))
        self.cache["last"] = h
        self.outputs.append(h * self.frequencies)
        return self.outputs[-1]


def test_attributes_beside_buffers_go_back_with_them():
    model, batch = nn.Sequential(nn.Linear(5, 3), Rotary()), (torch.randn(8, 5), torch.arange(8) % 3)
    cache = model[1].cache
    measure(model, batch)
    assert (model[1].longest, hasattr(model[1], "grown")) == (4, False)
    assert model[1].cache is cache
    assert cache == {"kept": 1}
    assert model[1].frequencies.tolist() == [1, 1, 1]
    assert len(model[1].outputs) == 1, "a list is where a network collects"


class Centred(nn.Module):
    """A loss with a running centre of the targets, as DINO's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.calls = 0

    def forward(self, output, y):
        self.calls += 1
        self.centre.mul_(0.9).add_(0.1 * y.mean(0))
        return -((y - self.centre).softmax(1) * output.log_softmax(1)).sum(1).mean()

    def by_name(self, output, y):
        return self(output, y)


@pytest.mark.parametrize("given", ["module", "method", "partial", "argument"])
def test_what_a_loss_holds_is_put_back(given):
    model, loss, batch = nn.Linear(5, 3), Centred(), (torch.randn(8, 5), torch.randn(8, 3))
    centre = loss.centre
    ways = {
        "module": loss,
        "method": loss.by_name,
        "partial": partial(loss),
        "argument": partial(lambda output, y, inner: inner(output, y), inner=loss),
    }
    measure(model, [batch, batch], loss=ways[given])
    assert loss.centre is centre
    assert (centre.tolist(), loss.calls) == ([0, 0, 0], 0)


class Codes(nn.Module):
    """The codebook of a VQ-VAE, with another parameter in its place after each forward pass."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, 6))

    def forward(self, h):
        nearest = torch.cdist(h, self.codes).argmin(1)
        self.codes = nn.Parameter(0.9 * self.codes.detach() + 0.1 * h.detach()[:4])
        return h + (self.codes[nearest] - h).detach()


def test_a_parameter_that_the_forward_pass_replaces_is_put_back():
    model, batch = nn.Sequential(nn.Linear(5, 6), Codes(), nn.Linear(6, 3)), (torch.randn(8, 5), torch.arange(8) % 3)
    codes, before = model[1].codes, model[1].codes.detach().clone()
    assert list(measure(model, batch)) == ["0", "2"]
    assert model[1].codes is codes
    assert torch.equal(codes, before)


class Augmented(torch.utils.data.Dataset):
    """Transforms that draw from all three streams, as those of timm and torchvision do."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((5,), random.random() + np.random.rand()) + torch.rand(5), index % 3  # noqa: NPY002


def test_the_streams_of_python_and_numpy_start_from_the_seed_and_are_left_as_they_were():
    """Not by way of `measure`: what checks types while tests run draws from Python's stream, too."""

    def streams():
        return random.getstate(), [str(part) for part in np.random.get_state()]  # noqa: NPY002

    before, drawn = streams(), []
    for seed in (3, 3, 4, -1):
        with outside_torch(seed):
            drawn.append((random.random(), np.random.rand()))  # noqa: NPY002
    assert streams() == before
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_two_measurements_of_a_seed_see_the_same_augmentation():
    model, loader = nn.Sequential(nn.Linear(5, 3)), torch.utils.data.DataLoader(Augmented(), 4)
    first, second = (measure(model, loader, seed=3)["0"].input.eigenvalues for _ in range(2))
    assert torch.equal(first, second)


CALLS = {
    "measure": lambda model, x, y: measure(model, (x, y), certify=True)["0"].output_grad.eigenvalues,
    "curvature": lambda model, x, y: curvature(model, x, y, "hessian").eigenvalues,
    "blocks": lambda model, x, y: curvature_blocks(model, x, y, "ggn")["0"].eigenvalues,
    "top": lambda model, x, y: top_curvature(model, x, y, "grad_moment").values,
    "report": lambda model, x, y: kronecker_report(model, x, y)["0"].exact.eigenvalues,
}


@pytest.mark.parametrize("call", CALLS)
def test_one_of_several_processes_measures_alone_what_synchronizes(call, kit, process_group):
    """The others make no such pass: on GPUs SyncBatchNorm waits for them, on a CPU it is an error in any group."""
    norm = nn.BatchNorm2d(5)
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)).double()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert torch.equal(CALLS[call](model, *kit.images()), CALLS[call](plain, *kit.images()))
    with pytest.raises(ValueError, match="expected input tensor to be on"):
        model(kit.images()[0])
