"""Labels from the model: exact expectations against sums or quadrature over labels, one sample at a time."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from condzoo.probe import curvature, measure, passes
from condzoo.probe.label_models import drawn_gradient

SAMPLES, WIDTH = 5, 3


def network(last=None):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WIDTH)]
    return nn.Sequential(*layers, *([last] if last else [])).double()


def inputs(samples=SAMPLES):
    return torch.randn((samples, 4), generator=torch.Generator().manual_seed(1)).double()


def likelihood(loss, f):
    """The distribution of one sample's labels, by torch.distributions, and every label with its probability."""
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * WIDTH)
    if loss in ("cross_entropy", "nll"):
        d = Categorical(logits=f) if loss == "cross_entropy" else Categorical(probs=f.exp())
        return d.log_prob if loss == "cross_entropy" else lambda y: f[y], [
            (y, float(d.probs[y].detach())) for y in torch.arange(WIDTH)
        ]
    if loss == "bce":
        d = Bernoulli(logits=f)
        return lambda y: d.log_prob(y).sum(), [(y, float(d.log_prob(y).sum().exp().detach())) for y in every]
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact for polynomials of degree 5
    points = torch.cartesian_prod(*[torch.tensor(nodes)] * WIDTH)
    probabilities = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * WIDTH).prod(1)
    d = Normal(f, 1.0)
    labels = [(f.detach() + e, float(p)) for e, p in zip(points, probabilities, strict=True)]
    return lambda y: d.log_prob(y).sum(), labels


LOSSES = {
    "cross_entropy": [
        None,
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()),
        functools.partial(F.cross_entropy, label_smoothing=0.1, reduction="sum"),
    ],
    "nll": [nn.NLLLoss()],
    "mse": [nn.MSELoss(), F.mse_loss, nn.MSELoss(reduction="sum")],
    "bce": [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits],
}
CASES = [(name, loss) for name, losses in LOSSES.items() for loss in losses]


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_model_labels_are_the_expectation_over_the_losss_distribution(name, loss):
    model = network(nn.LogSoftmax(1) if name == "nll" else None)
    x = inputs()
    moments = {"0": 0.0, "2": 0.0}
    fisher = 0.0
    for sample in x:
        hidden = [model[0](sample)]
        f = model[2](model[1](hidden[0]))
        hidden.append(f)
        f = model[3](f[None])[0] if name == "nll" else f
        log_prob, labels = likelihood(name, f)
        for y, p in labels:
            grads = torch.autograd.grad(-log_prob(y), [*hidden, *model.parameters()], retain_graph=True)
            for key, g in zip(moments, grads[:2], strict=True):
                moments[key] = moments[key] + p * torch.outer(g, g) / SAMPLES
            whole = torch.cat([g.flatten() for g in grads[2:]])
            fisher = fisher + p * torch.outer(whole, whole) / SAMPLES
    found = measure(model, [(x[:2], None), (x[2:], None)], labels="model", loss=loss)
    for key, moment in moments.items():
        expected = torch.linalg.eigvalsh(moment).flip(0)
        assert torch.allclose(found[key].output_grad.eigenvalues, expected, rtol=1e-9, atol=1e-12)
        assert found[key].output_grad.rows == SAMPLES * WIDTH
    expected = torch.linalg.eigvalsh(fisher).flip(0)
    assert torch.allclose(curvature(model, x, None, loss=loss).eigenvalues, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "loss"), [(name, losses[0]) for name, losses in LOSSES.items()])
def test_sampled_labels_approach_it(name, loss):
    model = network(nn.LogSoftmax(1) if name == "nll" else None)
    x = inputs(4000)
    exact = measure(model, (x, None), labels="model", loss=loss)["2"].output_grad.eigenvalues
    drawn = measure(model, (x, None), labels="sample", loss=loss)["2"].output_grad.eigenvalues
    assert float((drawn - exact).abs().max()) < 0.1 * float(exact[0])
    assert not torch.equal(drawn, exact)
    other = measure(model, (x, None), labels="sample", loss=loss, seed=1)["2"].output_grad.eigenvalues
    assert not torch.equal(drawn, other)


def test_outputs_of_any_shape_have_one_coordinate_a_number():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 1, 2)).double()
    x = torch.randn(4, 2, 4, 4).double()
    found = measure(model, (x, None), labels="model", loss=nn.MSELoss())["2"].output_grad
    assert found.lambda_max == pytest.approx(1.0, rel=1e-12)  # each of four positions has gradient 1 once
    flat = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    found = measure(flat, (inputs(), None), labels="model", loss=nn.MSELoss())["0"].output_grad
    assert found.lambda_max == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("labels", ["model", "sample"])
