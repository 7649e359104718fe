"""What the probe costs, as ratios within one run, and what its numbers are worth.

    python benchmarks/probe.py cost [--batch 128] [--pairs 7] [--threads 2] [--conv channels] [--precision auto ...]
    python benchmarks/probe.py peers [--batch 128] [--pairs 3]
    python benchmarks/probe.py kappa
    python benchmarks/probe.py exact [--samples 1024]
    python benchmarks/probe.py memory [--network resnet50 cifar_resnet1202] [--batch 2]

`cost`: ResNet-20 on CIFAR-sized images, float32, every convolution and linear layer, both moments, full
spectra: a probed training step over the plain step just before it, median of pairs, with the range, with the
moments and spectra alone (`neurons=False, weights=False`) and with everything, in turns; what `every=100` adds to
a training loop; and the peak resident memory of everything, each in a process of its own, over that of plain
steps. Beside it the moments and spectra of a short script (`short_script`), which multiplies in float32 and checks
nothing. `peers`: K-FAC factors by curvlinops and nngeometry, where installed, beside ours on patches. `kappa`: layers
of known condition number, the value reported. `exact`: curvature of the 8-layer MLP of arXiv:2002.10801, Fig. I, in
seconds. `memory`: every layer of a large network on one batch, in a process of its own: seconds, peak resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condzoo
from condzoo.probe import Probe, curvature, measure, top_curvature
from condzoo.probe.tables import lower_bound


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "peers", "kappa", "exact", "memory", "peak"])
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
    if options.what == "peak":
        peak(options.batch, options.conv, options.precision[0])
        return
    print(f"torch {torch.__version__}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    if options.what == "cost":
        cost(options.batch, options.pairs, options.conv, options.precision)
    elif options.what == "peers":
        peers(options.batch, options.pairs)
    elif options.what == "kappa":
        known_kappa()
    elif options.what == "exact":
        exact(options.samples)
    else:
        memory(options.network, options.batch, options.conv)


class Training:
    """Steps of ResNet-20 on one random batch."""

    def __init__(self, batch: int) -> None:
        self.model = condzoo.create_model("cifar_resnet20")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.x, self.y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def step(self, after: Callable[[], object] = int) -> float:
        """Seconds of a step and of what comes after it."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        after()
        return time.perf_counter() - start

    def probed(self, conv: str, precision: str, *, everything: bool = True) -> float:
        """Seconds of a step that is measured."""
        with Probe(
            self.model, every=1, conv=conv, precision=precision, neurons=everything, weights=everything
        ) as probe:
            return self.step(probe.step)

    def pairs(self, count: int, *others: Callable[[], float]) -> tuple[list[float], list[list[float]]]:
        """Plain seconds, and by other step its ratios over the plain one just before it; one round warms up."""
        plain: list[float] = []
        ratios: list[list[float]] = [[] for _ in others]
        for _ in range(count + 1):
            for other, found in zip(others, ratios, strict=True):
                plain.append(self.step())
                found.append(other() / plain[-1])
        return plain[len(others) :], [found[1:] for found in ratios]


def cost(batch: int, pairs: int, conv: str, precisions: list[str]) -> None:
    """Ratios of probed over plain training steps, and of their peak memory."""
    waiting = seconds_between_probes(Training(batch))
    plain_memory = peak_of(batch, conv, "plain")
    print(f"ResNet-20, batch {batch}, conv={conv}; a channels moment is 9 times smaller a side than K-FAC's patches")
    for precision in precisions:
        torch.manual_seed(0)
        training = Training(batch)  # from the start: what `auto` has to do again depends on the state
        everything = partial(training.probed, conv, precision)
        short = partial(short_script, training, conv)
        plain, ratios = training.pairs(pairs, partial(everything, everything=False), everything, short)
        step, memory = statistics.median(plain), peak_of(batch, conv, precision)
        loop = (statistics.median(ratios[1]) - 1) / 100 + waiting / step
        print(
            f"{precision:8} moments and spectra {spread(ratios[0])} (a short script's {spread(ratios[2])}), "
            f"everything {spread(ratios[1])}, plain step {1000 * step:.0f} ms, every=100 slows the loop by "
            f"{100 * loop:.2f} %, peak memory {memory / plain_memory:.2f}x "
            f"({plain_memory / 1024:.0f} to {memory / 1024:.0f} MB)"
        )


