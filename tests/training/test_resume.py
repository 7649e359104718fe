"""Nothing lost: a run that is stopped, killed or damaged ends bitwise where an undisturbed one does."""

import errno
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

from condzoo.training import (
    CheckpointError,
    EpochDone,
    Notice,
    Run,
    RunDirectoryError,
    Started,
    StepDone,
    Stopped,
    dump_recipe,
    load_run,
    loop,
    networks,
    outcome,
    preparation,
    reports,
    runs,
    state_of,
    train,
)
from condzoo.training.resume import Checkpoint, newest_checkpoint, save_checkpoint
from condzoo.training.run_directory import claimed
from tests.training.kill_runs import kill_and_compare
from tests.training.timeless import timeless

VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "decay_norm": False}},
    "average": {"ema": 0.9, "schedule": {"name": "onecycle"}},
    "full batch": {"optim": {"name": "gd", "lr": 0.3, "momentum": 0.5}, "epochs": 12},
    "resnet": {
        "model": {"name": "cifar_resnet8_lastbn", "drop_rate": 0.2},
        "data.augment": "paper",
        "schedule": {"name": "step", "milestones": [1], "reset_momentum": True},
        "iterations": 13,
    },
}


def assert_same_results(a: Path, b: Path) -> None:
    """Weights, last checkpoint, metrics but for times, and conditioning records are bitwise equal."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    last = [sorted((run / "checkpoints").glob("*.safetensors"))[-1] for run in (a, b)]
    assert last[0].name == last[1].name
    assert last[0].read_bytes() == last[1].read_bytes()
    assert timeless(a / "metrics.jsonl") == timeless(b / "metrics.jsonl")
    assert (a / "conditioning.jsonl").read_bytes() == (b / "conditioning.jsonl").read_bytes()


@pytest.mark.parametrize("steps", [3, 6, 7])
def test_a_finished_run_is_left_as_it_is(steps: int, tiny: Any, tmp_path: Path) -> None:
    recipe, run = tiny(iterations=steps, log_every=2), tmp_path / "run"
    first = train(recipe, out=run, device="cpu")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(recipe, out=run, device="cpu").summary == first.summary
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_in_pieces_equals_one_in_one_piece(variant: str, tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"probe.every": 5, "log_every": 2, **VARIANTS[variant]})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    for steps in (1, 6, 11, None):
        pieces = train(recipe, out=tmp_path / "pieces", max_steps=steps, device="cpu")
    assert_same_results(whole.path, pieces.path)
    starts = [entry["start_step"] for entry in json.loads((pieces.path / "environment.json").read_text())]
    assert starts == [0, 1, 6, 11]


def test_killed_between_the_last_checkpoint_and_the_results(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(**{"iterations": 13, "schedule": {"name": "cosine"}, "probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "run", device="cpu")
    monkeypatch.setattr(loop, "finish", outcome.finish)
    run = train(recipe, out=tmp_path / "run", device="cpu")
    assert_same_results(whole.path, run.path)


@pytest.mark.parametrize("epoch", [0, 1])
def test_killed_in_an_evaluation_a_run_goes_on_with_it(
    epoch: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(**{"model.name": "mlp4x24_bn", "ema": 0.9, "schedule": {"name": "cosine"}, "probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    left, evaluate = [None] * epoch, reports.evaluate

    def die(*arguments: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return evaluate(*arguments)

    monkeypatch.setattr(reports, "evaluate", die)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "run", device="cpu")
    monkeypatch.setattr(reports, "evaluate", evaluate)
    events: list[Any] = []
    run = train(recipe, out=tmp_path / "run", device="cpu", on_event=events.append)
    assert events[0].start_step == 11 * (epoch + 1)
    assert [event.epoch for event in events if isinstance(event, EpochDone)] == [0, 1][epoch:]
    assert_same_results(whole.path, run.path)


def test_a_signal_in_the_last_step_of_an_epoch_waits_for_no_evaluation(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")

    def stop_after_step_10(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGTERM at step 11"):
        train(recipe, out=tmp_path / "run", device="cpu", on_event=stop_after_step_10)
    assert all(line["kind"] == "step" for line in timeless(tmp_path / "run/metrics.jsonl"))
    assert_same_results(whole.path, train(recipe, out=tmp_path / "run", device="cpu").path)


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    report = kill_and_compare(tmp_path, kills=9, seed=1)
    assert sum(each["kills"] for each in report.values()) == 27
    assert {name: each["differ"] for name, each in report.items()} == {"sgd": [], "adam": [], "average": []}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_as_the_run_begins_waits_for_a_step(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = loop.claimed

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return claimed(*arguments)

    monkeypatch.setattr(loop, "claimed", interrupted)
    with pytest.raises(Stopped, match="stopped by SIGINT at step 1; run the same command to go on"):
        train(tiny(), out=tmp_path / "run", device="cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_goes_on(number: signal.Signals, tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    handler = signal.getsignal(number)

    def stop_after_step_7(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=f"stopped by {number.name} at step 8; run the same command to go on") as caught:
        train(recipe, out=tmp_path / "stopped", device="cpu", on_event=stop_after_step_7)
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is handler
    events: list[Any] = []
    stopped = train(recipe, out=tmp_path / "stopped", device="cpu", on_event=events.append)
    assert isinstance(events[0], Started)
    assert events[0].start_step == 8
    assert_same_results(whole.path, stopped.path)


def test_a_second_signal_stops_at_once(tiny: Any, tmp_path: Path) -> None:
    def twice(event: Any) -> None:
        if isinstance(event, StepDone):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), out=tmp_path / "run", device="cpu", on_event=twice)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    suffix: str, damage: Callable[[bytes], bytes], tiny: Any, tmp_path: Path
) -> None:
    recipe = tiny(**{"save_every": 0.5, "probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    partial = train(recipe, out=tmp_path / "run", max_steps=14, device="cpu")
    stems = sorted(path.stem for path in (partial.path / "checkpoints").glob("*.json"))
    assert stems == ["step_0000000012", "step_0000000014"]
    newest = partial.path / "checkpoints" / f"step_0000000014{suffix}"
    newest.write_bytes(damage(newest.read_bytes()))
    events: list[Any] = []
    run = train(recipe, out=tmp_path / "run", device="cpu", on_event=events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert "step_0000000014.json is damaged" in notices[0]
    assert "going on from step_0000000012.json instead" in notices[0]
    assert_same_results(whole.path, run.path)


def test_with_every_checkpoint_damaged_nothing_is_thrown_away(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny()
    train(recipe, out=tmp_path / "run", max_steps=14, device="cpu")
    for path in (tmp_path / "run/checkpoints").glob("*.json"):
        path.write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"no checkpoint is left to go on from: delete .* to start again"):
        train(recipe, out=tmp_path / "run", device="cpu")


def test_a_full_disk_leaves_the_last_checkpoint(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(**{"save_every": 0.5, "probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")

    def fill_the_disk(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 15:
            monkeypatch.setattr(os, "fsync", raise_no_space)

    with pytest.raises(OSError, match=r"No space left on device; what was saved before stands") as caught:
        train(recipe, out=tmp_path / "run", device="cpu", on_event=fill_the_disk)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.undo()
    run = train(recipe, out=tmp_path / "run", device="cpu")
    assert_same_results(whole.path, run.path)


def raise_no_space(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_holds_runs(
    number: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def sync_files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync_files_alone)
    assert train(tiny(), out=tmp_path / "run", max_steps=2, device="cpu").summary["steps"] == 2


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_a_damaged_one(
    number: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(2):
        save_checkpoint(tmp_path, Checkpoint({"x": torch.full((3,), float(step))}, {"step": step}))
    read_bytes, read_text = Path.read_bytes, Path.read_text

    def fail(path: Path) -> None:
        if path.name == f"step_0000000001{suffix}":
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", lambda path: fail(path) or read_bytes(path))
    monkeypatch.setattr(Path, "read_text", lambda path, **options: fail(path) or read_text(path, **options))
    said = r"the checkpoint cannot be read; try again, or delete it to go on from the one before: '.*0001\.json'"
    with pytest.raises(OSError, match=said) as caught:
        newest_checkpoint(tmp_path, notify=lambda text: None)
    assert caught.value.errno == number
    monkeypatch.undo()
    newest = newest_checkpoint(tmp_path, notify=lambda text: None)
    assert newest is not None
    assert newest.numbers == {"step": 1}
    (tmp_path / f"step_0000000001{suffix}").unlink()
    before = newest_checkpoint(tmp_path, notify=lambda text: None)
    assert before is not None
    assert before.numbers == {"step": 0}, "as the error says"


def test_a_network_with_one_module_under_two_names_is_saved_under_both(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors refuses tensors that share memory; on a GPU they are copied apart."""

    def shared(*arguments: Any) -> nn.Module:
        network: Any = networks.network_of(*arguments)
        network.layers[2] = network.layers[1]
        return network

    monkeypatch.setattr(preparation, "network_of", shared)
    monkeypatch.setattr(runs, "network_of", shared)
    recipe = tiny(**{"model.name": "mlp4x24_bn", "ema": 0.9, "probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    train(recipe, out=tmp_path / "run", max_steps=6, device="cpu")
    run = train(recipe, out=tmp_path / "run", device="cpu")
    assert_same_results(whole.path, run.path)
    network: Any = run.load_model()
    assert network.layers[1] is network.layers[2]
    stored = load_file(run.path / "model.safetensors")
    assert stored.keys() == network.state_dict().keys()
    for key, value in network.layers[1].state_dict().items():
        assert torch.equal(stored[f"layers.1.{key}"], value)
        assert torch.equal(stored[f"layers.2.{key}"], value)


def test_old_checkpoints_go_only_when_two_newer_ones_stand(tmp_path: Path) -> None:
    for step in range(4):
        save_checkpoint(tmp_path, Checkpoint({"x": torch.full((3,), float(step))}, {"step": step}))
        held = sorted(path.name for path in tmp_path.iterdir())
        kept = [s for s in (step - 1, step) if s >= 0]
        assert held == sorted(f"step_{s:010d}.{end}" for s in kept for end in ("json", "safetensors"))
    newest = newest_checkpoint(tmp_path, notify=lambda text: None)
    assert newest is not None
    assert newest.numbers == {"step": 3}
    assert newest.tensors["x"].tolist() == [3.0] * 3


def test_a_directory_in_use_is_refused(tiny: Any, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(
            RunDirectoryError,
            match=r"is in use by another run; wait for it, or use another --out; if none runs there any more \(it was "
            r"killed on another machine\), delete .*/\.lock$",
        ),
    ):
        train(tiny(), out=tmp_path, device="cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_killed_run_do_not_keep_its_directory(tiny: Any, tmp_path: Path) -> None:
    """They outlive it by seconds, in which filelock before 3.30 lets them hold the lock."""
    ended, end = os.pipe()
    trainer = os.fork()
    if not trainer:
        try:
            with claimed(tmp_path, tiny()):
                os.close(end)
                if not os.fork():
                    os.read(ended, 1)  # the worker, until the test is over
                os._exit(0)  # as by a kill: nothing is let go of
        finally:
            os._exit(1)
    assert os.waitpid(trainer, 0)[1] == 0
    try:
        with claimed(tmp_path, tiny()):
            pass
    finally:
        os.close(end)
        os.close(ended)


def test_a_directory_of_another_recipe_is_refused(tiny: Any, tmp_path: Path) -> None:
    run: Run = train(tiny(), out=tmp_path / "run", max_steps=2, device="cpu")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"another recipe: optim.lr is 0.1 there and 0.2 here; use another"):
        train(tiny(**{"optim.lr": 0.2}), out=run.path, device="cpu")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_directory_of_which_nothing_came_takes_the_recipe_that_mends_it(tiny: Any, tmp_path: Path) -> None:
    missing, path = tiny(**{"data.name": "mnist", "epochs": 1}), tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="data set 'mnist' was not found"):
        train(missing, out=path, data_root=tmp_path, device="cpu")
    assert train(tiny(), out=path, max_steps=1, device="cpu").summary["steps"] == 1
    with pytest.raises(RunDirectoryError, match="belongs to another recipe"):
        train(missing, out=path, data_root=tmp_path, device="cpu")
    mine = tmp_path / "mine" / "recipe.toml"
    mine.parent.mkdir()
    mine.write_text(f"# what I mean to find out\n{dump_recipe(missing)}")
    with pytest.raises(FileNotFoundError, match="data set 'mnist' was not found"):
        train(mine, out=mine.parent, data_root=tmp_path, device="cpu")
    assert mine.read_text().startswith("# what I mean to find out\n"), "a file that was there before is no run's"


def test_a_folder_with_other_things_is_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"holds 'thesis.tex' but no recipe.toml: it is not a run directory"):
        train(tiny(), out=tmp_path, device="cpu")
    with pytest.raises(NotADirectoryError, match=r"thesis\.tex is a file, not a run directory"):
        train(tiny(), out=tmp_path / "thesis.tex", device="cpu")


