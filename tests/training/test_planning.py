"""The plan of a training against closed forms, the real network on a CPU, and one step that is taken."""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from condzoo.data import BatchPlan, load_data
from condzoo.models import create_model
from condzoo.training import load_recipe
from condzoo.training.accelerators import GPUS, Accelerator, accelerator
from condzoo.training.planning import TEST_IMAGES, TRAINING_IMAGES, kept_for_backward, plan_training, trace
from condzoo.training.preparation import prepare, training_steps
from condzoo.training.steps import take_step

A100 = accelerator("a100")


def test_a_multilayer_perceptron_in_closed_form(tiny: Any) -> None:
    """mlp4x24 on 8x8 digits: 64-24-24-24-10, batch 128, SGD with momentum."""
    plan = plan_training(tiny(), A100)
    widths = [64, 24, 24, 24, 10]
    pairs = list(itertools.pairwise(widths))
    parameters = sum(a * b + b for a, b in pairs)
    assert (plan.parameters, plan.trainable) == (parameters, parameters)
    assert (plan.steps_per_epoch, plan.steps) == (11, 22)
    forward = sum(2 * a * b for a, b in pairs)
    assert plan.flops_forward_per_image == forward
    backward = 2 * forward - 2 * 64 * 24  # two products a layer, but no gradient of the images
    assert plan.flops_per_step == 128 * (forward + backward)
    assert plan.flops == 22 * plan.flops_per_step
    assert plan.weight_bytes == plan.gradient_bytes == plan.optimizer_bytes == 4 * parameters
    kept = 4 * 128 * (64 + 24 + 24 + 24 + 10)  # the images, each ReLU's output, the log-probabilities
    assert kept <= plan.activation_bytes <= kept + 128 * 8 + 8, "and the labels, and their number"


def test_flops_of_the_zoo_are_twice_its_multiply_adds() -> None:
    plan = plan_training(load_recipe("cifar10/resnet20"), A100)
    assert plan.flops_forward_per_image == 2 * 40_551_040
    assert plan.steps == 160 * 390
    assert plan.data_bytes == 60_000 * 3 * 32 * 32, "the test images are on the device, too"


def test_kept_activations_are_those_of_the_real_network() -> None:
    recipe = load_recipe("cifar10/resnet20", ["model.name=cifar_resnet8"])
    model = create_model("cifar_resnet8", num_classes=10).train()
    x, y = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    _, kept = kept_for_backward(model, lambda: nn.functional.cross_entropy(model(x), y))
    assert trace(recipe, 10, 4).activation_bytes == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({"optim.momentum": 0.0, "optim.nesterov": False}, 0),
        ({}, 1),
        ({"optim": {"name": "adam", "lr": 1e-3}}, 2),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_optimizer_state_is_what_the_optimizer_keeps(tiny: Any, changes: dict[str, Any], slots: int) -> None:
    plan = plan_training(tiny(**changes), A100)
    assert plan.optimizer_bytes == slots * plan.gradient_bytes


def test_frozen_parameters_have_no_gradient(tiny: Any) -> None:
    plan = plan_training(tiny(freeze=["fc.*"]), A100)
    assert plan.parameters - plan.trainable == 24 * 10 + 10


def test_devices_share_the_batch_and_exchange_the_gradient(tiny: Any) -> None:
    one, four = (plan_training(tiny(), A100, count) for count in (1, 4))
    assert one.communicated_bytes_per_step == 0
    assert four.communicated_bytes_per_step == 2 * 3 / 4 * one.gradient_bytes
    assert (one.images_per_pass, four.images_per_pass) == (128, 32)
    assert four.flops_per_step == one.flops_per_step
    parts = plan_training(tiny(accumulate=4), A100)
    assert parts.images_per_pass == 32
    assert parts.seconds_per_step > one.seconds_per_step, "four passes of a small network take four starts"
    with pytest.raises(ValueError, match=r"gpus: got 200, must be from 1 to data.batch_size \(128\)"):
        plan_training(tiny(), A100, 200)
    with pytest.raises(ValueError, match=r"gpus: got 0, must be from 1 to data.batch_size \(128\)"):
        plan_training(tiny(), A100, 0)


