"""The command line as a person meets it: what it prints, and how it fails."""

import atexit
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import typer

from condzoo import cli, exit_codes
from condzoo.catalog import list_models
from condzoo.cli import app, exit_code, main
from tests.forked_command import interrupted


def run(capsys, *args):
    """Call the command in this process; returns (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_ctrl_c_as_python_ends_is_no_traceback(monkeypatch, capsys):
    """matplotlib's and torch's functions that are called then were interrupted, and said so after a finished run."""
    ending, handler = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(atexit, "register", lambda function, *args: ending.append((function, args)))
    for code, arguments in ((0, ["--version"]), (2, ["info", "nothing"])):
        assert run(capsys, *arguments)[0] == code
        assert signal.getsignal(signal.SIGINT) is handler, "the process may go on"
        function, args = ending.pop()
        try:
            function(*args)
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, handler)


COMMANDS = [
    "list",
    "info",
    "recipes",
    "train",
    "sweep",
    "eval",
    "probe",
    "validate",
    "plot",
    "release",
    "verify",
    "convert",
    "reproduce",
]


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)


def test_the_version_is_the_packages(capsys):
    assert run(capsys, "--version") == (0, f"condzoo {version('condzoo')}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_that_explains_its_options(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    parsed = typer.main.get_command(app).commands[command]
    assert parsed.help
    assert [parameter.name for parameter in parsed.params if not parameter.help] == []
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    options = [option for parameter in parsed.params for option in parameter.opts if option.startswith("--")]
    assert [option for option in options if option not in out] == []


def test_a_path_is_printed_as_it_is_whatever_it_means_to_rich(capsys, tmp_path):
    out_folder = tmp_path / "lr[/a]:x:[bold]"
    changes = ("--set", "model.name=mlp4x24", "--set", "data.resize=8", "--set", "probe.every=0")
    words = ("digits/resnet20_nobn_lastbn", *changes, "--max-steps", "2", "--device", "cpu", "--out", str(out_folder))
    code, out, err = run(capsys, "train", *words)
    assert (code, err) == (0, "")
    assert out.count(str(out_folder)) == 2, "as the run begins, and under its table"


def test_list_as_json_is_strict_and_complete(capsys):
    code, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["name"] for row in rows] == list_models()
    assert {"name", "family", "params", "macs"} <= set(rows[0])


def test_info_prints_the_fields(capsys):
    code, out, _ = run(capsys, "info", "cifar_resnet20_lastbn")
    assert code == 0
    assert "269,850" in out
    assert "3 x 32 x 32" in out


@pytest.mark.parametrize(
    ("name", "weights", "released"),
    [
        (
            "cifar_resnet20_lastbn",
            "cifar_resnet20_lastbn.authors (default), cifar_resnet20_lastbn.modern",
            ["cifar_resnet20_lastbn.authors", "cifar_resnet20_lastbn.modern"],
        ),
        ("cifar_vgg16.modern", "cifar_vgg16.modern", ["cifar_vgg16.modern"]),
        ("cifar_resnet14", "none released", []),
        ("mlp12x64_bn", "none released", []),
        ("resnet18", "timm's: timm.list_pretrained('resnet18.*')", []),
    ],
)
def test_info_says_which_weights_are_released(capsys, name: str, weights: str, released: list[str]):
    _, out, _ = run(capsys, "info", name)
    assert f"weights      {weights}" in out.splitlines()
    _, out, _ = run(capsys, "info", name, "--json")
    assert json.loads(out)["released"] == released


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("info", "resnet50_lastbm"), "error: unknown model 'resnet50_lastbm'; did you mean 'resnet50_lastbn'?"),
        (("info", "cifar_resnet57"), "error: depth must be 6n + 2, got 57; nearest are 56 and 62"),
        (("list", "nothing*"), "error: no model matches 'nothing*'\n"),
        (("list", "resnet20"), "error: no model matches 'resnet20'; '*resnet20*' does\n"),
        (("list", "--family", "vgg"), "error: unknown family 'vgg'; one of: "),
        (("train", "no/such.toml"), "error: no recipe 'no/such.toml'"),
        (("eval", "no/such/run"), "no/such/run"),
        (("plot", "no/such/run"), "error: no conditioning records at no/such/run"),
        (
            ("probe", "no/such/mlp8x24.mine"),
            "error: no/such/mlp8x24.mine is neither a run directory nor a checkpoint's",
        ),
        (("probe", "cifar_resnet20", "--data", "cifar"), "unknown data set 'cifar'; did you mean 'cifar10'?"),
        (("sweep", "digits/resnet20_nobn", "--gpus-per-run", "-1"), "error: Invalid value for '--gpus-per-run': "),
        (("probe", "resnet18_lastbn", "--data-root", "no/such"), "error: no class folders were found"),
        (("probe", "resnet18_lastbn", "--data", "hfds"), "error: data set 'hfds': which one is missing; a recipe says"),
        (("train", "digits/resnet20_nobn_lastbn", "--seed", "-1"), "resnet20_nobn_lastbn: seed: got -1, must be"),
        (("probe", "mlp4x24", "--seed", str(2**63)), "error: Invalid value for '--seed': "),
        (("validate", "mlp4x24", "--seed", str(2**63)), "error: Invalid value for '--seed': "),
        (("probe", "mlp4x24", "--batches", "1" + "0" * 30), "error: Invalid value for '--batches': "),
        (("validate",), "error: validate takes a model's name, or --all"),
        (("verify",), "error: verify takes a checkpoint's name or folder, or --all"),
        (("convert", "weights.pt"), "error: convert takes FILE --model NAME, or timm/NAME --last-bn"),
        (("eval", __file__), "test_cli.py --model NAME` makes a checkpoint of weights in one"),
        (("release", "no/such/run", "--tag", "x"), "error: no/such/run holds no finished run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, args, text):
    code, _, err = run(capsys, *args)
    assert code == 2
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize(("pattern", "code"), [("mlp4x24", 0), ("nothing_of_the_kind", 2)])
def test_a_process_without_standard_streams_does_its_work(pattern, code):
    """Some daemons start theirs so: there is nowhere to print to, and sys.stdout is None."""
    command = shlex.join([sys.executable, "-m", "condzoo", "list", pattern])
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], timeout=120).returncode == code


def test_a_command_whose_reader_has_left_keeps_its_exit_code(monkeypatch):
    """`condzoo sweep ... | head`, where a run failed: what is left to print is flushed before the processes part."""

    class Unread(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    importlib.import_module("condzoo.training.distributed")  # as a training has done
    monkeypatch.setattr(sys, "stdout", Unread())
    monkeypatch.setattr(cli, "app", lambda args, standalone_mode: exit_codes.CHECK_FAILED)
    with pytest.raises(SystemExit) as ended:
        main(["sweep"])
    assert ended.value.code == exit_codes.CHECK_FAILED


def test_an_unforeseen_error_keeps_its_traceback():
    assert exit_code(ZeroDivisionError()) is None
    assert exit_code(ValueError("x")) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which "
                "1.2 GiB is free.\nSee documentation for Memory Management"
            ),
            "CUDA out of memory. Tried to allocate 2.50 GiB; use a smaller data.batch_size, or a larger accumulate",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "DataLoader worker (pid 7) is killed by signal: Bus error; use fewer data.workers, or give them more "
            "memory (/dev/shm, in a container --shm-size)",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly; use fewer data.workers, or give them more memory "
            "(/dev/shm, in a container --shm-size)",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes; use a smaller "
            "data.batch_size, or a larger accumulate",
        ),
        (
            MemoryError("Unable to allocate 711. PiB for an array with shape (9,) and data type float64"),
            "Unable to allocate 711. PiB for an array with shape (9,) and data type float64; use a smaller "
            "data.batch_size, or a larger accumulate",
        ),
        (
            MemoryError(),
            "too little memory; use a smaller data.batch_size, or a larger accumulate",
        ),
    ],
    ids=["GPU", "shared memory", "killed", "CPU", "NumPy", "Python"],
)
def test_too_little_memory_is_one_line_that_names_what_helps(capsys, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("condzoo.cli.app", fail)
    assert run(capsys, "train", "x") == (2, "", f"error: {message}\n")
    there = re.sub("; use a smaller data.*", "", message)
    assert run(capsys, "eval", "x") == (2, "", f"error: {there}\n"), "which has no batch size"
    there += "; use a smaller --batch-size" if there != message else ""
    assert run(capsys, "probe", "x") == (2, "", f"error: {there}\n")
    assert exit_code(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ("InvalidCxxCompiler: No working C++ compiler found in ...cpp.cxx: (None, '')", "install one, or set"),
        ("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found", "install one, or set"),
        ("RuntimeError: something else", "set"),
    ],
)
def test_a_network_that_is_not_compiled_is_one_line(capsys, monkeypatch, said, end):
    def fail(*args, **kwargs):
        raise BackendCompilerFailed(f"{said}\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

    class TorchDynamoException(RuntimeError):
        """Called as torch's own, whose import takes seconds."""

    class BackendCompilerFailed(TorchDynamoException):
        pass

    monkeypatch.setattr("condzoo.cli.app", fail)
    told = said.splitlines()[-1]
    assert run(capsys, "train", "x") == (2, "", f"error: compile: {told}; {end} compile = false\n")


