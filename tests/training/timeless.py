"""What a run has written down, without what the clock decides: the same of every run of a recipe."""

import json
from pathlib import Path
from typing import Any

TIMES = ("seconds", "test_seconds", "val_seconds", "images_per_second", "finished")


def timeless(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's .jsonl file, or its .json file as one."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
