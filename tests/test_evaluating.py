"""What a checkpoint or a trained network of timm's is shown: its own preprocessing, held against timm's transforms."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.datasets import ImageFolder

from condzoo import evaluating, probing
from condzoo.checkpoints.folder import CheckpointFolder
from condzoo.commands.display import print_evaluation
from condzoo.data import BatchPlan, DataSet
from condzoo.evaluating import Evaluated, checkpoint_images, evaluate_again
from condzoo.probing import Question, network_and_data
from condzoo.training import Evaluation

CONVERSION = {
    "model": "resnet50_lastbn",
    "tag": "t",
    "sha256": "",
    "parameters": 1,
    "origin": "",
    "origin_sha256": None,
    "note": "",
    "license": "unknown",
}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Class folders of noisy images that are much wider than high, or higher than wide."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, shape in (("a", (20, 60)), ("b", (50, 30))):
            (tmp_path / "wide" / split / name).mkdir(parents=True)
            image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            image.save(tmp_path / "wide" / split / name / "x.png")
    return tmp_path / "wide"


def converted(path: Path, classes: int = 2, **fields: Any) -> CheckpointFolder:
    """A folder as `convert` writes it, but for its weights."""
    usual = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    cfg = {"tag": "t", "num_classes": classes, **usual, **fields}
    config = {"architecture": "resnet50_lastbn", "num_classes": classes, "pretrained_cfg": cfg}
    contents = {"config.json": config, "conversion.json": CONVERSION}
    return CheckpointFolder(path, {name: json.dumps(content).encode() for name, content in contents.items()})


def seen(images: DataSet) -> torch.Tensor:
    return torch.cat([x for x, _ in images.ordered_batches("test", BatchPlan(8))])


def shown_by_timm(cfg: dict[str, Any], root: Path, use_test_size: bool = False) -> torch.Tensor:
    described = resolve_data_config(pretrained_cfg=cfg, use_test_size=use_test_size)
    transform = create_transform(**described, is_training=False)
    return torch.stack([transform(image) for image, _ in ImageFolder(str(root / "val"))])


@pytest.mark.parametrize("mode", [{"crop_mode": "squash"}, {"crop_mode": "center"}, {}])
def test_class_folders_are_scaled_and_cropped_as_timm_does(mode: dict[str, str], wide: Path) -> None:
    folder = converted(wide, **mode)
    cfg = json.loads(folder.files["config.json"])["pretrained_cfg"]
    images = checkpoint_images(folder, "imagefolder", wide)
    torch.testing.assert_close(seen(images), shown_by_timm(cfg, wide), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_images_to_train_on_need_not_be_there(trained: bool, wide: Path) -> None:
    folder = converted(wide)
    if trained:
        recipe = (
            'model.name = "resnet50_lastbn"\n[data]\nname = "imagefolder"\nbatch_size = 4\nimage_size = 32\n'
            "validation = 1\n"
        )
        folder.files.update({"metrics.json": b"{}", "recipe.toml": recipe.encode()})
    data = None if trained else "imagefolder"
    with_them = checkpoint_images(folder, data, wide)
    assert with_them.size("train") == 2 - trained, "those that `condzoo probe` measures"
    (wide / "train/c").mkdir()
    with pytest.raises(ValueError, match=r"/val has no class folder 'c', which \S+/train has"):
        checkpoint_images(folder, data, wide, test_only=True)
    shutil.rmtree(wide / "train")
    without = checkpoint_images(folder, data, wide, test_only=True)
    assert torch.equal(seen(without), seen(with_them))
    assert (without.num_classes, without.size("train"), without.size("test")) == (2, 0, 2)
    three = converted(wide, classes=3)
    with pytest.raises(ValueError, match=r"^data: imagefolder has 2 classes, \S+ tells 3 apart$"):
        checkpoint_images(three, "imagefolder", wide, test_only=True)
    with pytest.raises(FileNotFoundError, match="/train is missing"):
        checkpoint_images(folder, data, wide)


def test_a_crop_mode_that_is_not_known_is_refused(wide: Path) -> None:
    with pytest.raises(ValueError, match=r"crop_mode: the network's config says 'border'; images are prepared by cent"):
        checkpoint_images(converted(wide, crop_mode="border"), "imagefolder", wide)


def test_images_of_other_classes_are_told_by_what_eval_has(wide: Path) -> None:
    with pytest.raises(ValueError, match=r"^data: imagefolder has 2 classes, \S+ tells 1000 apart$"):
        checkpoint_images(converted(wide, classes=1000), "imagefolder", wide)
    trained = converted(wide, classes=3)
    trained.files["metrics.json"] = b"{}"
    recipe = 'model.name = "resnet50_lastbn"\n[data]\nname = "imagefolder"\nbatch_size = 4\nimage_size = 32\n'
    trained.files["recipe.toml"] = recipe.encode()
    with pytest.raises(ValueError, match=r"^data: imagefolder has 2 classes, \S+ tells 3 apart$"):
        checkpoint_images(trained, None, wide)


@pytest.mark.parametrize(
    "fields", [{"test_input_size": [3, 48, 48], "test_crop_pct": 1.0}, {"test_input_size": [3, 40, 40]}, {}]
)
def test_a_converted_network_is_evaluated_at_timms_size_for_tests_and_probed_at_its_own(
    fields: dict[str, Any], wide: Path
) -> None:
    folder = converted(wide, **fields)
    cfg = json.loads(folder.files["config.json"])["pretrained_cfg"]
    tested = checkpoint_images(folder, "imagefolder", wide, test_only=True)
    torch.testing.assert_close(seen(tested), shown_by_timm(cfg, wide, use_test_size=True), atol=1e-5, rtol=0)
    assert seen(checkpoint_images(folder, "imagefolder", wide)).shape[2:] == (32, 32)


def test_a_trained_network_of_timms_is_probed_on_images_as_its_weights_saw_them(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    known = replace(timm.get_pretrained_cfg(name), num_classes=2, crop_mode="squash")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: known)
    monkeypatch.setattr(
        probing, "create_model", lambda *_, **__: SimpleNamespace(num_classes=2)
    )  # in place of the download
    _, images = network_and_data(Question(name, data_root=wide))
    torch.testing.assert_close(seen(images), shown_by_timm(known.to_dict(), wide), atol=1e-5, rtol=0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"^data: imagefolder has 2 classes, {name} tells 1000 apart$"):
        network_and_data(Question(name, data_root=wide))


def test_a_trained_network_of_timms_is_evaluated_on_images_as_timm_evaluates_it(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "resnet50.a1_in1k"
    known = replace(timm.get_pretrained_cfg(name), num_classes=2)
    assert known.test_input_size == (3, 288, 288)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: known)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    asked: list[Any] = []
    monkeypatch.setattr(evaluating, "create_model", lambda *args, **kwargs: asked.append((args, kwargs)) or net)
    shutil.rmtree(wide / "train")
    found = evaluate_again(name, data_root=wide, device="cpu")
    assert asked == [((name,), {"pretrained": True})]
    logits = net(shown_by_timm(known.to_dict(), wide, use_test_size=True)).detach()
    assert found.evaluation.correct == int((logits.argmax(1) == torch.tensor([0, 1])).sum())
    assert found.evaluation.loss == pytest.approx(float(nn.functional.cross_entropy(logits, torch.tensor([0, 1]))))
    assert (found.recorded, found.note) == (None, "")
    with pytest.raises(ValueError, match=r"^timm has no weights 'resnet50\.a7_in1k'"):
        evaluate_again("resnet50.a7_in1k", data_root=wide, device="cpu")


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_an_older_name_of_timms_has_the_images_of_what_it_is_today(wide: Path) -> None:
    for name in ("tv_resnet50", "tv_resnet50.tv_in1k"):
        with pytest.raises(ValueError, match=rf"^data: imagefolder has 2 classes, {name} tells 1000 apart$"):
            evaluate_again(name, data_root=wide, device="cpu")


def test_what_is_doubtful_stands_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(Evaluated(Evaluation(3, 4, 0.5), None, "doubtful"), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["correct"], printed["recorded_correct"], printed["note"]) == (3, None, "doubtful")
