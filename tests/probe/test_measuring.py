"""`measure` against the dense oracle of conftest.py, and what it promises to leave alone."""

import copy
import dataclasses
import weakref
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from condzoo.probe import (
    Probe,
    curvature,
    curvature_blocks,
    kronecker_report,
    label_models,
    measure,
    measuring,
    origins,
    top_curvature,
    weights,
)

NAMES = ["mlp", "bn_mlp", "conv", "odd_conv", "residual", "other_dimensions", "tokens"]


def close(spectrum, expected, tolerance=1e-10):
    assert spectrum.eigenvalues.dtype == torch.float64
    assert spectrum.eigenvalues.shape == expected.shape
    assert float((spectrum.eigenvalues - expected).abs().max()) <= tolerance * float(expected.max())


def state_of(model):
    entries = [(n, t.clone(), t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    return entries, grads, [m.training for m in model.modules()], hooks, torch.get_rng_state()


def same_state(a, b):
    entries = all(x[0] == y[0] and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(a[0], b[0], strict=True))
    pairs = list(zip(a[1], b[1], strict=True))
    grads = all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)
    return entries and grads and a[2:4] == b[2:4] and torch.equal(a[4], b[4])


@pytest.mark.parametrize("conv", ["channels", "patches"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_spectra_equal_those_of_the_dense_oracle(kit, name, training, conv):
    model = kit.build(name).train(training)
    x, y = kit.images()
    expected = kit.oracle(copy.deepcopy(model), x, y, conv)
    found = measure(model, (x, y), conv=conv)
    assert list(found) == list(expected)
    for layer, (inputs, grads) in expected.items():
        close(found[layer].input, inputs)
        close(found[layer].output_grad, grads)


@pytest.mark.parametrize("name", NAMES)
def test_float32_data_measured_automatically_is_close_to_float64_products(kit, name):
    model = kit.build(name, torch.float32)
    x, y = kit.images(dtype=torch.float32)
    auto, exact = (measure(model, (x, y), precision=p) for p in ("auto", "float64"))
    for layer in exact:
        close(auto[layer].input, exact[layer].input.eigenvalues, 1e-5)
        close(auto[layer].output_grad, exact[layer].output_grad.eigenvalues, 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_bitwise_as_it_was(kit, name, training):
    model = kit.build(name).train(training)
    next(model.parameters()).requires_grad_(False)
    x, y = kit.images()
    F.cross_entropy(model(x), y).backward()
    before = state_of(model)
    measure(model, (x, y))
    assert same_state(before, state_of(model))


def test_the_model_is_left_as_it_was_when_the_loss_raises(kit):
    model = kit.build("residual")
    model[-1].weight.requires_grad_(False)
    before = state_of(model)

    def failing(output, target):
        torch.rand(3)
        raise RuntimeError("no such loss")

    with pytest.raises(RuntimeError, match="no such loss"):
        measure(model, kit.images(), loss=failing)
    assert same_state(before, state_of(model))


def test_splitting_and_reordering_batches_changes_nothing(kit):
    model = kit.build("residual").eval()
    x, y = kit.images(24)
    whole = measure(model, (x, y))
    parts = measure(model, [(x[a:b], y[a:b]) for a, b in ((17, 24), (0, 5), (5, 17))])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, layer in whole.items():
        close(parts[name].input, layer.input.eigenvalues)
        close(parts[name].output_grad, layer.output_grad.eigenvalues)
        assert parts[name].weight_grad == pytest.approx(layer.weight_grad, rel=1e-9)
        assert (parts[name].samples, parts[name].positions) == (24, layer.positions)


def test_batches_are_let_go_one_after_the_other(kit):
    """So a loader of any length is measured in the memory of a few; the first stays, for `certify`."""
    given = []

    def loader():
        for seed in range(30):
            assert sum(x() is not None for x in given) <= 3
            x, y = kit.images(4, seed=seed)
            given.append(weakref.ref(x))
            yield x, y

    assert measure(kit.build("mlp"), loader())["1"].samples == 30 * 4


def test_gradients_are_quadratic_in_the_scale_of_the_loss_and_know_its_reduction(kit):
    model = kit.build("mlp")
    x, y = kit.images()
    mean = measure(model, (x, y))
    total = measure(model, (x, y), loss=nn.CrossEntropyLoss(reduction="sum"))
    each = measure(model, (x, y), loss=nn.CrossEntropyLoss(reduction="none"))
    triple = measure(model, (x, y), loss=lambda output, target: 3 * F.cross_entropy(output, target))
    for name, layer in mean.items():
        close(total[name].output_grad, layer.output_grad.eigenvalues)
        close(each[name].output_grad, layer.output_grad.eigenvalues)
        close(triple[name].output_grad, 9 * layer.output_grad.eigenvalues)


def test_model_labels_are_the_expectation_over_the_softmax(kit):
    model = kit.build("conv").eval()
    x, _ = kit.images(6)
    found = measure(model, (x, torch.zeros(6, dtype=torch.long)), labels="model")
    p = model(x).softmax(1).detach()
    moments = dict.fromkeys(found, 0)
    for n in range(6):
        for label in range(4):
            one = measure(model, (x[n : n + 1], torch.tensor([label])))
            for name in found:
                moments[name] += p[n, label] * one[name].output_grad.eigenvalues.sum() / 6
    for name, layer in found.items():  # the trace is linear in the moment
        assert float(layer.output_grad.eigenvalues.sum()) == pytest.approx(float(moments[name]), rel=1e-10)


def test_the_mean_of_sampled_labels_approaches_the_exact_expectation(kit):
    model = kit.build("mlp").eval()
    x, y = kit.images(64)
    exact = measure(model, (x, y), labels="model")["5"].output_grad.eigenvalues.sum()
    draws = [measure(model, (x, y), labels="sample", seed=s)["5"].output_grad.eigenvalues.sum() for s in range(16)]
    draws = torch.stack(draws)
    assert abs(float(draws.mean() - exact)) < 4 * float(draws.std()) / 16**0.5
    assert float(draws.std()) > 0


def test_a_layer_called_twice_counts_every_call():
    torch.manual_seed(0)
    shared, head = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), head)
    x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
    layer = measure(model, (x, y))["0"]
    rows = torch.cat([x, shared(x).tanh()]).detach()
    assert (layer.samples, layer.input.rows, layer.positions) == (16, 16, 1)
    close(layer.input, torch.linalg.svdvals(rows).square() / 16)


def test_what_cannot_be_measured_is_named_with_the_reason():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True)
            self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.aside = nn.Linear(4, 2)

        def forward(self, tokens):
            h = self.rnn(self.embed(tokens))[0][:, -1]
            self.aside(h)
            return self.head(h)

    found = measure(Part(), (torch.randint(7, (6, 5)), torch.randint(3, (6,))))
    assert list(found) == ["head"]
    assert "indices" in found.skipped["embed"]
    assert "recurrent" in found.skipped["rnn"]
    assert found.skipped["unused"] == "not called in the forward pass, or only without gradients"
    assert "no gradient" in found.skipped["aside"]
    with pytest.raises(KeyError, match="was not measured: not called"):
        found["unused"]


def test_the_first_layer_with_nan_is_named_in_both_directions(kit):
    model = kit.build("mlp")
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    found = measure(model, kit.images())
    assert found.first_nonfinite == {"forward": "3", "backward": "5"}
    assert found.skipped["5"] == "its input holds NaN or Inf"
    assert found.loss is None


class LogBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).log())


