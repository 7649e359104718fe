"""The snippets of docs/probe.md run, one after the other, as they stand there."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "probe.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_the_snippets_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(snippet, str(PAGE), "exec"), names)
    assert Path("conditioning.json").exists()
    assert Path("runs/x/conditioning.png").exists()
    assert Path("both.png").exists()
    assert set(names["columns"]["step"]) == {0, 10, 20}
