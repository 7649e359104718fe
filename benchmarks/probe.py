"""What the probe costs, as ratios within one run, and what its numbers are worth.

    python benchmarks/probe.py cost [--batch 128] [--pairs 7] [--threads 2] [--conv channels] [--precision auto ...]
    python benchmarks/probe.py kappa
    python benchmarks/probe.py exact [--samples 1024]
    python benchmarks/probe.py memory [--network resnet50 cifar_resnet1202] [--batch 2]

`cost`: ResNet-20 on CIFAR-sized images, float32, every convolution and linear layer, both moments, full
spectra: a probed training step over the plain step just before it, median of pairs, with the range; and the
peak resident memory over that of plain steps. `kappa`: layers of known condition number, the value reported.
`exact`: curvature of the 8-layer MLP of arXiv:2002.10801, Fig. I, in seconds. `memory`: every layer of a large
network on one batch, in a process of its own: seconds and peak resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condzoo
from condzoo.probe import Probe, curvature, measure, top_curvature


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "kappa", "exact", "memory"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--conv", default="channels", choices=["channels", "patches"])
    parser.add_argument("--precision", nargs="+", default=["auto", "fast", "float64"])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--network", nargs="+", default=["resnet50", "cifar_resnet1202"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    if options.what == "cost":
        cost(options.batch, options.pairs, options.conv, options.precision)
    elif options.what == "kappa":
        known_kappa()
    elif options.what == "exact":
        exact(options.samples)
    else:
        memory(options.network, options.batch, options.conv)


def cost(batch: int, pairs: int, conv: str, precisions: list[str]) -> None:
    """Ratios of probed over plain training steps."""
    model = condzoo.create_model("cifar_resnet20")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def step(probe: Probe | None = None) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if probe is not None:
            probe.step()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    plain_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"ResNet-20, batch {batch}, conv={conv}; a channels moment is 9 times smaller a side than K-FAC's patches")
    for precision in precisions:
        ratios, plain = [], []
        for pair in range(pairs + 1):
            plain.append(step())
            with Probe(model, every=1, conv=conv, precision=precision) as probe:
                ratios.append(step(probe) / plain[-1])
            if pair == 0:  # the first builds what later ones reuse
                ratios.clear()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / plain_memory
        print(
            f"{precision:8} {statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f}, n={pairs}), "
            f"plain step {1000 * statistics.median(plain):.0f} ms, peak memory {memory:.2f}x"
        )


def known_kappa() -> None:
    """A table of reported over true condition number, 2,048 rows of 64 coordinates."""
    cases = [(d, p) for d in (torch.float64, torch.float32, torch.bfloat16) for p in ("auto", "fast")]
    print(f"{'true kappa':>10} " + " ".join(f"{str(d)[6:] + ' ' + p:>14}" for d, p in cases))
    for exponent in range(1, 13):
        cells = []
        for dtype, precision in cases:
            model = nn.Linear(64, 3).to(dtype)
            batch = rows_of_kappa(10.0**exponent).to(dtype), torch.zeros(2048, dtype=torch.long)
            found = measure(model, batch, precision=precision)[""].input
            known = found.status() == "ok"
            cells.append(f"{found.condition_number():.3e}" if known else f"> {found.at_least():.0e}")
        print(f"{10.0**exponent:>10.0e} " + " ".join(f"{cell:>14}" for cell in cells))


def rows_of_kappa(kappa: float, dim: int = 64, rows: int = 2048) -> Tensor:
    """[rows, dim] with eigenvalues of the second moment even in the logarithm from 1 to 1 / kappa."""
    left = torch.linalg.qr(torch.randn(rows, dim, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(kappa), dim, dtype=torch.float64)
    return (left * (values * rows).sqrt()) @ right.T


def exact(samples: int) -> None:
    """Seconds for the full spectra of M and F, and for the largest eigenvalues alone."""
    model = condzoo.create_model("mlp8x24", num_classes=10)
    x = torch.randn(samples, *condzoo.model_info("mlp8x24").input_size)
    y = torch.randint(10, (samples,))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"8x24 MLP, {parameters} parameters, {samples} samples, float64")
    for matrix in ("grad_moment", "fisher"):
        start = time.perf_counter()
        found = curvature(model, x, y, matrix)
        full = time.perf_counter() - start
        top = top_curvature(model, x, y, matrix)
        alone = time.perf_counter() - start - full
        agreement = abs(float(top.values[0]) / found.lambda_max - 1)
        print(f"{matrix:12} full spectrum {full:.2f} s; lambda_max alone {alone:.2f} s, equal to {agreement:.0e}")


def memory(networks: list[str], batch: int, conv: str) -> None:
    """Each network with full spectra and with lambda_max alone, in a child process each."""
    for name, kappa in itertools.product(networks, (True, False)):
        child = multiprocessing.get_context("spawn").Process(target=probe_once, args=(name, batch, conv, kappa))
        child.start()
        child.join()
        if child.exitcode:
            print(f"{name}: the process ended with {child.exitcode}")


def probe_once(name: str, batch: int, conv: str, kappa: bool) -> None:
    """Measure one network in train mode and print what it took."""
    torch.manual_seed(0)
    model, size = condzoo.create_model(name), condzoo.model_info(name).input_size
    x, y = torch.randn(batch, *size), torch.randint(10, (batch,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = measure(model, (x, y), conv=conv, kappa=kappa)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{name} {'x'.join(map(str, size))}, batch {batch}, conv={conv}, kappa={kappa}: {len(found)} layers, "
        f"{seconds:.1f} s, peak memory {peak / 2**20:.2f} GiB ({before / 2**20:.2f} before)",
        flush=True,
    )


if __name__ == "__main__":
    main()
