"""Both callbacks under DDP in two processes, run by test_distributed_callbacks.py: python processes.py OUT.

The processes are forks of one that has imported everything and computed nothing.
"""

import os
import socket
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_lightning
import test_transformers

from condzoo.integrations import lightning, transformers

WORLD = 2


def under_lightning(rank, out):
    callback = lightning.ProbeCallback(every=2, out=out / "lightning")
    _, trainer = test_lightning.fit(out, [callback], strategy="ddp", devices=WORLD)
    assert (trainer.world_size, trainer.global_step) == (WORLD, 5)


def under_the_trainer(rank, out):
    torch.nn.Dropout.forward = lambda self, x: x  # what it draws depends on what else the Trainer draws
    callback = transformers.ProbeCallback(every=2, out=out / "trainer")
    _, batches = test_transformers.fit("module", out, [callback], ddp_backend="gloo")
    torch.save(batches, out / f"batches{rank}.pt")


def in_processes(run, out):
    """Two forks as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(WORLD):
        children.append(os.fork())
        if not children[-1]:
            torch.set_num_threads(1)
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "GROUP_RANK": 0}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            os.environ.update({key: str(value) for key, value in (ranks | where).items()})
            run(rank, out)
            return
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(f"{run.__name__}: a process failed")


if __name__ == "__main__":
    parent = os.getpid()
    for run in (under_lightning, under_the_trainer):
        in_processes(run, Path(sys.argv[1]))
        if os.getpid() != parent:
            break
