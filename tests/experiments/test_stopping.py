"""Signals where nothing is trained: the code that says "go on", whatever was at work."""

import signal

import pytest

from condzoo import exit_codes
from condzoo.cli import main
from condzoo.experiments import collect
from condzoo.experiments.stopping import stopping
from condzoo.training import Message, Stopped


@pytest.mark.parametrize(
    ("name", "pieces", "first"),
    [
        ("fig01", "networks", "[1/2] plain, seed 1"),
        ("thm1", "trials", "[1/1] theorem_1, seed 1"),
        ("cost", "sizes", "[1/6] examples 4, seed 1"),
    ],
)
def test_a_signal_stops_between_two_pieces_which_are_told_as_they_begin(name, pieces, first, tiny, tmp_path):
    told = []

    def stop(event):
        told.append(event)
        signal.raise_signal(signal.SIGTERM)

    message = f"stopped by SIGTERM between two {pieces}; run the same command to go on"
    with pytest.raises(Stopped, match=message):
        collect(tiny(name), "cpu", tmp_path, on_event=stop)
    assert told == [Message(first)]
    assert not (tmp_path / f"{name}.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_figure_is_drawn_ends_with_the_code_to_go_on(number, tiny, tmp_path, monkeypatch, capsys):
    experiment = tiny("thm1")
    monkeypatch.setattr("condzoo.experiments.load_experiment", lambda _: experiment)
    monkeypatch.setattr("condzoo.experiments.draw", lambda *_: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "thm1", "thm1", "--out", str(tmp_path)])
    assert stop.value.code == exit_codes.STOPPED
    said = f"stopped by {number.name} between two experiments; run the same command to go on"
    assert capsys.readouterr().err.strip() == said


def test_a_second_ctrl_c_ends_the_piece_at_work():
    def signalled_twice():
        with stopping("networks"):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)

    with pytest.raises(Stopped, match="stopped within one of the networks; run the same command to go on"):
        signalled_twice()
