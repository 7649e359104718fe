"""Two short real trainings, and the checkpoint released from them: made once, copied by the tests that change them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from condzoo.checkpoints.folder import read_folder, write_sums
from condzoo.checkpoints.model_card import model_card
from condzoo.models import released
from condzoo.release import release
from condzoo.training import reports, train

RECIPE = """
epochs = 2
[model]
name = "mlp4x24_bn"
[data]
name = "digits"
batch_size = 256
resize = 12
[optim]
name = "sgd"
lr = 0.1
momentum = 0.9
[probe]
every = 5
"""


def claim_clean_source(run: Path) -> None:
    """Say in a run's record that its source was committed, whatever the state of the tree the tests run in."""
    parts = json.loads((run / "environment.json").read_text())
    for part in parts:
        part["source"] = {"commit": "0123456789abcdef0123456789abcdef01234567", "changed": False}
    (run / "environment.json").write_text(json.dumps(parts))


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run directories of seeds 3 and 2, in this order; read only."""
    root = tmp_path_factory.mktemp("runs")
    (root / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "plot_records", lambda records, picture: picture.touch())  # the release is drawn
        paths = [train(root / "recipe.toml", out=root / f"seed{seed}", seed=seed, device="cpu").path for seed in (3, 2)]
    for path in paths:
        claim_clean_source(path)
    return paths


@pytest.fixture
def runs(finished_runs: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the runs that a test may damage."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in finished_runs]


@pytest.fixture(scope="session")
def made_checkpoint(finished_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder mlp4x24_bn.digits; read only."""
    return release(finished_runs, "digits", out=tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def checkpoint(made_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(made_checkpoint, tmp_path / made_checkpoint.name))


@pytest.fixture
def index(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of the package's with this one release, found in the cache only; the Hub fails the test."""
    file = tmp_path / "released.toml"
    cfg = json.loads((checkpoint / "config.json").read_text())["pretrained_cfg"]
    digest = released.sha256((checkpoint / "model.safetensors").read_bytes())
    fields = "".join(f"{key} = {cfg[key]}\n" for key in ("mean", "std", "crop_pct", "num_classes", "input_size"))
    file.write_text(f'["{checkpoint.name}"]\nsha256 = "{digest}"\ndefault = true\n{fields}')
    monkeypatch.setattr(released, "INDEX", file)
    (checkpoint / "README.md").write_text(model_card(read_folder(checkpoint)))  # as of a release: by its name, too
    write_sums(checkpoint)
    monkeypatch.setenv(released.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(released, "download", lambda *arguments: pytest.fail("the Hub was asked"))
    (tmp_path / "cache").mkdir()
    checkpoint.parent.joinpath("cache", "checkpoints").mkdir()
    shutil.copytree(checkpoint, tmp_path / "cache" / "checkpoints" / checkpoint.name)
    return file


@pytest.fixture
def images() -> torch.Tensor:
    """Four images that suit mlp4x24_bn, [4, 1, 12, 12]."""
    return torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
