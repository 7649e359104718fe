"""Every command and snippet of the README and command of docs/recipes.md runs; the table of models is up to date."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from condzoo.catalog import markdown_table
from condzoo.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands_of(page: str) -> list[str]:
    """The lines that a page gives for a shell, without their prompts."""
    blocks = re.findall(r"```console\n(.*?)```", page, re.S)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


COMMANDS = commands_of(README)
TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
SNIPPETS, TRAINING_SNIPPETS = (re.findall(r"```python\n(.*?)```", page, re.S) for page in (README, TRAINING))
TRAININGS = ("condzoo train", "condzoo sweep")
MADE = ("make demo", "make test")


def run(command: str, capsys: pytest.CaptureFixture[str], probed: bool = True) -> str:
    """Run a `condzoo ...` line of the README, in this process (starting one costs seconds).

    Trainings are cut short; without the probe they draw no pictures, which take longer than they do.
    """
    args = shlex.split(command)
    assert args[0] == "condzoo"
    if command.startswith(TRAININGS):
        args += ["--max-steps", "3", "--set", f"probe.every={2 if probed else 0}"]
    with pytest.raises(SystemExit) as stop:
        main(args[1:])
    out, err = capsys.readouterr()
    assert stop.value.code in (0, None), f"{command}: exit {stop.value.code}\n{err}"
    return out


def test_the_readme_has_what_these_tests_run():
    assert len(SNIPPETS) == 2
    assert set(MADE) < set(COMMANDS)
    assert len(COMMANDS) >= 14


def test_the_trainings_from_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet, tuning = TRAINING_SNIPPETS
    found = {}
    exec(compile(snippet, "docs/training.md", "exec"), found)
    assert [run.summary["status"] for run in (found["run"], *found["runs"])] == ["done"] * 5
    assert found["run"].summary["epochs"] == 1
    assert not found["model"].training
    exec(compile(tuning, "docs/training.md", "exec"), found)
    assert found["model"].get_classifier().out_features == 7
    assert found["probe"].latest["fc"].output_grad.lambda_max > 0


def test_the_commands_without_real_data_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [c for c in COMMANDS if c not in MADE and "--data-root" not in c]
    for command in commands:
        out = run(command, capsys, probed="--seeds" not in command)  # the demo's sweep has its pictures
        assert out.strip()
    assert (tmp_path / "comparison.png").exists()
    assert (tmp_path / "mlp.png").exists()


def test_the_commands_of_the_page_on_recipes_run_in_their_order(tmp_path, monkeypatch, capsys):
    """Trainings are of a smaller network."""
    monkeypatch.chdir(tmp_path)
    commands = commands_of((ROOT / "docs/recipes.md").read_text(encoding="utf-8"))
    assert len(commands) == 7
    for command in commands:
        small = " --set model.name=cifar_resnet8_nobn_lastbn" if command.startswith(TRAININGS) else ""
        assert run(command + small, capsys, probed=False).strip()


@pytest.mark.real_data
def test_the_commands_on_real_data_run(tmp_path, data_root, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [c for c in COMMANDS if "--data-root" in c]
    assert len(commands) == 2
    (tmp_path / "data").symlink_to(data_root)
    for command in commands:
        assert "test error" in run(command, capsys)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", MADE)
def test_the_make_targets_exist_and_call_what_they_say(command):
    planned = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("condzoo sweep" if command == "make demo" else "-m pytest") in planned


def test_what_make_demo_runs_ends_in_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    planned = subprocess.run(["make", "demo", "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = next(line for line in planned.splitlines() if "condzoo sweep" in line).split("-m ", 1)[1]
    assert commands_of((ROOT / "docs/demo.md").read_text(encoding="utf-8")) == [command]
    out = run(command, capsys)
    assert "cifar_resnet20_nobn_lastbn" in out
    assert "picture: runs/demo/conditioning.png" in out
    assert (tmp_path / "runs/demo/conditioning.png").exists()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["zoo", "probe"])
def test_the_snippets_run_as_pasted(snippet, tmp_path, monkeypatch, capsys):
    """As pasted, but for timm's download: pretrained=True builds the same network without reading the network."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_table_of_models_is_up_to_date():
    between = re.search(r"<!-- models.*?-->\n(.*?)<!-- /models -->", README, re.S)
    assert between is not None
    assert between[1].strip() == markdown_table(), "python -m condzoo.catalog prints the table"