def short_script(training: Training, conv: str) -> float:
    """Seconds of a step whose moments and spectra are measured in the shortest way: float32 products, float64 sums."""
    handles, moments = [], list[Tensor]()

    def gram(rows: Tensor) -> None:  # [n, d, k]
        moments.append(torch.bmm(rows, rows.mT).double().sum(0) / (rows.shape[0] * rows.shape[2]))

    def on_layer(module: nn.Module, args: tuple[Tensor], h: Tensor) -> None:
        x = args[0].detach()
        if conv == "patches" and isinstance(module, nn.Conv2d):
            gram(F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride))
        else:
            gram(x.flatten(2) if x.ndim == 4 else x.T[None])
        h.register_hook(lambda g: gram(len(g) * g.flatten(2) if g.ndim == 4 else len(g) * g.T[None]))

    def spectra() -> None:
        for side in {m.shape[0] for m in moments}:
            torch.linalg.eigvalsh(torch.stack([m for m in moments if m.shape[0] == side]))

    for module in training.model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(on_layer))
    seconds = training.step(spectra)
    for handle in handles:
        handle.remove()
    return seconds


def spread(ratios: list[float]) -> str:
    """Their median and range as text."""
    return f"{statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f}, n={len(ratios)})"


def seconds_between_probes(training: Training) -> float:
    """What `probe.step()` takes where no measurement is due."""
    with Probe(training.model, every=10**9, start_step=1) as probe:
        start = time.perf_counter()
        for _ in range(1000):
            probe.step()
        return (time.perf_counter() - start) / 1000


def peak_of(batch: int, conv: str, precision: str) -> int:
    """Peak resident memory, in kB, of a process that takes a few steps ("plain": without the probe)."""
    options = ["--batch", batch, "--threads", torch.get_num_threads(), "--conv", conv, "--precision", precision]
    command = [sys.executable, __file__, "peak", *map(str, options)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(batch: int, conv: str, precision: str) -> None:
    """Take four steps and print this process's peak resident memory in kB."""
    training = Training(batch)
    for _ in range(4):
        training.step() if precision == "plain" else training.probed(conv, precision)
    print(peak_kilobytes())


def peak_kilobytes() -> int:
    """Peak resident memory of this program alone: getrusage counts that of the process that started it, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


def peers(batch: int, pairs: int) -> None:
    """Empirical K-FAC factors of every layer, labels from the data, after a training step, over the plain step."""
    training = Training(batch)
    model = training.model
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    parameters = [p for m in layers for p in m.parameters(recurse=False)]
    print("channels: the same of positions instead of patches, a smaller definition; peers give no eigenvalues here")
    ways: dict[str, Callable[[], float]] = {
        "condzoo patches": lambda: training.probed("patches", "auto"),
        "condzoo channels": lambda: training.probed("channels", "auto"),
        "curvlinops": lambda: training.step(lambda: curvlinops_factors(model, parameters, training.x, training.y)),
        "nngeometry": lambda: training.step(lambda: nngeometry_factors(model, layers, training.x, training.y)),
    }
    for name, way in ways.items():
        try:
            _, [ratios] = training.pairs(pairs, way)
        except ModuleNotFoundError as missing:
            print(f"{name:18} not installed ({missing.name})")
            continue
        print(f"{name:18} {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}, n={pairs})")


def curvlinops_factors(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> object:
    """Its K-FAC with labels from the data, patches expanded."""
    from curvlinops import KFACLinearOperator

    loss = nn.CrossEntropyLoss()
    operator = KFACLinearOperator(
        model, loss, parameters, [(x, y)], fisher_type="empirical", kfac_approx="expand", check_deterministic=False
    )
    return operator.compute_kronecker_factors()


def nngeometry_factors(model: nn.Module, layers: list[nn.Module], x: Tensor, y: Tensor) -> object:
    """Its K-FAC with each sample's loss as the function: labels from the data."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatKFAC
    from torch.utils.data import DataLoader, TensorDataset

    collection = LayerCollection()
    for module in layers:
        collection.add_layer_from_model(model, module)

    def losses(*batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")[:, None]

    backend = TorchHooksJacobianBackend(layer_collection=collection, model=model, function=losses)
    return PMatKFAC(generator=backend, examples=DataLoader(TensorDataset(x, y), batch_size=len(x)))


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
            cells.append(f"{found.condition_number():.3e}" if known else lower_bound(found.at_least()))
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
    before = peak_kilobytes()
    start = time.perf_counter()
    found = measure(model, (x, y), conv=conv, kappa=kappa)
    seconds = time.perf_counter() - start
    peak = peak_kilobytes()
    print(
        f"{name} {'x'.join(map(str, size))}, batch {batch}, conv={conv}, kappa={kappa}: {len(found)} layers, "
        f"{seconds:.1f} s, peak memory {peak / 2**20:.2f} GiB ({before / 2**20:.2f} before)",
        flush=True,
    )


if __name__ == "__main__":
    main()