def test_probe_measures_a_model_on_digits(capsys, tmp_path):
    out = tmp_path / "c.json"
    args = (
        "--data",
        "digits",
        "--batches",
        "1",
        "--batch-size",
        "32",
        "--out",
        str(out),
        "--plot",
        str(tmp_path / "c.png"),
    )
    code, printed, err = run(capsys, "probe", "mlp4x24_bn", *args)
    assert code == 0, err
    assert "fc" in printed
    assert "fc" in json.loads(out.read_text())["layers"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_python_dash_m_condzoo_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "condzoo", "info", "mlp8x24"], capture_output=True, text=True, check=True
    )
    assert "7,330" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_ctrl_c_saves_and_the_same_command_goes_on(capsys, tmp_path):
    """A SIGINT in the middle: exit code 75, no traceback, and the second call ends where an unbroken run does."""
    args = ["train", "digits/resnet20_nobn_lastbn"]
    for change in ("data.resize=8", "probe.every=0", "epochs=1000"):  # more than it trains before the signal comes
        args += ["--set", change]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ended = interrupted([*args, "--out", str(broken)], "epoch 1/", tmp_path)
    assert ended.code == 75, ended
    stopped = re.fullmatch(r"stopped by SIGINT at step (\d+); run the same command to go on\n", ended.err)
    assert stopped, ended
    for folder in (broken, whole):
        code, _, err = run(capsys, *args, "--max-steps", str(int(stopped[1]) + 3), "--out", str(folder))
        assert code == 0, err
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_help_joins_the_lines_of_a_paragraph_and_keeps_wildcards(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for args, text in (
        (("validate", "--help"), "scale invariance (or Theorem 1), the last BN's bound"),
        (("list", "--help"), "'*resnet20*'"),
        (("reproduce", "--help"), "'*-20*'"),
    ):
        with pytest.raises(SystemExit):
            main(list(args))
        assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("probe", "cifar_resnet20_lastbn.nosuch"), "error: unknown tag 'nosuch' of cifar_resnet20_lastbn"),
        (("info", "mlp8x24.nosuch"), "error: unknown tag 'nosuch' of mlp8x24"),
        (("probe", "mlp8x24.mnist", "--init", "he"), "error: --init is for new weights; mlp8x24.mnist"),
        (("probe", "mlp4x24", "--data", "digits", "--device", "gpu"), "error: device 'gpu' cannot be used here"),
        (("validate", "efficientnet_b0"), "error: efficientnet_b0 is not a network of the zoo"),
        (("info", "mlp4x99999999999"), "error: 'mlp4x99999999999': at most 10,000 layers, of 1,0"),
        (("convert", "timm/resnet18.nosuch", "--last-bn"), "error: timm has no weights 'resnet18.nosuch'; did"),
        (("convert", "timm/resnet18d.x", "--last-bn"), "error: timm has no weights 'resnet18d.x'"),
    ],
)
def test_names_and_tags_that_are_not_there_are_one_line(capsys, args, text):
    code, _, err = run(capsys, *args)
    assert code == 2
    assert text in err
    assert len(err.strip().splitlines()) == 1


