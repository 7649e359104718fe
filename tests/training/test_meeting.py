"""Processes of one start meet each other in a store that has what processes of earlier starts left."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from condzoo.training import Stopped, loop, many_runs, meeting, run_all, train
from condzoo.training.distributed import ALONE, Ranks
from condzoo.training.meeting import agents_store, fresh_part


@pytest.fixture
def server() -> dist.TCPStore:
    """What an agent keeps for all starts of its processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)


def client(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False
    )


def met(server: dist.TCPStore, processes: int) -> list[bytes]:
    """Each process writes where it listens, and reads where the first one does."""

    def start(rank: int) -> bytes:
        store = fresh_part(client(server), rank, processes)
        if rank == 0:
            assert not store.check(["address"]), "something is there already"
            store.set("address", f"of start {server.add('starts', 1)}")
        return store.get("address")

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(start, reversed(range(processes))))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_start_has_a_part_of_the_store_of_its_own(server: dist.TCPStore, processes: int) -> None:
    for number in (1, 2, 3):
        assert met(server, processes) == [f"of start {number}".encode()] * processes


def test_what_processes_left_that_died_before_they_were_answered_harms_nobody(server: dist.TCPStore) -> None:
    hall = dist.PrefixStore("condzoo", server)
    hall.set("hello of 1", "of one that is gone")
    hall.set("hello of 2", "of another")
    assert met(server, 3) == [b"of start 1"] * 3


def test_one_that_does_not_come_is_an_error_of_the_first(
    server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match=r"of 3 processes \[1, 2\] have not come within 0:00:00.1"):
        fresh_part(client(server), 0, 3)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_the_waiting_for_those_that_do_not_come(
    rank: int, number: signal.Signals, server: dist.TCPStore
) -> None:
    """torch's own waiting for a key would end by none, and a SIGINT be a traceback when it does."""
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    with pytest.raises(Stopped, match=rf"^stopped by {number.name} before the processes had met; run the same command"):
        fresh_part(client(server), rank, 2)


def test_a_signal_that_comes_as_they_meet_stops_the_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meet(device: Any) -> tuple[Ranks, torch.device]:
        signal.raise_signal(signal.SIGTERM)
        return ALONE, torch.device("cpu")

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for module in (loop, many_runs):
        monkeypatch.setattr(module, "join", meet)
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 1; run the same command to go on"):
        train(tiny(), out=tmp_path / "run")
    monkeypatch.setattr(many_runs, "among_others", lambda: True)
    with pytest.raises(Stopped, match="stopped by SIGTERM between two runs"):
        run_all({"run": tiny()}, tmp_path)


def test_only_torchruns_agents_have_a_store(server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agents_store() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert agents_store() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = agents_store()
    assert store is not None
    store.set("key", "value")
    assert server.get("key") == b"value"
