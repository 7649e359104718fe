"""What a CPU is taken to be capable of, from what the system says of it."""

from pathlib import Path

import pytest
import torch

from condzoo.training import accelerators
from condzoo.training.accelerators import accelerator, clock

CORES = "cpu MHz\t\t: 800.021\ncache size\t: 1 MB\ncpu MHz\t\t: 3100.500\n"


@pytest.fixture
def frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder of frequencies, empty; and of two cores the first is idle."""
    (tmp_path / "cpuinfo").write_text(CORES)
    monkeypatch.setattr(accelerators, "CPU_FREQUENCIES", tmp_path)
    monkeypatch.setattr(accelerators, "CPU_INFO", tmp_path / "cpuinfo")
    return tmp_path


def test_the_clock_is_not_that_of_an_idle_core(frequencies: Path) -> None:
    assert clock() == 3100.5e6
    (frequencies / "cpuinfo_max_freq").write_text("4900000\n")
    assert clock() == 4.9e9
    (frequencies / "base_frequency").write_text("2100000\n")
    assert clock() == 2.1e9


@pytest.mark.parametrize("told", ["", "cpu MHz\t\t: 0.000\n", "BogoMIPS\t: 50.00\n", None])
def test_a_clock_of_which_nothing_is_said_is_that_of_a_usual_core(frequencies: Path, told: str | None) -> None:
    if told is None:
        (frequencies / "cpuinfo").unlink()
    else:
        (frequencies / "cpuinfo").write_text(told)
    assert clock() == 2.5e9


@pytest.mark.parametrize(("amx", "avx512", "factor"), [(False, False, 1), (False, True, 2), (True, True, 1)])
def test_bf16_has_twice_the_peak_where_the_cpu_multiplies_it(
    amx: bool, avx512: bool, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    cpu = accelerator("cpu", threads=2)
    assert cpu.flops16 == factor * cpu.flops
    assert cpu.bf16 == (amx or avx512)


def test_a_torch_that_does_not_say_has_no_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    cpu = accelerator("cpu", threads=1)
    assert (cpu.flops16, cpu.bf16) == (cpu.flops, False)
