"""Layers called on nothing, by keyword, or whose inputs and outputs are no plain tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, curvature, measure
from condzoo.probe.finishing import NO_GRADIENT

EMPTY = "called on empty inputs alone"


class Detector(nn.Module):
    """A head for the first few feature maps of a batch, its proposals: as many as `wanted` says, call by call."""

    def __init__(self, wanted):
        super().__init__()
        self.stem, self.head, self.classes = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 2), nn.Linear(4, 4)
        self.relu, self.wanted, self.seen = nn.ReLU(), iter(wanted), []

    def forward(self, x):
        h = self.stem(x)
        proposals = h[: next(self.wanted)]
        self.seen.append(proposals.detach())
        return self.classes(h.mean((2, 3))) + torch.arange(4.0) * self.relu(self.head(proposals)).sum() / 10


def detector(wanted):
    torch.manual_seed(0)
    return Detector(wanted)


@pytest.mark.parametrize("conv", ["channels", "patches"])
def test_a_head_without_proposals_adds_no_rows(kit, conv):
    model, batches = detector([3, 0, 2, 0]), [kit.images(6, seed, torch.float32) for seed in range(4)]
    found = measure(model, batches, conv=conv)
    maps = torch.cat(model.seen)  # of 2 x 2 pixels, one patch
    rows = kit.patch_rows(model.head, maps).flatten(1) if conv == "patches" else kit.rows_of(maps, True)
    expected = kit.eigenvalues(rows, 1, len(rows))
    assert found["head"].input.rows == len(rows)
    assert torch.allclose(found["head"].input.eigenvalues, expected, rtol=1e-5, atol=1e-6 * float(expected[0]))
    assert found["head"].output_grad.rows == 5
    assert found.neurons["relu"].rows == 5


def test_a_training_step_without_proposals_is_measured_and_says_so(kit):
    model = detector([0, 0])
    with Probe(model) as probe:
        for seed in range(2):
            x, y = kit.images(6, seed, torch.float32)
            F.cross_entropy(model(x), y).backward()
        probe.step()
    assert list(probe.latest) == ["stem", "classes"]
    assert probe.latest.skipped == {"head": EMPTY}
    assert not probe.latest.neurons


class Renamed(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden)


class Pair(nn.Linear):
    """Its product is by no function that is looked at, nor is that of the class below."""

    def forward(self, x):
        return torch.einsum("ni,oi->no", x, self.weight) + self.bias, self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return torch.einsum("ni,oi->no", x.double() / 255, self.weight) + self.bias


def nested(x):
    return torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)


CALLS = {
    "plain": (nn.Linear, lambda layer, x: layer(x)),
    "by a keyword of its own": (Renamed, lambda layer, x: layer(hidden=x)),
    "Pair whose output is a tuple": (Pair, lambda layer, x: layer(x)[0]),
    "Linear whose input is a sparse_coo tensor": (nn.Linear, lambda layer, x: layer(x.to_sparse())),
    "Linear whose input is a nested tensor": (nn.Linear, lambda layer, x: F.relu(layer(nested(x))).values()),
    "Scaled whose input is a tensor of uint8": (Scaled, lambda layer, x: layer((100 + 20 * x).to(torch.uint8))),
}


class Called(nn.Module):
    def __init__(self, how):
        super().__init__()
        kind, self.call = CALLS[how]
        torch.manual_seed(0)
        self.first, self.last = kind(48, 5), nn.Linear(5, 4)
        self.double()

    def forward(self, x):
        return self.last(self.call(self.first, x.flatten(1)))


def measurements(model, batch):
    """At rest, and of a training step."""
    with Probe(model) as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        probe.step()
    return measure(model, batch), probe.latest


def test_an_input_passed_by_a_name_of_a_subclass_is_the_input(kit):
    expected = measure(Called("plain"), kit.images())
    for found in measurements(Called("by a keyword of its own"), kit.images()):
        for side in ("input", "output_grad"):
            a, b = (getattr(c["first"], side).eigenvalues for c in (found, expected))
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("how", list(CALLS)[2:])
def test_a_layer_whose_rows_cannot_be_read_is_skipped_by_name(kit, how):
    for found in measurements(Called(how), kit.images()):
        assert list(found) == ["last"]
        skipped = {"first": f"a {how}: its rows are not seen"}
        if "nested" in how:
            skipped["relu()"] = "a ReLU whose output is a nested tensor: its units are not seen"
        assert found.skipped == skipped


@pytest.mark.parametrize("how", list(CALLS)[1:3])
def test_exact_curvature_is_that_of_the_plain_layer(kit, how):
    found, expected = (curvature(Called(h), *kit.images(), "fisher").eigenvalues for h in (how, "plain"))
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected[0])


class Cut(nn.Conv2d):
    """A layer of a slimmable network, which uses part of its weight."""

    width = 6

    def forward(self, x):
        return F.conv2d(x, self.weight[: self.width, : x.shape[1]], None, self.stride, self.padding)


class Slimmable(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Cut(3, 6, 3, padding=1), Cut(6, 4, 3), nn.Linear(4, 4)
        self.second.width = 4

    def forward(self, x):
        self.first.width = 10 - self.first.width  # 4, 6, 4, ...
        return self.head(F.gelu(self.second(F.gelu(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("conv", ["channels", "patches"])
@pytest.mark.parametrize("kappa", [True, False])
def test_a_layer_called_at_several_widths_is_skipped_with_the_reason(kit, conv, kappa):
    batches = [kit.images(6, seed, torch.float32) for seed in range(2)]
    with Probe(Slimmable(), conv=conv, kappa=kappa) as probe:
        for x, y in batches:
            F.cross_entropy(probe.model(x), y).backward()
        probe.step()
    for found in (measure(Slimmable(), batches, conv=conv, kappa=kappa), probe.latest):
        assert list(found) == ["head"]
        assert found.skipped == dict.fromkeys(
            ["first", "second"], "called at several widths, whose rows cannot be added up"
        )


class Stop(torch.autograd.Function):
    """Passes no gradient on, where others pass zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class TwoHeads(nn.Module):
    """The second head's output is of no use to the loss."""

    def __init__(self, stopped):
        super().__init__()
        torch.manual_seed(0)
        self.stopped = stopped
        self.body, self.head, self.second = nn.Linear(48, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        h = F.relu(self.body(x.flatten(1)))
        if self.stopped:
            return self.head(h) + Stop.apply(self.second(h))
        return self.head(h), self.second(h)


@pytest.mark.parametrize("weights", [True, False])
def test_an_output_without_a_gradient_under_ddp_is_skipped_with_the_reason(kit, process_group, weights):
    x, y = kit.images(6, dtype=torch.float32)
    model = nn.parallel.DistributedDataParallel(TwoHeads(stopped=False), find_unused_parameters=True)
    with Probe(model, weights=weights) as probe:
        F.cross_entropy(model(x)[0], y).backward()
        probe.step()
    assert list(probe.latest) == ["body", "head"]
    assert probe.latest.skipped == {"second": NO_GRADIENT}


def test_a_function_whose_backward_passes_none_on_is_no_error(kit):
    for found in measurements(TwoHeads(stopped=True), kit.images(6, dtype=torch.float32)):
        assert list(found) == ["body", "head"]
        assert found.skipped == {"second": NO_GRADIENT}


class Generating(nn.Module):
    """Runs a layer on weights that another makes for it, or on its own."""

    def __init__(self):
        super().__init__()
        self.make, self.inner = nn.Linear(4, 20), nn.Linear(4, 5)

    def weight(self):
        return 3 * self.make.bias.reshape(5, 4)

    def forward(self, x, own=False):
        held = {} if own else {"weight": self.weight()}
        return torch.func.functional_call(self.inner, held, (x,))


@pytest.mark.parametrize("validated", [False, True])
def test_the_norms_of_a_weight_that_is_generated_are_of_the_one_that_runs(validated):
    torch.manual_seed(0)
    model, x, y = Generating().double(), torch.randn(12, 4).double(), torch.arange(12) % 5
    weight = model.weight()
    (grad,) = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, model.inner.bias), y), weight)
    with Probe(model) as probe:
        if validated:
            with torch.no_grad():
                model(x, own=True)
        F.cross_entropy(model(x), y).backward()
        probe.step()
    found = probe.latest["inner"]
    assert found.weight == pytest.approx(float(torch.linalg.matrix_norm(weight.detach(), 2)))
    assert found.weight_grad == pytest.approx(float(torch.linalg.matrix_norm(grad, 2)))


