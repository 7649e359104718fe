"""Paths as users write them, and files that are written whole."""

import os
from pathlib import Path

import pytest

from condzoo.probe.files import expanded, write_whole


def test_only_a_tilde_in_front_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/a") == Path("/home/me/a")
    for path in ("a/~/b", "./~", "~nobody-has-this-name/a"):
        assert expanded(path) == Path(path)


def test_a_pipe_is_written_into(tmp_path):
    """As `| jq` and `>(jq)` are, whose paths lead to none: /proc/1/fd/pipe:[2]."""
    reads, writes = os.pipe()
    try:
        (tmp_path / "link").symlink_to(f"/dev/fd/{writes}")
        for path in (Path(f"/dev/fd/{writes}"), tmp_path / "link"):
            write_whole(path, b"content")
            assert os.read(reads, 99) == b"content"
    finally:
        os.close(reads)
        os.close(writes)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_folder_is_no_file(tmp_path):
    for path in (tmp_path, Path("/")):
        with pytest.raises(IsADirectoryError, match=f"'{path}'$"):
            write_whole(path, b"content")


def test_a_private_file_stays_private(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    path.chmod(0o600)
    write_whole(path, b"content")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"content", 0o600)
