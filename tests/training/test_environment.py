"""What a run writes down of the machine, the packages and the source that it ran on."""

import json
import subprocess
from typing import Any

import PIL
import pytest
import torch

from condzoo.training import environment
from condzoo.training.environment import describe_environment
from condzoo.training.precision import Numerics


def test_the_packages_that_decode_images_are_among_them() -> None:
    packages = describe_environment(Numerics("fp32", False, torch.device("cpu")))["packages"]
    assert packages["pillow"] == PIL.__version__
    assert "datasets" in packages


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            subprocess.CalledProcessError(128, "git", stderr="fatal: dubious ownership\nTo add"),
            "fatal: dubious ownership",
        ),
        (subprocess.CalledProcessError(1, "git", stderr="\n"), "Command 'git' returned non-zero exit status 1."),
        # a warning before its time was over is no reason; it comes as bytes, whatever text was asked for
        (subprocess.TimeoutExpired("git", 10, stderr=b"warning: x"), "Command 'git' timed out after 10 seconds"),
        (FileNotFoundError(2, "No such file", "git"), "[Errno 2] No such file: 'git'"),
    ],
    ids=["told", "no word", "timeout", "no git"],
)
def test_a_git_that_does_not_tell_is_no_end_of_the_training(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "condzoo" / "training" / "environment.py"))
    monkeypatch.setattr(subprocess, "run", fail)
    found = environment._source()
    assert found == {"commit": None, "changed": None, "error": said}
    assert json.dumps(found)