def test_memory_and_time_are_sums_of_what_they_consist_of(tiny: Any) -> None:
    plan = plan_training(tiny(ema=0.9), A100, 2)
    parts = [plan.weight_bytes, plan.gradient_bytes, plan.optimizer_bytes, plan.average_bytes]
    parts += [plan.activation_bytes, plan.data_bytes]
    assert all(parts)
    assert plan.memory_bytes == sum(parts)
    assert plan.seconds == 22 * plan.seconds_per_step


def test_a_step_of_several_devices_takes_what_their_link_does(tiny: Any) -> None:
    slow = replace(A100, link=A100.link / 1e6)
    one, four, slow_one, slow_four = (plan_training(tiny(), gpu, count) for gpu in (A100, slow) for count in (1, 4))
    assert slow_one.seconds_per_step == one.seconds_per_step
    longer = four.communicated_bytes_per_step * (1 / slow.link - 1 / A100.link)
    assert slow_four.seconds_per_step - four.seconds_per_step == pytest.approx(longer)


def test_the_time_of_a_step_is_about_what_one_takes_here(tiny: Any) -> None:
    """Of the processor, whatever else it has to do: within a factor of 10."""
    recipe = tiny(**{"model.name": "cifar_resnet8", "data.resize": 16, "precision": "fp32"})
    training = prepare(recipe, torch.device("cpu"))
    first, *others = training_steps(training, 0, 6)
    take_step(training, first)
    began = time.process_time()
    for batch in others:
        take_step(training, batch)
    measured = (time.process_time() - began) / len(others)
    planned = plan_training(recipe, accelerator("cpu", threads=1)).seconds_per_step
    assert measured / 10 < planned < 10 * measured


def test_imagenet_can_be_planned_where_it_is_not(tmp_path: Path) -> None:
    recipe = load_recipe("imagenet/resnet18", ["data.batch_size=256"])
    plan = plan_training(recipe, A100, 8, data_root=tmp_path)
    assert (plan.training_images, plan.steps_per_epoch) == (1_281_167, 5005)
    with pytest.raises(FileNotFoundError, match="no class folders were found"):
        plan_training(load_recipe("imagenet/resnet18", ["data.num_classes=none"]), A100, data_root=tmp_path)


def test_full_batch_iterations_max_steps_and_average(tiny: Any) -> None:
    changes = {"optim": {"name": "gd", "lr": 0.1}, "iterations": 7, "ema": 0.9}
    plan = plan_training(tiny(**changes), A100)
    assert (plan.steps_per_epoch, plan.steps, plan.images_per_step) == (1, 7, 1437)
    assert plan.average_bytes == plan.weight_bytes
    assert plan_training(tiny(**changes), A100, max_steps=3).steps == 3


def test_a_batch_larger_than_the_data_is_refused_as_the_training_refuses_it(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size 5000 is larger than the 1437 training images and drop_last"):
        plan_training(tiny(**{"data.batch_size": 5000}), A100)
    assert plan_training(tiny(**{"data.batch_size": 5000, "data.drop_last": False}), A100).steps_per_epoch == 1


@pytest.mark.parametrize("data", [{"name": "imagefolder"}, {"name": "hfds", "dataset": "x"}], ids=["folders", "hub"])
def test_images_that_stay_on_disk_take_no_memory(data: Any, folders: Any, tiny: Any, monkeypatch: Any) -> None:
    on_disk = load_data("imagefolder", folders(), image_size=8)
    monkeypatch.setattr("condzoo.training.planning.read_data", lambda *_: on_disk)
    plan = plan_training(tiny(data={**data, "image_size": 8, "batch_size": 4}), A100)
    assert (plan.training_images, plan.data_bytes) == (12, 0)


def test_time_is_the_longest_of_computing_moving_and_starting() -> None:
    device = Accelerator("x", 100.0, 400.0, 10.0, 1.0, 1.0, reached=0.5, reached_bandwidth=0.5, launch=1.0)
    assert device.time_of(flops=500, traffic=1, operations=1, sixteen_bit=False) == 10
    assert device.time_of(flops=500, traffic=1, operations=1, sixteen_bit=True) == 2.5
    assert device.time_of(flops=1, traffic=100, operations=1, sixteen_bit=False) == 20
    assert device.time_of(flops=1, traffic=1, operations=7, sixteen_bit=False) == 7


def test_precision_auto_is_16_bit_for_convolutions_where_the_gpu_has_bf16() -> None:
    recipe = load_recipe("cifar10/resnet20", ["model.name=cifar_resnet8"])
    full = plan_training(load_recipe("cifar10/resnet20", ["model.name=cifar_resnet8", "precision=fp32"]), A100)
    half = plan_training(recipe, A100)
    assert (full.precision, half.precision) == ("float32", "16-bit")
    assert half.activation_bytes == full.activation_bytes // 2
    assert plan_training(recipe, accelerator("v100")).precision == "float32"
    assert plan_training(load_recipe("mnist/mlp8x24", ["precision=auto"]), A100).precision == "float32"


def test_an_unknown_gpu_is_named_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"gpu: got 'A100'; did you mean 'a100'."):
        accelerator("A100")
    with pytest.raises(ValueError, match=r"gpu: got 'a10'; did you mean 'a100'. must be one of: cpu, t4, "):
        accelerator("a10")
    assert all(gpu.flops16 > gpu.flops > 1e12 for gpu in GPUS.values())
    assert accelerator("cpu", threads=2).flops == 2 * accelerator("cpu", threads=1).flops


