"""One step against its definition: accumulation, full batch, clipping, averaging, freezing, smoothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from condzoo.training import Recipe, RecipeError, train
from condzoo.training.distributed import Ranks
from condzoo.training.preparation import Training, pieces, prepare, training_steps
from condzoo.training.steps import take_step

CPU = torch.device("cpu")


def prepared(recipe: Recipe) -> Training:
    return prepare(recipe, CPU)


def gradient_after_a_step(recipe: Recipe) -> tuple[Training, dict[str, Tensor]]:
    training = prepared(recipe)
    take_step(training, next(training_steps(training, 0, 1)))
    return training, {n: p.grad.clone() for n, p in training.model.named_parameters() if p.grad is not None}


def mean_gradient(training: Training, x: Tensor, y: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Gradient of the mean loss in float64, in one go, at the recipe's initial weights."""
    torch.manual_seed(training.recipe.seed)
    model = prepared(training.recipe).model.double()
    log_p = model(x.double()).log_softmax(1)
    target = (1 - smoothing) * nn.functional.one_hot(y, 10) + smoothing / 10
    (-(target * log_p).sum(1).mean()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def whole_batch(training: Training) -> tuple[Tensor, Tensor]:
    chunks = list(next(training_steps(training, 0, 1)).chunks)
    return torch.cat([x for x, _ in chunks]), torch.cat([y for _, y in chunks])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 4},
        {"accumulate": 3},
        {"optim": {"name": "gd", "lr": 0.1}, "data.batch_size": 500},
        {"data.batch_size": 1000, "data.drop_last": False},
    ],
    ids=["one batch", "4 chunks", "3 uneven chunks", "full batch in uneven chunks", "kept last batch"],
)
def test_gradient_is_the_mean_over_all_images_of_the_step(changes: dict[str, Any], tiny: Any) -> None:
    training, got = gradient_after_a_step(tiny(**changes))
    x, y = whole_batch(training)
    assert len(y) == (1437 if training.full_batch else training.plan.batch_size)
    expected = mean_gradient(training, x, y)
    for name, gradient in expected.items():
        assert torch.allclose(got[name].double(), gradient, rtol=1e-4, atol=1e-6), name


def test_label_smoothing_is_spread_over_all_classes(tiny: Any) -> None:
    training, got = gradient_after_a_step(tiny(**{"loss.label_smoothing": 0.2}))
    expected = mean_gradient(training, *whole_batch(training), smoothing=0.2)
    for name, gradient in expected.items():
        assert torch.allclose(got[name].double(), gradient, rtol=1e-4, atol=1e-6), name


def test_an_incomplete_last_batch_is_weighted_by_its_own_size(tiny: Any) -> None:
    training = prepared(tiny(**{"data.batch_size": 1000, "data.drop_last": False}))
    batches = list(training_steps(training, 0, 2))
    assert [batch.images for batch in batches] == [1000, 437]


@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_grad_clip_bounds_the_norm_of_the_whole_gradient(limit: float, tiny: Any) -> None:
    _, free = gradient_after_a_step(tiny())
    _, clipped = gradient_after_a_step(tiny(grad_clip=limit))
    norm = torch.stack([g.norm() for g in free.values()]).norm()
    factor = min(1.0, limit / float(norm))
    for name, gradient in free.items():
        assert torch.allclose(clipped[name], gradient * factor, rtol=1e-4)


def test_average_is_the_exponential_mean_of_the_weights(tiny: Any) -> None:
    training = prepared(tiny(ema=0.8))
    expected: dict[str, Tensor] = {}
    for batch in training_steps(training, 0, 5):
        take_step(training, batch)
        now = {n: p.detach().double().clone() for n, p in training.model.named_parameters()}
        expected = {n: 0.8 * expected[n] + 0.2 * now[n] if expected else now[n] for n in now}
    for name, parameter in training.result.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert training.result is not training.model


