"""`condzoo train`, `sweep`, `eval` and `recipes` as a person meets them."""

import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from condzoo.cli import main
from condzoo.evaluating import evaluate_again
from condzoo.probe import Conditioning, Probe, plot_records, plots
from condzoo.probing import Question, answer
from condzoo.training import load_recipe, load_run, sweep, train
from tests.forked_command import interrupted

CHANGES = ("model.name=mlp4x24", "data.resize=8", "probe.every=0")
TINY = ["digits/resnet20_nobn_lastbn", *(word for change in CHANGES for word in ("--set", change))]
SHORT = [*TINY, "--max-steps", "3", "--device", "cpu"]


def run(capsys, *args):
    """Call the command in this process; returns (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_a_tilde_is_the_home_wherever_a_path_is_taken(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, _, err = run(capsys, "train", *SHORT, "--set", "probe.every=2", "--out=~/run")
    assert code == 0, err
    load_recipe("~/run/recipe.toml")
    assert train("~/run/recipe.toml", out="~/run", max_steps=3).path == load_run("~/run").path
    assert evaluate_again("~/run").as_recorded
    plot_records("~/run", "~/run.png")
    answer(Question("~/run", batches=1)).to_json("~/found.json")
    assert len(Conditioning.from_json("~/found.json")) == 4
    sweep(load_recipe("~/run/recipe.toml"), {"optim.lr": [0.1]}, out="~/sweep", max_steps=1)
    Probe(torch.nn.Linear(2, 2), out="~/probe").__enter__().__exit__(None, None, None)
    assert {"run", "run.png", "found.json", "sweep"} <= set(os.listdir(tmp_path / "home"))
    assert os.listdir(tmp_path) == ["home"], "no folder called ~"


def test_a_run_directory_may_be_called_like_a_network_and_a_setting(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "mlp4x24.lr0.1"
    assert run(capsys, "train", *SHORT, "--out", name)[0] == 0
    for command in ("probe", "eval"):
        code, out, err = run(capsys, command, name)
        assert (code, err) == (0, "")
        assert out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_output_has_not_are_written_by_their_numbers(tmp_path, monkeypatch, encoding):
    """Of the streams that a process with this PYTHONIOENCODING has; starting one takes seconds."""
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, errors="strict", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding, errors="backslashreplace", write_through=True))
    with pytest.raises(SystemExit) as stop:
        main(["train", *SHORT, "--out", str(tmp_path / "Läufe 跑")])
    assert (stop.value.code, err.getvalue()) == (0, b"")
    assert rb"ufe \u8dd1" in out.getvalue()


@pytest.fixture
def no_comparison(monkeypatch):
    """Runs are not drawn beside each other, which takes longer than their trainings."""
    monkeypatch.setattr("condzoo.probe.plot_comparison", lambda runs, picture: None)


def test_several_seeds_end_in_mean_and_deviation(capsys, tmp_path, monkeypatch):
    code, out, err = run(capsys, "train", *SHORT, "--set", "probe.every=2", "--seeds", "1-3", "--out", tmp_path)
    assert code == 0, err
    group = json.loads((tmp_path / "summary.json").read_text())["settings"][""]
    mean, std = (100 * group["test_error"][key] for key in ("mean", "std"))
    printed = re.search(r"mean \+- std: 3 of 3 seeds, test error ([\d.]+) \+- ([\d.]+) %", out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(mean, abs=0.05)
    assert float(printed[2]) == pytest.approx(std, abs=0.05)
    assert "[2/3] seed2" in out
    assert (tmp_path / "conditioning.png").exists()
    monkeypatch.setattr("condzoo.probe.plot_comparison", lambda runs, picture: None)  # once is enough
    code, out, _ = run(capsys, "train", *SHORT, "--set", "probe.every=2", "--seeds", "1-3", "--out", tmp_path)
    assert code == 0
    assert "[2/3]" not in out, "finished seeds are not trained again"
    out = run(capsys, "train", *SHORT, "--set", "probe.every=2", "--seeds", "4,5", "--out", tmp_path)[1]
    errors = [json.loads((tmp_path / f"seed{n}/summary.json").read_text())["test_error"] * 100 for n in range(1, 6)]
    mean, std = statistics.fmean(errors), statistics.stdev(errors)
    assert f"mean +- std: 5 of 5 seeds, test error {mean:.2f} +- {std:.2f} %" in out, "of earlier calls, too"
    assert [line.split()[0] for line in out.splitlines() if re.match(r" *seed\d +[\d.]+%", line)] == [
        f"seed{n}" for n in range(1, 6)
    ]


def test_a_picture_that_is_not_drawn_leaves_the_table(capsys, tmp_path, monkeypatch):
    """Of many runs it takes a minute, and was drawn first."""

    def fail(runs, path):
        drawn.append(list(runs))
        raise ValueError("too wide")

    drawn = []
    monkeypatch.setattr("condzoo.probe.plot_comparison", fail)
    monkeypatch.setattr("condzoo.commands.training.MOST_DRAWN", 1)
    words = ["train", *SHORT, "--set", "probe.every=2", "--seeds", "1,2", "--out", tmp_path]
    code, out, err = run(capsys, *words)
    assert (code, err) == (2, "error: too wide\n")
    assert "mean +- std: 2 of 2 seeds" in out
    assert drawn == [["seed1"]]
    monkeypatch.setattr("condzoo.probe.plot_comparison", lambda runs, path: path.write_bytes(b""))
    out = run(capsys, *words)[1]
    assert "drawn: the first 1 of 2 probed runs; `condzoo plot RUN RUN ...` draws others\n" in out
    assert out.index("mean +- std") < out.index("drawn: ") < out.index("picture: ")


@pytest.mark.usefixtures("no_comparison")
def test_runs_cut_short_say_so_and_one_measurement_is_no_course(capsys, tmp_path):
    words = ["train", *TINY, "--set", "probe.every=4", "--set", "epochs=1", "--device", "cpu", "--seeds", "1,2"]
    words += ["--out", tmp_path]
    out = run(capsys, *words, "--max-steps", "3")[1]
    assert "\nseed1, seed2: stopped after 3 steps, of 1 epochs; the same command without --max-steps goes on\n" in out
    assert re.search(r"\n +seed1( +[\d.%e+]+( s)?){5} *\n", out), "one value of lambda_max and kappa each"
    out = run(capsys, "train", *words[1:-3], "1", "--out", tmp_path)[1]  # seed 2 is of the earlier call
    assert "\nseed2: stopped after 3 steps, of 1 epochs; " in out
    assert re.search(r"\n +seed1 .* -> .* -> ", out)
    assert "stopped" not in run(capsys, *words)[1]


@pytest.mark.parametrize("command", [["plot"], ["release", "--tag", "mine"], ["eval"]])
@pytest.mark.usefixtures("no_comparison")
def test_a_folder_of_several_runs_is_answered_by_their_names(capsys, tmp_path, command):
    run(capsys, "train", *SHORT, "--set", "probe.every=2", "--seeds", "1,2", "--out", tmp_path)
    code, _, err = run(capsys, *command, tmp_path)
    assert code == 2
    assert err.startswith(f"error: {tmp_path} is a folder of several runs; name ")
    assert "seed1" in err
    assert "seed2" in err


def test_measurements_are_drawn_side_by_side_by_their_own_names(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("a.json", "b.json", "other/b.json"):
        run(capsys, "probe", "mlp4x24", "--data", "digits", "--batches", "1", "--out", name)
    assert run(capsys, "plot", "a.json")[:2] == (0, "wrote a.png\n")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr("condzoo.probe.plot_comparison", lambda runs, path: drawn.append(list(runs)))
    for files in (("a.json", "b.json"), ("b.json", "other/b.json"), (".", "../x/conditioning.jsonl")):
        assert run(capsys, "plot", *files)[:2] == (0, "wrote comparison.png\n")
    assert drawn == [["a", "b"], ["b.json", "other/b.json"], [tmp_path.name, "x"]]
    assert run(capsys, "plot", "a.json", "a.json")[::2] == (2, "error: a.json is given twice\n")


@pytest.mark.filterwarnings("default")
def test_a_torn_line_is_warned_of_in_a_line_of_words(capsys, tmp_path):
    (tmp_path / "conditioning.jsonl").write_text("{")
    code, _, err = run(capsys, "plot", tmp_path)
    assert code == 2
    warned, failed = err.splitlines()
    assert warned == f"warning: {tmp_path / 'conditioning.jsonl'}:1: skipped a torn last line"
    assert failed.startswith("error: no record with a measured layer")


def test_a_picture_of_the_folder_one_is_in_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [plots._label(path) for path in (".", "conditioning.jsonl", "a.json")] == [tmp_path.name] * 2 + ["a.json"]


def test_what_a_new_user_gives_in_place_of_a_file_is_said(capsys, tmp_path):
    finished, picture = tmp_path / "run", tmp_path / "picture"
    run(capsys, "train", *SHORT, "--set", "probe.every=2", "--out", finished)
    code, out, _ = run(capsys, "plot", finished, "--out", picture)
    assert (code, out) == (0, f"wrote {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG"), "and not picture.png"
    code, out, _ = run(capsys, "probe", "mlp4x24", "--data", "digits", "--batches", "1", "--plot", picture / "x")
    assert code == 2, "a file is no folder"
    assert run(capsys, "plot", finished, "--out", tmp_path)[0] == 2
    err = run(capsys, "plot", picture)[2]
    assert err.startswith(f"error: {picture} is no file of conditioning records: ")
    assert run(capsys, "probe", finished / "model.safetensors", "--batches", "1")[::2] == (0, "")
    err = run(capsys, "train", finished)[2]
    goes_on = f"condzoo train {finished / 'recipe.toml'} --out {finished}"
    assert err == f"error: {finished} is a run directory, no recipe; `{goes_on}` goes on\n"
    assert "going on from step 3" in run(capsys, *goes_on.split()[1:], "--max-steps", "4")[1]


def test_a_loss_beyond_measure_keeps_the_table_narrow(capsys, tmp_path):
    wild = ["--set", "optim.lr=1e6", "--set", 'on_divergence="record"', "--out", tmp_path]
    out = run(capsys, "train", *TINY, "--device", "cpu", *wild)[1]
    assert re.search(r" \d\.\d+e\+\d+ ", out)


def test_a_seed_that_diverges_is_recorded_and_the_exit_code_says_so(capsys, tmp_path):
    wild = ["--set", "optim.lr=1e30", "--seeds", "1,2", "--out", tmp_path]
    code, out, _ = run(capsys, "train", *SHORT, *wild)
    assert code == 3
    assert re.search(r"seed2 diverged: the (loss|gradient) of step \d is not finite", out)
    assert "mean +- std: 0 of 2 seeds (2 diverged)" in out
    recorded = ["--set", 'on_divergence="record"', "--set", "optim.lr=1e30", "--seeds", "1,2"]
    assert run(capsys, "train", *SHORT, *recorded, "--out", tmp_path / "recorded")[0] == 0


def test_a_sweep_can_be_looked_at_before_and_split(capsys, tmp_path):
    args = ["sweep", *SHORT, "--grid", "optim.lr=0.1,0.01", "--seeds", "1-2", "--out", tmp_path / "s"]
    code, out, _ = run(capsys, *args, "--dry-run")
    assert code == 0
    assert "to do     " in out
    assert "4 runs, 4 left to do" in out
    assert not (tmp_path / "s").exists()
    code, out, _ = run(capsys, *args, "--shard", "1/2")
    assert code == 0
    assert "4 runs, 2 left to do" in run(capsys, *args, "--dry-run")[1]
    assert "s is a folder of several runs; name one of them: " in run(capsys, "eval", tmp_path / "s")[2]
    code, out, _ = run(capsys, *args)
    assert re.search(r"optim.lr=0.1: 2 of 2 seeds, test error [\d.]+ \+- [\d.]+ %", out)
    assert "4 runs, 0 left to do" in run(capsys, *args, "--dry-run")[1]
    code, out, err = run(capsys, *args, "--set", "optim.momentum=0.5", "--dry-run")
    assert re.search(r"blocked   .*seed1  \(.* belongs to another recipe: optim.momentum is 0.9 there", out)
    assert "4 runs, 0 left to do, 4 blocked" in out
    assert (code, err) == (2, run(capsys, *args, "--set", "optim.momentum=0.5")[2]), "as the sweep itself ends"
    others = (*args[:-1], tmp_path / "s" / "optim.lr=0.1-seed1")
    code, _, err = run(capsys, *others, "--dry-run")
    assert code == 2
    assert "is the directory of one run; several need a folder of their own" in err
    code, _, err = run(capsys, *args[:-1], __file__, "--dry-run")
    assert code == 2
    assert err.startswith(f"error: {__file__} is a file; --out must be a folder")
    code, _, err = run(capsys, "eval", tmp_path / "s")
    assert code == 2
    assert re.search(
        r"s is a folder of several runs; name one of them: optim.lr=0.01-seed1, optim.lr=0.01-seed2, ", err
    )


def test_a_failed_run_of_a_sweep_is_said_and_is_exit_code_1(capsys, tmp_path):
    (tmp_path / "seed2").mkdir()
    (tmp_path / "seed2" / "thesis.tex").write_text("x")
    code, out, _ = run(capsys, "sweep", *SHORT, "--seeds", "1-2", "--out", tmp_path)
    assert code == 1
    assert "seed2 failed: " in out
    assert "is not a run directory" in out
    assert "1 of 2 seeds (1 failed)" in out


def test_held_out_images_are_in_the_tables(capsys, tmp_path):
    code, out, err = run(capsys, "train", *SHORT, "--set", "data.validation=0.1", "--seeds", "1-2", "--out", tmp_path)
    assert code == 0, err
    assert re.search(r"run +val error +test error +train loss", out)
    found = [json.loads((tmp_path / f"seed{seed}/summary.json").read_text()) for seed in (1, 2)]
    for seed, summary in zip((1, 2), found, strict=True):
        assert re.search(rf"seed{seed} +{summary['val_error']:.2%} +{summary['test_error']:.2%} ", out)
    assert re.search(r"2 of 2 seeds, val error [\d.]+ \+- [\d.]+ %, test error [\d.]+ \+- [\d.]+ %", out)


def test_a_finished_run_gets_the_tensorboard_files_that_it_lacks(capsys, tmp_path):
    pytest.importorskip("tensorboard")
    args = ["train", *SHORT, "--out", tmp_path]
    assert run(capsys, *args)[0] == 0
    assert not (tmp_path / "tensorboard").exists()
    assert run(capsys, *args, "--tensorboard")[0] == 0
    (written,) = (tmp_path / "tensorboard").iterdir()
    assert run(capsys, *args, "--tensorboard")[0] == 0
    assert list((tmp_path / "tensorboard").iterdir()) == [written], "they are there: nothing is added"


def test_recipes_are_listed_and_their_fields_explained(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert "digits/resnet20_nobn_lastbn" in out
    assert "MNIST, 8-layer MLP of 24 units, plain" in out
    out = run(capsys, "recipes", "--schema")[1]
    assert "  nesterov           true or false, default false: Nesterov's momentum" in out.splitlines()
    assert json.loads(run(capsys, "recipes", "--schema", "--json")[1])["title"] == "Recipe"


def test_a_dry_run_takes_a_step_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "train", *TINY, "--set", "probe.every=1", "--dry-run")
    assert code == 0
    assert "1,437 training and 360 test images" in out
    assert re.search(r"step 1   of 330: loss \d\.\d+, gradient norm [\d.]+, [\d.]+ m?s, 4 layers probed", out)
    first = json.loads(run(capsys, "train", *TINY, "--dry-run", "--json")[1])
    assert not list(tmp_path.iterdir()), "nothing is written"
    run(capsys, "train", *TINY, "--max-steps", "1", "--out", "real", "--set", "log_every=1")
    line = json.loads((tmp_path / "real" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == line["loss"], "it is the step that the training takes"


def test_a_dry_run_finds_what_is_wrong(capsys, tmp_path):
    code, _, err = run(capsys, "train", "cifar10/resnet20", "--dry-run", "--data-root", tmp_path)
    assert code == 2
    assert "cifar10" in err


def test_a_dry_run_that_diverges_says_where_and_is_exit_code_3(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "train", *TINY, "--set", "model.init=scaled:1e20", "--dry-run")
    assert code == 3
    assert re.fullmatch(r"error: diverged: the loss of step 0 is not finite, first in layers\.\d\.linear\n", err)


def test_a_diverged_run_is_evaluated_again_as_strict_json(capsys, tmp_path):
    wild = ("--set", "optim.lr=1e30", "--set", "on_divergence=record", "--out", tmp_path / "run")
    run(capsys, "train", *SHORT, *wild)
    code, out, _ = run(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)["loss"] is None


def test_a_run_whose_probe_measured_no_layer_ends_with_its_table(capsys, tmp_path):
    frozen = ["--set", "model.name=cifar_resnet8", "--set", "freeze=['conv1.*', 'bn1.*']", "--set", "probe.every=1"]
    words = ["train", *SHORT, *frozen, "--set", "probe.layers=['conv1']", "--out", tmp_path / "run"]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert re.search(r"cifar_resnet8 +[\d.]+% +[\d.]+ +[\d.]+( s)? *\n", out), "no lambda_max, no kappa"


def test_a_plan_prints_every_quantity(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "train", "cifar10/resnet20", "--plan", "--gpu", "a100", "--gpus", "8")
    assert code == 0
    labels = [line.split()[0] for line in out.splitlines()]
    assert labels == ["model", "device", "steps", "FLOPs", "memory", "sent", "time"]
    assert "8 x a100, 16-bit, taken to reach 35% of its peak FLOP/s and 70% of its bandwidth" in out
    assert "62,400: 390 an epoch of 50,000 images, 128 a step, 16 at once" in out
    assert "1.89 MB a step and device" in out  # 2 * 7/8 * 4 * 269,722
    assert not list(tmp_path.iterdir())
    code, out, err = run(capsys, "train", "cifar10/resnet20", "--plan", "--seeds", "1-5", "--tensorboard")
    assert (code, out.splitlines()[-1].split()[:6]) == (0, ["runs", "5,", "one", "after", "the", "other:"])
    assert err == "note: --tensorboard is of a training; --plan and --dry-run write nothing\n"
    plan = json.loads(run(capsys, "train", "cifar10/resnet20", "--plan", "--json", "--seeds", "1-3")[1])
    assert plan["device"].startswith("cpu, ")
    assert plan["steps"] == 62_400
    assert (plan["runs"], plan["seconds_of_all_runs"]) == (3, 3 * plan["seconds"])


def test_a_plan_says_where_it_does_not_fit(capsys):
    words = ("train", "cifar10/resnet20", "--plan", "--set", "data.batch_size=50000", "--gpu")
    for gpu, fits in (("h200", True), ("t4", False)):
        _, out, _ = run(capsys, *words, gpu)
        memory = next(line for line in out.splitlines() if line.startswith("memory"))
        assert memory.endswith("  DOES NOT FIT") is not fits


def test_eval_of_a_run_and_of_its_release_are_as_recorded(capsys, tmp_path):
    trained = tmp_path / "run"
    run(capsys, "train", *SHORT, "--out", trained)
    code, out, _ = run(capsys, "eval", trained)
    assert code == 0
    assert re.fullmatch(r"test error [\d.]+% \(\d+ of 360 wrong\), loss [\d.]+, as recorded\n", out)
    summary = json.loads((trained / "summary.json").read_text())
    (trained / "summary.json").write_text(json.dumps(summary | {"test_correct": summary["test_correct"] + 1}))
    code, out, _ = run(capsys, "eval", trained)
    assert code == 1
    assert re.search(r"; recorded: \d+ of 360 wrong", out)
    code, _, err = run(capsys, "eval", trained, "--data", "mnist")
    assert code == 2
    assert "data: got 'mnist', it was trained and is evaluated on 'digits'; leave --data out" in err
    summary = json.loads((trained / "summary.json").read_text())
    (trained / "summary.json").write_text(json.dumps(summary | {"test_correct": summary["test_correct"] - 1}))
    assert run(capsys, "eval", trained / "model.safetensors")[0] == 0, "a file of the run stands for it"
    code, _, err = run(capsys, "eval", next((trained / "checkpoints").glob("*.safetensors")))
    assert code == 2
    assert f"is a state that the run {trained} goes on from, no checkpoint; give the run" in err
    torch.save({"fc.weight": torch.zeros(2)}, trained / "best.pt")
    code, _, err = run(capsys, "eval", trained / "best.pt")
    assert code == 2, "another file does not"
    assert "best.pt" in err
    assert "condzoo convert" in err


@pytest.mark.real_data
def test_eval_of_a_released_name_is_as_recorded(capsys, data_root):
    found = json.loads(run(capsys, "eval", "mlp8x24_bn", "--data-root", data_root, "--json")[1])
    assert (found["correct"], found["total"]) == (found["recorded_correct"], 10_000)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("train", *TINY, "--seed", "1", "--seeds", "1-2"), "error: train takes --seed N or --seeds 1-5, not both"),
        (("train", *TINY, "--seeds", "5-1"), "error: seeds '5-1': must be like 1-5 or 1,3,7"),
        (("train", *TINY, "--seeds", "abc", "--dry-run"), "error: seeds 'abc': must be like 1-5 or 1,3,7"),
        (("train", *TINY, "--plan", "--dry-run"), "error: train takes --plan or --dry-run, not both"),
        (
            ("train", *TINY, "--gpu", "a100"),
            "error: --gpu and --gpus are what --plan plans for; a training takes --device",
        ),
        (("train", *TINY, "--json"), "error: --json goes with --plan or --dry-run; a training writes OUT/summary.json"),
        (
            ("eval", "mlp8x24.nope"),
            "error: mlp8x24.nope is neither a run directory nor a checkpoint's folder here; "
            "unknown tag 'nope' of mlp8x24; released: mlp8x24.mnist",
        ),
        (("train", *TINY, "--plan", "--gpus", "0"), "error: gpus: got 0, must be from 1 to data.batch_size (64)"),
        (
            ("sweep", *TINY, "--grid", "freeze=['layers.0*'],['layers.0?*']"),
            "error: grid: \"freeze=['layers.0?*']-seed1\" and another run would both be in "
            "'freeze=_layers.0_-seed1'; sweep them apart",
        ),
        (("sweep", *TINY, "--seeds", ""), "error: seeds '': must be like 1-5 or 1,3,7"),
        (("reproduce", "thm1", "--seeds", ""), "error: seeds '': must be like 1-5 or 1,3,7"),
        (("sweep", *TINY, "--shard", "5/4"), "error: shard '5/4': must be I/N with I from 1 to N, e.g. 2/4"),
        (("sweep", *TINY, "--engine", "slurm"), "error: engine: got 'slurm', must be one of: local, ray"),
        (("sweep", *TINY, "--grid", "optim.lr=a"), "error: optim.lr=a-seed1: optim.lr: got 'a', must be a number"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, args, text):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *args)
    assert code == 2
    assert err.strip() == text
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_ctrl_c_among_several_seeds_saves_and_the_same_command_goes_on(capsys, tmp_path, command):
    args = [command, *TINY, "--set", "epochs=5", "--seeds", "1-2", "--device", "cpu"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(capsys, *args, "--out", whole)
    ended = interrupted([*args, "--out", str(broken)], "[2/2]", tmp_path)
    assert ended.code == 75, ended
    assert re.fullmatch(r"stopped by SIGINT at step \d+; run the same command to go on\n", ended.err)
    assert not (broken / "summary.json").exists()
    code, out, _ = run(capsys, *args, "--out", broken)
    assert code == 0
    assert "[1/2]" not in out
    assert weights(broken) == weights(whole)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_reaches_the_command_as_it_is_started(tmp_path):
    command = [sys.executable, "-m", "condzoo", "train", *TINY, "--set", "epochs=1000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75
    assert re.fullmatch(r"stopped by SIGINT at step \d+; run the same command to go on\n", err)


def weights(folder: Path) -> list[bytes]:
    """The final weights of every run in a folder."""
    found = [path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))]
    assert len(found) == 2
    return found
