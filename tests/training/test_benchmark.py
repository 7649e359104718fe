"""The benchmark of training puts functions of its own in the place of the loop's, by name."""

import importlib.util
from pathlib import Path

import torch

from condzoo.data import ImageData
from condzoo.data.memory import LabelledImages
from tests.forked import LIMIT, forked, forks

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train.py"


@forks
def test_the_overhead_of_the_loop_is_a_share_of_a_short_epoch() -> None:
    """In a process of its own, since what the benchmark replaces stays so."""
    spec = importlib.util.spec_from_file_location("benchmark_of_training", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    images = torch.zeros((2 * benchmark.BATCH, 3, 32, 32), dtype=torch.uint8)
    both = LabelledImages(images, torch.arange(len(images)) % 10)
    data = ImageData("cifar10", 10, both, both, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))

    def measure() -> None:
        torch.set_num_threads(1)
        assert 0 < benchmark.overhead(data, 2) < 1

    with forked(measure) as process:
        process.join(LIMIT)
    assert process.exitcode == 0
