"""Eigenvalues of many symmetric matrices at once: one matrix a thread.

torch takes a batch one matrix after the other, each on all threads; LAPACK's reduction to tridiagonal form is
bound by memory, and a second thread gains it next to nothing. A GPU takes a batch one after the other, too, and
starts many kernels for each matrix: small ones are decomposed on the CPU (not run on a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

WORTH_A_THREAD = 128  # side from which a matrix takes longer than a thread takes to start
SMALL = 512  # side up to which a matrix of a GPU is decomposed on the CPU


def eigvalsh(matrices: Float[Tensor, "*b _ _"]) -> Float[Tensor, "*b _"]:
    """Ascending eigenvalues; those of small matrices of a GPU are on the CPU.

    A matrix of side 1, of which a depthwise convolution has one a channel, is its own eigenvalue.
    """
    matrices = near(matrices)
    return matrices[..., 0] if matrices.shape[-2:] == (1, 1) else torch.linalg.eigvalsh(matrices)


def near(matrices: Float[Tensor, "*b _ _"]) -> Float[Tensor, "*b _ _"]:
    """Matrices where they are to be decomposed: small ones on the CPU."""
    return matrices.cpu() if matrices.shape[-1] <= SMALL else matrices


def symmetric_eigenvalues(batches: Sequence[Float[Tensor, "_ _ _"]]) -> list[Float[Tensor, "_ _"]]:
    """Eigenvalues of each batch's matrices, ascending.

    Args:
        batches: [b, m, m] each, of any sides and devices.

    Returns:
        [b, m] for each batch, on its device, or on the CPU where the matrices are small.
    """
    batches = [near(batch) for batch in batches]
    spread = [i for i, batch in enumerate(batches) if batch.device.type == "cpu" and batch.shape[-1] >= WORTH_A_THREAD]
    matrices = [(i, matrix) for i in spread for matrix in batches[i]]
    workers = min(torch.get_num_threads(), len(matrices))
    if workers < 2:
        return [eigvalsh(batch) for batch in batches]
    matrices.sort(key=lambda item: -item[1].shape[0])  # so that no thread is left with a large one; stable
    found: dict[int, list[Tensor]] = {i: [] for i in spread}
    for (i, _), values in zip(matrices, _one_a_thread([matrix for _, matrix in matrices], workers), strict=True):
        found[i].append(values)
    return [torch.stack(found[i]) if i in found else eigvalsh(batch) for i, batch in enumerate(batches)]


def _one_a_thread(matrices: list[Tensor], workers: int) -> list[Tensor]:
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            return list(pool.map(torch.linalg.eigvalsh, matrices))
    finally:
        torch.set_num_threads(threads)  # a thread's own number is also that of threads that start after it
