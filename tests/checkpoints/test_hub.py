"""Uploading and downloading: the real client against a local stand-in of the Hub's HTTP API, and a stand-in client."""

import importlib.util
import inspect
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch

from condzoo.checkpoints import load_checkpoint, verify_checkpoint
from condzoo.checkpoints.hub import push
from condzoo.cli import main
from condzoo.models import released

spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_server)
ORIGINAL_DOWNLOAD = released.download  # the fixture `index` puts one in its place that fails


@pytest.fixture
def hub(monkeypatch):
    """The stand-in server, and huggingface_hub's client pointed at it."""
    for name, value in (("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_standin")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub_server.serve() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield server


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own
def test_release_push_sends_every_file_over_http(hub, runs, tmp_path, capsys):
    command = ["release", *map(str, runs), "--tag", "digits", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--push", "--owner", "someone"])
    assert not stop.value.code
    assert "uploaded 9 files to someone/mlp4x24_bn.digits" in capsys.readouterr().out
    made = tmp_path / "out" / "mlp4x24_bn.digits"
    assert hub.files == {"someone/mlp4x24_bn.digits": {path.name: path.read_bytes() for path in made.iterdir()}}
    assert hub.tokens == {"Bearer hf_standin"}


def test_a_release_that_is_nowhere_here_is_fetched_over_http(hub, index, checkpoint, images, monkeypatch):
    shutil.rmtree(released.cache_folder() / checkpoint.name)
    hub.files[f"condzoo/{checkpoint.name}"] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    monkeypatch.setattr(released, "download", ORIGINAL_DOWNLOAD)
    model = load_checkpoint(checkpoint.name)
    assert torch.equal(model(images), load_checkpoint(checkpoint)(images))
    assert verify_checkpoint(checkpoint.name).ok
    assert (released.cache_folder() / checkpoint.name / "README.md").is_file()


def test_a_file_that_was_changed_on_the_hub_is_refused(hub, index, checkpoint, monkeypatch):
    shutil.rmtree(released.cache_folder() / checkpoint.name)
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    hub.files[f"condzoo/{checkpoint.name}"] = {"model.safetensors": bytes(content)}
    monkeypatch.setattr(released, "download", ORIGINAL_DOWNLOAD)
    with pytest.raises(ValueError, match="is not the released file: its SHA-256 differs; not kept"):
        load_checkpoint(checkpoint.name)
    assert list(released.cache_folder().iterdir()) == []


def test_processes_that_fetch_at_once_get_one_folder(index, checkpoint, monkeypatch):
    """The second waits, and finds what the first has brought."""
    shutil.rmtree(released.cache_folder() / checkpoint.name)
    brought = []

    def slow(repository, folder):
        brought.append(repository)
        time.sleep(0.2)
        shutil.copytree(checkpoint, folder)

    monkeypatch.setattr(released, "download", slow)
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: released.fetch(released.find_release("mlp4x24_bn", None)), range(4)))
    assert set(models) == {released.cache_folder() / checkpoint.name}
    assert brought == [f"condzoo/{checkpoint.name}"]


def test_a_repository_that_is_not_on_the_hub_is_one_clear_error(hub, index, checkpoint, monkeypatch):
    shutil.rmtree(released.cache_folder() / checkpoint.name)
    monkeypatch.setattr(released, "download", ORIGINAL_DOWNLOAD)
    with pytest.raises(FileNotFoundError, match=r"is in none of .*, and the Hub did not give it: .*404"):
        load_checkpoint(checkpoint.name)


@pytest.mark.parametrize("options", [("--dry-run",), ("--owner", "someone")])
def test_options_of_push_without_it_are_refused(runs, capsys, options):
    with pytest.raises(SystemExit) as stop:
        main(["release", str(runs[0]), "--tag", "digits", *options])
    assert stop.value.code == 2
    assert "--dry-run and --owner say how to --push" in capsys.readouterr().err


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


def test_a_push_that_failed_is_repeated_with_the_same_command(hub, runs, tmp_path, capsys, monkeypatch):
    command = ["release", *map(str, runs), "--tag", "digits", "--out", str(tmp_path / "out"), "--push"]

    def say(*options):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--owner", "someone", *options])
        return stop.value.code or 0, capsys.readouterr()

    code, said = say("--dry-run")
    assert code == 0
    assert "would upload 9 files to someone/mlp4x24_bn.digits\nREADME.md\nSHA256SUMS\n" in said.out
    with monkeypatch.context() as broken:
        broken.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: fail())
        code, said = say()
    assert code == 2
    assert "is made, but could not be uploaded to someone/mlp4x24_bn.digits: no route to host" in said.err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # huggingface_hub's own
        code, said = say()
    assert code == 0
    assert said.out.startswith("released before: ")
    assert len(hub.files["someone/mlp4x24_bn.digits"]) == 9


def test_a_release_that_was_stopped_before_it_was_listed_is_listed_as_it_is_pushed(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["release", *map(str, runs), "--tag", "digits", "--out", str(out), "--push", "--dry-run"]
    with monkeypatch.context() as broken:
        broken.setattr("condzoo.release.making.write_table", lambda root: fail())
        with pytest.raises(SystemExit) as stop:
            main(command)
    assert stop.value.code == 2
    assert not (out / "README.md").exists()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("released before: ")
    assert "[mlp4x24_bn.digits]" in (out / "README.md").read_text()


def test_a_release_becomes_the_default_and_is_pushed_again(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(released, "INDEX", tmp_path / "released.toml")
    (tmp_path / "released.toml").touch()
    monkeypatch.setattr("condzoo.release.making.in_repository", lambda target: True)
    out = tmp_path / "out"

    def say(tag, *options):
        with pytest.raises(SystemExit) as stop:
            main(["release", *map(str, runs), "--tag", tag, "--out", str(out), *options])
        return stop.value.code or 0, capsys.readouterr().out

    def default():
        return [name for name, made in released.read_index().items() if made.default]

    assert say("first")[0] == say("second")[0] == 0
    assert default() == ["mlp4x24_bn.first"]
    for _ in range(2):
        code, said = say("second", "--default", "--push", "--dry-run")
        assert code == 0
        assert "would upload 9 files to condzoo/mlp4x24_bn.second" in said
        assert default() == ["mlp4x24_bn.second"]
    assert said.startswith("released before: ")


def fail():
    raise ConnectionAbortedError("no route to host")