def test_a_weight_that_runs_again_after_another_has_its_gradient_once_a_pass():
    torch.manual_seed(0)
    model, x, y = Generating().double(), torch.randn(12, 4).double(), torch.arange(12) % 5
    grads = []
    for weight in (model.inner.weight, model.weight(), model.inner.weight):
        value = F.cross_entropy(F.linear(x, weight, model.inner.bias), y)
        grads.append(torch.autograd.grad(value, weight)[0])
    with Probe(model) as probe:
        for own in (True, False, True):
            F.cross_entropy(model(x, own=own), y).backward()
        probe.step()
    found = probe.latest["inner"]
    assert found.weight == pytest.approx(float(torch.linalg.matrix_norm(model.inner.weight.detach(), 2)))
    assert found.weight_grad == pytest.approx(float(torch.linalg.matrix_norm(sum(grads) / 3, 2)))


@pytest.mark.parametrize("probed", [False, True])
def test_a_hook_of_the_users_that_changes_an_output_comes_after_the_layer(probed):
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3

    def read(between, hook):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3)).double()
        if hook is not None:
            model[0].register_forward_hook(hook)
        if not probed:
            return measure(model, (x, y))
        with Probe(model, every=1) as probe:
            F.cross_entropy(model(x), y).backward()
            probe.step()
        return probe.latest

    written = read(nn.Tanh(), None)
    for hook in (lambda m, a, h: h.tanh(), lambda m, a, h: h.tanh_()):
        hooked = read(nn.Identity(), hook)
        for name in ("0", "2"):
            a, b = hooked[name].output_grad, written[name].output_grad
            torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=0, atol=1e-14)
