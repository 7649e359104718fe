"""Where the processes that torchrun started meet: at a place in its store that none of an earlier start has used.

torchrun's agents keep one store for all starts of their processes (torch 2.14 has no prefix for a start), in which a
process that was started again may find where those that are gone listened, and wait for half an hour.
"""

import contextlib
import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from condzoo.training.signals import Stopped, StopRequest, stop_signals

SECONDS_BETWEEN_LOOKS = 0.02  # of the first process; the others, of which there may be a thousand, look less often
PATIENCE = timedelta(minutes=30)  # as torch has it for all that processes wait for each other


def by_agents() -> bool:
    """Whether torchrun's agents started this process, and no other launcher."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def signals_noted() -> contextlib.AbstractContextManager[Any]:
    """`stop_signals` from before processes meet, where a signal then ends the waiting for those that do not come.

    Without torchrun's agents it is torch that waits, and no signal that is noted ends that.
    """
    return stop_signals(patient=True) if by_agents() else contextlib.nullcontext()


def agents_store() -> dist.Store | None:
    """The store of torchrun's agents, as a client; None where another launcher started this process."""
    if not by_agents():
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)


def fresh_part(store: dist.Store, rank: int, processes: int) -> dist.Store:
    """The part of the store for this start of all processes; every one of them calls this.

    Each says hello under a name of its own, and the first answers until all have said that they heard it: hellos of
    before are answered, too, and nobody hears.

    Raises:
        TimeoutError: a process has not come within half an hour.
        Stopped: a signal came meanwhile.
    """
    hall, place, end = dist.PrefixStore("condzoo", store), uuid.uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    with stop_signals(patient=True) as request:
        if rank:
            hall.set(f"hello of {rank}", place)
            while not hall.check([f"welcome {place}"]):
                look_again(request, end, f"the first of {processes} processes has", 5 * SECONDS_BETWEEN_LOOKS)
            place = hall.get(f"welcome {place}").decode()
            hall.set(f"{rank} in {place}", "here")
            return dist.PrefixStore(place, hall)
        missing = set(range(1, processes))
        while missing:
            for other in [other for other in missing if hall.check([f"hello of {other}"])]:
                hall.set(f"welcome {hall.get(f'hello of {other}').decode()}", place)
            missing = {other for other in missing if not hall.check([f"{other} in {place}"])}
            if missing:
                look_again(request, end, f"of {processes} processes {sorted(missing)} have", SECONDS_BETWEEN_LOOKS)
    return dist.PrefixStore(place, hall)


def look_again(request: StopRequest, end: float, who: str, seconds: float) -> None:
    """Wait for a moment, unless there is no more reason to.

    Raises:
        TimeoutError: it is past `end`.
        Stopped: a signal came.
    """
    if request.asked:
        raise Stopped(f"stopped by {request.asked} before the processes had met; run the same command to go on")
    if time.monotonic() > end:
        raise TimeoutError(f"{who} not come within {PATIENCE}")
    time.sleep(seconds)
