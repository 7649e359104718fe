"""SIGTERM and Ctrl-C end a run between two steps, with everything saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: run the same command again


class Stopped(RuntimeError):
    """A run that was asked to stop and saved its state; the same call goes on."""

    exit_code = EXIT_STOPPED


@dataclass
class StopRequest:
    """The name of the signal that asked the run to stop; empty while none has."""

    asked: str = ""


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