def test_frozen_parameters_stay_and_the_others_move(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(freeze=["layers.0.*", "fc.bias"])
    before = {n: p.detach().clone() for n, p in prepared(recipe).model.named_parameters()}
    run = train(recipe, out=tmp_path / "run", max_steps=3, device="cpu")
    after = load_file(run.path / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) - moved == {"layers.0.linear.weight", "layers.0.linear.bias", "fc.bias"}


def test_a_pattern_that_matches_nothing_is_an_error(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"freeze: 'layer9\.\*' matches no parameter; they are called like "):
        tiny(freeze=["layer9.*"])


def test_freezing_everything_is_an_error(tiny: Any) -> None:
    with pytest.raises(ValueError, match="every parameter of the network is frozen"):
        prepared(tiny(freeze=["*"]))


def test_momentum_is_forgotten_at_a_milestone(tiny: Any) -> None:
    schedule = {"name": "step", "milestones": [1], "reset_momentum": True}
    training = prepared(tiny(schedule=schedule))
    parameter = next(iter(training.model.parameters()))
    fresh = []
    for batch in training_steps(training, 0, 13):
        before = parameter.detach().clone()
        take_step(training, batch)
        assert parameter.grad is not None
        gradient = parameter.grad + 1e-4 * before  # with the weight decay: what a new buffer starts from
        if torch.allclose(training.optimizer.state[parameter]["momentum_buffer"], gradient, rtol=1e-5):
            fresh.append(batch.step)
    assert fresh == [0, 11]


def test_dropout_is_a_function_of_seed_and_step(tiny: Any) -> None:
    recipe = tiny(**{"model.drop_rate": 0.5})
    results = []
    for skipped in (0, 3):
        training = prepared(recipe)
        torch.rand(skipped)
        results.append(float(take_step(training, next(training_steps(training, 0, 1))).loss_sum))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("images", "sizes"),
    [(9, [[2, 1, 1, 1], [1, 1, 1, 1]]), (7, [[2, 1, 1], [1, 1, 1]]), (3, [[2], [1]]), (1, [[1], [0]])],
    ids=["uneven parts", "fewer images than pieces", "less than two for each", "one image, which is refused"],
)
def test_with_sync_bn_every_process_has_as_many_pieces_and_an_image_of_each(
    images: int, sizes: list[list[int]], tiny: Any
) -> None:
    for rank, expected in enumerate(sizes):
        training = prepare(tiny(accumulate=4), CPU, ranks=Ranks(rank, 2))
        mine = torch.arange(rank, images, 2)
        synchronized = replace(training, recipe=training.recipe.model_copy(update={"sync_bn": True}))
        found = list(pieces(synchronized, mine[:, None], mine, images))
        assert [len(y) for _, y in found] == expected
        assert torch.equal(torch.cat([y for _, y in found]), mine)
    alone = list(pieces(prepared(tiny(accumulate=4, sync_bn=True)), torch.zeros(5, 1), torch.zeros(5), 5))
    assert [len(y) for _, y in alone] == [2, 2, 1], "as ever, to the bit"


def test_who_cannot_read_an_image_takes_part_in_all_that_is_left_of_a_full_batch(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches of 400 make a step, in each of which the other process waits for SyncBatchNorm."""
    recipe = tiny(**{"optim": {"name": "gd", "lr": 0.1}, "data.batch_size": 400})
    training = prepare(recipe, CPU, ranks=Ranks(1, 2))
    whole = training.data.ordered_batches

    def damaged(*arguments: Any) -> Iterator[Any]:
        yield next(whole(*arguments))
        raise OSError("damaged image")

    monkeypatch.setattr(type(training.data), "ordered_batches", lambda data, *arguments: damaged(*arguments))
    chunks = [x for x, _ in next(training_steps(training, 0, 1)).chunks]
    assert [bool(x.isnan().all()) for x in chunks] == [False, True, True, True]
    assert [str(error) for error in training.unreadable] == ["damaged image"]


PARTS = {
    "a last batch of one": ({"data.batch_size": 4, "data.drop_last": False}, 1, True),
    "the same, dropped": ({"data.batch_size": 4, "data.drop_last": True}, 1, False),
    "chunks of a full batch": ({"optim": {"name": "gd", "lr": 0.1}, "data.batch_size": 4}, 1, True),
    "parts of one": ({"data.batch_size": 8, "accumulate": 8}, 1, True),
    "a last part of one": ({"data.batch_size": 7, "accumulate": 3}, 1, True),
    "even parts": ({"data.batch_size": 8, "accumulate": 4}, 1, False),
    "one of two processes": ({"data.batch_size": 239, "data.drop_last": False}, 2, True),
    "nothing for some of them": ({"data.batch_size": 1436, "data.drop_last": False}, 3, True),
    "two for each": ({"data.batch_size": 1433, "data.drop_last": False}, 2, False),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_batchnorm_that_would_see_one_image_is_an_error_before_the_run(case: str, tiny: Any) -> None:
    """Of 1,437 training images, as every process would see it, for networks that have a BatchNorm1d alone."""
    changes, processes, wrong = PARTS[case]
    for name in ("mlp4x24_bn", "cifar_resnet8_lastbn", "mlp4x24"):
        recipe = tiny(**{**changes, "model.name": name})
        for rank in range(processes):
            if wrong and name != "mlp4x24":
                with pytest.raises(ValueError, match=r"^data\.batch_size: got \d+, with which one of .* single image"):
                    prepare(recipe, CPU, ranks=Ranks(rank, processes))
            else:
                prepare(recipe, CPU, ranks=Ranks(rank, processes))