def test_a_directory_that_cannot_be_made_is_one_clear_error(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    said = r"Not a directory: no run can be written here; use another --out: '.*thesis\.tex/run'"
    with pytest.raises(NotADirectoryError, match=said):
        train(tiny(), out=tmp_path / "thesis.tex/run", device="cpu")
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_read_only_run_directory_is_left_as_it_is(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(), out=tmp_path / "run", max_steps=2, device="cpu")
    (run.path / ".lock").unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    run.path.chmod(0o555)
    try:
        if os.access(run.path, os.W_OK):
            pytest.skip("this user may write to a read-only folder all the same")
        with pytest.raises(PermissionError, match=r"Permission denied: no run can be written here; use another --out"):
            train(tiny(), out=run.path, device="cpu")
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    finally:
        run.path.chmod(0o755)


def test_a_run_directory_on_a_read_only_file_system_is_left_as_it_is(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tiny(), out=tmp_path / "run", max_steps=2, device="cpu")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def refuse(lock: FileLock) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("condzoo.training.run_directory.FileLock.acquire", refuse)
    said = r"Read-only file system: no run can be written here; use another --out: '.*run'"
    with pytest.raises(OSError, match=said):
        train(tiny(), out=run.path, device="cpu")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", [b'{"status"', b"\xff\xfe\x00" * 200, b"\x00" * 600, b"[" * 10_000])
@pytest.mark.parametrize("name", ["summary.json", "environment.json"])
def test_a_damaged_record_is_named_and_can_be_made_again(name: str, damage: bytes, tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(log_every=1)
    run = train(recipe, out=tmp_path / "run", max_steps=2, device="cpu")
    (run.path / name).write_bytes(damage)
    with pytest.raises(RunDirectoryError, match=rf"run/{name} is damaged: .*; delete it, and give the `condzoo train`"):
        train(recipe, out=run.path, max_steps=3, device="cpu")
    (run.path / name).unlink()
    assert train(recipe, out=run.path, max_steps=3, device="cpu").summary["steps"] == 3


@pytest.mark.parametrize("content", ["{}", "[]", '{"settings": {}, "runs": {}}'])
def test_a_summary_of_no_run_is_named(content: str, tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(), out=tmp_path / "run", max_steps=2, device="cpu")
    (run.path / "summary.json").write_text(content)
    for call in (lambda: train(tiny(), out=run.path, device="cpu"), lambda: load_run(run.path)):
        with pytest.raises(RunDirectoryError, match=r"run/summary\.json is not the summary of a run; delete it, and"):
            call()
    assert state_of(tiny(), run.path) == "begun"


def test_another_thread_count_is_said(tiny: Any, tmp_path: Path) -> None:
    train(tiny(), out=tmp_path / "run", max_steps=3, device="cpu")
    torch.set_num_threads(2)
    events: list[Any] = []
    train(tiny(), out=tmp_path / "run", max_steps=4, device="cpu", on_event=events.append)
    assert events[0] == Notice("the run began with 1 threads and goes on with 2: sums may round differently")


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tiny: Any, tmp_path: Path) -> None:
    """After the fallback two good ones stand again: the next damage, too, costs no more than one."""
    recipe = tiny(**{"save_every": 0.5, "probe.every": 5})
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    run, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    train(recipe, out=run, max_steps=14, device="cpu")
    (folder / "step_0000000014.json").write_bytes(b"{")
    train(recipe, out=run, max_steps=18, device="cpu")
    good = sorted(path.name for path in folder.glob("*.json"))
    assert good == ["step_0000000012.json", "step_0000000018.json"]
    assert (folder / "step_0000000014.json.damaged").exists()
    (folder / "step_0000000018.json").write_bytes(b"{")
    train(recipe, out=run, device="cpu")
    assert_same_results(whole.path, run)


def test_a_run_killed_as_it_wrote_its_first_file_begins_again(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / "recipe.toml.tmp").write_text("epochs = ")
    recipe = tiny(**{"epochs": 1, "probe.every": 5})
    train(recipe, out=run, device="cpu")
    assert not list(run.rglob("*.tmp"))
    assert_same_results(train(recipe, out=tmp_path / "whole", device="cpu").path, run)


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "step_0000000005.safetensors.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, Checkpoint({"x": torch.zeros(3)}, {"step": 6}))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_what_a_kill_left_of_a_checkpoint_that_was_being_deleted_goes_as_the_run_goes_on(tmp_path: Path) -> None:
    for step in (6, 7):
        save_checkpoint(tmp_path, Checkpoint({"x": torch.zeros(3)}, {"step": step}))
    before = sorted(tmp_path.iterdir())
    (tmp_path / "step_0000000005.safetensors").write_bytes(b"old")
    assert newest_checkpoint(tmp_path, notify=lambda text: None) is not None
    assert sorted(tmp_path.iterdir()) == before


def test_a_users_own_copies_of_checkpoints_are_left_alone(tiny: Any, tmp_path: Path) -> None:
    """They are neither gone on from, nor counted as one of the two that are kept, nor deleted."""
    recipe, folder = tiny(**{"save_every": 0.2, "probe.every": 5}), tmp_path / "run/checkpoints"
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    train(recipe, out=tmp_path / "run", max_steps=4, device="cpu")
    copies = {folder / "step_.json": b"{}", folder / "step_.safetensors.tmp": b"half"}
    for path in sorted(folder.iterdir()):
        for end in ("_best", " (copy)", ".2"):
            copies[path.with_name(f"{path.stem}{end}{path.suffix}")] = path.read_bytes()
    for path, content in copies.items():
        path.write_bytes(content)
    assert_same_results(whole.path, train(recipe, out=tmp_path / "run", device="cpu").path)
    assert {path: path.read_bytes() for path in copies} == copies
    assert len(set(folder.iterdir()) - set(copies)) == 4


@pytest.mark.parametrize("steps", [7, None], ids=["cut short", "whole"])
def test_lost_or_damaged_weights_are_written_again_from_the_checkpoint(
    steps: int | None, tiny: Any, tmp_path: Path
) -> None:
    run = train(tiny(), out=tmp_path / "run", max_steps=steps, device="cpu")
    before = (run.path / "model.safetensors").read_bytes()
    (run.path / "model.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or of another run: summary\.json has"):
        run.load_model()
    (run.path / "model.safetensors").unlink()
    events: list[Any] = []
    again = train(tiny(), out=run.path, max_steps=steps, device="cpu", on_event=events.append)
    assert (run.path / "model.safetensors").read_bytes() == before
    assert not [event for event in events if isinstance(event, StepDone)], "nothing is trained again"
    assert again.summary["test_correct"] == run.summary["test_correct"]


@pytest.mark.parametrize("weights", [False, True], ids=["no weights", "weights"])
@pytest.mark.parametrize("steps", [3, None], ids=["cut short", "whole"])
def test_the_records_of_a_run_whose_checkpoints_are_lost_are_not_cut_off(
    steps: int | None, weights: bool, tiny: Any, tmp_path: Path
) -> None:
    """A copy without its large files: the same command would begin anew with empty records."""
    recipe, run = tiny(**{"epochs": 1, "log_every": 1, "probe.every": 5}), tmp_path / "run"
    first = train(recipe, out=run, max_steps=steps, device="cpu")
    shutil.rmtree(run / "checkpoints")
    if not weights:
        (run / "model.safetensors").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    if weights and steps is None:
        assert train(recipe, out=run, device="cpu").summary == first.summary, "nothing is left to train"
        return
    said = (
        rf"run was trained to step {steps or 11} and holds no checkpoint to go on from: .* or delete its summary\.json"
    )
    with pytest.raises(RunDirectoryError, match=said):
        train(recipe, out=run, device="cpu")
    assert {path: path.read_bytes() for path in before} == before
    (run / "summary.json").unlink()
    assert train(recipe, out=run, device="cpu").summary["steps"] == 11


def test_a_run_that_diverged_in_its_first_epoch_has_no_checkpoint_and_ends_the_same_again(
    tiny: Any, tmp_path: Path
) -> None:
    wild = {"optim.lr": 1e30, "optim.momentum": 0.0, "optim.nesterov": False, "on_divergence": "record"}
    run = train(tiny(**wild), out=tmp_path / "run", device="cpu")
    assert run.summary["steps"] > 0
    assert not (run.path / "checkpoints").exists()
    assert train(tiny(**wild), out=run.path, device="cpu").summary == run.summary
