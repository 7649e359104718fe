"""The snippets and commands of docs/checkpoints.md run, one after the other, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from condzoo.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_the_snippets_and_commands_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```(python|console)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            continue
        for line in text.splitlines():
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(line.removeprefix("$ condzoo ")))
            assert stop.value.code in (0, None), f"{line}: {capsys.readouterr().err}"
    assert names["other"].num_classes == 7
    assert Path("converted/cifar_resnet8.mine/model.safetensors").is_file()
    assert "True" in capsys.readouterr().out