class InfiniteGradient(nn.Module):
    """sqrt at 0: the forward pass is finite, the gradient is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(48, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = self.second(self.first(x.flatten(1)).tanh())
        return self.third((h * torch.tensor([1.0, 1, 1, 1, 0]).double()).abs().sqrt())


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("input", {"forward": "1", "backward": "5"}),
        ("last weight", {"forward": "5", "backward": "5"}),
        ("between", {"forward": "second", "backward": "second"}),
        ("gradient", {"backward": "second"}),
        ("none", {}),
    ],
)
def test_nan_and_inf_are_found_where_they_come_in(kit, place, expected, probed):
    torch.manual_seed(0)
    model = {"between": LogBetween, "gradient": InfiniteGradient}.get(place, lambda: kit.build("mlp"))().double()
    x, y = kit.images()
    with torch.no_grad():
        if place == "input":
            x[3, 1, 2, 0] = torch.inf
        if place == "last weight":
            model[5].weight[2, 1] = torch.nan
    if probed:
        with Probe(model) as probe:
            F.cross_entropy(model(x), y).backward()
            probe.step()
        assert probe.latest.first_nonfinite == expected
    else:
        fine = kit.images(seed=1)
        assert measure(model, [fine, (x, y), fine]).first_nonfinite == expected


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("where", ["forward", "loss of the second batch", "backward"])
def test_the_model_is_left_as_it_was_wherever_it_raises(kit, where, labels):
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("in the middle")

    class Failing(nn.Module):
        def forward(self, x):
            if where == "forward":
                raise RuntimeError("in the middle")
            return Raises.apply(x) if where == "backward" else x

    model = kit.build("residual")
    model.insert(4, Failing())
    model.insert(3, nn.Dropout(0.5))
    model[0].weight.requires_grad_(False)
    before = state_of(model)
    calls = []

    class Loss(nn.CrossEntropyLoss):
        def forward(self, output, target):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("in the middle")
            return super().forward(output, target)

    with pytest.raises(RuntimeError, match="in the middle"):
        measure(model, [kit.images(), kit.images()], loss=Loss(), labels=labels)
    assert same_state(before, state_of(model))


def test_a_seed_of_numpys_is_one(kit, tmp_path):
    model, (x, y) = kit.build("mlp"), kit.images(16)
    c = measure(model, (x, y), labels="sample", seed=np.int64(3))
    assert (c.seed, type(c.seed)) == (3, int)
    c.to_json(tmp_path / "c.json")
    for of in (curvature, curvature_blocks, top_curvature, kronecker_report):
        of(model, x, y, seed=np.int64(3))
    with pytest.raises(ValueError, match=r"seed must be from -2\*\*63 to 2\*\*64 - 1, got a number of 65 bits"):
        measure(model, (x, y), seed=2**64)
    with pytest.raises(TypeError, match=r"seed must be a whole number, got array\(\[1, 2\]\)"):
        measure(model, (x, y), seed=np.array([1, 2]))


def test_dropout_is_seeded_and_the_seed_matters(kit):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.Dropout(0.5), nn.Linear(9, 4)).double()
    a, b, c = (measure(model, kit.images(), seed=s)["3"].input.eigenvalues for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_frozen_layers_are_measured_like_others(kit):
    model = kit.build("conv").eval()
    free = measure(model, kit.images())
    model.requires_grad_(False)
    for name, layer in measure(model, kit.images()).items():
        close(layer.output_grad, free[name].output_grad.eigenvalues)
        assert layer.weight_grad == free[name].weight_grad


def test_weights_are_their_largest_singular_values_and_frobenius_norms(kit, monkeypatch):
    model = kit.build("conv")
    x, y = kit.images()
    found = measure(model, (x, y))
    F.cross_entropy(model(x), y).backward()
    dense, grouped = model[6].weight.detach(), model[2].weight.detach()
    assert found["6"].weight == pytest.approx(float(torch.linalg.svdvals(dense)[0]), rel=1e-12)
    assert found["6"].weight_grad == pytest.approx(float(torch.linalg.svdvals(model[6].weight.grad)[0]), rel=1e-12)
    halves = max(float(torch.linalg.svdvals(half.flatten(1))[0]) for half in grouped.chunk(2))
    assert found["2"].weight == pytest.approx(halves, rel=1e-12)
    monkeypatch.setattr(weights, "EXACT", 0)
    for measured in (found, measure(model, (x, y))):
        for name, module in (("0", model[0]), ("2", model[2]), ("6", model[6])):
            layer = measured[name]
            assert layer.weight_frobenius == pytest.approx(float(module.weight.detach().norm()), rel=1e-12)
            assert layer.weight_grad_frobenius == pytest.approx(float(module.weight.grad.norm()), rel=1e-12)
            assert layer.weight <= layer.weight_frobenius * (1 + 1e-12)


def test_the_bias_enters_as_a_constant_input(kit):
    model = kit.build("mlp")
    x, y = kit.images()
    rows = torch.cat([x.flatten(1), torch.ones(12, 1).double()], dim=1)
    expected = torch.zeros(49).double()
    expected[:12] = torch.linalg.svdvals(rows).square() / 12
    close(measure(model, (x, y), bias=True)["1"].input, expected)


def test_layers_are_chosen_by_name_or_pattern(kit):
    model = kit.build("residual")
    assert list(measure(model, kit.images(), layers=["3.*", "7"])) == ["3.conv1", "3.conv2", "7"]
    with pytest.raises(ValueError, match=r"no layer matches '3.conv9'; did you mean '3.conv"):
        measure(model, kit.images(), layers=["3.conv9"])


def test_a_layer_is_chosen_by_a_name_with_brackets_and_a_shared_one_by_its_first_name(kit):
    first = nn.Linear(48, 48)
    model = nn.Sequential(OrderedDict({"flat": nn.Flatten(), "a": first, "k[0]": nn.Linear(48, 48), "b": first}))
    model = model.double()
    assert list(measure(model, kit.images(), layers=["k[0]"])) == ["k[0]"]
    with pytest.raises(ValueError, match=r"layer 'b' is 'a' under another name; it is measured under that one"):
        measure(model, kit.images(), layers=["b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "modle"}, r"labels must be one of 'data', 'model', 'sample', got 'modle'; did you mean 'model'\?"),
        ({"conv": "patch"}, r"conv must be one of 'channels', 'patches', got 'patch'; did you mean 'patches'\?"),
        ({"precision": "float32"}, r"precision must be one of 'auto', 'float64', 'fast', got 'float32'"),
        (
            {"loss": lambda output, y: output},
            r"loss must return a scalar, or one number a sample \[12\]; got \[12, 4\]",
        ),
    ],
)
def test_wrong_options_are_explained(kit, options, message):
    with pytest.raises(ValueError, match=message):
        measure(kit.build("mlp"), kit.images(), **options)


def test_no_batch_and_wrong_batches_are_explained(kit):
    model = kit.build("mlp")
    with pytest.raises(ValueError, match="batches gave no batch"):
        measure(model, [])
    with pytest.raises(TypeError, match=r"must hold 'labels', got a dict with image; pass adapter"):
        measure(model, [{"image": kit.images()[0]}])
    with pytest.raises(TypeError, match=r"must be a pair \(x, y\), got a list of 3; pass adapter"):
        measure(model, [[1, 2, 3]])
    x, y = kit.images()
    adapted = measure(model, [{"image": x, "label": y}], adapter=lambda batch: (batch["image"], batch["label"]))
    close(adapted["1"].input, measure(model, (x, y))["1"].input.eigenvalues)


def test_the_certificate_shows_what_the_dtype_of_the_pass_cost(kit):
    x, y = kit.images(64)
    exact = measure(kit.build("residual"), (x, y), certify=True).certificate
    single = measure(kit.build("residual", torch.float32), (x.float(), y), certify=True).certificate
    half_model = kit.build("residual").bfloat16()
    half = measure(half_model, (x.bfloat16(), y), certify=True).certificate
    assert list(exact) == list(single) == list(half) == ["0", "3.conv1", "3.conv2", "7"]
    for name in exact:
        assert exact[name] == {
            "input_lambda_max": 0.0,
            "input_known": 1.0,
            "output_grad_lambda_max": 0.0,
            "output_grad_known": exact[name]["output_grad_known"],
        }
        assert 0 < single[name]["output_grad_lambda_max"] < 1e-4 < half[name]["output_grad_lambda_max"] < 0.5
        assert single[name]["input_known"] >= half[name]["input_known"]


def test_a_unit_that_is_nan_is_neither_dying_nor_full() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.full((16, 4), float("nan"))
    counted = measure(net, [(x, torch.zeros(16, dtype=torch.long))]).neurons["1"]
    assert (counted.units, counted.dying, counted.full) == (3, 0, 0)


class Repeating(nn.Module):
    """A network that is called on its images, and on them turned over."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.inner(x.flip(0))


