"""One training in many processes, as torchrun starts them: who this one is, and how they agree.

Each process takes its part of every global batch. Its loss is weighted so that the average that
DistributedDataParallel takes is the mean over the global batch; the sums that metrics are made of are added
up. Every decision is taken by all processes at the same step; the first one alone touches the run directory.
"""

import atexit
import contextlib
import inspect
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from condzoo.training.meeting import agents_store, fresh_part
from condzoo.training.precision import resolve_device
from condzoo.training.signals import Stopped

T = TypeVar("T")
FORESEEN = (ValueError, TypeError, OSError)  # what the command line says in one line
STARTED_BY_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECONDS_TO_BE_ENDED = 30.0  # from the first error on; processes may differ so much in how long they import


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` processes of a training, counted from 0."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes the run directory."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; stays on the device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        value = torch.tensor(number, device=meeting_place())
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def gather(self, mine: T) -> list[T]:
        """What each process has, in their order."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def first_does(self, action: Callable[[], T]) -> T:
        """What the first process gets from an action, in every process; where it fails, all fail alike."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [_outcome(action) if self.first else None]
        dist.broadcast_object_list(outcome, src=0)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def all_do(self, action: Callable[[], T]) -> T:
        """What this process gets from an action; where it fails in one process, all fail with that error."""
        if self.world == 1:
            return action()
        value, error = _outcome(action)
        for other in self.gather(error):
            if other is not None:
                raise other
        return value


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or a launcher that sets what it sets, started this process."""
    return dist.is_available() and all(name in os.environ for name in STARTED_BY_LAUNCHER)


def among_others() -> bool:
    """Whether `join` makes this process one of several: torchrun started it, or the caller has set up a group."""
    return launched() or (dist.is_available() and dist.is_initialized())


def join(device: str | torch.device | None) -> tuple[Ranks, torch.device]:
    """This process's place among those that train with it, or alone; and the device it trains on.

    The group is joined once in a process and left when it ends. One that the caller has set up is used.

    Raises:
        ValueError: no such device here, one GPU for several processes, or more processes than GPUs.
    """
    if not among_others():
        return ALONE, resolve_device(device)
    own = _own_device(device)
    if not dist.is_initialized():
        # Tensors of a CPU go by gloo even where those of GPUs go by NCCL: agreeing on a number stops no GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", **_meeting())
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size()), own


def _meeting() -> dict[str, Any]:
    """Under torchrun, arguments for torch's group: where processes of an earlier start left nothing."""
    store = agents_store()
    if store is None:
        return {}
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return {"store": fresh_part(store, rank, processes), "rank": rank, "world_size": processes}


def meeting_place() -> torch.device:
    """Where a tensor must be for the processes to exchange it: a group of the caller's may have NCCL alone."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def in_step(error: BaseException) -> bool:
    """Whether all processes of a run have come to this error, and none waits for another."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return not several or getattr(error, "shared", False)


def writes() -> bool:
    """Whether this process may write what all have: the first one, or one alone."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def wrap(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The network whose backward pass averages gradients over the processes.

    Buffers are not sent around: BatchNorm's running statistics are those of the first process, which
    `share_buffers` gives to all where they are used.
    """
    if ranks.world == 1:
        return model
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # torch < 2.14
    chosen: dict[str, Any] = {"device_ids": [device] if device.type == "cuda" else None, buffers: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **chosen)


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's buffers."""
    if ranks.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def synchronize_norms(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The network with BatchNorms that use the statistics of the global batch (`sync_bn`).

    Raises:
        ValueError: several processes on CPUs, where torch has none.
    """
    if ranks.world == 1:
        return model
    if device.type != "cuda":
        raise ValueError(
            "sync_bn: SyncBatchNorm runs on GPUs only, and these processes are on CPUs; "
            "leave sync_bn out (each process then uses the statistics of its own images)"
        )
    return convert_sync_batchnorm(model)


def said_elsewhere(error: BaseException) -> bool:
    """Whether another process says this error: the first one, where all have come to it.

    Before they have met the first on this machine most likely comes to it, too, and speaks at once. As a process
    leaves torchrun ends those that are left, so the others wait for that, and speak only if it does not come. An error
    that the first cannot come to says so (`own`): one process too many for the GPUs. Of a signal, which torchrun gives
    to all of them and then waits until they have ended, the first speaks.
    """
    if os.environ.get("RANK", "0") == "0":
        return False
    if dist.is_available() and dist.is_initialized():
        return getattr(error, "shared", False)
    if os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, Stopped):
        return True
    if os.environ.get("LOCAL_RANK", "0") != "0" and not getattr(error, "own", False):
        time.sleep(SECONDS_TO_BE_ENDED)
    return False


def leave_together(error: BaseException | None = None) -> None:
    """Wait for the others, where all have come to this error, or without one to the end of the same work.

    torchrun ends those that are left as soon as one leaves with an exit code, while the first may still write.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and (error is None or in_step(error)):
        with contextlib.suppress(RuntimeError):  # one of them is gone
            Ranks(dist.get_rank(), dist.get_world_size()).largest(0)


def _own_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; of a machine's GPUs the one with this process's number there."""
    here = torch.cuda.device_count()
    if str(device) == "cuda" and here and _local_rank() < here:
        torch.cuda.set_device(_local_rank())  # trying it out takes memory of the current GPU, in all the first one's
    resolved = resolve_device(device)
    if resolved.type != "cuda":
        return resolved
    if resolved.index is not None:
        raise ValueError(f"device: each process takes a GPU of its own, got {resolved}; use --device cuda")
    local = _local_rank()
    if local >= here:
        alone = "; where each process is shown one of its own, set LOCAL_RANK=0" if here == 1 else ""
        error = ValueError(
            f"device: process {local} of this machine has no GPU, it sees {here}; "
            f"use --nproc-per-node {here}, or --device cpu{alone}"
        )
        error.own = local == here  # type: ignore[attr-defined]
        raise error
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _local_rank() -> int:
    """This process's number on its machine, as its launcher says; else of the GPU that who started it has set."""
    said = os.environ.get("LOCAL_RANK")
    return torch.cuda.current_device() if said is None else int(said)


def _outcome(action: Callable[[], T]) -> tuple[Any, BaseException | None]:
    try:
        return action(), None
    except FORESEEN as error:
        error.shared = True  # type: ignore[union-attr]
        return None, _sendable(error)


def _sendable(error: Exception) -> Exception:
    """The error, or its text where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = ValueError(str(error))
        error.shared = True  # type: ignore[attr-defined]
    return error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
