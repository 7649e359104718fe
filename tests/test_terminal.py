"""What a terminal of 80 columns shows: every number and name of a table, a training's bar, and its lines elsewhere."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from condzoo.catalog import list_models, look_up
from condzoo.commands import display
from condzoo.commands.planning_display import byte_text, duration_text
from condzoo.commands.progress import TrainingProgress
from condzoo.experiments import Verdict, load_experiment
from condzoo.probe import Conditioning
from condzoo.probe.conditioning import LayerConditioning
from condzoo.probe.records import append_record
from condzoo.probe.spectra import Spectrum
from condzoo.training import Run, Started, StepDone, recipe_headers

LABELS = [f"optim.lr={lr}-seed{seed}" for lr in (0.1, 0.01) for seed in (1, 2)]
LONG = [
    f"model.name=cifar_resnet20_nobn_lastbn-{label.replace('-', '-optim.weight_decay=0.0001-')}" for label in LABELS
]
COURSES = ("51.3 -> 1.23e+03", "1.05e+03 -> 77.1")
HEADS = ("val error", "test error", "train loss", "minutes", "lambda_max", "kappa 50%")


def screen(columns: int = 80, terminal: bool = True) -> Console:
    """A console that keeps what it prints."""
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=columns, color_system=None, markup=False, emoji=False
    )


def runs(labels: list[str]) -> list[Any]:
    """Finished runs of one network, probed; the last one failed."""
    model = SimpleNamespace(name="cifar_resnet20")
    done = {"status": "done", "val_error": 0.09, "test_error": 0.0812, "train_loss": 0.1234, "seconds": 725.0}
    summaries = [done] * (len(labels) - 1) + [{"status": "failed", "error": "no room"}]
    return [
        SimpleNamespace(path=Path("runs") / label, recipe=SimpleNamespace(model=model), summary=summary)
        for label, summary in zip(labels, summaries, strict=True)
    ]


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def names(lines: list[str]) -> str:
    """What the first column of a table holds, its lines joined."""
    return "".join(line.split()[0] for line in lines if line[1:2].strip())


def test_a_last_layer_that_a_record_skipped_is_not_another_layer(tmp_path: Path) -> None:
    def layer(size: float) -> LayerConditioning:
        x = Spectrum(torch.tensor([size, 1.0], dtype=torch.float64))
        return LayerConditioning("Linear", x, x, 1.0, 1.0, samples=2, positions=1)

    whole = {"body": layer(9.0), "fc": layer(2.0)}
    skipped = Conditioning({"body": layer(9.0)}, skipped={"fc": "its input holds NaN or Inf"}, step=2)
    for record in (Conditioning(whole, step=0), Conditioning(whole | {"fc": layer(3.0)}, step=1), skipped):
        append_record(tmp_path / "conditioning.jsonl", record)
    assert display.last_layer_texts(cast("Run", SimpleNamespace(path=tmp_path)))[0] == "2 -> 3"


@pytest.mark.parametrize("labels", [LABELS, LONG], ids=["short", "long"])
@pytest.mark.parametrize(("columns", "terminal"), [(80, True), (120, True), (80, False)])
def test_the_table_of_runs_has_every_name_and_number(
    labels: list[str], columns: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "last_layer_texts", lambda run: COURSES)
    monkeypatch.setattr(display, "cut_short_texts", lambda runs: [])
    monkeypatch.setattr(display, "console", screen(columns, terminal))
    display.print_runs(runs(labels))
    lines = printed(display.console)
    text = "\n".join(lines)
    assert all(label in names(lines) for label in labels)
    assert all(text.count(cell) == 3 for cell in ("9.00%", "8.12%", "0.1234", "12.1 ", *COURSES))
    assert all(head in text for head in HEADS)
    assert f"{labels[-1]} failed: no room" in text
    if terminal:
        assert max(len(line) for line in lines if "no room" not in line) <= columns
    else:
        assert all(any(line.split()[0] == label for line in lines if line.strip()) for label in labels)


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (59.0, "59.0 s"), (60.0, "1.0"), (725.0, "12.1")])
def test_a_run_of_seconds_is_not_one_of_no_minutes(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "last_layer_texts", lambda run: COURSES)
    run = runs(["a", "b"])[0]
    run.summary = {**run.summary, "seconds": seconds}
    assert display.result_texts(run, held_out=False) == ["8.12%", "0.1234", text, *COURSES]


def test_what_the_numbers_of_the_last_layer_mean_is_true_of_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "console", screen(400))
    (tmp_path / "conditioning.png").touch()
    display.print_places(runs(["a", "b"]), tmp_path / "conditioning.png")
    text = "A large one limits the learning rate; near 0 no signal arrives; inf: not known, or zeros in the spectrum."
    assert printed(display.console)[0].endswith(text)


def test_models_and_recipes_are_listed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    models, headers = list_models("*1202*"), recipe_headers()
    for terminal in (True, False):
        monkeypatch.setattr(display, "console", screen(terminal=terminal))
        display.print_models([(name, look_up(name)) for name in models], as_json=False)
        lines = printed(display.console)
        assert [line.split()[0] for line in lines if "1202" in line] == models
        assert all(f"{look_up(name).params:,}" in "\n".join(lines) for name in models)
        monkeypatch.setattr(display, "console", screen(terminal=terminal))
        display.print_recipes(headers, as_json=False)
        lines = printed(display.console)
        assert all(name in names(lines) for name in headers)
        words = {word for line in lines for word in line.split()}
        assert words >= {word for header in headers.values() for word in header.split()}
        assert terminal == (max(map(len, lines)) <= 80)


def test_numbers_stay_whole_where_the_terminal_is_narrower_than_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "console", screen(20))
    display.print_table(["name", "a", "b"], [["x" * 30, "123456789", "987654321"]])
    lines = printed(display.console)
    assert names(lines) == "name" + "─" * 48 + "x" * 30
    assert "123456789   987654321" in "\n".join(lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_of_claims_says_why_one_is_not_decided(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = load_experiment("fig01").claims[:3]
    monkeypatch.setattr(display, "console", screen(terminal=terminal))
    verdicts = [
        Verdict(claims[0], "held", {1: 0.5, 2: 0.5}),
        Verdict(claims[1], "not decided", {1: 0.5}, "one seed alone, within the bound"),
        Verdict(claims[2], "not decided", {}, "no seed has a value"),
    ]
    display.print_verdicts(verdicts, Path("fig01.png"))
    lines = printed(display.console)
    if terminal:
        assert max(map(len, lines)) <= 80
        assert {"(one", "alone,", "within", "bound)"} <= {word for line in lines for word in line.split()}
    else:
        assert any(line.rstrip().endswith("not decided (one seed alone, within the bound)") for line in lines)
        assert any("no seed has a value" in line and line.rstrip().endswith("not decided") for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.9996, "1,000 ms"),
        (31.5, "31.5 s"),
        (119.0, "119 s"),
        (1234.0, "20.6 minutes"),
        (47 * 3600.0, "47 hours"),
        (49 * 3600.0, "2.04 days"),
        (5.12e3 * 3600, "213 days"),
        (1e9, "11,574 days"),
    ],
)
def test_times_of_a_plan_are_no_powers_of_ten(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_sizes_of_a_plan_are_no_powers_of_ten() -> None:
    counts = (999, 1.234e6, 999_600_000, 1.08e9, 1.2345e16)
    assert [byte_text(count) for count in counts] == ["999 B", "1.23 MB", "1,000 MB", "1.08 GB", "12,345 TB"]
    assert [display.number(count) for count in (0.5, 999_600, 1.81e9)] == ["0.5", "1,000K", "1.81G"]


def started(name: str, steps: int) -> Started:
    recipe: Any = SimpleNamespace(model=SimpleNamespace(name="cifar_resnet20"))
    return Started(Path(name), recipe, "cpu", "fp32", 0, steps, 390, steps, 269_722)


def test_the_bar_of_a_training_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time left also where one step, or one line of a GPU's, takes longer than rich keeps its samples."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("condzoo.commands.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    with TrainingProgress(screen()) as progress:
        progress(started("run", 450_449))
        clock.now += 15_000.0
        progress(StepDone(123_455, 0, 2.3026, 0.1234, 0.1, 12_345.0, {"lambda_max": 51.3, "kappa_50": 1234.0}))
        bar = screen()
        bar.print(progress.bar.get_renderable())
    (line,) = printed(bar)
    drawn, _, state = line.partition("123456/450449 ")
    assert state == "loss 2.303  acc 12.3%  12,345 images/s  kappa 1.23e+03 11:02:10"
    assert drawn.strip(), "the bar itself has room, too"


@pytest.mark.parametrize("dumb", [False, True])
def test_without_a_bar_a_line_each_half_minute_has_every_number(dumb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal, and on one that moves no cursor, such as Emacs' shell."""
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("condzoo.commands.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    console = screen(terminal=dumb)
    with TrainingProgress(console) as progress:
        progress(replace(started("run", 150), start_step=50))
        for seconds, step in ((29.0, 56), (40.0, 59), (69.0, 70)):
            clock.now = 1000.0 + seconds
            progress(StepDone(step, 0, 2.3026, 0.1234, 0.1, 12_345.0, {"lambda_max": 51.3, "kappa_50": 1234.0}))
    assert printed(console) == [
        "cifar_resnet20: 269,722 parameters, cpu in fp32, into run, going on from step 50",
        "step 60  loss 2.303  acc 12.3%  12,345 images/s  last layer: lambda_max 51.3  kappa_50 1.23e+03  0:06:00 left",
    ]


def test_a_run_that_failed_leaves_no_bar() -> None:
    with TrainingProgress(screen()) as progress:
        for name in ("failed", "next"):  # of a run that fails nothing says that it ended
            progress(started(name, 100))
        assert len(progress.bar.tasks) == 1
    assert not progress.bar.tasks
