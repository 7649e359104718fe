"""What devices are capable of on paper, for estimates of time: `condzoo train RECIPE --plan --gpu a100`."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from condzoo.training.precision import has_bf16_units

HOST_SECONDS = 2e-5  # Python, autograd and the launch: an operation of eager PyTorch takes that, whatever its size
CPU_FLOPS_A_CYCLE = {"AVX512": 64, "AVX2": 32}  # float32, two fused multiply-add units a core
CPU_BANDWIDTH = 10e9  # bytes/s a core gets of main memory
CPU_FREQUENCIES = Path("/sys/devices/system/cpu/cpu0/cpufreq")
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Accelerator:
    """Peaks of one device, from its vendor's data sheet (dense, no sparsity).

    `flops` and `flops16` are FLOP/s of float32 and of 16-bit tensor units with float32 sums, `bandwidth` bytes/s
    of its memory, `link` bytes/s to its neighbours one way, `memory` bytes. `reached` is the share of the peaks
    that estimates assume, `launch` the seconds an operation takes the host, `bf16` says whether
    `precision = "auto"` may pick it.
    """

    name: str
    flops: float
    flops16: float
    bandwidth: float
    link: float
    memory: float
    reached: float = 0.35
    reached_bandwidth: float = 0.7
    launch: float = HOST_SECONDS
    bf16: bool = True

    @property
    def kind(self) -> str:
        """As torch calls it: cpu or cuda."""
        return "cpu" if self.name.startswith("cpu") else "cuda"

    def time_of(self, flops: float, traffic: float, operations: float, sixteen_bit: bool) -> float:
        """Seconds of work on one of them: the longest of computing, moving bytes and starting operations."""
        computing = flops / (self.reached * (self.flops16 if sixteen_bit else self.flops))
        return max(computing, traffic / (self.reached_bandwidth * self.bandwidth), operations * self.launch)


def _gpu(
    name: str, flops: float, flops16: float, bandwidth: float, link: float, memory: float, bf16: bool = True
) -> Accelerator:
    """In TFLOP/s, GB/s and GB, as data sheets have it."""
    return Accelerator(name, flops * 1e12, flops16 * 1e12, bandwidth * 1e9, link * 1e9, memory * 1e9, bf16=bf16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", 8.1, 65, 320, 16, 16, bf16=False),
        _gpu("v100", 15.7, 125, 900, 150, 32, bf16=False),
        _gpu("l4", 30.3, 121, 300, 32, 24),
        _gpu("rtx3090", 35.6, 71, 936, 32, 24),
        _gpu("rtx4090", 82.6, 165, 1008, 32, 24),
        _gpu("a100", 19.5, 312, 2039, 300, 80),
        _gpu("h100", 67, 989, 3350, 450, 80),
        _gpu("h200", 67, 989, 4800, 450, 141),
    )
}


def accelerator(name: str, threads: int | None = None) -> Accelerator:
    """A GPU by its name, or this machine's "cpu".

    Args:
        name: one of `GPUS`, or "cpu".
        threads: of the CPU that work; default: torch's.

    Raises:
        ValueError: an unknown name; the closest is given.
    """
    if name == "cpu":
        return this_cpu(threads or torch.get_num_threads())
    if name not in GPUS:
        close = difflib.get_close_matches(name.lower(), [*GPUS, "cpu"], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"gpu: got {name!r}; {hint}must be one of: cpu, {', '.join(GPUS)}")
    return GPUS[name]


def this_cpu(threads: int) -> Accelerator:
    """This machine's CPU as PyTorch uses it: clock times float32 operations a cycle times threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    cycle = next((count for known, count in CPU_FLOPS_A_CYCLE.items() if capability.startswith(known)), 16)
    peak = cycle * clock() * threads
    return Accelerator(
        f"cpu, {threads} thread(s), {capability}",
        flops=peak,
        flops16=peak * bf16_factor(),
        bandwidth=CPU_BANDWIDTH * threads,
        link=1e9,
        memory=memory_bytes(),
        reached=0.7,  # docs/recipes.md has the measurement
        bf16=has_bf16_units(torch.device("cpu")),
    )


def bf16_factor() -> int:
    """How many times float32's peak bf16 has: 2 with AVX512-BF16.

    AMX has 16 on paper; ResNet-20, which waits for memory there, came to 253 GFLOP/s on two threads, about float32's.
    """
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return 1
    return 2 if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else 1


def clock() -> float:
    """Cycles/s of the CPU under load; 2.5e9 where the system does not say.

    /proc/cpuinfo has those of this moment, which on an idle machine may be a third: it comes last, by its fastest core.
    """
    for file in ("base_frequency", "cpuinfo_max_freq"):  # in kHz; virtual machines have neither
        if (path := CPU_FREQUENCIES / file).is_file():
            return float(path.read_text()) * 1e3
    found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", CPU_INFO.read_text()) if CPU_INFO.is_file() else []
    return max(map(float, found), default=0.0) * 1e6 or 2.5e9


def memory_bytes() -> float:
    """Main memory; infinite where the system does not say."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemTotal:\s*(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return float(found[1]) * 1024 if found else float("inf")
