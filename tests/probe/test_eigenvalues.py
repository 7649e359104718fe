"""Eigenvalues of matrices of several sizes, a thread each, against numpy's one after the other."""

import threading

import numpy as np
import pytest
import torch

from condzoo.probe.eigenvalues import WORTH_A_THREAD, symmetric_eigenvalues

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