def test_the_known_numbers_of_images_are_those_of_the_data(tiny: Any) -> None:
    data = load_data("digits")
    assert (data.size("train"), data.size("test")) == (TRAINING_IMAGES["digits"], TEST_IMAGES["digits"])
    held_out = plan_training(tiny(**{"data.validation": 0.1}), A100)
    assert held_out.data_bytes == plan_training(tiny(), A100).data_bytes == (1437 + 360) * 8 * 8


def test_devices_share_every_chunk_of_a_full_batch_as_in_training(tiny: Any) -> None:
    recipe = tiny(**{"optim": {"name": "gd", "lr": 0.1}, "data.batch_size": 128})
    plan = plan_training(recipe, A100, 4)
    parts = [list(load_data("digits").ordered_batches("train", BatchPlan(128, part=r, parts=4))) for r in range(4)]
    assert plan.images_per_pass == max(len(y) for part in parts for _, y in part) == 32
    alone = plan_training(recipe, A100)
    assert alone.images_per_pass == 128
    assert plan.activation_bytes < alone.activation_bytes / 3
    assert plan.flops_per_step == pytest.approx(alone.flops_per_step, rel=1e-6)


def test_a_smaller_last_batch_counts_for_what_it_holds(tiny: Any) -> None:
    kept = {"data.drop_last": False, "data.batch_size": 128}
    plan = plan_training(tiny(epochs=3, **kept), A100)
    assert plan.steps_per_epoch == 12
    assert plan.flops == pytest.approx(plan.flops_per_step / 128 * 1437 * 3)
    stopped = plan_training(tiny(epochs=3, **kept), A100, max_steps=14)
    assert stopped.flops == pytest.approx(plan.flops_per_step / 128 * (1437 + 2 * 128))
    dropped = plan_training(tiny(epochs=3, **(kept | {"data.drop_last": True})), A100)
    assert dropped.flops == pytest.approx(plan.flops_per_step * 11 * 3)


def test_a_batch_holds_no_more_images_than_there_are(tiny: Any) -> None:
    plan = plan_training(tiny(**{"data.batch_size": 5000, "data.drop_last": False}), A100)
    assert (plan.images_per_step, plan.images_per_pass) == (1437, 1437)


def test_more_held_out_than_there_is_is_told_as_the_training_tells_it(tiny: Any) -> None:
    with pytest.raises(
        ValueError, match=r"data\.validation: 2000 holds out 2000 of 1437 training images; it must hold"
    ):
        plan_training(tiny(**{"data.validation": 2000}), A100)
    assert plan_training(tiny(**{"data.validation": 0.1}), A100).training_images == 1437 - 144


def test_fp16_on_a_cpu_is_refused_as_the_training_refuses_it(tiny: Any) -> None:
    recipe = tiny(precision="fp16")
    with pytest.raises(ValueError, match="precision: fp16 needs a GPU; on a CPU use bf16, fp32 or auto"):
        plan_training(recipe, accelerator("cpu"))
    assert plan_training(recipe, accelerator("v100")).precision == "16-bit"
