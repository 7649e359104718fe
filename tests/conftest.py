"""Fixtures for the whole suite: where real images are, and one thread count for all."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# One thread a worker (pytest -n auto runs one a core): threads of several processes that share cores wait for each
# other far longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

# No time limit of an example, nor of drawing them: the machine may be shared.
settings.register_profile("condzoo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("condzoo")

# With these rich and typer write as to a terminal, which is other texts than the tests expect.
for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "PY_COLORS"):
    os.environ.pop(variable, None)

# Real images for development lie beside the repository, when they are there at all.
SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without real images the tests that need them are skipped, and say so."""
    if "CONDZOO_DATA" in os.environ or SHARED_DATA.is_dir():
        return
    skip = pytest.mark.skip(reason="no real images: set CONDZOO_DATA to a data root")
    for item in items:
        if "real_data" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What collection made lives to the end: without it in their way, garbage collections are several times shorter."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_run_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the trainings of tests: a run's picture is drawn where it is asked for by the mark.

    So is a release's, which must have one.
    """
    if "run_pictures" in request.keywords:
        return
    if "condzoo.training.reports" in sys.modules:
        monkeypatch.setattr("condzoo.training.reports.plot_records", lambda records, picture: None)
    if "condzoo.release.making" in sys.modules:
        monkeypatch.setattr("condzoo.release.making.picture", lambda run, title, end: b"\x89PNG")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with CIFAR-10 and MNIST in torchvision's layout, and imagenette10/{train,val}."""
    if "CONDZOO_DATA" in os.environ:
        return Path(os.environ["CONDZOO_DATA"])
    root = tmp_path_factory.mktemp("data")
    for name, folder in (("cifar10", root), ("mnist", root), ("imagenette10", root / "imagenette10")):
        subprocess.run([sys.executable, str(SHARED_DATA / "unpack.py"), name, str(folder)], check=True)
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Path]:
    """folders(): class folders of small made-up images, a colour a class; JPEGs but for one PNG a class."""

    def make(train: int = 4, test: int = 2, size: int = 24) -> Path:
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", test)):
            for label, name in enumerate(("ant", "bee", "cat")):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 120, (size, size + 2 * number, 3), dtype=np.uint8)
                    pixels[..., label] += 120
                    Image.fromarray(pixels).save(folder / f"{number}.{'png' if number == 0 else 'jpg'}")
        return tmp_path / "images"

    return make
