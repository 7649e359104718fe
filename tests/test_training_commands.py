"""`condzoo train`, `sweep`, `eval` and `recipes` as a person meets them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from condzoo.cli import main

CHANGES = ("model.name=mlp4x24", "data.resize=8", "probe.every=0")
TINY = ["digits/resnet20_nobn_lastbn", *(word for change in CHANGES for word in ("--set", change))]
SHORT = [*TINY, "--max-steps", "3", "--device", "cpu"]


def run(capsys, *args):
    """Call the command in this process; returns (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_several_seeds_end_in_mean_and_deviation(capsys, tmp_path):
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
    code, out, _ = run(capsys, "train", *SHORT, "--set", "probe.every=2", "--seeds", "1-3", "--out", tmp_path)
    assert code == 0
    assert "[2/3]" not in out, "finished seeds are not trained again"


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
    code, out, _ = run(capsys, *args)
    assert re.search(r"optim.lr=0.1: 2 of 2 seeds, test error [\d.]+ \+- [\d.]+ %", out)
    assert "4 runs, 0 left to do" in run(capsys, *args, "--dry-run")[1]


def test_a_failed_run_of_a_sweep_is_said_and_is_exit_code_1(capsys, tmp_path):
    (tmp_path / "seed2").mkdir()
    (tmp_path / "seed2" / "thesis.tex").write_text("x")
    code, out, _ = run(capsys, "sweep", *SHORT, "--seeds", "1-2", "--out", tmp_path)
    assert code == 1
    assert "seed2 failed: " in out
    assert "is not a run directory" in out
    assert "1 of 2 seeds (1 failed)" in out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("train", *TINY, "--seed", "1", "--seeds", "1-2"), "error: train takes --seed N or --seeds 1-5, not both"),
        (("train", *TINY, "--seeds", "5-1"), "error: seeds '5-1': must be like 1-5 or 1,3,7"),
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
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_ctrl_c_among_several_seeds_saves_and_the_same_command_goes_on(capsys, tmp_path, command):
    args = [command, *TINY, "--set", "epochs=5", "--seeds", "1-2", "--device", "cpu"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(capsys, *args, "--out", whole)
    process = subprocess.Popen(
        [sys.executable, "-m", "condzoo", *args, "--out", str(broken)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("[2/2]"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, (seen, err)
    assert re.fullmatch(r"stopped by SIGINT at step \d+; run the same command to go on\n", err)
    assert not (broken / "summary.json").exists()
    code, out, _ = run(capsys, *args, "--out", broken)
    assert code == 0
    assert "[1/2]" not in out
    assert weights(broken) == weights(whole)


def weights(folder: Path) -> list[bytes]:
    """The final weights of every run in a folder."""
    found = [path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))]
    assert len(found) == 2
    return found