def probed_once(model, x, y):
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    return probe.latest


def put_there_once(layer):
    """As a network that computes another's weights does it."""
    layer.base = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.weight = layer.base * 2.0


WAYS = {
    "put there once": put_there_once,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old weight_norm": lambda m: nn.utils.weight_norm(m),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m).eval(),
    "pruning": lambda m: prune.random_unstructured(m, "weight", amount=0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("labels", ["data", "model", "probed"])
def test_layers_whose_weight_is_computed_are_measured(kit, way, labels):
    """As the same network with those weights as parameters, wherever the layers stand and however often called."""
    plain, model = (Repeating(kit.build("mlp").eval()) for _ in range(2))
    for at in (1, 3):
        WAYS[way](model.inner[at])
        model.inner.eval()(kit.images()[0])  # what a hook computes is computed in a forward pass
        plain.inner[at].weight = nn.Parameter(model.inner[at].weight.detach().clone())
    if labels == "probed":
        plain.training = model.training = True
        expected, found = (probed_once(m, *kit.images()) for m in (plain, model))
        assert not any(m._forward_hooks for m in model.modules())
    else:
        expected, found = (measure(m, kit.images(), labels=labels) for m in (plain, model))
    assert list(found) == list(expected)
    assert not found.skipped
    for name, layer in expected.items():
        close(found[name].input, layer.input.eigenvalues)
        close(found[name].output_grad, layer.output_grad.eigenvalues)
    assert labels == "probed" or found.loss == pytest.approx(expected.loss)
    for norm in ("weight", "weight_frobenius", "weight_grad", "weight_grad_frobenius"):
        values = [getattr(layer, norm) for layer in found.values()]
        assert values == pytest.approx([getattr(layer, norm) for layer in expected.values()], rel=1e-9)


class Quantized(nn.Linear):
    """8-bit codes with one scale, as the layers of quantized models have them; the codes are no weight."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("probed", [False, True])
def test_the_codes_of_a_quantized_weight_have_no_norms(kit, probed):
    model, (x, y) = kit.build("mlp"), kit.images()
    model[3] = Quantized(model[3])
    if probed:
        with Probe(model) as probe:
            F.cross_entropy(model(x), y).backward()
            probe.step()
    found = probe.latest if probed else measure(model, (x, y))
    assert list(found) == ["1", "3", "5"]
    assert [layer.weight is None for layer in found.values()] == [False, True, False]
    assert (found["3"].weight_frobenius, found["3"].weight_domination) == (None, None)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_network_of_computed_weights_alone_is_measured(kit):
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(48, 4))).double()
    found = measure(model, kit.images())
    assert list(found) == ["1"]
    assert found.loss > 0


def test_a_weight_of_zeros_has_no_domination_and_is_shown(kit, tmp_path):
    model = kit.build("mlp")
    nn.init.zeros_(model[-1].weight)
    with Probe(model, tensorboard=tmp_path) as probe:
        x, y = kit.images()
        F.cross_entropy(model(x), y).backward()
        probe.step()
    layer = probe.latest["5"]
    assert (layer.weight, layer.weight_domination) == (0.0, None)
    assert layer.weight_grad > 0
    assert "5      Linear" in probe.latest.table()


class Branches(nn.Module):
    """Three layers on one input: the output of all but the last is read after another layer ran."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(*shape) for shape in ((48, 6), (48, 6), (48, 6), (6, 4)))

    def forward(self, x):
        q, k, v = (layer(x.flatten(1)) for layer in (self.q, self.k, self.v))
        return self.head((q * k).tanh() * v)


@pytest.mark.parametrize("layer", ["q", "k", "v"])
def test_a_branch_with_nan_is_named_and_not_the_one_that_ran_last(kit, layer):
    torch.manual_seed(0)
    model = Branches().double()
    with torch.no_grad():
        getattr(model, layer).weight[2, 1] = torch.nan
    assert measure(model, kit.images()).first_nonfinite["forward"] == layer
    with Probe(model) as probe:
        F.cross_entropy(model(kit.images()[0]), kit.images()[1]).backward()
        probe.step()
    assert probe.latest.first_nonfinite["forward"] == layer


class Hidden(nn.Module):
    """What comes after the second of three layers makes an infinite output a finite one."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.c, self.between = nn.Linear(48, 5), nn.Linear(5, 6), nn.Linear(6, 4), between

    def forward(self, x):
        return self.c(self.between(self.b(self.a(x.flatten(1)).tanh())).tanh())


HIDING = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "clamp": lambda h: h.clamp(-6, 6),
    "softmax": lambda h: h.softmax(1),
}


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("between", HIDING)
def test_an_infinite_output_is_named_although_the_next_function_hides_it(kit, between, probed):
    torch.manual_seed(0)
    model = Hidden(HIDING[between])
    with torch.no_grad():
        model.b.bias[2] = -torch.inf
    x, y = kit.images(dtype=torch.float32)
    found = measured(model, x, y, probed)
    assert found.first_nonfinite["forward"] == "b"
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_output_whose_sum_alone_is_infinite_is_finite(kit, dtype):
    torch.manual_seed(0)
    model = Hidden(torch.tanh).to(dtype)
    with torch.no_grad():
        model.b.bias.fill_(torch.finfo(dtype).max)
    x, y = kit.images(dtype=dtype)
    assert "forward" not in measured(model, x, y, False).first_nonfinite


def test_a_training_step_looks_at_a_large_output_once_another_shows_it(kit, monkeypatch):
    """Reading all outputs of a convolutional network once more would take longer than a step may."""
    monkeypatch.setattr(origins, "SMALL", 40)
    torch.manual_seed(0)
    model, (x, y) = Hidden(HIDING["clamp"]), kit.images(dtype=torch.float32)
    with torch.no_grad():
        model.b.bias[2] = torch.inf
    assert measured(model, x, y, True).first_nonfinite == {}
    model.between = lambda h: h.clamp(-6, 6) * torch.nan
    assert measured(model, x, y, True).first_nonfinite["forward"] == "b"


def measured(model, x, y, probed):
    if not probed:
        return measure(model, (x, y))
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    return probe.latest


def test_model_labels_under_batch_statistics_are_independent(kit):
    """The expectation by all label combinations of the batch, each with its probability."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, samples = kit.images(4)[0], 4
    h = model[1](x.flatten(1)).detach().requires_grad_()
    log_p = model[2:](h).log_softmax(1)
    expected = sum(probability * g.T @ g / samples for probability, g in kit.labellings(log_p, h))
    found = measure(model, (x, None), labels="model")["1"].output_grad.eigenvalues
    assert torch.allclose(found, torch.linalg.eigvalsh(expected).flip(0).clamp(min=0), rtol=1e-10, atol=1e-14)


def test_a_losss_own_weights_follow_it_into_float64(kit):
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]))
    model, (x, y) = kit.build("mlp").float(), kit.images()
    found = measure(model, (x.float(), y), loss=loss, certify=True)
    partial_loss = partial(F.cross_entropy, weight=loss.weight)
    again = measure(model, (x.float(), y), loss=partial_loss, certify=True)
    assert 0 < found.certificate["5"]["output_grad_lambda_max"] < 1e-4
    assert again.certificate == found.certificate
    assert loss.weight.dtype is torch.float32


