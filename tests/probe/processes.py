"""Data-parallel training in several processes, forked from the tests' own."""

import contextlib
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from condzoo.probe import Probe
from tests.forked import LIMIT, forked
from tests.probe.conftest import build, images


class Attending(nn.Module):
    """Images as tokens through nn.MultiheadAttention, to all tokens or (cross) all but the first."""

    def __init__(self, cross=False):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)
        self.cross = cross

    def forward(self, x):
        h = x.flatten(2)
        keys = h[:, 1:] if self.cross else h
        return self.head(self.attention(h, keys, keys, need_weights=False)[0].mean(1))


def network(kind):
    """The model before it is distributed; test_distributed.py makes the same one."""
    torch.manual_seed(1)
    if kind.startswith("tensor_parallel"):
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 4)).double()
    if "attention" not in kind:
        return build("conv")
    return Attending(cross="cross" in kind).double()


def part(kind, rank, world):
    """Which of 24 samples a process takes."""
    if kind.startswith("absent"):
        return slice(0, 10) if (rank == 0) != ("first" in kind) else slice(0, 0)
    edges = [24 * i // world for i in range(world + 1)]
    if "uneven" in kind:
        edges = [0, *(edge + 3 for edge in edges[1:-1]), 24]
    return slice(edges[rank], edges[rank + 1])


def factor(kind, rank, world):
    """What a process multiplies its mean loss by; weighed by samples the processes' mean is that of all samples."""
    mine = part(kind, rank, world)
    return (mine.stop - mine.start) * world / 24 if kind.endswith("weighed") else 1.0


def distributed(model, kind, mesh):
    """The model as this kind of training wraps it."""
    if kind.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    if kind.startswith("fully_shard"):
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if kind.endswith("bf16") else MixedPrecisionPolicy()
        for module in model.children():
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh, mp_policy=bf16)
        return fully_shard(model, mesh=mesh, mp_policy=bf16)
    if kind.startswith("fsdp"):
        settings = {"use_orig_params": "orig_params" in kind, "device_id": torch.device("cpu")}
        name, first = next(model.named_children())
        setattr(model, name, FullyShardedDataParallel(first, **settings))
        return FullyShardedDataParallel(model, **settings)
    if kind == "tensor_parallel":
        return parallelize_module(model, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    if kind == "tensor_parallel_own_samples":
        return parallelize_module(model, mesh, {"4": ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0))})
    return model


def train(model, kind, rank, world, probe=None):
    """Two steps; the second one moves on from what the first has made."""
    x, y = images(24)
    mine = slice(None) if kind == "tensor_parallel" else part(kind, rank, world)
    x, y = x[mine], y[mine]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        halves = (slice(0, 6), slice(6, 12)) if "accumulated" in kind else (slice(None),)
        for half in halves:
            if len(x):
                (F.cross_entropy(model(x[half]), y[half]) * factor(kind, rank, world) / len(halves)).backward()
        optimizer.step()
        if probe is not None:
            probe.step()
    return [p.detach().clone() for p in model.parameters()]


def one(rank, world, out, kinds):
    torch.set_num_threads(1)
    warnings.simplefilter("default")  # of torch's wrappers
    warnings.simplefilter("error", RuntimeWarning)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world,))
    for kind in kinds:
        plain = train(distributed(network(kind), kind, mesh), kind, rank, world)
        model = distributed(network(kind), kind, mesh)
        scale = 0.5 if "accumulated" in kind else factor(kind, rank, world) or 1.0
        with Probe(model, every=2, out=f"{out}/{kind}", loss_scale=scale) as probe:
            probed = train(model, kind, rank, world, probe)
        probe.latest.to_json(f"{out}/{kind}/rank{rank}.json")
        for a, b in zip(plain, probed, strict=True):
            a, b = (t.to_local() if hasattr(t, "to_local") else t for t in (a, b))
            assert torch.equal(a, b), kind
    dist.barrier()
    dist.destroy_process_group()


def run(world, out, kinds):
    """Train every kind in so many processes."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(forked(lambda rank=rank: one(rank, world, out, kinds))) for rank in range(world)
        ]
        for process in processes:
            process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0] * world
