"""SIGTERM and Ctrl-C end a run between two steps, with everything saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from condzoo import exit_codes


class Stopped(RuntimeError):
    """A run that was asked to stop and saved its state; the same call goes on."""

    exit_code = exit_codes.STOPPED
    shared = True  # raised in every process of a run alike


@dataclass
class StopRequest:
    """The signal that asked the run to stop; 0 while none has. `interrupted`: one of those that came is SIGINT."""

    number: int = 0
    interrupted: bool = False

    @property
    def asked(self) -> str:
        """The signal's name; empty while none has asked."""
        return signal.Signals(self.number).name if self.number else ""


@dataclass(frozen=True)
class _Note:
    """The signal handler that fills a request."""

    request: StopRequest
    patient: bool

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.request.interrupted and not self.patient:
                raise KeyboardInterrupt
            self.request.interrupted = True
        self.request.number = self.request.number or number


@contextlib.contextmanager
def stop_signals(patient: bool = False) -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; a second SIGINT (Ctrl-C) raises KeyboardInterrupt at once.

    SIGTERM does not, whatever came before: batch systems send SIGINT, then SIGTERM, and then wait for a while.
    `patient`: nor does SIGINT. A launcher passes on a signal that each of its processes may have had already.
    Within another `stop_signals` (a run among many) the request is the same: a signal stops both.
    Outside the main thread, where Python delivers no signals, nothing is changed; nor is a handler that was not set
    from Python, which could not be put back.
    """
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for handler in found.values():
        if isinstance(handler, _Note):
            yield handler.request
            return
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    before = {number: handler for number, handler in found.items() if handler is not None}
    for number in before:
        signal.signal(number, _Note(request, patient))
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
