"""The package as a wheel installs it: recipes and weights inside it, and no repository around it."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from condzoo.checkpoints import list_checkpoints
from condzoo.experiments.loading import experiment_ids
from condzoo.training.recipe_files import recipe_files
from tests.forked import forks, run_anew

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json
import condzoo
from condzoo.experiments.loading import experiment_ids, load_experiment
from condzoo.models.released import find_folder, read_index, recipes_by_model
from condzoo.training.recipe_files import recipe_files

model = condzoo.create_model("mlp8x24", pretrained=True)
found = {
    "package": condzoo.__file__,
    "weights": model.pretrained_cfg["file"],
    "parameters": sum(p.numel() for p in model.parameters()),
    "checkpoints": [name for name, release in read_index().items() if find_folder(release)],
    "recipe": condzoo.load_recipe("cifar10/resnet20").model.name,
    "recipes": list(recipe_files()),
    "experiments": experiment_ids(),
    "experiment": load_experiment("fig01").id,
    "trains": recipes_by_model()["cifar_resnet20"],
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel's files, laid out as pyproject.toml says."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folder = tmp_path_factory.mktemp("site")

    def left_out(parent: str, names: list[str]) -> list[str]:
        # other workers may be compiling modules: half-written ones come and go
        half_written = [name for name in names if ".pyc." in name]
        excluded = [name for name in names if (Path(parent) / name).relative_to(ROOT).as_posix() in wheel["exclude"]]
        return half_written + excluded

    for name in wheel["only-include"]:
        shutil.copytree(ROOT / name, folder / wheel["sources"].get(name, name), ignore=left_out, dirs_exist_ok=True)
    return folder


@forks
def test_an_installed_package_has_its_recipes_and_weights(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDZOO_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(site)
    found = json.loads(run_anew(PROGRAM, tmp_path, ("condzoo", "timm")))
    assert Path(found["package"]) == site / "condzoo/__init__.py"
    assert Path(found["weights"]).is_relative_to(site / "condzoo/_checkpoints/mlp8x24.mnist")
    assert found["parameters"] == 7_330
    carried = sorted(path.name for path in (site / "condzoo/_checkpoints").iterdir() if path.is_dir())
    assert sorted(found["checkpoints"]) == carried
    assert {"cifar_resnet56.modern", "cifar_vgg16.modern"} == set(list_checkpoints()) - set(carried)
    assert found["recipe"] == "cifar_resnet20"
    assert found["recipes"] == list(recipe_files())
    assert found["experiments"] == experiment_ids()
    assert found["experiment"] == "fig01"
    assert found["trains"] == "cifar10/resnet20"
