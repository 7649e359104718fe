"""Labels from a softmax: only where the loss is one, a label for each output that the loss looks at."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import curvature, measure, top_curvature

SAMPLES = 16


class Own(nn.Module):
    """Returns a loss of its own with its logits [n, k], as Hugging Face's models do when called with labels."""

    def __init__(self, classes, loss, factor=1.0, body=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.loss = nn.Linear(5, 4), nn.Linear(4, classes), loss
        self.whole = body
        with torch.no_grad():
            self.head.weight.mul_(factor)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.body(x))) if self.whole is None else self.whole(x)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": self.loss(logits, labels)}


def batch(labels):
    return {"x": torch.randn((SAMPLES, 5), generator=torch.Generator().manual_seed(1)), "labels": labels}


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


NO_SOFTMAX = {
    "regression": (1, lambda h, y: F.mse_loss(h.squeeze(-1), y), numbers(SAMPLES), "has no meaning for one class"),
    "several numbers": (3, F.mse_loss, numbers(SAMPLES, 3), "the model's own loss is no cross-entropy"),
    "several labels": (
        3,
        F.binary_cross_entropy_with_logits,
        (numbers(SAMPLES, 3) > 0).float(),
        "the model's own loss is no cross-entropy",
    ),
}
INSTEAD = r"; pass loss=nn.MSELoss\(\) or nn.BCEWithLogitsLoss\(\), or use the labels of the data"


@pytest.mark.parametrize("labels", ["model", "sample"])
@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_a_models_own_loss_that_is_no_cross_entropy_has_no_softmax(name, labels):
    """A softmax over one class has no gradient: its spectra were 0, and so was F."""
    classes, loss, y, why = NO_SOFTMAX[name]
    message = rf"takes labels from a softmax, .*{why}.*{INSTEAD}"
    with pytest.raises(ValueError, match=rf"labels='{labels}' {message}"):
        measure(Own(classes, loss), batch(y), labels=labels)
    with pytest.raises(ValueError, match=rf"matrix='fisher' {message}"):
        curvature(Own(classes, loss), batch(y), y, "fisher")
    for matrix in ("fisher", "ggn"):
        with pytest.raises(ValueError, match=rf"matrix='{matrix}' {message}"):
            top_curvature(Own(classes, loss), batch(y), y, matrix)
    normed = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, classes))  # whose G is formed whole
    with pytest.raises(ValueError, match=rf"matrix='ggn' {message}"):
        curvature(Own(classes, loss, body=normed), batch(y), y, "ggn")
    assert measure(Own(classes, loss), batch(y)).loss_name == "output.loss"
    explicit = nn.BCEWithLogitsLoss() if name == "several labels" else nn.MSELoss()
    found = measure(Own(classes, loss), (batch(y)["x"], None), labels="model", loss=explicit)
    assert found["head"].output_grad.lambda_max > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["several numbers", "several labels"])
def test_the_rounding_of_half_precision_lets_no_other_loss_pass(name, dtype):
    classes, loss, y, why = NO_SOFTMAX[name]
    many = batch(y.repeat(8, 1).to(dtype))
    many["x"] = many["x"].repeat(8, 1).to(dtype)
    with pytest.raises(ValueError, match=why):
        measure(Own(classes, loss).to(dtype), many, labels="model")


def test_one_class_has_no_softmax_whoever_says_that_there_is_one():
    for loss in (None, nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match=r"no meaning for one class \(logits \[16, 1\]\)" + INSTEAD):
            measure(nn.Linear(5, 1), (batch(None)["x"], None), labels="model", loss=loss)


@pytest.mark.parametrize("factor", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_models_own_cross_entropy_is_one_however_confident_it_is(smoothing, reduction, dtype, factor):
    """Its p - y sums to 0 but for round-off, of which that of a confident network may consist."""
    y = torch.arange(SAMPLES) % 3
    loss = functools.partial(F.cross_entropy, reduction=reduction, label_smoothing=smoothing)
    model = Own(3, loss, factor).to(dtype)
    with torch.no_grad():
        y = y if factor == 1.0 else model(batch(y)["x"].to(dtype))["logits"].argmax(1)  # it is right, too
    given = {"x": batch(y)["x"].to(dtype), "labels": y}
    found = measure(model, given, labels="model", reduction=reduction)
    expected = measure(model, (given["x"], None), labels="model")
    assert found["head"].output_grad.rows == expected["head"].output_grad.rows
    if factor == 1.0:
        assert found["head"].output_grad.lambda_max == expected["head"].output_grad.lambda_max > 0


@pytest.mark.parametrize("labels", ["model", "sample"])
@pytest.mark.parametrize("loss", [None, nn.MSELoss()])
def test_tokens_flattened_into_the_batch_are_refused(loss, labels):
    """It is not known whose they are; their moments were too small by the square of the tokens a sample."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 6)

        def forward(self, x):
            return self.head(x).flatten(0, 1)

    y = torch.zeros(12, dtype=torch.long) if loss is None else torch.zeros(12, 6)
    message = r"needs an output whose first dimension is the 4 samples, got \[12, 6\]; return tokens as \[n, classes"
    with pytest.raises(ValueError, match=rf"labels='{labels}' {message}"):
        measure(Flat(), (torch.randn(4, 3, 5), y), labels=labels, loss=loss)


def confident(dtype):
    """Three samples of each class, each sure of its own, and their labels."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(14 * torch.eye(3))
    y = torch.arange(3).repeat(32)
    return model.to(dtype), torch.eye(3)[y].to(dtype), y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(ignore_index=7), F.cross_entropy])
def test_labels_of_the_data_say_which_outputs_count_and_no_more(dtype, loss):
    """The gradients of the data's labels vanish in float16; those of the expectation over labels do not."""
    model, x, y = confident(dtype)
    expected = measure(model, (x, None), labels="model", loss=loss)[""].output_grad
    found = measure(model, (x, y), labels="model", loss=loss)[""].output_grad
    assert torch.equal(found.eigenvalues, expected.eigenvalues)
    assert found.lambda_max == pytest.approx(1.663e-6, rel=0.02)
    ignored = torch.where(torch.arange(len(y)) < 48, 7 if isinstance(loss, nn.Module) else -100, y)
    half = measure(model, (x, ignored), labels="model", loss=loss)[""].output_grad
    assert half.lambda_max == pytest.approx(expected.lambda_max / 2, rel=0.01)


def test_a_models_own_loss_says_which_outputs_count_also_in_float16():
    inner, x, y = confident(torch.float16)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, labels):
            logits = self.inner(x)
            return {"logits": logits, "loss": F.cross_entropy(logits, labels)}

    found = measure(Wrapped(), {"x": x, "labels": y}, labels="model")["inner"].output_grad
    assert found.lambda_max == pytest.approx(1.663e-6, rel=0.02)
