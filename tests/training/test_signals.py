"""Which signal handlers a run replaces, and puts back."""

import signal
from typing import Any

import pytest

from condzoo.training.signals import stop_signals


@pytest.mark.parametrize("foreign", [signal.SIGTERM, signal.SIGINT])
def test_a_handler_from_outside_python_is_left_alone(foreign: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that embeds Python: it reads as None, which signal.signal does not take back."""
    handlers: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.SIG_DFL, foreign: None}

    def set_handler(number: int, handler: Any) -> Any:
        if handler is None:
            raise TypeError("signal handler must be SIG_IGN, SIG_DFL, or a callable object")
        before, handlers[number] = handlers[number], handler
        return before

    before = dict(handlers)
    (other,) = handlers.keys() - {foreign}
    with monkeypatch.context() as patch:  # no longer: pytest's own time limit sets a handler, too
        patch.setattr(signal, "getsignal", handlers.get)
        patch.setattr(signal, "signal", set_handler)
        with stop_signals() as request:
            assert handlers[foreign] is None
            handlers[other](other, None)
            with stop_signals() as within:
                assert within is request
    assert request.number == other
    assert handlers == before