def test_an_empty_batch_adds_nothing(kit):
    model, (x, y) = kit.build("conv"), kit.images()
    found, expected = measure(model, [(x, y), (x[:0], y[:0])]), measure(model, (x, y))
    assert (found.samples, found.batches, found.loss) == (expected.samples, 2, expected.loss)
    for name in expected:
        assert torch.equal(found[name].output_grad.eigenvalues, expected[name].output_grad.eigenvalues)


def test_an_unknown_layer_is_answered_by_the_closest(kit):
    model = nn.Sequential(OrderedDict(body=nn.Linear(48, 6), head=nn.Linear(6, 4))).double()
    found = measure(model, (kit.images()[0].flatten(1), kit.images()[1]))
    assert found.last is found["head"]
    with pytest.raises(KeyError, match="layer ''; measured: none"):
        _ = dataclasses.replace(found, layers={}).last
    with pytest.raises(KeyError, match="no layer 'heads'; did you mean 'head'"):
        found["heads"]
    with pytest.raises(KeyError, match="no layer 'x'; measured: body, head"):
        found["x"]


def test_large_batches_under_batch_statistics_say_that_their_expectation_is_over_random_signs(kit, monkeypatch):
    monkeypatch.setattr(label_models, "ONE_BY_ONE", 20)
    model, (x, y) = kit.build("bn_mlp"), kit.images(12)
    small, large = (measure(model, (x[:n], y[:n]), labels="model") for n in (5, 12))
    assert (small.random_signs, large.random_signs) == (False, True)
    assert "labels from the model (random signs)" in large.table()
    assert not measure(model.eval(), (x, y), labels="model").random_signs


