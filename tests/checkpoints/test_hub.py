"""Uploading, against a stand-in for huggingface_hub's client that keeps what it is given."""

import inspect
from pathlib import Path

import huggingface_hub
import pytest

from condzoo.checkpoints import load_checkpoint
from condzoo.checkpoints.hub import push


class Hub:
    """Takes uploads into a local folder; its two methods have parameters of the real client's."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id, *, repo_type, exist_ok):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        for name in allow_patterns:
            (self.root / repo_id / name).write_bytes((folder_path / name).read_bytes())


def test_what_is_pushed_loads_again(checkpoint, tmp_path, images):
    (checkpoint / ".hidden").write_text("not part of the checkpoint")
    upload = push(checkpoint, owner="someone", api=Hub(tmp_path / "hub"))
    assert (upload.repository, upload.done) == ("someone/mlp4x24_bn.digits", True)
    there = tmp_path / "hub" / upload.repository
    assert {path.name for path in there.iterdir()} == set(upload.files)
    assert (load_checkpoint(there)(images) == load_checkpoint(checkpoint)(images)).all()


def test_a_dry_run_uploads_nothing(checkpoint, tmp_path):
    upload = push(checkpoint, dry_run=True, api=Hub(tmp_path / "hub"))
    assert (upload.repository, upload.done) == ("condzoo/mlp4x24_bn.digits", False)
    assert not (tmp_path / "hub").exists()


def test_a_damaged_folder_is_not_pushed(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not as it was summed"):
        push(checkpoint, api=Hub(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_the_stand_in_is_called_as_the_real_client_is(method):
    real = inspect.signature(getattr(huggingface_hub.HfApi, method)).parameters
    assert set(inspect.signature(getattr(Hub, method)).parameters) <= set(real)
