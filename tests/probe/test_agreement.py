"""Processes of which one saw something else: every one's record is that of all, as one process would have it."""

import os
from contextlib import ExitStack
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Conditioning, Probe
from tests.forked import forked

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="forks"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """For the processes, which are forked from this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_two_processes(measured, folder):
    """The record of each of two processes, which measure their own parts."""

    def run(rank):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        measured(rank).to_json(folder / f"rank{rank}.json")
        dist.barrier()

    with ExitStack() as stack:
        processes = [stack.enter_context(forked(partial(run, rank))) for rank in range(2)]
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = ((folder / f"rank{rank}.json").read_text() for rank in range(2))
    assert first == second
    return Conditioning.from_json(folder / "rank0.json")


class Checkpointed(nn.Module):
    """Its middle layer runs again in the backward pass, in a checkpoint; `sparse`: it reads a sparse tensor."""

    sparse = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, x):
        h = self.a(x).tanh()
        h = self.b(h.to_sparse()) if self.sparse else checkpoint(self.b, h, use_reentrant=True)
        return self.c(h.tanh())


def test_what_one_process_cannot_see_of_a_layer_is_skipped_in_all(tmp_path):
    """In the second process, in the second of two passes that wait for their backward passes, it is sparse."""
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)).double()
    y = torch.arange(24) % 4
    parts = [slice(0, 6), slice(6, 12)], [slice(12, 14), slice(14, 24)]

    def measured(rank):
        net = Checkpointed()
        with Probe(net, loss_scale=0.5) as probe:
            losses = [F.cross_entropy(net(x[parts[rank][0]]), y[parts[rank][0]]) / 2]
            net.sparse = rank == 1
            losses.append(F.cross_entropy(net(x[parts[rank][1]]), y[parts[rank][1]]) / 2)
            for loss in losses:
                loss.backward()
            probe.step()
        return probe.latest

    record = in_two_processes(measured, tmp_path)
    assert list(record) == ["a", "c"]
    assert record.skipped["b"] == "a Linear whose input is a sparse_coo tensor: its rows are not seen"
    assert record["c"].output_grad.rows == record.samples == 24


@pytest.mark.parametrize(("layer", "width"), [("2", 6), ("2", 70_000), ("4", 3)])
def test_the_first_layer_with_inf_is_named_whichever_process_had_it(layer, width, tmp_path):
    """An output of 4 * 70,000 numbers is looked at only once a gradient shows that there is some."""
    torch.manual_seed(0)
    widths = {"2": width}.get(layer, 6)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, widths), nn.ReLU(), nn.Linear(widths, 3))
    with torch.no_grad():
        net.get_submodule(layer).weight *= 1e38
    x, y = torch.zeros(8, 4), torch.arange(8) % 3
    x[4:] = 1000 * torch.randn(4, 4)

    def measured(part):
        net.zero_grad()
        with Probe(net) as probe:
            F.cross_entropy(net(x[part]), y[part]).backward()
            probe.step()
        return probe.latest

    alone = measured(slice(0, 8)).first_nonfinite
    assert alone["forward"] == layer
    found = in_two_processes(lambda rank: measured(slice(4 * rank, 4 * rank + 4)), tmp_path)
    assert found.first_nonfinite == alone


def test_batches_are_those_of_the_process_with_most_and_precisions_are_those_of_all(tmp_path):
    """The first process has none, the second two."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(12, 4)

    def measured(rank):
        with Probe(net, loss_scale=0.5, weights=False) as probe:
            for part in (slice(0, 5), slice(5, 12)) if rank else ():
                (F.cross_entropy(net(x[part]), torch.arange(12)[part] % 3) / 2).backward()
            probe.step()
        return probe.latest

    record = in_two_processes(measured, tmp_path)
    assert (record.batches, record.samples, record.dtype) == (2, 12, "float32")
