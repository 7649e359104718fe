"""Eigenvalues of matrices of several sizes, a thread each, against numpy's one after the other."""

import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

from condzoo.probe import spectrum
from condzoo.probe.eigenvalues import SMALL, WORTH_A_THREAD, eigvalsh, symmetric_eigenvalues
from condzoo.probe.finishing import COPIED, spectra_of
from condzoo.probe.kronecker_quality import _spectrum
from condzoo.probe.moments import RunningMoment
from condzoo.probe.weights import norms_of
from tests.probe.on_gpus import OnGPU

SHAPES = {
    "small ones": [(3, 5, 5), (1, 40, 40)],
    "one large": [(1, 150, 150), (2, 7, 7)],
    "several sizes": [(2, 130, 130), (4, 9, 9), (3, 200, 200), (1, WORTH_A_THREAD, WORTH_A_THREAD)],
    "none": [],
}


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SHAPES)
def test_they_are_those_of_each_matrix_in_order(name, threads):
    torch.manual_seed(0)
    roots = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES[name]]
    batches = [root @ root.mT for root in roots]
    found = symmetric_eigenvalues(batches)
    assert len(found) == len(batches)
    for values, batch in zip(found, batches, strict=True):
        np.testing.assert_allclose(values, np.linalg.eigvalsh(batch.numpy()), rtol=1e-10, atol=1e-10)


def test_the_number_of_threads_is_as_before_here_and_in_threads_that_start_later(threads):
    symmetric_eigenvalues([torch.eye(200, dtype=torch.float64).expand(3, -1, -1)])
    later = []
    other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), later) == (threads, [threads])


def test_an_error_in_a_thread_is_raised_and_the_number_of_threads_restored(threads):
    with pytest.raises(RuntimeError, match="must be batches of square matrices"):
        symmetric_eigenvalues([torch.ones(2, 150, 200, dtype=torch.float64)] * 2)
    assert torch.get_num_threads() == threads


def test_a_matrix_of_side_one_is_its_own_eigenvalue_to_the_last_bit(monkeypatch):
    """A depthwise convolution has one a channel, which a GPU's solver takes one after the other."""
    numbers = torch.tensor([3.7, 0.0, -0.0, -2.5e-300, math.inf, math.nan], dtype=torch.float64).view(2, 3, 1, 1)
    expected = torch.linalg.eigvalsh(numbers)
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    for found in (eigvalsh(numbers), symmetric_eigenvalues([numbers.flatten(0, 1)])[0].view(2, 3, 1)):
        assert torch.equal(found.view(torch.int64), expected.view(torch.int64))
    x, layer = torch.randn(9, 6, 4, generator=torch.Generator().manual_seed(0)), nn.Conv1d(6, 6, 1, groups=6)
    moment = RunningMoment()
    moment.add(x[:, :, None], "auto")
    assert spectra_of([moment, moment])[0].dim == 6
    assert norms_of({"": layer}, {"": layer.weight})[""].sigma_max == float(layer.weight.detach().abs().max())


def moments(kind):
    """An input's and an output gradient's: sums, or the rows themselves where they are few."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for groups in (1, 3):
        moment = RunningMoment()
        rows = torch.randn((60 if kind == "sums" else 4, groups, 20, 1), generator=generator)
        rows[:, :, 3] = 0.0
        moment.add(rows, "fast")
        found.append(moment)
    return found


@pytest.mark.parametrize("kappa", [True, False])
@pytest.mark.parametrize("kind", ["sums", "rows"])
def test_small_moments_of_a_gpu_are_read_and_decomposed_on_the_cpu(kind, kappa):
    expected, there = spectra_of(moments(kind), kappa=kappa), moments(kind)
    for moment in there:
        moment.total = None if moment.total is None else OnGPU(moment.total)
        moment.pending = [OnGPU(part) for part in moment.pending]
    before = [(moment.total, moment.pending) for moment in there]
    for a, b in zip(spectra_of(there, kappa=kappa), expected, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        assert (a.noise_floor, a.nulls, a.rank) == (b.noise_floor, b.nulls, b.rank)
    assert all(m.total is a and m.pending is b for m, (a, b) in zip(there, before, strict=True))


@pytest.mark.parametrize("shape", [(SMALL + 1, SMALL + 1), (COPIED // 4 + 1, 4)])
def test_large_moments_stay_on_a_gpu(shape):
    moment = RunningMoment(pending=[OnGPU(torch.zeros((1, *shape), dtype=torch.float64))], rows=shape[1])
    with pytest.raises(AssertionError, match="on a GPU"):
        spectra_of([moment, moment])


def test_small_matrices_of_a_gpu_are_decomposed_on_the_cpu():
    torch.manual_seed(0)
    layers = {"a": nn.Linear(9, 5), "b": nn.Conv2d(6, 6, 3, groups=6)}
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    weights["a"][0, 0] = math.nan
    assert norms_of(layers, {name: OnGPU(weight) for name, weight in weights.items()}) == norms_of(layers, weights)
    root = torch.randn(7, 7, dtype=torch.float64)
    moment = root @ root.T
    assert torch.equal(eigvalsh(OnGPU(moment)), torch.linalg.eigvalsh(moment))
    assert torch.equal(symmetric_eigenvalues([OnGPU(moment[None])])[0][0], torch.linalg.eigvalsh(moment))
    assert torch.equal(_spectrum(OnGPU(moment[None]), 9).eigenvalues, _spectrum(moment[None], 9).eigenvalues)


def test_a_moment_on_apples_gpu_has_a_spectrum():
    """MPS has no float64."""
    moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert torch.equal(spectrum(OnGPU(moment, "mps")).eigenvalues, spectrum(moment).eigenvalues)
