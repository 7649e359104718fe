"""The checkpoints that come with condzoo: the index and the folders say the same, generated files are up to date."""

import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import timm
import torch

import condzoo
from condzoo.checkpoints import load_checkpoint, verify_checkpoint
from condzoo.checkpoints.folder import read_folder
from condzoo.checkpoints.model_card import model_card
from condzoo.checkpoints.overview import checkpoints_table
from condzoo.checkpoints.writing import checkpoint_folders_in
from condzoo.models.released import read_index, releases_of

ROOT = Path(__file__).parents[2] / "checkpoints"
GOLDEN = json.loads((Path(__file__).parent / "golden_keys.json").read_text())
WHEEL_BYTES = 30 * 2**20
NAMES = sorted(read_index())


def test_the_index_and_the_folders_name_the_same_releases():
    assert [folder.name for folder in checkpoint_folders_in(ROOT)] == NAMES
    assert sorted(condzoo.list_checkpoints()) == NAMES == sorted(condzoo.list_models(pretrained=True))


@pytest.mark.skipif(not (ROOT.parent / ".git").exists() or not shutil.which("git"), reason="no clone")
def test_no_clone_has_other_ends_of_lines_in_a_checkpoint():
    """Git for Windows has core.autocrlf on, and the sums are over bytes."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT.parent)]
    files = subprocess.run([*git, "ls-files", "checkpoints"], capture_output=True, check=True).stdout
    asked = [*git, "check-attr", "--stdin", "text"]
    said = subprocess.run(asked, input=files, capture_output=True, check=True).stdout.decode().splitlines()
    assert len(said) > len(NAMES)
    assert all(line.endswith(": text: unset") for line in said)


def test_there_is_one_default_a_model():
    for arch in {name.split(".")[0] for name in NAMES}:
        assert [release.default for release in releases_of(arch)].count(True) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_release_holds_what_it_claims_without_images(name, monkeypatch, tmp_path):
    """But for digits, which come with condzoo."""
    monkeypatch.setenv("CONDZOO_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verification = verify_checkpoint(name)
    assert verification.ok, verification.rows


@pytest.mark.real_data
@pytest.mark.parametrize("name", NAMES)
def test_a_release_is_as_accurate_and_as_conditioned_as_recorded(name, data_root):
    verification = verify_checkpoint(name, data_root=data_root)
    checks = {row.check: row.ok for row in verification.rows}
    assert checks["accuracy"] is checks["conditioning"] is True, verification.rows


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_keys_are_public_and_stay(name):
    assert list(load_checkpoint(name).state_dict()) == GOLDEN[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_model_card_is_up_to_date(name):
    assert (ROOT / name / "README.md").read_text() == model_card(read_folder(ROOT / name))


@pytest.mark.parametrize("name", ["cifar_resnet56_lastbn.modern", "mlp8x24_bn.mnist"])
def test_every_line_of_a_cards_code_loads_these_weights(name):
    code = (ROOT / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
    weights, scope, loaded = load_checkpoint(name).state_dict(), dict[str, object](), 0
    for line in code.replace("FOLDER", ROOT.as_posix()).splitlines():
        exec(line, scope)
        if line.startswith("model = "):
            found = scope["model"].state_dict()
            assert found.keys() == weights.keys()
            assert all(torch.equal(value, weights[key]) for key, value in found.items()), line
            loaded += 1
    assert loaded == 4


def test_the_table_of_all_is_up_to_date():
    assert (ROOT / "README.md").read_text() == checkpoints_table(checkpoint_folders_in(ROOT))


def test_what_the_wheel_carries_is_small():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    left_out = [ROOT.parent / name for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]]
    assert all(folder.parent == ROOT and folder.is_dir() for folder in left_out)
    carried = [path for path in ROOT.rglob("*") if path.is_file() and path.parent not in left_out]
    assert sum(path.stat().st_size for path in carried) < WHEEL_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_timm_lists_and_builds_it_by_its_tag(name):
    assert name in timm.list_models(pretrained=True)
    assert timm.is_model_pretrained(name.split(".")[0])
    model = timm.create_model(name, pretrained=True)
    assert model.pretrained_cfg["tag"] == name.split(".")[1]
    assert Path(model.pretrained_cfg["file"]).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_timm_knows_how_images_are_prepared(name):
    config = json.loads((ROOT / name / "config.json").read_text())["pretrained_cfg"]
    known = timm.get_pretrained_cfg(name)
    assert list(known.mean) == config["mean"]
    assert list(known.std) == config["std"]
    assert known.crop_pct == config["crop_pct"]


@pytest.mark.parametrize(
    ("name", "size", "of"),
    [
        ("mlp20x256_bn", (1, 14, 14), "1 x 28 x 28"),
        ("mlp20x256_bn", (1, 16, 49), "1 x 28 x 28"),
        ("mlp8x24", (4, 6, 6), "1 x 12 x 12"),
        ("mlp8x24", (1, 5, 5), "1 x 12 x 12"),
    ],
)
def test_an_mlps_weights_fit_one_height_and_width(name, size, of):
    with pytest.raises(ValueError, match=f"these weights take images of {of}, got input_size="):
        condzoo.create_model(name, pretrained=True, input_size=size)
    with pytest.raises(ValueError, match="an MLP's weights fit one height and width"):
        condzoo.create_model(name, pretrained=True, input_size=size)


def test_an_mlps_weights_take_other_channels_of_their_size():
    own = condzoo.create_model("mlp8x24", pretrained=True).eval()
    three = condzoo.create_model("mlp8x24", pretrained=True, input_size=(3, 12, 12)).eval()
    x = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(three(x.expand(-1, 3, -1, -1)), own(x), rtol=1e-5, atol=1e-5)
