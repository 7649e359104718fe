"""Real images in ImageNet's layout, through the ImageNet recipe, with the probe."""

from pathlib import Path

import pytest

from condzoo.data import check_images
from condzoo.probe import read_records
from condzoo.training import evaluate_run, load_recipe, train

REDUCED = [
    "data.num_classes=none",
    "data.image_size=64",
    "data.eval_resize=72",
    "data.batch_size=32",
    "probe.every=2",
    "log_every=1",
    "eval_every=1000",
    "precision=fp32",
]


IMAGES = 16  # of each class and split


@pytest.fixture
def root(data_root: Path, tmp_path: Path) -> Path:
    """Links to the first images of each class."""
    for folder in (data_root / "imagenette10").glob("*/*"):
        here = tmp_path / "images" / folder.parent.name / folder.name
        here.mkdir(parents=True)
        for image in sorted(folder.iterdir())[:IMAGES]:
            (here / image.name).symlink_to(image)
    return tmp_path / "images"


@pytest.mark.real_data
def test_resnet18_lastbn_through_the_imagenet_recipe(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe("imagenet/resnet18_lastbn", REDUCED)
    run = train(recipe, out=tmp_path / "run", max_steps=4, device="cpu", data_root=root)
    summary = run.summary
    assert (summary["status"], summary["steps"], summary["num_classes"]) == ("done", 4, 10)
    assert summary["test_images"] == 10 * IMAGES
    assert 0 < summary["train_loss"] < 10
    records = read_records(run.path)
    assert len(records) == 2
    assert len(records[0]) == 21  # 20 convolutions with those of the shortcuts, and fc
    assert records[0]["fc"].input.eigenvalues.numel() == 512
    assert records[0]["fc"].input.lambda_max > 0
    again = evaluate_run(run.path, data_root=root, device="cpu")
    assert (again.correct, again.loss) == (summary["test_correct"], summary["test_loss"])


@pytest.mark.real_data
def test_real_images_have_no_fault(root: Path) -> None:
    assert list(check_images(root, workers=0)) == []