def test_a_free_function_has_no_distribution_and_the_error_says_what_has(labels):
    def own(output, target):
        return output.square().mean()

    message = (
        rf"labels='{labels}' takes labels from .* needs cross-entropy \(softmax\), NLL .*, MSE \(Gaussian\) or BCE .*; "
        r"of own none is known. Pass one of these as loss, or use the labels of the data \(labels='data'\)"
    )
    with pytest.raises(ValueError, match=message):
        measure(network(), (inputs(), None), labels=labels, loss=own)


def test_outputs_that_do_not_fit_the_distribution_are_explained():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x), x

    with pytest.raises(ValueError, match=r"needs logits \[n, classes\] or \[n, classes, ...\], got \[5\]"):
        measure(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double(), (inputs(), None), labels="model")
    with pytest.raises(ValueError, match=r"logits \[5, 2, 3\] have their classes second or last: pass the targets too"):
        measure(network(), (inputs(10).reshape(5, 2, 4), None), labels="model")
    with pytest.raises(ValueError, match=r"matrix='ggn' needs logits \[n, classes\], got \[5, 2, 3\]"):
        curvature(network(), inputs(10).reshape(5, 2, 4), None, "ggn")
    with pytest.raises(ValueError, match=r"needs a model output that is a tensor \[n, ...\], got tuple"):
        measure(Pair(), (inputs(), None), labels="model", loss=nn.MSELoss())


def test_the_ggn_is_the_cross_entropys_alone():
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3).double())
    for loss, name in ((nn.MSELoss(), "MSELoss"), (weighted, "CrossEntropyLoss")):
        with pytest.raises(ValueError, match=rf"'ggn' needs the cross-entropy .* without class weights, got {name}"):
            curvature(network(), inputs(), None, "ggn", loss=loss)


class Tokens(nn.Module):
    """Logits of many labels a sample, [n, tokens, classes], whose tokens see each other; `.logits`, or transposed."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head, self.form = nn.Linear(4, 5), nn.Linear(3, 3), nn.Linear(5, WIDTH), form

    def forward(self, x, labels=None):
        h = self.embed(x)
        logits = self.head(torch.tanh(h + self.mix(h.mT).mT))
        if self.form == "second":
            return logits.mT
        shifted = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits} if labels is None else {"logits": logits, "loss": shifted}


def per_token_moment(model, x, counted):
    """E[g g^T] of the tokens' embedding and of the head, label by label; tokens that do not count have none."""
    found = {"embed": 0.0, "head": 0.0}
    for sample in x:
        hidden = model.embed(sample[None])
        f = model.head(torch.tanh(hidden + model.mix(hidden.mT).mT))
        for t in counted:
            d = Categorical(logits=f[0, t])
            for y in torch.arange(WIDTH):
                grads = torch.autograd.grad(-d.log_prob(y), [hidden, f], retain_graph=True)
                for name, g in zip(found, grads, strict=True):
                    found[name] = found[name] + float(d.probs[y].detach()) * g[0].T @ g[0] / (len(x) * 3)
    return found


@pytest.mark.parametrize("form", ["last", "second", "model's own loss"])
def test_labels_of_every_token_are_drawn_from_its_own_softmax(form):
    model, x = Tokens(form).double(), torch.randn((4, 3, 4), generator=torch.Generator().manual_seed(0)).double()
    model.head.weight.data.mul_(6)  # softmaxes that are far from uniform and from each other
    y = torch.zeros((4, 3), dtype=torch.long)

    def batch(times):
        xs, ys = x.repeat(times, 1, 1), y.repeat(times, 1)
        return {"last": ({"x": xs}, None), "second": (xs, ys), "model's own loss": {"x": xs, "labels": ys}}[form]

    found = measure(model, [batch(1)], labels="model")
    drawn = measure(model, [batch(40)] * 10, labels="sample")
    for name, moment in per_token_moment(model, x, range(2 if form == "model's own loss" else 3)).items():
        expected = torch.linalg.eigvalsh(moment).flip(0)
        assert torch.allclose(found[name].output_grad.eigenvalues, expected, rtol=1e-9, atol=1e-14)
        assert drawn[name].output_grad.lambda_max == pytest.approx(float(expected[0]), rel=0.1)