def test_a_model_that_is_on_the_device_asked_for_is_not_copied(kit, monkeypatch):
    """ "cuda" is "cuda:0" of the parameters; "cpu:0" is "cpu"."""
    monkeypatch.setattr(measuring, "copied", lambda model: pytest.fail("copied"))
    assert measure(kit.build("mlp"), kit.images(), device="cpu:0").layers


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_losss_own_tensors_go_to_the_device_asked_for(kit, monkeypatch, wrapped):
    held = torch.ones(4).double()
    loss = partial(F.cross_entropy, weight=held) if wrapped else nn.CrossEntropyLoss(weight=held)
    seen = []
    monkeypatch.setattr(measuring, "Passes", lambda *arguments: seen.append(arguments[3]) or pytest.fail("far enough"))
    for device in ("meta", "cpu"):
        with pytest.raises(pytest.fail.Exception, match="far enough"):
            measure(kit.build("mlp"), kit.images(), loss=loss, device=device)
    weights = [found.keywords["weight"] if wrapped else found.weight for found in seen]
    assert [weight.device.type for weight in weights] == ["meta", "cpu"]
    assert weights[1] is held


class Elsewhere(nn.Module):
    """Its first parameter is on another device than its output, as of a model that is split over devices."""

    def __init__(self, x):
        super().__init__()
        self.first = nn.Parameter(torch.ones(1, device="meta"))
        self.x, self.layer = x, nn.Linear(5, 3)

    def forward(self, x):
        assert x.is_meta
        return self.layer(self.x)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [(None, "data"), (None, "model"), (nn.CrossEntropyLoss(), "sample"), (lambda h, y: F.cross_entropy(h, y), "data")],
)
def test_targets_go_where_the_output_is(loss, labels):
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    model = Elsewhere(x)
    found = measure(model, (x, y), loss=loss, labels=labels)["layer"]
    expected = measure(nn.Sequential(OrderedDict(layer=model.layer)), (x, y), labels=labels)["layer"]
    assert torch.equal(found.output_grad.eigenvalues, expected.output_grad.eigenvalues)
