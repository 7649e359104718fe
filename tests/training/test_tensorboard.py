"""TensorBoard's event files, read back, against metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest

from condzoo.training import EpochDone, Finished, Started, StepDone, train
from condzoo.training.tensorboard import TensorBoard

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorBoard's own


def events(path: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every event of a tag, in the order of their steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(path / "tensorboard"))
    found.Reload()
    # two event files of one second are read in the order of their names' counters as text, 10 before 9
    return sorted((event.step, event.value) for event in found.Scalars(tag))


def scalars(path: Path, tag: str) -> dict[int, float]:
    """Step -> value of a tag."""
    return dict(events(path, tag))


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a kind."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_it_shows_what_the_run_recorded_and_goes_on_with_it(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe, passed = tiny(**{"probe.every": 11}), []
    with TensorBoard(then=passed.append) as board:
        train(recipe, out=tmp_path, device="cpu", max_steps=11, on_event=board)
        train(recipe, out=tmp_path, device="cpu", on_event=board)
    steps = {line["step"]: line["loss"] for line in lines(tmp_path, "step")}
    assert scalars(tmp_path, "step/loss") == pytest.approx(steps)
    epochs = {line["step"] - 1: line["test_accuracy"] for line in lines(tmp_path, "epoch")}
    assert scalars(tmp_path, "epoch/test_accuracy") == pytest.approx(epochs)
    assert list(scalars(tmp_path, "input_lambda_max/fc")) == [0, 11]
    assert any(isinstance(event, Finished) for event in passed)


def test_a_finished_run_is_written_from_its_records(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(tiny(**{"probe.every": 11}), out=tmp_path, device="cpu")
    TensorBoard().complete(tmp_path)
    steps = {line["step"]: line["loss"] for line in lines(tmp_path, "step")}
    assert scalars(tmp_path, "step/loss") == pytest.approx(steps)
    assert list(scalars(tmp_path, "input_lambda_max/fc")) == [0, 11]


def test_new_lines_are_not_left_in_a_buffer(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoard() as board:
        board(Started(tmp_path, tiny(), "cpu", "fp32", 0, 22, 11, 22, 1))
        flushed, flush = [], board.writer.flush
        board.writer.flush = lambda: flushed.append(flush())
        for step in range(2):
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(f'{{"kind": "step", "step": {step}, "loss": 2.5}}\n')
            board.write_new()
            board.write_new()  # nothing is new
        assert len(flushed) == 2
        assert scalars(tmp_path, "step/loss") == {0: 2.5, 1: 2.5}


def test_what_was_written_of_steps_that_are_lost_is_not_shown(tiny: Any, tmp_path: Path) -> None:
    """Killed before its first checkpoint, a run begins again."""
    pytest.importorskip("tensorboard")

    def die(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            raise KeyboardInterrupt

    with TensorBoard(then=die) as board, pytest.raises(KeyboardInterrupt):
        train(tiny(), out=tmp_path, device="cpu", on_event=board)
    (tmp_path / "tensorboard/notes.txt").write_text("mine")
    with TensorBoard() as board:
        train(tiny(), out=tmp_path, device="cpu", on_event=board)
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1
    assert (tmp_path / "tensorboard/notes.txt").exists()
    steps = {line["step"]: line["loss"] for line in lines(tmp_path, "step")}
    assert scalars(tmp_path, "step/loss") == pytest.approx(steps)


@pytest.mark.parametrize("kill", [EpochDone, StepDone])
def test_a_line_that_is_written_again_after_a_kill_is_shown_once(kill: type, tiny: Any, tmp_path: Path) -> None:
    """The checkpoint at the end of an epoch is older than the epoch's line, which a run that goes on writes again."""
    pytest.importorskip("tensorboard")

    def die(event: Any) -> None:
        if isinstance(event, kill) and event.epoch == (1 if kill is StepDone else 0):
            raise KeyboardInterrupt

    recipe = tiny(**{"log_every": 1, "probe.every": 5})
    with TensorBoard(then=die) as board, pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path, device="cpu", on_event=board)
    with TensorBoard() as board:
        train(recipe, out=tmp_path, device="cpu", on_event=board)
    assert [step for step, _ in events(tmp_path, "epoch/test_accuracy")] == [10, 21]
    assert [step for step, _ in events(tmp_path, "step/loss")] == list(range(22))
    assert [step for step, _ in events(tmp_path, "input_lambda_max/fc")] == [0, 5, 10, 15, 20]


def test_the_evaluation_of_a_run_that_was_cut_short_goes_with_its_line(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoard() as board:
        for steps in (5, 11, None):
            train(tiny(log_every=1), out=tmp_path, device="cpu", max_steps=steps, on_event=board)
    assert [step for step, _ in events(tmp_path, "epoch/test_accuracy")] == [10, 21]
    assert [step for step, _ in events(tmp_path, "step/loss")] == list(range(22))


def test_validation_images_are_shown_too(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoard() as board:
        train(tiny(**{"data.validation": 0.1}), out=tmp_path, device="cpu", on_event=board)
    epochs = {line["step"] - 1: line["val_accuracy"] for line in lines(tmp_path, "epoch")}
    assert scalars(tmp_path, "epoch/val_accuracy") == pytest.approx(epochs)
    assert list(scalars(tmp_path, "epoch/test_accuracy")) == [max(epochs)]


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"TensorBoard is not installed: pip install 'condzoo\[tensorboard\]'"):
        TensorBoard()