def test_exact_curvature_of_many_labels_a_sample_is_the_measured_factor():
    model, x = Tokens("second").double(), torch.randn(4, 3, 4).double()
    y = torch.zeros((4, 3), dtype=torch.long)
    block = curvature(model, x, y, "fisher", "head")  # a sample's tokens add up: the trace is that of all rows
    rows = [(torch.cat([torch.tanh(h), torch.ones(3, 1)], 1), f) for h, f in per_sample_heads(model, x)]
    trace = sum(float((p * (1 - p)).sum(1) @ r.square().sum(1)) for r, p in rows) / 4
    assert float(block.eigenvalues.sum()) == pytest.approx(trace, rel=1e-10)


def per_sample_heads(model, x):
    """The head's inputs before tanh and its tokens' class probabilities, sample by sample."""
    for sample in x:
        h = model.embed(sample)
        h = h + model.mix(h.mT).mT
        yield h.detach(), model.head(torch.tanh(h)).softmax(1).detach()


def test_very_many_labels_are_warned_of(monkeypatch):
    monkeypatch.setattr(passes, "MANY", 20)
    model = nn.Linear(4, 21).double()
    with pytest.warns(UserWarning, match=r"a backward pass a class and label, 21 a batch here; labels='sample'"):
        measure(model, (torch.zeros(2, 4).double(), None), labels="model")


def test_samples_that_the_loss_ignores_have_no_part_also_where_each_has_one_label():
    model, x = network(), inputs()
    y = torch.tensor([0, -100, 2, -100, 1])
    found = measure(model, (x, y), labels="model")
    as_map = nn.Sequential(model, nn.Unflatten(1, (WIDTH, 1)))
    expected = measure(as_map, (x, y[:, None]), labels="model")
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert torch.allclose(a.output_grad.eigenvalues, b.output_grad.eigenvalues, rtol=1e-10)
    whole = measure(model, (x, y.clamp(min=0)), labels="model")
    assert found["2"].output_grad.lambda_max < whole["2"].output_grad.lambda_max


@pytest.mark.parametrize("labels", ["model", "sample"])
def test_targets_that_are_probabilities_have_the_classes_where_torch_does(labels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, WIDTH, 1)).double()
    x = torch.randn(SAMPLES, 4, 7).double()
    hard = torch.randint(WIDTH, (SAMPLES, 7))
    soft = F.one_hot(hard, WIDTH).movedim(-1, 1).double()
    of_hard, of_soft = (measure(model, (x, y), labels=labels) for y in (hard, soft))
    assert torch.allclose(of_soft["0"].output_grad.eigenvalues, of_hard["0"].output_grad.eigenvalues, rtol=1e-10)


def test_logits_of_a_plain_tensor_with_the_classes_last_as_language_models_give_them():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, WIDTH)

        def forward(self, x):
            return self.head(self.body(x).tanh())

    torch.manual_seed(0)
    model = Tagger().double()
    x, y = inputs(10).reshape(2, 5, 4), torch.arange(10).reshape(2, 5) % WIDTH
    second = nn.Sequential(model, Last()).double()
    for labels in ("data", "model", "sample"):
        found, expected = measure(model, (x, y), labels=labels), measure(second, (x, y), labels=labels)
        assert found.loss == pytest.approx(expected.loss)
        for name in ("body", "head"):
            a, b = found[name].output_grad.eigenvalues, expected[f"0.{name}"].output_grad.eigenvalues
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-15)
    explicit = measure(model, (x, y), loss=nn.CrossEntropyLoss(ignore_index=2))
    assert explicit.loss == pytest.approx(float(F.cross_entropy(model(x).mT, y, ignore_index=2).detach()))


class Last(nn.Module):
    def forward(self, h):
        return h.mT  # [n, tokens, classes] -> [n, classes, tokens]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [None, nn.NLLLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_drawn_labels_of_logits_that_are_not_finite_leave_the_layer_named(value, loss):
    """As labels of the data do; torch draws no label from such a row, and the others' labels are as without it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    with torch.no_grad():
        model[2].weight[1, 2] = value
    targets = y if loss is None or isinstance(loss, nn.NLLLoss) else F.one_hot(y, 3).float()
    found = measure(model, (x, targets), labels="sample", loss=loss)
    assert found.first_nonfinite["forward"] == "2"
    assert "NaN or Inf" in found.skipped["0"]


def test_one_sample_that_is_not_finite_leaves_the_labels_of_the_others():
    logits = torch.randn((6, 4), generator=torch.Generator().manual_seed(0))
    for kind in ("softmax", "log-softmax", "bernoulli"):
        expected = drawn_gradient(kind, logits, torch.Generator().manual_seed(1))
        bad = logits.clone()
        bad[2] = torch.nan
        found = drawn_gradient(kind, bad, torch.Generator().manual_seed(1))
        assert found[2].isnan().all()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(found[others], expected[others])
