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


def raised(*numbers: signal.Signals, patient: bool = False) -> tuple[int, bool]:
    """What the request notes of signals that come one after the other, and whether the last ended it at once."""
    with stop_signals(patient) as request:
        for number in numbers[:-1]:
            signal.raise_signal(number)
        try:
            signal.raise_signal(numbers[-1])
        except KeyboardInterrupt:
            return request.number, True
    return request.number, False


def test_only_a_second_ctrl_c_ends_a_run_at_once() -> None:
    """LSF sends SIGINT, ten seconds later SIGTERM, and then waits: that is the time in which a run saves."""
    term, ctrl_c = signal.SIGTERM, signal.SIGINT
    assert raised(ctrl_c, term) == (ctrl_c, False)
    assert raised(term, term, term) == (term, False)
    assert raised(term, ctrl_c) == (term, False)
    assert raised(term, ctrl_c, ctrl_c) == (term, True)
    assert raised(ctrl_c, ctrl_c) == (ctrl_c, True)
    assert raised(ctrl_c, ctrl_c, patient=True) == (ctrl_c, False)
