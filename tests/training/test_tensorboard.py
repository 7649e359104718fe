"""TensorBoard's event files, read back, against metrics.jsonl."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from condzoo.training import EpochDone, Finished, Started, StepDone, train
from condzoo.training.tensorboard import TensorBoard

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorBoard's own


@pytest.fixture(autouse=True)
def names_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second are read in the order of their names, in which 10 would come before 9."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    counter = itertools.count(1000)
    monkeypatch.setattr(writer, "_global_uid", SimpleNamespace(get=lambda: next(counter)))


def shown(path: Path) -> Any:
    """What TensorBoard reads of a run."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    return reader.EventAccumulator(str(path / "tensorboard")).Reload()


def points(accumulator: Any, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every event of a tag that has been read."""
    from tensorboard.util.tensor_util import make_ndarray

    return [(event.step, float(make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(tag)]


def events(path: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every event of a tag."""
    return points(shown(path), tag)


def scalars(path: Path, tag: str) -> dict[int, float]:
    """Step -> value of a tag."""
    return dict(events(path, tag))


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a kind."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_it_shows_what_the_run_recorded_and_goes_on_with_it(tiny: Any, tmp_path: Path) -> None:
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
    train(tiny(**{"probe.every": 11}), out=tmp_path, device="cpu")
    TensorBoard().complete(tmp_path)
    steps = {line["step"]: line["loss"] for line in lines(tmp_path, "step")}
    assert scalars(tmp_path, "step/loss") == pytest.approx(steps)
    assert list(scalars(tmp_path, "input_lambda_max/fc")) == [0, 11]
    (tmp_path / "metrics.jsonl").unlink()
    TensorBoard().complete(tmp_path)
    assert scalars(tmp_path, "step/loss") == pytest.approx(steps), "what is there stays"


def test_what_a_run_did_without_a_board_is_filled_in(tiny: Any, tmp_path: Path) -> None:
    """Begun with, gone on without, gone on with; then begun with, and finished without."""
    recipe = tiny(**{"log_every": 1, "probe.every": 3})
    for name, boards in (("middle", (True, False, True)), ("end", (True, False, False))):
        path = tmp_path / name
        for steps, with_board in zip((4, 9, None), boards, strict=True):
            with TensorBoard() as board:
                train(recipe, out=path, device="cpu", max_steps=steps, on_event=board if with_board else None)
        if not boards[-1]:
            assert [step for step, _ in events(path, "step/loss")] == list(range(4))
        TensorBoard().complete(path)
        steps = {line["step"]: line["loss"] for line in lines(path, "step")}
        assert events(path, "step/loss") == [(step, pytest.approx(steps[step])) for step in range(22)]
        assert [step for step, _ in events(path, "epoch/test_accuracy")] == [10, 21]
        assert [step for step, _ in events(path, "input_rank/fc")] == list(range(0, 22, 3))
        files = list((path / "tensorboard").iterdir())
        TensorBoard().complete(path)  # nothing is lacking
        assert list((path / "tensorboard").iterdir()) == files


def test_an_open_board_forgets_what_is_written_again(tiny: Any, tmp_path: Path) -> None:
    with TensorBoard() as board:
        train(tiny(log_every=1), out=tmp_path, device="cpu", max_steps=4, on_event=board)
        accumulator = shown(tmp_path)
        train(tiny(log_every=1), out=tmp_path, device="cpu", on_event=board)
    accumulator.Reload()
    assert [step for step, _ in points(accumulator, "step/loss")] == list(range(22))
    assert [step for step, _ in points(accumulator, "epoch/test_accuracy")] == [10, 21]


def test_a_point_that_two_lines_have_is_shown_once(tiny: Any, tmp_path: Path) -> None:
    """A run cut short at the end of an epoch has a line of the epoch, and one of its end with the test images."""
    with TensorBoard() as board:
        train(tiny(**{"data.validation": 0.1}), out=tmp_path, device="cpu", max_steps=10, on_event=board)
    both = [line["val_loss"] for kind in ("epoch", "end") for line in lines(tmp_path, kind)]
    assert events(tmp_path, "epoch/val_loss") == [(9, pytest.approx(both[0]))]
    assert both == both[:1] * 2
    assert len(events(tmp_path, "epoch/test_loss")) == 1


def test_new_lines_are_not_left_in_a_buffer(tiny: Any, tmp_path: Path) -> None:
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

    def die(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            raise KeyboardInterrupt

    with TensorBoard(then=die) as board, pytest.raises(KeyboardInterrupt):
        train(tiny(), out=tmp_path, device="cpu", on_event=board)
    (tmp_path / "tensorboard/notes.txt").write_text("mine")
    with TensorBoard() as board:
        train(tiny(), out=tmp_path, device="cpu", on_event=board)
    assert (tmp_path / "tensorboard/notes.txt").exists()
    steps = {line["step"]: line["loss"] for line in lines(tmp_path, "step")}
    assert scalars(tmp_path, "step/loss") == pytest.approx(steps)


@pytest.mark.parametrize("kill", [EpochDone, StepDone])
def test_a_line_that_is_written_again_after_a_kill_is_shown_once(kill: type, tiny: Any, tmp_path: Path) -> None:
    """The checkpoint at the end of an epoch is older than the epoch's line, which a run that goes on writes again."""

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
    with TensorBoard() as board:
        for steps in (5, 11, None):
            train(tiny(log_every=1), out=tmp_path, device="cpu", max_steps=steps, on_event=board)
    assert [step for step, _ in events(tmp_path, "epoch/test_accuracy")] == [10, 21]
    assert [step for step, _ in events(tmp_path, "step/loss")] == list(range(22))


def test_validation_images_are_shown_too(tiny: Any, tmp_path: Path) -> None:
    with TensorBoard() as board:
        train(tiny(**{"data.validation": 0.1}), out=tmp_path, device="cpu", on_event=board)
    epochs = {line["step"] - 1: line["val_accuracy"] for line in lines(tmp_path, "epoch")}
    assert scalars(tmp_path, "epoch/val_accuracy") == pytest.approx(epochs)
    assert list(scalars(tmp_path, "epoch/test_accuracy")) == [max(epochs)]


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"TensorBoard is not installed: pip install 'condzoo\[tensorboard\]'"):
        TensorBoard()