def test_a_damaged_run_is_one_line(capsys, tmp_path):
    args = ("digits/resnet20_nobn_lastbn", "--set", "model.name=mlp4x24", "--set", "data.resize=8")
    code, _, err = run(capsys, "train", *args, "--max-steps", "2", "--out", str(tmp_path / "run"), "--device", "cpu")
    assert code == 0, err
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    for command in ("eval", "probe"):
        code, _, err = run(capsys, command, str(tmp_path / "run"))
        assert code == 2
        assert "model.safetensors is not a readable safetensors file" in err


@pytest.mark.parametrize(("option", "value"), [("--max-steps", "many"), ("--seed", "1.5"), ("--max-steps", "-3")])
def test_a_wrong_value_of_an_option_is_named_whatever_the_version_of_typer(capsys, option, value):
    code, _, err = run(capsys, "train", "digits/resnet20_nobn", option, value)
    assert code == 2
    assert value in err.replace(option, "")
    assert "Input should be" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["info"], "error: Missing argument 'name'; see `"),
        (["train", "x", "--seeed", "1"], "error: No such option: --seeed"),
        (["train", "x", "--seed", "x"], "error: Invalid value for '--seed': "),
        (["trian"], "error: No such command 'trian'"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_where_help_is(capsys, args, message):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert err.endswith(" --help`\n")
