"""Where the processes that torchrun started meet: at a place in its store that none of an earlier start has used.

torchrun's agents keep one store for all starts of their processes (torch 2.14 has no prefix for a start), in which a
process that was started again may find where those that are gone listened, and wait for half an hour.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

SECONDS_BETWEEN_LOOKS = 0.02
PATIENCE = timedelta(minutes=30)  # as torch has it for all that processes wait for each other


def agents_store() -> dist.Store | None:
    """The store of torchrun's agents, as a client; None where another launcher started this process."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)


def fresh_part(store: dist.Store, rank: int, processes: int) -> dist.Store:
    """The part of the store for this start of all processes; every one of them calls this.

    Each says hello under a name of its own, and the first answers until all have said that they heard it: hellos of
    before are answered, too, and nobody hears.

    Raises:
        TimeoutError: a process has not come within half an hour (of others than the first, it is torch's error).
    """
    hall = dist.PrefixStore("condzoo", store)
    if rank:
        own = uuid.uuid4().hex
        hall.set(f"hello of {rank}", own)
        place = hall.get(f"welcome {own}").decode()
        hall.set(f"{rank} in {place}", "here")
        return dist.PrefixStore(place, hall)
    place, missing, end = uuid.uuid4().hex, set(range(1, processes)), time.monotonic() + PATIENCE.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"of {processes} processes {sorted(missing)} have not come within {PATIENCE}")
        for other in [other for other in missing if hall.check([f"hello of {other}"])]:
            hall.set(f"welcome {hall.get(f'hello of {other}').decode()}", place)
        missing = {other for other in missing if not hall.check([f"{other} in {place}"])}
        time.sleep(SECONDS_BETWEEN_LOOKS if missing else 0)
    return dist.PrefixStore(place, hall)
