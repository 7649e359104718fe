"""The files of a run: what is left of them when something is lost, damaged or refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from condzoo.training import Notice, RunDirectoryError, loop, reports, state_of, steps, train
from condzoo.training.recipe import parse_recipe
from tests.training.conftest import tiny_tables
from tests.training.timeless import timeless

PROBED = {"log_every": 1, "probe.every": 1, "probe.layers": ["fc"], "eval_every": 0}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else here."""
    monkeypatch.setattr(reports, "plot_records", lambda records, path: None)


@pytest.fixture(scope="module")
def after_3_and_5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run after 3 steps, and after 5."""
    recipe, (first, second) = parse_recipe(tiny_tables(PROBED)), map(tmp_path_factory.mktemp, ("after_3", "after_5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "plot_records", lambda records, path: None)
        train(recipe, out=first, max_steps=3, device="cpu")
        shutil.copytree(first, second, dirs_exist_ok=True)
        train(recipe, out=second, max_steps=5, device="cpu")
    return first, second


def test_a_changed_digit_of_metrics_is_told_where_the_run_goes_on(tiny: Any, tmp_path: Path) -> None:
    recipe, metrics = tiny(log_every=1), tmp_path / "metrics.jsonl"
    train(recipe, out=tmp_path, max_steps=3, device="cpu")
    content = metrics.read_bytes()
    changed = content.replace(b'"loss": 2.', b'"loss": 7.', 1)
    assert changed != content
    metrics.write_bytes(changed)
    told: list[list[str]] = []
    for end in (4, 5):  # the second finds what it was at the first's end
        events: list[Any] = []
        train(recipe, out=tmp_path, max_steps=end, device="cpu", on_event=events.append)
        told.append([event.text for event in events if isinstance(event, Notice)])
    assert told == [[f"{metrics} is not what it was when step 3 was saved: a record was changed since"], []]


DAMAGED_LINES = {
    "cut": b"{",
    "no text": b"\xff\xfe\x00",
    "zeros": b"\x00" * 60,
    "a number": b"7",
    "no step": b'{"kind": "step"}',
    "spaces": b"",
}


@pytest.mark.parametrize("damage", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_damaged_line_of_metrics_is_named_before_a_step_is_trained(damage: bytes, tiny: Any, tmp_path: Path) -> None:
    recipe, metrics = tiny(log_every=1), tmp_path / "run/metrics.jsonl"
    train(recipe, out=tmp_path / "run", max_steps=3, device="cpu")
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([lines[0], damage.ljust(len(lines[1]) - 1) + b"\n", *lines[2:]]))
    events: list[Any] = []
    said = r"line 2 of .*run/metrics\.jsonl is damaged: .*; delete that line, and give the `condzoo train` command"
    with pytest.raises(RunDirectoryError, match=said):
        train(recipe, out=tmp_path / "run", max_steps=5, device="cpu", on_event=events.append)
    assert not events
    metrics.write_bytes(b"".join(line for line in metrics.read_bytes().splitlines(keepends=True) if line in lines))
    train(recipe, out=tmp_path / "run", max_steps=5, device="cpu")
    kept = timeless(metrics)
    assert [line["step"] for line in kept if line["kind"] == "step"] == [0, 2, 3, 4], "the good lines stand"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="the last line's end lost"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut within a line"),
        pytest.param(lambda content: content[:150].ljust(len(content), b"\0"), id="zeros after a crash"),
        pytest.param(lambda content: content[content.index(b"\n") + 1 :], id="the first line lost"),
        pytest.param(lambda content: content.replace(b"\n", b"\r\n"), id="an editor's line ends"),
        pytest.param(lambda content: b"", id="empty"),
    ],
)
@pytest.mark.parametrize("later", [b"", b'{"kind": "step", "step": 3'], ids=["stopped", "killed"])
def test_a_run_that_lost_records_says_so_and_goes_on_with_whole_lines(
    later: bytes, damage: Callable[[bytes], bytes], after_3_and_5: tuple[Path, Path], tmp_path: Path
) -> None:
    after_3, after_5 = after_3_and_5
    recipe, run = parse_recipe(tiny_tables(PROBED)), tmp_path / "run"
    shutil.copytree(after_3, run)
    sizes = json.loads((run / "checkpoints/step_0000000003.json").read_text())["numbers"]["bytes"]
    for name, size in sizes.items():
        (run / name).write_bytes(damage((run / name).read_bytes()[:size]) + later)
    events: list[Any] = []
    train(recipe, out=run, max_steps=5, device="cpu", on_event=events.append)
    for name in sizes:
        assert Notice(f"{run / name} has lost records from before step 3") in events
        expected, found = (timeless(folder / name) for folder in (after_5, run))
        assert found[-2:] == expected[-2:]
        assert all(line in expected for line in found), "nothing else, and no line within another"


def test_a_run_that_fails_in_its_first_step_takes_the_recipe_that_mends_it(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little memory for data.batch_size, say. From the first step on a directory is its recipe's."""
    smaller = tiny(**{"data.batch_size": 64, "probe.every": 5})

    def fail_at(step: int) -> None:
        def take_step(training: Any, batch: Any, probe: Any) -> Any:
            if batch.step == step:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return steps.take_step(training, batch, probe)

        monkeypatch.setattr(loop, "take_step", take_step)

    fail_at(0)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(tiny(**{"probe.every": 5}), out=tmp_path / "run", device="cpu")
    assert state_of(smaller, tmp_path / "run") == "to do"
    fail_at(1)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(smaller, out=tmp_path / "run", device="cpu")
    with pytest.raises(RunDirectoryError, match=r"data\.batch_size is 64 there and 128 here"):
        train(tiny(**{"probe.every": 5}), out=tmp_path / "run", device="cpu")


def test_where_no_file_can_be_made_no_record_is_cut_off(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run directory without the right to write, the files may have it still, and .lock is there."""
    run = train(tiny(**{"probe.every": 1}), out=tmp_path / "run", max_steps=2, device="cpu")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    path_open = Path.open

    def refuse(path: Path, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return path_open(path, mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    said = r"Permission denied; what was saved before stands: '.*environment\.json'"
    with pytest.raises(PermissionError, match=said):
        train(tiny(**{"probe.every": 1}), out=run.path, device="cpu")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
